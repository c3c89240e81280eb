"""The normalization of an environment's states by their moments, as a job's own would find for most of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from components.normalization.spec import FeatureNormalization, NormalizationSpec


def standardized(state: np.ndarray, names: Sequence[str]) -> NormalizationSpec:
    """Of states [N, F] that were seen."""
    moments = zip(names, state.mean(0).tolist(), state.std(0).tolist(), strict=True)
    features = [
        FeatureNormalization(name=name, type="continuous", mean=mean, stddev=stddev, how="by its moments", evidence={})
        for name, mean, stddev in moments
    ]
    return NormalizationSpec(inputs=list(names), features=features)
