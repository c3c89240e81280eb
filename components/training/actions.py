"""What a policy chooses among."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from components.normalization.spec import NormalizationSpec


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
