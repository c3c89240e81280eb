"""The normalization spec: per feature its type, its parameters, and the evidence for them."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from contracts.job import FeatureType
from contracts.transitions import ACTION_PREFIX, STATE_PREFIX

SPECS = {STATE_PREFIX: "spec.json", ACTION_PREFIX: "action_spec.json"}
"""File of the spec of each kind of feature, by the prefix of its columns in the training data."""


def label(prefix: str, name: str) -> str:
    """A feature's name where those of the state and of the action are spoken of: the column of an action's."""
    return name if prefix == STATE_PREFIX else prefix + name


class FeatureNormalization(BaseModel):
    """How one feature is normalized. Parameters that its type does not use are at their defaults."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    name: str
    type: FeatureType
    mean: float = 0.0
    stddev: float = 1.0
    box_cox_lambda: float = 1.0
    box_cox_shift: float = 0.0
    box_cox_floor: float = 1e-12
    """The least value that is transformed, after the shift: in the feature's own unit."""
    probability_clamp: float = 1e-5
    quantiles: list[float] = []
    values: list[float] = []
    how: str
    """One sentence: why this type."""
    evidence: dict[str, float]
    """count, missing, minimum and maximum of all rows; of the sample its size, distinct values (of all rows,
    where they are few integers), mean, stddev, skewness and k2, and Box-Cox's lambda and k2; of a constant no more than
    can be told of it."""


class NormalizationSpec(BaseModel):
    """How a vector of raw features, of a state or of an action, is normalized."""

    model_config = ConfigDict(extra="forbid")
    version: int = 1
    inputs: list[str]
    """Every feature of the input vector, in its order; those not among `features` are not used."""
    features: list[FeatureNormalization]
    presence: list[str] = []
    """Those of `features` of which the network is told, by an input more, whether they are there."""
    dropped: dict[str, str] = {}
    """Features that carry nothing (constant, never present), with the reason."""

    def write(self, path: Path) -> None:
        path.write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> NormalizationSpec:
        return cls.model_validate_json(path.read_text())
