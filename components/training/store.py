"""Transitions as a learner takes them: each state held once, in memory or on disk, and batches by their rows."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from components.normalization.graph import NormalizationGraph
from components.training.algorithms.actor_critic import ActorCriticNetwork
from components.training.algorithms.learner import Batch, Listed
from components.training.batches import Shuffled
from components.training.network import Normalized, NormalizedPairs
from components.transitions import Lists, Transitions

CHUNK = 65_536
AT_ONCE = 1 << 19
"""Numbers that are gathered at once: few enough to stay in a cache, and many small batches."""
CGROUP = Path("/sys/fs/cgroup")
AHEAD = 4
"""Gathers from disk at a time, by a thread each, so that one's wait for a page is not the next one's."""


@dataclass(frozen=True)
class Offers:
    """What each of N decisions could choose among, of I different items with G normalized features."""

    described: Tensor  # float32 [I, G]
    items: Tensor  # int64, on the same device
    offsets: Tensor  # int64 [N + 1], here, where what a batch takes is known without asking the device

    def at(self, rows: Tensor) -> tuple[Listed, Tensor]:
        """The lists at the rows, int64 [B], and where each begins, int64 [B]."""
        device, first = self.items.device, self.offsets.index_select(0, rows)
        lengths = self.offsets.index_select(0, rows + 1) - first
        # By numpy: the host's own, which no test for what asks a device should take for a device's.
        total, longest = int(lengths.numpy().sum()), int(lengths.numpy().max())
        starts, lengths = sent(first, device), sent(lengths, device)
        begins = lengths.cumsum(0) - lengths
        row = torch.repeat_interleave(lengths, output_size=total)
        places = (starts - begins).index_select(0, row) + torch.arange(total, device=device)
        features = self.described.index_select(0, self.items.index_select(0, places))
        return Listed(features, row, len(rows), longest), begins


@dataclass(frozen=True)
class Store:
    """N rows over F features and A actions; the state that follows a row is that of another row."""

    state: Tensor  # float32 [N, F], normalized; or as logged, where a graph normalizes what a batch needs
    action: Tensor  # int64 [N], of described actions the place in the own list, of slates places [N, k]; of continuous
    # ones float32 [N, D] in [-1, 1]
    possible: Tensor | Offers | None  # bool [N, A]; None where all actions always are
    reward: Tensor  # float32 [N]
    next_row: Tensor  # int64 [N], here, as all that says what a batch gathers
    discount: Tensor  # float32 [N], 0 where the MDP has ended
    usable: np.ndarray  # int64, the rows that can be learned from: those whose next state is known
    graph: NormalizationGraph | None = None
    chosen: Tensor | None = None  # int64 [N], of slates

    def batch(self, rows: Tensor) -> Batch:
        """The transitions at the rows, int64 [B], here; they lie where the store does, which nothing waits for."""
        here = rows, self.next_row.index_select(0, rows)
        (at, action, possible, state), (_, next_action, next_possible, next_state) = map(self._decisions, here)
        return Batch(
            state=state,
            action=action,
            possible=possible,
            reward=self.reward.index_select(0, at),
            next_state=next_state,
            next_action=next_action,
            next_possible=next_possible,
            discount=self.discount.index_select(0, at),
            chosen=None if self.chosen is None else self.chosen.index_select(0, at),
        )

    def batches(self, shuffled: Shuffled, start: int, stop: int) -> Iterator[Batch]:
        """Those of the steps from start to stop, several gathered at a time; from disk, ahead of being asked for."""
        width = self.state.shape[1] if self.graph is None else self.graph.outputs
        possible = self.possible.shape[1] // 4 if isinstance(self.possible, Tensor) else 0
        numbers = shuffled.share * (2 * (width + possible) + 8)
        size = 1 if isinstance(self.possible, Offers) else max(1, AT_ONCE // numbers)

        def gather(rows: np.ndarray) -> list[Batch]:
            with torch.no_grad():
                return self.batch(torch.from_numpy(rows.ravel())).split(rows.shape[1])

        if self.graph is None:
            for step in range(start, stop, size):
                yield from gather(shuffled.at(step, min(size, stop - step)))
            return
        # Each computes by itself: with more threads than cores, those of the step would be slow to wake up.
        with ThreadPoolExecutor(AHEAD, initializer=torch.set_num_threads, initargs=(1,)) as readers:
            waiting: deque[Future[list[Batch]]] = deque()
            for step in range(start, stop, size):
                waiting.append(readers.submit(gather, shuffled.at(step, min(size, stop - step))))
                if len(waiting) > AHEAD:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()

    def _decisions(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | Listed | None, Tensor]:
        """Where the store lies: the rows, the logged actions, what was possible, and the states."""
        at = sent(rows, self.reward.device)
        if self.graph is None:
            state = self.state.index_select(0, at)
        else:
            state = self.graph(sent(self.state.index_select(0, rows), at.device))
        action = self.action.index_select(0, at)
        if isinstance(self.possible, Offers):
            listed, begins = self.possible.at(rows)
            return at, (begins if action.dim() == 1 else begins.unsqueeze(1)) + action, listed, state
        return at, action, None if self.possible is None else self.possible.index_select(0, at), state


def sent(values: Tensor, device: torch.device) -> Tensor:
    """The same on a device, on their way there when this returns."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def build_store(
    data: Transitions,
    policy: Normalized,
    rewards: np.ndarray,
    discounts: np.ndarray,
    steps: int = 1,
    everything: bool = False,
) -> Store:
    """Transitions over `steps` decisions each, of rewards and discounts [N], normalized as for the policy.

    They lie where the policy does. Over fewer decisions where an MDP ends before, or where what followed is not in the
    log. With `everything`, rows of which nothing more is known are usable too; never those whose action is outside of
    the policy's bounds. States that do not fit into memory stay where they are mapped.
    """
    graph = policy.normalization
    device = graph.device
    on_disk = len(data) * graph.outputs * 4 > memory_for_states(device)
    if on_disk:
        print(
            f"training: the states, {len(data):,} of {graph.outputs} numbers, do not fit into memory: they are read "
            "as they are needed, and normalized then", file=sys.stderr, flush=True,
        )  # fmt: skip
        if isinstance(data.state.base, mmap.mmap):
            # Rows come in any order: what lies beside one is not wanted.
            data.state.base.madvise(mmap.MADV_RANDOM)
    over = over_steps(rewards, discounts, data.next_row, data.terminal, data.truncated, steps)
    with torch.no_grad():
        state = torch.from_numpy(data.state) if on_disk else normalized(graph, data.state)
        possible: Tensor | Offers | None = None
        if isinstance(data.possible, Lists):
            assert isinstance(policy, NormalizedPairs)
            described = normalized(policy.of_actions, data.possible.described)
            items, offsets = (torch.from_numpy(each) for each in (data.possible.items, data.possible.offsets))
            possible = Offers(described, items.to(device), offsets)
        elif data.possible is not None and not data.possible.all():
            possible = torch.from_numpy(data.possible).to(device)
        total, next_row, discount = map(torch.from_numpy, over)
        action = torch.from_numpy(data.action).to(device)
        within = np.ones(len(data), bool)
        if isinstance(policy.network, ActorCriticNetwork):
            action = policy.network.actor.as_unit(action)
            within = (action.abs() <= 1 + 1e-6).all(1).cpu().numpy()
    usable = np.flatnonzero((~data.truncated | everything) & within)
    chosen = None if data.chosen is None else torch.from_numpy(data.chosen).to(device)
    reward, discount = total.to(device), discount.to(device)
    return Store(state, action, possible, reward, next_row, discount, usable, graph if on_disk else None, chosen)


def memory_for_states(device: torch.device) -> float:
    """Bytes that this worker may fill: half of what is free, on its GPU, or here and in this container, with others."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2 / math.ceil(local_workers() / torch.cuda.device_count())
    free = float(psutil.virtual_memory().available)
    # Of a container with a limit: "max" is none, and cached files make room when it is needed.
    with contextlib.suppress(OSError, ValueError, KeyError):
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        kinds = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(kinds["inactive_file"]))
    return free / 2 / local_workers()


def local_workers() -> int:
    """On this machine, or in this pod."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def normalized(graph: NormalizationGraph, raw: np.ndarray) -> Tensor:
    """[N, inputs] -> [N, outputs], in parts: what lies between is larger than either."""
    found = torch.empty(len(raw), graph.outputs, device=graph.device)
    for i in range(0, len(raw), CHUNK):
        found[i : i + CHUNK] = graph(torch.from_numpy(raw[i : i + CHUNK]).to(graph.device))
    return found


def over_steps(
    reward: np.ndarray,
    discount: np.ndarray,
    next_row: np.ndarray,
    terminal: np.ndarray,
    truncated: np.ndarray,
    steps: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reward, next row and discount [N] of transitions over `steps` decisions (Sutton 1988; n-step returns).

    The discount is 0 where the MDP has ended.

    A row that is truncated itself is left as it is.
    """
    total, factor, last = reward.copy(), discount.copy(), np.arange(len(reward))
    for _ in range(steps - 1):
        following = next_row[last]
        known = ~terminal[last] & ~truncated[last] & ~truncated[following]
        if not known.any():
            break
        total += np.where(known, factor * reward[following], 0)
        factor *= np.where(known, discount[following], 1)
        last = np.where(known, following, last)
    return total, next_row[last], np.where(terminal[last], np.float32(0), factor)
