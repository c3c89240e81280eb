"""The normalization spec: per feature its type, its parameters, and the evidence for them."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from contracts.job import FeatureType


class FeatureNormalization(BaseModel):
    """How one feature is normalized. Parameters that its type does not use are at their defaults."""

    model_config = ConfigDict(extra="forbid")
    name: str
    type: FeatureType
    mean: float = 0.0
    stddev: float = 1.0
    box_cox_lambda: float = 1.0
    box_cox_shift: float = 0.0
    quantiles: list[float] = []
    values: list[float] = []
    how: str
    """One sentence: why this type."""
    evidence: dict[str, float]
    """count, missing, distinct, minimum and maximum of all rows; mean, stddev, skewness, k2 of the sample, and
    Box-Cox's lambda and k2."""


class NormalizationSpec(BaseModel):
    """How a policy's input, a vector of raw state features, is normalized."""

    model_config = ConfigDict(extra="forbid")
    version: int = 1
    inputs: list[str]
    """Every feature of the input vector, in its order; those not among `features` are not used."""
    features: list[FeatureNormalization]
    dropped: dict[str, str] = {}
    """Features that carry nothing (constant, never present), with the reason."""

    def write(self, path: Path) -> None:
        path.write_text(self.model_dump_json(indent=2))

    @classmethod
    def read(cls, path: Path) -> NormalizationSpec:
        return cls.model_validate_json(path.read_text())
