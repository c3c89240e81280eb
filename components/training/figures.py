"""What people watch while a policy is trained: a line of JSON, TensorBoard's curves, and the progress shown."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from components.normalization.graph import NormalizationGraph
from components.training.actions import Actions
from components.training.algorithms.learner import Batch, Learner, Listed
from contracts.progress import report

LOSSES = "losses.jsonl"


class Figures:
    """Writes `losses.jsonl` and `tensorboard` below a directory.

    Per look: the mean loss since the one before, of the last batch the mean reward and score of the logged actions; and
    of a batch that stays the same, the probe: the mean distance of the logged actions' scores to their Monte-Carlo
    returns, where those are known, those scores' deviation, the largest score; the size of the gradient. With each
    epoch, how often the policy takes each action; or what it sets each number of an action to on average; or what the
    items that it takes are like on average, by their normalized features, of an enum's values how often it takes such
    ones.
    """

    def __init__(
        self, directory: Path, learner: Learner, probe: Batch, returns: Tensor, actions: Actions, first: int = 1
    ) -> None:
        """`first` is the step that training goes on with: what the board holds of it and later ones is forgotten."""
        self.learner, self.probe, self.returns, self.actions = learner, probe, returns, actions
        self.board = SummaryWriter(directory / "tensorboard", purge_step=first)
        self.losses = (directory / LOSSES).open("a", buffering=1)

    def write(self, step: int, steps: int, epoch: int, ends_epoch: bool, seen: dict[str, float]) -> None:
        self.learner.settle()
        # What follows the network stays as it is: it has no noise.
        self.learner.network.eval()
        with torch.no_grad():
            logged, best, action = self.learner.examine(self.probe)
        self.learner.network.train()
        gradients = [p.grad for p in self.learner.parameters() if p.grad is not None]
        distance = (logged - self.returns).abs().nanmean().item()
        figures = seen | {
            **({} if math.isnan(distance) else {"mc_loss": distance}),
            "q_stddev": logged.std().item(),
            "q_maximum": best.max().item(),
            "gradient_norm": torch.nn.utils.get_total_norm(gradients).item() if gradients else 0.0,
        }
        self.losses.write(json.dumps({"step": step, "epoch": epoch} | figures) + "\n")
        for name, figure in figures.items():
            self.board.add_scalar(name, figure, step)
        if ends_epoch:
            for name, mean in self._taken(action).items():
                self.board.add_scalar(f"greedy_action/{name}", mean, step)
        known = "" if math.isnan(distance) else f" mc_loss {distance:.2f}"
        report(step, steps, f"epoch {epoch} td_loss {seen['td_loss']:.3f}{known}")

    def _taken(self, action: Tensor) -> dict[str, float]:
        """The policy's actions on average, by name."""
        names, means = self.actions.names, action
        if isinstance(self.probe.possible, Listed):
            assert self.actions.described
            columns = NormalizationGraph(self.actions.described).output_columns
            names = [feature if what == "value" else f"{feature} {what}" for feature, what in columns]
            means = self.probe.possible.features.index_select(0, action.flatten())
        elif self.actions.space == "discrete":
            means = torch.nn.functional.one_hot(action, len(names)).float()
        return dict(zip(names, means.mean(0).tolist(), strict=True))

    def close(self) -> None:
        self.board.close()
        self.losses.close()


def forget_after(directory: Path, epoch: int) -> None:
    """Take the lines of later epochs from `losses.jsonl`, as well as one that was cut off."""
    losses = directory / LOSSES
    lines = losses.read_text().splitlines(keepends=True) if losses.exists() else []
    losses.write_text("".join(line for line in lines if _epoch(line) <= epoch))


def _epoch(line: str) -> float:
    try:
        return float(json.loads(line)["epoch"])
    except ValueError:
        return float("inf")
