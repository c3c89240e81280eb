"""Slates: k of N items are shown, and people choose one of them or none."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from components.training.network import QNetwork
from contracts.job import LearnerConfig

ROUNDS = 8
"""Of Dinkelbach's iteration, which rarely takes more than four."""


class SlateQ(LearnerConfig):
    """What SlateQ is learned with; a job has no slates yet, a log of them is learned from Python."""

    next_slate: Literal["best", "logged"] = Field(
        "best", description="Whose worth a target adds: that of the best slate, or of the logged one (SARSA)."
    )
    target_update_rate: float = Field(0.005, gt=0, le=1, description="Share of the new weights per target update.")


@dataclass(frozen=True)
class SlateBatch:
    """B decisions over slates of k out of N items with G features each, beside a state of F features."""

    state: Tensor  # float32 [B, F]
    items: Tensor  # float32 [B, N, G]
    slate: Tensor  # int64 [B, k], places among the items
    chosen: Tensor  # int64 [B], place in the slate; k where nothing was chosen
    reward: Tensor  # float32 [B]
    next_state: Tensor  # float32 [B, F]; any finite value where nothing follows
    next_items: Tensor  # float32 [B, N, G]
    next_slate: Tensor  # int64 [B, k], the logged one
    discount: Tensor  # float32 [B], 0 where the MDP has ended


class SlateNetwork(nn.Module):
    """What a choice is worth, and how likely it is: for each item by itself, and for choosing nothing."""

    def __init__(self, state: int, item: int, slate: int, hidden_layers: list[int]) -> None:
        super().__init__()
        self.slate = slate
        self.value, self.appeal = (QNetwork(state + item, 1, hidden_layers) for _ in range(2))
        self.nothing = QNetwork(state, 2, hidden_layers) if state else None
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, state: Tensor, items: Tensor) -> Tensor:
        """state float32 [B, F], items float32 [B, N, G] -> the best slate, int64 [B, k]."""
        return best_slate(*self.judge(state, items), self.slate)

    def judge(self, state: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Values and appeal (a logit) of each item and, last, of nothing: [B, N + 1] each."""
        shown = torch.cat([state.unsqueeze(1).expand(-1, items.shape[1], -1), items], 2)
        nothing = self.bias.expand(len(items), -1)
        if self.nothing is not None:
            nothing = nothing + self.nothing(state)
        value = torch.cat([self.value(shown.flatten(0, 1)).view(items.shape[:2]), nothing[:, :1]], 1)
        appeal = torch.cat([self.appeal(shown.flatten(0, 1)).view(items.shape[:2]), nothing[:, 1:]], 1)
        return value, appeal


def on_slate(judged: Tensor, slate: Tensor) -> Tensor:
    """Of [B, N + 1] what belongs to the slate's items and, last, to nothing: [B, k + 1]."""
    return torch.cat([judged.gather(1, slate), judged[:, -1:]], 1)


def worth(value: Tensor, appeal: Tensor, slate: Tensor) -> Tensor:
    """Of a slate, [B]: the choices' values, each as likely as its appeal makes it (equation 6 of the paper)."""
    return (torch.softmax(on_slate(appeal, slate), 1) * on_slate(value, slate)).sum(1)


def best_slate(value: Tensor, appeal: Tensor, size: int) -> Tensor:
    """The slate that is worth most, int64 [B, size].

    Its worth is a ratio of sums over its items, which Dinkelbach's iteration (1967) raises to the largest: what is
    worth more than the slate so far counts by how likely it is chosen. The paper solves the same by linear programming.
    """
    mass = torch.exp((appeal - appeal.amax(1, keepdim=True)).clamp(min=-60.0))

    def beyond(level: Tensor) -> Tensor:
        return (mass[:, :-1] * (value[:, :-1] - level.unsqueeze(1))).topk(size, dim=1).indices

    level = value[:, -1]
    for _ in range(ROUNDS - 1):
        slate = beyond(level)
        shares = on_slate(mass, slate)
        level = (shares * on_slate(value, slate)).sum(1) / shares.sum(1)
    return beyond(level)


class SlateQLearner(nn.Module):
    """SlateQ (Ie et al. 2019, arXiv 1905.12767, equations 6, 17 and 19).

    The value of what was chosen moves towards r + discount * the worth of the next slate, the best one or the logged.
    A conditional logit model of the choice is learned beside.
    """

    def __init__(self, network: SlateNetwork, config: SlateQ) -> None:
        super().__init__()
        self.network, self.config = network, config
        self.target = copy.deepcopy(network).requires_grad_(False)
        self._slow: list[Tensor] = list(self.target.parameters())
        self._fast: list[Tensor] = list(network.parameters())

    def forward(self, batch: SlateBatch) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            value, appeal = self.target.judge(batch.next_state, batch.next_items)
            following = batch.next_slate
            if self.config.next_slate == "best":
                following = best_slate(value, appeal, batch.slate.shape[1])
            wanted = batch.reward + batch.discount * worth(value, appeal, following)
        value, appeal = (on_slate(each, batch.slate) for each in self.network.judge(batch.state, batch.items))
        q = value.gather(1, batch.chosen.unsqueeze(1)).squeeze(1)
        # Squared, not Huber's: of skewed rewards, such as the time that people stay, the mean is wanted.
        loss = functional.mse_loss(q, wanted) + functional.cross_entropy(appeal, batch.chosen)
        return loss, q.detach()

    def follow(self) -> None:
        with torch.no_grad():
            torch._foreach_lerp_(self._slow, self._fast, self.config.target_update_rate)
