"""One optimizer step per batch, and all that training needs to go on from where it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from components.training.learners import Batch, Learner


class Trainer:
    """Lowers a learner's loss by Adam (Kingma and Ba 2015).

    `distributed` calls the same learner and averages gradients over the workers.
    """

    def __init__(
        self,
        learner: Learner,
        learning_rate: float,
        distributed: Callable[[Batch], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.learner = learner
        self.call = distributed or learner
        # Fused: one pass over the weights, where a step of a small network is mostly the calls that it makes.
        self.optimizer = torch.optim.Adam(learner.network.parameters(), lr=learning_rate, fused=True)

    def step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Update the network; returns the loss and the mean score of the logged actions, both scalars."""
        loss, score = self.call(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.learner.follow()
        return loss.detach(), score

    def state_dict(self) -> dict[str, Any]:
        """Weights, those that follow them, the optimizer's state and the random numbers'."""
        return {
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
