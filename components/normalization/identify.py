"""Find out what each feature is, after the paper's Algorithm 1 (Gauci et al. 2019, arXiv 1811.00260)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from scipy import optimize, stats

from components.normalization.spec import SPECS, FeatureNormalization, NormalizationSpec
from components.spark import spark_session
from contracts.job import FeatureType, JobSpec, Normalization
from contracts.progress import report
from contracts.stage import StageError, read_record, stage
from contracts.transitions import ACTION_PREFIX, STATE_PREFIX

PROBABILITY_CLAMP = 1e-5
SAMPLE_VALUES = 50_000_000
"""Most values of a sample, over all features: it is held in memory."""


def identify_features(spec: JobSpec, features: str | Path, output: str | Path) -> None:
    """Write `spec.json` and, where actions have features, `action_spec.json`: each a `NormalizationSpec`.

    Spark reads the training data twice, whatever the number of features: a sample for distributions and tests of
    normality, and all rows for counts and ends. Raises `StageError` when no feature is left to learn from.
    """
    record = read_record(features)
    groups = {STATE_PREFIX: record["features"], ACTION_PREFIX: record.get("action_features", [])}
    names = {prefix + name: name for prefix, group in groups.items() for name in group}
    overrides = spec.normalization.overrides
    if unknown := set(overrides) - set(names.values()):
        raise StageError(
            f"normalization.overrides.{sorted(unknown)[0]}: no such feature; there are {', '.join(names.values())}"
        )
    with stage("normalization", output) as (directory, facts), spark_session("normalization") as spark:
        data = spark.read.parquet(str(Path(features) / "training")).select(*[F.col(f"`{c}`") for c in names])
        report(0, 3, "sample")
        sample, whole = draw(data, spec.normalization.sample_rows, spec.seed)
        candidates = {} if whole else {c for c in names if looks_countable(sample[c], spec.normalization)}
        report(1, 3, "all rows")
        summary = summarize(data, list(names), candidates)
        report(2, 3, f"{len(names)} features")
        with ThreadPool(os.cpu_count()) as pool:
            found = dict(
                zip(
                    names,
                    pool.map(
                        lambda c: examine(names[c], sample[c], summary[c], spec.normalization, overrides.get(names[c])),
                        names,
                    ),
                    strict=True,
                )
            )
        for prefix, group in groups.items():
            if not group:
                continue
            made = {name: found[prefix + name] for name in group}
            kept = [f for f in made.values() if isinstance(f, FeatureNormalization)]
            dropped = {name: reason for name, reason in made.items() if isinstance(reason, str)}
            if not kept:
                raise StageError(f"normalization: no feature carries information: {dropped}")
            presence = [f.name for f in kept if f.evidence["missing"]] if spec.normalization.presence else []
            result = NormalizationSpec(inputs=group, features=kept, presence=presence, dropped=dropped)
            result.write(directory / SPECS[prefix])
            facts.setdefault("types", {}).update({f.name: f.type for f in kept})
            facts.setdefault("dropped", {}).update(dropped)
        report(3, 3, f"{len(facts['types'])} features")


def draw(data: DataFrame, rows: int, seed: int) -> tuple[dict[str, np.ndarray], bool]:
    """A sample of each column's present values, float64, and whether it is all that there is."""
    total = data.count()
    fraction = min(1.0, min(rows, SAMPLE_VALUES // len(data.columns)) / max(1, total))
    table = (data if fraction == 1.0 else data.sample(fraction=fraction, seed=seed)).toArrow()
    return {c: table[c].drop_null().to_numpy().astype(np.float64) for c in data.columns}, fraction == 1.0


def looks_countable(sample: np.ndarray, limits: Normalization) -> bool:
    """Whether a feature's sample has so few values, all integers, that it is worth counting them in all rows."""
    return np.unique(sample[:1000]).size <= limits.max_enum_values and np.unique(sample).size <= limits.max_enum_values


def summarize(data: DataFrame, columns: list[str], candidates: Collection[str]) -> dict[str, dict[str, Any]]:
    """Of all rows: how many there are, present and missing, their ends, and of candidates the distinct values."""
    parts = [F.count(F.lit(1))]
    for column in columns:
        value = F.col(f"`{column}`")
        parts += [F.count(value), F.min(value), F.max(value)]
    parts += [F.approx_count_distinct(F.col(f"`{column}`")) for column in candidates]
    rows, *found = data.agg(*parts).collect()[0]
    distinct = dict(zip(candidates, found[3 * len(columns) :], strict=True))
    result = {}
    for i, column in enumerate(columns):
        count, low, high = found[3 * i : 3 * i + 3]
        result[column] = {"count": count, "missing": rows - count, "minimum": low, "maximum": high}
        if column in distinct:
            result[column]["distinct"] = distinct[column]
    return result


def examine(
    name: str, sample: np.ndarray, summary: dict[str, Any], limits: Normalization, override: FeatureType | None
) -> FeatureNormalization | str:
    """A feature's normalization, or why it is of no use."""
    low, high = summary["minimum"], summary["maximum"]
    evidence = {"distinct": float(np.unique(sample).size)} | {k: float(v) for k, v in summary.items() if v is not None}
    if reason := carries_nothing(sample, evidence, low, high, limits, override):
        return reason
    return identify(name, sample, evidence | {"sample": float(sample.size)}, limits, override)


def carries_nothing(
    sample: np.ndarray,
    evidence: dict[str, float],
    low: float | None,
    high: float | None,
    limits: Normalization,
    override: str | None,
) -> str:
    """Why a feature is of no use, or nothing; `low` and `high` are of all rows, `sample` holds present values alone."""
    if low is None or high is None:
        return "never present"
    if low == high:
        return f"constant at {low:g}"
    missing = evidence["missing"] / (evidence["missing"] + evidence["count"])
    if missing > limits.max_missing_fraction and not override:
        return f"missing in {missing:.4%} of the rows"
    if sample.size == 0 or np.ptp(sample) == 0:
        return f"varies in none of the {sample.size:,} rows of the sample that have it; raise normalization.sampleRows"
    return ""


def identify(
    name: str, values: np.ndarray, evidence: dict[str, float], limits: Normalization, override: str | None = None
) -> FeatureNormalization:
    """One feature's type and parameters from a sample of its present values, shape [n], not all equal.

    `evidence` is kept in the result, with what the sample shows added.
    """
    distinct = np.unique(values)
    # What the sample does not show, the count over all rows may.
    count = max(distinct.size, evidence.get("distinct", 0))
    k2 = normality(values)
    evidence = {"minimum": float(values.min()), "maximum": float(values.max())} | evidence
    evidence |= {
        "mean": float(values.mean()),
        "stddev": float(values.std()),
        "skewness": float(stats.skew(values)),
        "k2": k2,
    }
    shift = float(1e-6 * np.ptp(values) - values.min())
    lam, transformed = box_cox(values, shift)
    k2_box_cox = normality(transformed)
    evidence |= {"box_cox_lambda": lam, "box_cox_k2": k2_box_cox}
    logits = stats.logistic.ppf(np.clip(values, PROBABILITY_CLAMP, 1 - PROBABILITY_CLAMP))
    if override:
        type_, how = override, "set by hand"
    elif distinct.size <= 2 and set(distinct) <= {0.0, 1.0}:
        type_, how = "binary", "only 0 and 1 occur"
    elif count <= limits.max_enum_values and np.all(distinct == np.round(distinct)):
        type_, how = "enum", f"{distinct.size} distinct integers"
    elif values.min() >= 0 and values.max() <= 1 and np.ptp(logits) > 1e-3:
        type_, how = "probability", "all values lie in [0, 1]"
    elif k2 < limits.normality_bound:
        type_, how = "continuous", f"K^2 {k2:.4g} is under {limits.normality_bound:g}"
    elif not 0.9 <= lam <= 1.1 and k2_box_cox * limits.box_cox_gain <= k2:
        type_, how = "box_cox", f"Box-Cox with lambda {lam:.3g} lowers K^2 from {k2:.4g} to {k2_box_cox:.4g}"
    else:
        type_, how = "quantile", f"K^2 {k2:.4g} is not under {limits.normality_bound:g}, and Box-Cox does not help"
    parameters: dict[str, object] = {}
    if type_ == "continuous":
        parameters = {"mean": float(values.mean()), "stddev": float(values.std())}
    elif type_ == "box_cox":
        parameters = {
            "mean": float(transformed.mean()),
            "stddev": float(transformed.std()),
            "box_cox_lambda": lam,
            "box_cox_shift": shift,
        }
    elif type_ == "quantile":
        levels = np.linspace(0, 1, limits.quantiles + 1)
        parameters = {"quantiles": np.unique(np.quantile(values, levels)).tolist()}
    elif type_ == "enum":
        parameters = {"values": distinct.tolist()}
    elif type_ == "probability":
        parameters = {"mean": float(logits.mean()), "stddev": float(logits.std()) or 1.0}
    return FeatureNormalization.model_validate(
        {"name": name, "type": type_, "how": how, "evidence": evidence, **parameters}
    )


def normality(values: np.ndarray) -> float:
    """D'Agostino and Pearson's K^2 (1973): small for a normal sample; infinite when it cannot be had."""
    if values.size < 20:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        k2 = float(stats.normaltest(values).statistic)
    return k2 if np.isfinite(k2) else 1e300


def box_cox(values: np.ndarray, shift: float) -> tuple[float, np.ndarray]:
    """The maximum-likelihood lambda in [-2, 2] (Box and Cox 1964) of `values + shift`, and the transformed values."""
    log = np.log(values + shift)
    mean = float(log.mean())

    def loss(lam: float) -> float:
        with np.errstate(over="ignore", invalid="ignore"):
            variance = float(np.var(_power(log, lam)))
        return 0.5 * np.log(variance) - (lam - 1) * mean if 0 < variance < np.inf else 1e300

    lam = float(optimize.minimize_scalar(loss, bounds=(-2.0, 2.0), method="bounded", options={"xatol": 1e-3}).x)
    return lam, _power(log, lam)


def _power(log: np.ndarray, lam: float) -> np.ndarray:
    """Box and Cox's transform of exp(log)."""
    return log if abs(lam) < 1e-8 else np.expm1(lam * log) / lam
