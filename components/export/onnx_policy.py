"""A policy as one ONNX graph: from raw features to scores, probabilities and an action in a forward pass."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from components.training.network import IMPOSSIBLE, Head
from contracts.job import PolicyHead
from contracts.stage import StageError

INPUTS = ("state", "uniform", "possible")
OUTPUTS = ("q_values", "greedy_action", "propensities", "sampled_action")
TOLERANCE = 1e-5


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
        q_values = self.network(state)
        allowed = torch.where(possible, q_values, IMPOSSIBLE)
        propensities = self.head(q_values, possible)
        cumulative = torch.cumsum(propensities, 1)
        passed = cumulative <= uniform.clamp(max=1 - 2**-24) * cumulative[:, -1:]
        sampled = passed.to(torch.int64).sum(1, keepdim=True).clamp(max=q_values.shape[1] - 1)
        return q_values, allowed.argmax(1, keepdim=True), propensities, sampled


def export_onnx(network: nn.Module, head: PolicyHead, features: int, actions: int, path: Path) -> ServedPolicy:
    """Write the served policy of a network to `path` with a free batch size; returns it for checking."""
    policy = ServedPolicy(network, head).eval()
    example = (torch.zeros(2, features), torch.full((2, 1), 0.5), torch.ones(2, actions, dtype=torch.bool))
    batch = torch.export.Dim("batch")
    quiet = logging.getLogger("torch.onnx")
    quiet.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            policy,
            example,
            input_names=list(INPUTS),
            output_names=list(OUTPUTS),
            dynamic_shapes=tuple({0: batch} for _ in INPUTS),
            dynamo=True,
            verbose=False,
        )
        program.save(str(path))  # type: ignore[union-attr]
    return policy


def check_onnx(policy: ServedPolicy, path: Path, state: np.ndarray, actions: int, seed: int) -> float:
    """Compare the ONNX graph with torch on the given states; returns the largest difference.

    Differences are relative where values exceed 1. Raises `StageError` beyond 1e-5, or when actions differ in more than
    one state of a thousand, as they may where two are equally good.
    """
    rng = np.random.default_rng(seed)
    uniform = rng.random((len(state), 1), np.float32)
    possible = rng.random((len(state), actions)) < 0.8
    possible[np.arange(len(state)), rng.integers(actions, size=len(state))] = True
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(list(OUTPUTS), {"state": state, "uniform": uniform, "possible": possible})
    with torch.no_grad():
        wanted = [t.numpy() for t in policy(*map(torch.from_numpy, (state, uniform, possible)))]
    worst = 0.0
    for name, a, b in zip(OUTPUTS, found, wanted, strict=True):
        if name.endswith("_action"):
            differing = np.flatnonzero((a != b).any(1))
            if len(differing) > 1e-3 * len(state):
                raise StageError(f"export: {name} of the ONNX graph differs from torch in {len(differing)} states")
            continue
        if name == "propensities":
            # Those of a policy that takes the best action jump where two are equally good.
            same = a.argmax(1) == b.argmax(1)
            if (~same).sum() > 1e-3 * len(state):
                raise StageError(f"export: {name} of the ONNX graph differs from torch in {(~same).sum()} states")
            a, b = a[same], b[same]
        difference = float((np.abs(a - b) / np.maximum(1, np.abs(b))).max())
        if not difference <= TOLERANCE:
            raise StageError(f"export: {name} of the ONNX graph differs from torch by {difference:.2g} > {TOLERANCE}")
        worst = max(worst, difference)
    return worst
