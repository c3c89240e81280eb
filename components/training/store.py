"""Transitions as a learner takes them: tensors of which each state is held once, and batches by their rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from components.training.learners import Batch
from components.transitions import Transitions
from contracts.job import Reward

CHUNK = 65_536


@dataclass(frozen=True)
class Store:
    """N rows over F features and A actions; the state that follows a row is that of another row."""

    state: Tensor  # float32 [N, F], normalized: once, not in each step that sees it
    action: Tensor  # int64 [N]
    possible: Tensor | None  # bool [N, A]; None where all actions always are
    reward: Tensor  # float32 [N]
    next_row: Tensor  # int64 [N]
    terminal: Tensor  # bool [N]
    discount: Tensor  # float32 [N]
    usable: np.ndarray  # int64, the rows that can be learned from: those whose next state is known

    def batch(self, rows: Tensor) -> Batch:
        """The transitions at the rows, int64 [B]."""
        following = self.next_row.index_select(0, rows)
        return Batch(
            state=self.state.index_select(0, rows),
            action=self.action.index_select(0, rows),
            possible=None if self.possible is None else self.possible.index_select(0, rows),
            reward=self.reward.index_select(0, rows),
            next_state=self.state.index_select(0, following),
            next_action=self.action.index_select(0, following),
            next_possible=None if self.possible is None else self.possible.index_select(0, following),
            terminal=self.terminal.index_select(0, rows),
            discount=self.discount.index_select(0, rows),
        )


def build_store(
    data: Transitions, normalization: nn.Module, reward: Reward, steps: int = 1, everything: bool = False
) -> Store:
    """Transitions over `steps` decisions each, of the reward that the job weighs; over fewer where an MDP ends before,
    or where what followed is not in the log. With `everything`, rows of which nothing more is known are usable too."""
    rewards = data.reward(reward.metric_weights)
    over = over_steps(rewards, data.discount(reward), data.next_row, data.terminal, data.truncated, steps)
    with torch.no_grad():
        parts = [normalization(torch.from_numpy(data.state[i : i + CHUNK])) for i in range(0, len(data), CHUNK)]
    possible = None if data.possible.all() else torch.from_numpy(data.possible)
    action, total, next_row, terminal, discount = map(torch.from_numpy, (data.action, *over))
    usable = np.flatnonzero(~data.truncated | everything)
    return Store(torch.cat(parts), action, possible, total, next_row, terminal, discount, usable)


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
