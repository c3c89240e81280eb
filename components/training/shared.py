"""What belongs to a whole batch, of which several workers see a share of the rows each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class _Share:
    first: int
    end: int
    rows: int
    lists: bool


_own: _Share | None = None


def share(first: int, end: int, rows: int, lists: bool = False) -> None:
    """Say which of a batch's rows this process sees; with `lists`, all that those list."""
    global _own
    _own = _Share(first, end, rows, lists)


def place(rows: int) -> tuple[int, int]:
    """Where in the batch the rows of this process, so many, begin, and how many all have."""
    return (0, rows) if _own is None else (_own.first, _own.rows)


def normal(rows: int, size: int, like: Tensor) -> Tensor:
    """Standard normal numbers on `like`'s device, float32 [rows, size]: for a row the same on any number of workers.

    Each worker draws for the whole batch. Lists are of any length, so that each draws for its own, by a seed that all
    draw: what comes next is the same for all again.
    """
    if _own is None:
        return torch.randn((rows, size), device=like.device)
    if _own.lists:
        seed = int(torch.randint(2**62, ())) + _own.first
        generator = torch.Generator(like.device).manual_seed(seed)
        return torch.randn((rows, size), generator=generator, device=like.device)
    return torch.randn((_own.rows, size), device=like.device)[_own.first : _own.end]


def mean(values: Tensor) -> Tensor:
    """Over all rows of the batch, of which `values`, [rows], are this worker's; a scalar that no gradient goes through.

    All workers must ask.
    """
    if _own is None or _own.end - _own.first == _own.rows:
        return values.detach().mean()
    part = values.detach().sum() / _own.rows
    dist.all_reduce(part)
    return part
