"""A policy as one ONNX graph: from raw features to scores, probabilities and an action in a forward pass."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from components.export.repository import signature
from components.training.algorithms.learner import Listed, score
from components.training.algorithms.slate import SlateHead, SlateNetwork, gains
from components.training.network import IMPOSSIBLE, Head, NormalizedPairs, among
from contracts.job import PolicyHead
from contracts.stage import StageError

TOLERANCE = 1e-5
LISTED, LISTS = 8, 200
LARGEST = 1e30
"""Gain that is told: an item of hardly any worth and overwhelming appeal takes more from a slate than float32 holds."""
Inputs = dict[str, np.ndarray]


class ServedPolicy(nn.Module):
    """Scores of a network, and the policy that is served from them.

    The random number comes with the request, so that the graph is a pure function and a repeated request gets the same
    action. Actions that are not possible have probability 0.
    """

    def __init__(self, network: nn.Module, head: PolicyHead) -> None:
        super().__init__()
        self.network = network
        self.head = Head(head)

    def forward(self, state: Tensor, uniform: Tensor, possible: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """state float32 [B, F] (NaN = missing), uniform float32 [B, 1] in [0, 1), possible bool [B, A].

        Returns q_values float32 [B, A], greedy_action int64 [B, 1], propensities float32 [B, A], sampled_action
        int64 [B, 1].
        """
        return self.choose(among(self.network, state, possible), uniform, possible)

    def choose(self, q_values: Tensor, uniform: Tensor, possible: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        allowed = torch.where(possible, q_values, IMPOSSIBLE)
        propensities = self.head(q_values, possible)
        cumulative = torch.cumsum(propensities, 1)
        passed = cumulative <= uniform.clamp(max=1 - 2**-24) * cumulative[:, -1:]
        sampled = passed.to(torch.int64).sum(1, keepdim=True).clamp(max=q_values.shape[1] - 1)
        return q_values, allowed.argmax(1, keepdim=True), propensities, sampled

    def example(
        self, generator: np.random.Generator, states: np.ndarray, policy: dict[str, Any], items: np.ndarray
    ) -> Inputs:
        """Inputs for the states, everything else drawn at random: of described actions from `items`, [I, G]."""
        n, a = len(states), len(policy["actions"])
        possible = generator.random((n, a)) < 0.8
        possible[np.arange(n), generator.integers(a, size=n)] = True
        return {"state": states, "uniform": generator.random((n, 1), np.float32), "possible": possible}


class ServedActor(nn.Module):
    """A policy over numbers, which always takes the one action."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, state: Tensor) -> tuple[Tensor]:
        """state float32 [B, F] (NaN = missing) -> action float32 [B, D], in the product's units."""
        return (self.network(state),)

    def example(
        self, generator: np.random.Generator, states: np.ndarray, policy: dict[str, Any], items: np.ndarray
    ) -> Inputs:
        return {"state": states}


class ServedChoice(ServedPolicy):
    """A policy over the K described actions that one decision lists."""

    network: NormalizedPairs

    def forward(  # type: ignore[override]
        self, state: Tensor, action: Tensor, uniform: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """state float32 [1, F], action float32 [K, G], uniform float32 [1, 1] in [0, 1); NaN = missing.

        Returns q_values float32 [K], greedy_action int64 [1], propensities float32 [K], sampled_action int64 [1].
        """
        row = torch.zeros(action.shape[0], dtype=torch.int64)
        listed = Listed(self.network.of_actions(action), row, 1, action.shape[0])
        scores = score(self.network.network, self.network.normalization(state), listed).unsqueeze(0)
        found = self.choose(scores, uniform, torch.ones_like(scores, dtype=torch.bool))
        return tuple(each.squeeze(0) for each in found)  # type: ignore[return-value]

    def example(
        self, generator: np.random.Generator, states: np.ndarray, policy: dict[str, Any], items: np.ndarray
    ) -> Inputs:
        # Each once, where there are enough: which of two alike is the best, rounding decides.
        action = generator.choice(items, LISTED, replace=len(items) < LISTED)
        return {"state": states[:1], "action": action, "uniform": generator.random((1, 1), np.float32)}


class ServedSlate(nn.Module):
    """A policy over slates of k out of the K items that one decision lists."""

    def __init__(self, policy: nn.Module, head: PolicyHead) -> None:
        super().__init__()
        assert isinstance(policy, NormalizedPairs)
        assert isinstance(policy.network, SlateNetwork)
        self.normalization, self.of_actions, self.network = policy.normalization, policy.of_actions, policy.network
        self.head = SlateHead(head, policy.network.slate)

    def forward(self, state: Tensor, action: Tensor, uniform: Tensor) -> tuple[Tensor, ...]:
        """state float32 [1, F], action float32 [K, G], uniform float32 [k + 1] in [0, 1); NaN = missing. K >= k.

        Returns q_values float32 [K], of each item if it is chosen; gains float32 [K], what each adds to the slate;
        greedy_action int64 [k]; propensity float32 [1], that of sampled_action, int64 [k].
        """
        known = self.normalization(state)
        items = self.network(torch.cat([known.expand(action.shape[0], -1), self.of_actions(action)], 1))
        judged = torch.cat([items, self.network.nothing(known)]).unsqueeze(0)
        gain = gains(judged, self.head.size)
        sampled, greedy = self.head(gain, uniform.unsqueeze(0))
        shown = action.index_select(0, sampled.squeeze(0)).unsqueeze(1)
        alike = ((shown == action) | (torch.isnan(shown) & torch.isnan(action))).all(2)
        propensity = self.head.probability(gain, sampled, alike.unsqueeze(0))
        told = gain.squeeze(0).clamp(-LARGEST, LARGEST).float()
        return items[:, 0], told, greedy.squeeze(0), propensity.float(), sampled.squeeze(0)

    def example(
        self, generator: np.random.Generator, states: np.ndarray, policy: dict[str, Any], items: np.ndarray
    ) -> Inputs:
        size = self.head.size
        action = generator.choice(items, size + LISTED)
        return {"state": states[:1], "action": action, "uniform": generator.random(size + 1, np.float32)}


Served = ServedPolicy | ServedActor | ServedSlate


def served(network: nn.Module, head: PolicyHead, action_space: str) -> Served:
    match action_space:
        case "continuous":
            return ServedActor(network).eval()
        case "slate":
            return ServedSlate(network, head).eval()
    return (ServedChoice if action_space == "parametric" else ServedPolicy)(network, head).eval()


def export_onnx(made: Served, policy: dict[str, Any], path: Path) -> None:
    """Write a served policy to `path`, with a free number of rows; `policy` describes it, as its file does."""
    inputs, outputs, batched = signature(policy)
    states = np.zeros((2, len(policy["features"])), np.float32)
    items = np.zeros((1, len(policy.get("action_features", []))), np.float32)
    example = made.example(np.random.default_rng(0), states, policy, items)
    batch = torch.export.Dim("batch")
    free = {name for name, (_, dims) in inputs.items() if batched or -1 in dims}
    quiet = logging.getLogger("torch.onnx")
    quiet.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            made,
            tuple(torch.from_numpy(example[name]) for name in inputs),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=tuple({0: batch} if name in free else None for name in inputs),
            dynamo=True,
            verbose=False,
        )
        program.save(str(path))  # type: ignore[union-attr]


def check_onnx(
    made: Served,
    policy: dict[str, Any],
    path: Path,
    states: np.ndarray,
    seed: int,
    items: np.ndarray | None = None,
) -> float:
    """Compare the ONNX graph with torch on the given states and described actions; returns the largest difference.

    Differences are relative where values exceed 1. Raises `StageError` beyond 1e-5, or when actions differ in more than
    one state of a thousand, as they may where two are equally good; items of a slate that add the same are one.
    """
    inputs, outputs, batched = signature(policy)
    rng = np.random.default_rng(seed)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    # What takes one decision at a time is asked for some of them, the last ones, the extremes, among them.
    parts = [states] if batched else [states[i : i + 1] for i in range(max(0, len(states) - LISTS), len(states))]
    if items is None:
        items = rng.normal(size=(100, len(policy.get("action_features", [])))).astype(np.float32)
    asked = [made.example(rng, part, policy, items) for part in parts]
    found = _together([session.run(list(outputs), given) for given in asked], batched)
    with torch.no_grad():
        answers = [made(*(torch.from_numpy(given[name]) for name in inputs)) for given in asked]
    wanted = _together([[each.numpy() for each in answer] for answer in answers], batched)
    worst, by_name = 0.0, dict(zip(outputs, zip(found, wanted, strict=True), strict=True))

    def difference(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """By how much they differ, relative to their size."""
        size = np.abs(b)
        if name == "gains":
            # Each is a difference of values, times how much more likely it is chosen than all of the slate.
            size = np.maximum(np.abs(by_name[name][1]), np.abs(by_name["q_values"][1])).max(1, keepdims=True)
        return np.asarray(np.abs(a - b) / np.maximum(1, size))

    for name, (a, b) in by_name.items():
        if name.endswith("_action"):
            unlike = a != b
            if "gains" in outputs:
                # Items described alike add the same to a slate, but for rounding.
                gain = by_name["gains"][1]
                apart = difference("gains", *(np.take_along_axis(gain, action, 1) for action in (a, b)))
                unlike &= apart > TOLERANCE
            differing = np.flatnonzero(unlike.any(1))
            if len(differing) > 1e-3 * len(a):
                raise StageError(f"export: {name} of the ONNX graph differs from torch in {len(differing)} states")
            continue
        if name == "propensity":
            # That of what is sampled, which is compared by itself.
            same = np.equal(*by_name["sampled_action"]).all(1)
            a, b = a[same], b[same]
        if name == "propensities":
            # Those of a policy that takes the best action jump where two are equally good.
            same = a.argmax(1) == b.argmax(1)
            if (~same).sum() > 1e-3 * len(a):
                raise StageError(f"export: {name} of the ONNX graph differs from torch in {(~same).sum()} states")
            a, b = a[same], b[same]
        largest = float(difference(name, a, b).max(initial=0.0))
        if not largest <= TOLERANCE:
            raise StageError(f"export: {name} of the ONNX graph differs from torch by {largest:.2g} > {TOLERANCE}")
        worst = max(worst, largest)
    return worst


def _together(answers: list[list[np.ndarray]], batched: bool) -> list[np.ndarray]:
    """Each output with a row for each state."""
    return [np.concatenate(each) if batched else np.stack(each) for each in zip(*answers, strict=True)]
