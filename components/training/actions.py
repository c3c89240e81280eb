"""What a policy chooses among."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from components.normalization.spec import SPECS, NormalizationSpec
from components.transitions import Transitions
from contracts.job import JobSpec
from contracts.stage import StageError
from contracts.transitions import ACTION_PREFIX


@dataclass(frozen=True)
class Actions:
    """Names; or numbers, each between bounds; or whatever is listed, described by features, one item or a slate."""

    names: list[str]
    """Of discrete actions; of continuous ones each number's. Empty where actions are described."""
    bounds: list[tuple[float, float]] | None = None
    """Of each number of a continuous action, in the product's units."""
    described: NormalizationSpec | None = None
    """How the features of described actions are normalized."""
    slate: int | None = None
    """Items of a slate, where an action is one."""

    @property
    def space(self) -> str:
        """`discrete`, `continuous`, `parametric` or `slate`, as in the job."""
        if self.bounds is not None:
            return "continuous"
        return "slate" if self.slate else "parametric" if self.described else "discrete"

    def as_json(self) -> dict[str, Any]:
        """All that decides what an action is."""
        found: dict[str, Any] = {"actions": self.names}
        if self.bounds is not None:
            found["bounds"] = self.bounds
        if self.described:
            found["action_features"] = self.described.inputs
        if self.slate:
            found["slate"] = self.slate
        return found


def find_actions(data: Transitions, spec: JobSpec, normalization_dir: Path, warn: Callable[[str], None]) -> Actions:
    """What there is to choose among; raises `StageError` where bounds are missing or not those of the log's numbers."""
    if spec.action_space == "discrete":
        return Actions(list(spec.actions))
    if spec.action_space in ("parametric", "slate"):
        described = NormalizationSpec.read(normalization_dir / SPECS[ACTION_PREFIX])
        return Actions([], described=described, slate=spec.slate.size if spec.slate else None)
    if unknown := set(spec.action_bounds) - set(data.actions):
        raise StageError(f"actionBounds.{min(unknown)}: the log's actions have {', '.join(data.actions)}")
    bounds = []
    for i, name in enumerate(data.actions):
        given = spec.action_bounds.get(name)
        low, high = (given.low, given.high) if given else (float(v(data.action[:, i])) for v in (np.min, np.max))
        if low == high:
            raise StageError(f"action: {name} is {low:g} in all decisions: set actionBounds.{name}, or leave it out")
        if outside := int(((data.action[:, i] < low) | (data.action[:, i] > high)).sum()):
            warn(f"actionBounds.{name}: {outside:,} logged values lie outside, and are not learned from")
        bounds.append((low, high))
    return Actions(data.actions, bounds)
