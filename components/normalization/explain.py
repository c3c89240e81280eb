"""Why a feature has its type, and what normalization makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import torch

from components.normalization.graph import NormalizationGraph
from components.normalization.identify import as_seen
from components.normalization.spec import SPECS, NormalizationSpec, label
from contracts.stage import StageError, read_record

ROWS = 100_000
BINS = 24


def explain(features: str | Path, normalization: str | Path, asked: str) -> dict[str, Any]:
    """What is known of a feature: {name, type, how, evidence, before, after}, or {name, dropped} for one of no use.

    `before` and `after` are histograms, {edges [BINS + 1], counts [BINS]}, of its first present values; an enum has
    {values, counts} after, the last count that of other values. Raises `StageError` for a feature that is not there.
    """
    read_record(normalization)
    files = {prefix: Path(normalization) / file for prefix, file in SPECS.items()}
    specs = {prefix: NormalizationSpec.read(file) for prefix, file in files.items() if file.exists()}
    there = {label(prefix, n): (prefix, n) for prefix, spec in specs.items() for n in (*spec.inputs, *spec.dropped)}
    if asked not in there:
        raise StageError(f"normalization: no feature {asked!r}; there are {', '.join(there)}")
    prefix, name = there[asked]
    spec = specs[prefix]
    if name in spec.dropped:
        return {"name": name, "dropped": spec.dropped[name]}
    feature = next(f for f in spec.features if f.name == name)
    data = ds.dataset(Path(features) / "training", format="parquet")
    column = prefix + name
    present = data.head(ROWS, columns=[column], filter=ds.field(column).is_valid())
    values = as_seen(present[column].to_numpy()).astype(np.float32)
    graph = NormalizationGraph(NormalizationSpec(inputs=[name], features=[feature]))
    with torch.no_grad():
        after = graph(torch.from_numpy(values)[:, None]).numpy()
    described: dict[str, Any]
    if feature.type == "enum":
        described = {"values": feature.values, "counts": after.sum(0).astype(int).tolist()}
    else:
        described = _histogram(after[:, 0])
    return {
        "name": name,
        "type": feature.type,
        "how": feature.how,
        "evidence": feature.evidence,
        "before": _histogram(values),
        "after": described,
    }


def _histogram(values: np.ndarray) -> dict[str, list[float]]:
    counts, edges = np.histogram(values.astype(np.float64), BINS)
    return {"edges": edges.tolist(), "counts": counts.tolist()}
