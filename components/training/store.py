"""Transitions as a learner takes them: tensors of which each state is held once, and batches by their rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from components.training.algorithms.actor_critic import ActorCriticNetwork
from components.training.algorithms.learner import Batch, Listed
from components.training.network import Normalized, NormalizedPairs
from components.transitions import Lists, Transitions

CHUNK = 65_536


@dataclass(frozen=True)
class Offers:
    """What each of N decisions could choose among, of K different actions with G normalized features."""

    described: Tensor  # float32 [K, G]
    offsets: Tensor  # int64 [N + 1]
    items: Tensor  # int64

    def at(self, rows: Tensor) -> tuple[Listed, Tensor]:
        """The lists at the rows, int64 [B], and where each begins, int64 [B]."""
        starts = self.offsets.index_select(0, rows)
        lengths = self.offsets.index_select(0, rows + 1) - starts
        ends = lengths.cumsum(0)
        begins = ends - lengths
        row = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), lengths)
        places = (starts - begins).index_select(0, row) + torch.arange(len(row), device=rows.device)
        features = self.described.index_select(0, self.items.index_select(0, places))
        return Listed(features, row, len(rows)), begins


@dataclass(frozen=True)
class Store:
    """N rows over F features and A actions; the state that follows a row is that of another row."""

    state: Tensor  # float32 [N, F], normalized: once, not in each step that sees it
    action: Tensor  # int64 [N], of described actions the place in the own list; of continuous ones [N, D] in [-1, 1]
    possible: Tensor | Offers | None  # bool [N, A]; None where all actions always are
    reward: Tensor  # float32 [N]
    next_row: Tensor  # int64 [N]
    terminal: Tensor  # bool [N]
    discount: Tensor  # float32 [N]
    usable: np.ndarray  # int64, the rows that can be learned from: those whose next state is known

    def batch(self, rows: Tensor) -> Batch:
        """The transitions at the rows, int64 [B]."""
        following = self.next_row.index_select(0, rows)
        action, possible = self._choice(rows)
        next_action, next_possible = self._choice(following)
        return Batch(
            state=self.state.index_select(0, rows),
            action=action,
            possible=possible,
            reward=self.reward.index_select(0, rows),
            next_state=self.state.index_select(0, following),
            next_action=next_action,
            next_possible=next_possible,
            terminal=self.terminal.index_select(0, rows),
            discount=self.discount.index_select(0, rows),
        )

    def _choice(self, rows: Tensor) -> tuple[Tensor, Tensor | Listed | None]:
        action = self.action.index_select(0, rows)
        if isinstance(self.possible, Offers):
            listed, begins = self.possible.at(rows)
            return begins + action, listed
        return action, None if self.possible is None else self.possible.index_select(0, rows)


def build_store(
    data: Transitions,
    policy: Normalized,
    rewards: np.ndarray,
    discounts: np.ndarray,
    steps: int = 1,
    everything: bool = False,
) -> Store:
    """Transitions over `steps` decisions each, of rewards and discounts [N], normalized as for the policy.

    Over fewer where an MDP ends before, or where what followed is not in the log. With `everything`, rows of which
    nothing more is known are usable too; never those whose action is outside of the policy's bounds.
    """
    over = over_steps(rewards, discounts, data.next_row, data.terminal, data.truncated, steps)
    with torch.no_grad():
        state = normalized(policy.normalization, data.state)
        possible: Tensor | Offers | None = None
        if isinstance(data.possible, Lists):
            assert isinstance(policy, NormalizedPairs)
            described = normalized(policy.of_actions, data.possible.described)
            possible = Offers(described, *map(torch.from_numpy, (data.possible.offsets, data.possible.items)))
        elif data.possible is not None and not data.possible.all():
            possible = torch.from_numpy(data.possible)
        action, total, next_row, terminal, discount = map(torch.from_numpy, (data.action, *over))
        within = np.ones(len(data), bool)
        if isinstance(policy.network, ActorCriticNetwork):
            action = policy.network.actor.as_unit(action)
            within = (action.abs() <= 1 + 1e-6).all(1).numpy()
    usable = np.flatnonzero((~data.truncated | everything) & within)
    return Store(state, action, possible, total, next_row, terminal, discount, usable)


def normalized(graph: nn.Module, raw: np.ndarray) -> Tensor:
    """[N, inputs] -> [N, outputs], in parts: what lies between is larger than either."""
    parts = [graph(torch.from_numpy(raw[i : i + CHUNK])) for i in range(0, len(raw), CHUNK)]
    return torch.cat(parts) if parts else torch.zeros((0, 0))


def over_steps(
    reward: np.ndarray,
    discount: np.ndarray,
    next_row: np.ndarray,
    terminal: np.ndarray,
    truncated: np.ndarray,
    steps: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Reward, next row, terminal and discount [N] of transitions over `steps` decisions (Sutton 1988; n-step returns).

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
    return total, next_row[last], terminal[last], factor
