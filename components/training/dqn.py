"""Deep Q-learning from logged transitions."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from contracts.job import DQN


@dataclass(frozen=True)
class Batch:
    """B transitions."""

    state: Tensor  # float32 [B, F]
    action: Tensor  # int64 [B]
    reward: Tensor  # float32 [B]
    next_state: Tensor  # float32 [B, F]; any value where terminal
    next_possible: Tensor  # bool [B, A]
    terminal: Tensor  # bool [B]
    discount: Tensor  # float32 [B], what a value at the next state counts for


class DQNTrainer:
    """One optimizer step of (double) deep Q-learning per call.

    The target is r + discount * Q'(s', argmax_a Q(s', a)) with the slowly following network Q' and, when double, the
    action chosen by Q (van Hasselt et al. 2016, arXiv 1509.06461, equation 4), else by Q'. Actions that are not
    possible at s' are never chosen. The loss is Huber's.
    """

    def __init__(self, network: nn.Module, config: DQN, distributed: nn.Module | None = None) -> None:
        self.network = network
        self.forward = distributed or network  # the same network, its gradients averaged over the workers
        self.target = copy.deepcopy(network).requires_grad_(False)
        self.config = config
        self.optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate)

    def step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Update the network; returns the TD loss and the mean Q-value of the logged actions, both scalars."""
        with torch.no_grad():
            next_target = self.target(batch.next_state)
            chooser = self.network(batch.next_state) if self.config.double else next_target
            choice = chooser.masked_fill(~batch.next_possible, -torch.inf).argmax(1, keepdim=True)
            following = next_target.gather(1, choice).squeeze(1)
            wanted = batch.reward + batch.discount * torch.where(batch.terminal, 0.0, following)
        q = self.forward(batch.state).gather(1, batch.action.unsqueeze(1)).squeeze(1)
        loss = functional.smooth_l1_loss(q, wanted)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.network.parameters(), strict=True):
                slow.lerp_(fast, self.config.target_update_rate)
        return loss.detach(), q.detach().mean()
