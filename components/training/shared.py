"""What belongs to a whole batch, of which several workers see a share of the rows each."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_own: tuple[slice, int] | None = None


def share(first: int, end: int, rows: int) -> None:
    """Say which of a batch's rows this process sees."""
    global _own
    _own = slice(first, end), rows


def normal(rows: int, size: int, like: Tensor) -> Tensor:
    """Standard normal numbers on `like`'s device, float32 [rows, size]: for a row the same on any number of workers.

    Each worker draws for the whole batch. Where there are not as many rows as it sees of it, as with lists of any
    length, it draws for them alone.
    """
    own, whole = _own or (slice(0, rows), rows)
    if own.stop - own.start != rows:
        own, whole = slice(0, rows), rows
    return torch.randn((whole, size), device=like.device)[own]


def mean(values: Tensor) -> Tensor:
    """Over all rows of the batch, of which `values`, [rows], are this worker's; a scalar that no gradient goes through.

    All workers must ask.
    """
    if _own is None or _own[1] == len(values):
        return values.detach().mean()
    part = values.detach().sum() / _own[1]
    dist.all_reduce(part)
    return part
