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


class Look:
    """What was seen after a step, on its way from the device."""

    def __init__(self, step: int, epoch: int, names: list[str], values: Tensor) -> None:
        self.step, self.epoch, self._names = step, epoch, names
        self._values = values.to("cpu", non_blocking=True)
        self._sent = torch.Event(values.device) if values.is_cuda else None
        if self._sent:
            self._sent.record()

    def is_here(self) -> bool:
        return self._sent is None or self._sent.query()

    def read(self) -> dict[str, float]:
        """By name; waits for what is not here."""
        if self._sent:
            self._sent.synchronize()
        return dict(zip(self._names, self._values.tolist(), strict=True))


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

    def look(self, step: int, epoch: int, ends_epoch: bool, seen: dict[str, Tensor]) -> Look:
        """Take what there is to see after a step; nothing waits for it."""
        self.learner.settle()
        # What follows the network stays as it is: it has no noise.
        self.learner.network.eval()
        with torch.no_grad():
            logged, best, action = self.learner.examine(self.probe)
        self.learner.network.train()
        gradients = [p.grad for p in self.learner.parameters() if p.grad is not None]
        figures = seen | {
            "mc_loss": (logged - self.returns).abs().nanmean(),
            "q_stddev": logged.std(correction=0),
            "q_maximum": best.max(),
            "gradient_norm": torch.nn.utils.get_total_norm(gradients) if gradients else best.new_zeros(()),
        }
        names = list(figures)
        values = torch.stack([value.float() for value in figures.values()])
        if ends_epoch:
            taken, means = self._taken(action)
            names += [f"greedy_action/{name}" for name in taken]
            values = torch.cat([values, means.float()])
        return Look(step, epoch, names, values)

    def write(self, look: Look, steps: int) -> None:
        """Write down a look at one of so many steps."""
        # Of what is probed no return may be known.
        seen = {name: value for name, value in look.read().items() if name != "mc_loss" or not math.isnan(value)}
        for name, value in seen.items():
            self.board.add_scalar(name, value, look.step)
        figures = {name: value for name, value in seen.items() if not name.startswith("greedy_action/")}
        self.losses.write(json.dumps({"step": look.step, "epoch": look.epoch} | figures) + "\n")
        known = f" mc_loss {seen['mc_loss']:.2f}" if "mc_loss" in seen else ""
        report(look.step, steps, f"epoch {look.epoch} td_loss {seen['td_loss']:.3f}{known}")

    def _taken(self, action: Tensor) -> tuple[list[str], Tensor]:
        """The policy's actions on average, and what each number is called."""
        names, means = self.actions.names, action
        if isinstance(self.probe.possible, Listed):
            assert self.actions.described
            columns = NormalizationGraph(self.actions.described).output_columns
            names = [feature if what == "value" else f"{feature} {what}" for feature, what in columns]
            means = self.probe.possible.features.index_select(0, action.flatten())
        elif self.actions.space == "discrete":
            means = torch.nn.functional.one_hot(action, len(names)).float()
        return names, means.mean(0)

    def close(self) -> None:
        self.board.close()
        self.losses.close()


def forget_after(directory: Path, step: int) -> None:
    """Take the lines of later steps from `losses.jsonl`, as well as one that was cut off."""
    losses = directory / LOSSES
    lines = losses.read_text().splitlines(keepends=True) if losses.exists() else []
    losses.write_text("".join(line for line in lines if _step(line) <= step))


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return float("inf")
