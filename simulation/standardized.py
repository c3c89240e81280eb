"""The normalization of an environment's states by their moments, as a job's own would find for most of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from components.normalization.spec import FeatureNormalization, NormalizationSpec


def standardized(names: Sequence[str], mean: np.ndarray, stddev: np.ndarray) -> NormalizationSpec:
    """Of features with these moments, [F] each."""
    features = [
        FeatureNormalization(name=name, type="continuous", mean=m, stddev=d, how="by its moments", evidence={})
        for name, m, d in zip(names, mean.tolist(), stddev.tolist(), strict=True)
    ]
    return NormalizationSpec(inputs=list(names), features=features)
