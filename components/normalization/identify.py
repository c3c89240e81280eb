"""Find out what each feature is, after the paper's Algorithm 1 (Gauci et al. 2019, arXiv 1811.00260)."""

from __future__ import annotations

import os
import warnings
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from scipy import optimize, stats

from components.normalization.spec import SPECS, FeatureNormalization, NormalizationSpec, label
from components.spark import spark_session
from contracts.job import FeatureType, JobSpec, Normalization
from contracts.progress import report
from contracts.stage import StageError, read_record, stage
from contracts.transitions import ACTION_PREFIX, STATE_PREFIX

MOST_CLAMPED = 0.01
MOST_ENUM_VALUES = 1000
SELDOM = 0.001
"""Share of the rows of which a constant may be missing and is none the less constant."""
SAMPLE_VALUES = 20_000_000
"""Most values of a sample, over all features: it is held in memory."""
TOGETHER = 16
"""Columns that one aggregate summarizes: of many more, Spark makes code that the JVM does not compile."""
HASHES = 10**15
"""Fine enough for a sample of thousands in billions of rows."""
LARGEST = 3e38
"""A float32 holds little more."""


def identify_features(spec: JobSpec, features: str | Path, output: str | Path) -> None:
    """Write `spec.json` and, where actions have features, `action_spec.json`: each a `NormalizationSpec`.

    Spark reads every column twice: a sample for distributions and tests of normality, and all rows, some columns at a
    time, for counts and ends; and once more those of few integers of which the sample has missed some. An action's
    feature is called `action_feature_<name>` where both kinds are spoken of. Raises `StageError` when no feature of the
    state, or of described actions, is left to learn from.
    """
    record = read_record(features)
    groups = {STATE_PREFIX: record["features"], ACTION_PREFIX: record.get("action_features", [])}
    labels = {prefix + name: label(prefix, name) for prefix, group in groups.items() for name in group}
    overrides = spec.normalization.overrides
    if unknown := set(overrides) - set(labels.values()):
        raise StageError(
            f"normalization.overrides.{sorted(unknown)[0]}: no such feature; there are {', '.join(labels.values())}"
        )
    with stage("normalization", output) as (directory, facts), spark_session("normalization") as spark:
        data = spark.read.parquet(str(Path(features) / "training"))
        report(0, 3, "sample")
        sample, whole = draw(data, list(labels), spec.normalization.sample_rows, spec.seed)
        few = {} if whole else {c: v for c in labels if (v := countable(sample[c], spec.normalization)) is not None}
        summary = summarize(data, list(labels), few)
        report(2, 3, f"{len(labels)} features")

        def found(column: str) -> FeatureNormalization | str:
            name = labels[column].removeprefix(ACTION_PREFIX)
            override = overrides.get(labels[column])
            return examine(name, sample[column], summary[column], spec.normalization, override)

        with warnings.catch_warnings(), ThreadPool(len(os.sched_getaffinity(0))) as pool:
            # The tests of normality warn of samples that have no moments.
            warnings.simplefilter("ignore")
            made = dict(zip(labels, pool.map(found, labels), strict=True))
        facts |= {"types": {}, "dropped": {}}
        for prefix, group in groups.items():
            kept = [f for name in group if isinstance(f := made[prefix + name], FeatureNormalization)]
            dropped = {name: reason for name in group if isinstance(reason := made[prefix + name], str)}
            if not kept and (prefix == STATE_PREFIX or (group and spec.action_space in ("parametric", "slate"))):
                what = "the state" if prefix == STATE_PREFIX else "the actions"
                raise StageError(f"normalization: no feature of {what} carries information: {dropped}")
            holed = [f.name for f in kept if f.evidence["missing"] and f.evidence["distinct"] > 1]
            presence = holed if spec.normalization.presence else []
            if group:
                result = NormalizationSpec(inputs=group, features=kept, presence=presence, dropped=dropped)
                result.write(directory / SPECS[prefix])
            facts["types"] |= {label(prefix, f.name): f.type for f in kept}
            facts["dropped"] |= {label(prefix, name): reason for name, reason in dropped.items()}
        report(3, 3, f"{len(facts['types'])} features")


def draw(data: DataFrame, columns: list[str], rows: int, seed: int) -> tuple[dict[str, np.ndarray], bool]:
    """A sample of each column's present values, as a network will see them, and whether it is all that there is.

    It is chosen by the hash of rows' keys, and put in order, and so the same wherever Spark runs.
    """
    total = data.count()
    fraction = min(1.0, min(rows, SAMPLE_VALUES // len(columns)) / max(1, total))
    if fraction < 1:
        place = F.pmod(F.xxhash64("mdp_id", "ordinal", F.lit(seed)), F.lit(HASHES))
        data = data.where(place < int(fraction * HASHES))
    table = data.select(*[F.col(f"`{c}`") for c in columns]).toArrow()
    return {c: np.sort(as_seen(table[c].drop_null().to_numpy())) for c in columns}, fraction == 1.0


def as_seen(values: np.ndarray) -> np.ndarray:
    """float64 of what a network's float32 holds: what differs by less is one value to it, as 0 and -0 are."""
    return np.clip(values.astype(np.float64), -LARGEST, LARGEST).astype(np.float32).astype(np.float64) + 0.0


def countable(sample: np.ndarray, limits: Normalization) -> np.ndarray | None:
    """A sample's distinct values where they are few and integers, so that they are worth looking for in all rows."""
    if np.unique(sample[:1000]).size > limits.max_enum_values:
        return None
    distinct = np.unique(sample)
    few = 0 < distinct.size <= limits.max_enum_values and bool(np.all(distinct == np.round(distinct)))
    return distinct if few else None


def summarize(data: DataFrame, columns: list[str], few: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Of all rows: how many have a feature and how many miss it, its ends; of `few` how many have other values."""
    result: dict[str, dict[str, Any]] = {}
    seldom: list[str] = []
    for start in range(0, len(columns), TOGETHER):
        report(1 + start / len(columns), 3, "all rows")
        group = columns[start : start + TOGETHER]
        parts = [F.count(F.lit(1))]
        for column in group:
            value = F.col(f"`{column}`")
            other = ~value.cast("float").isin(few[column].tolist()) if column in few else F.lit(False)
            parts += [F.count(value), F.min(value), F.max(value), F.count_if(other)]
        rows, *found = data.agg(*parts).collect()[0]
        for i, column in enumerate(group):
            count, low, high, others = found[4 * i : 4 * i + 4]
            result[column] = {"count": count, "missing": rows - count, "minimum": low, "maximum": high}
            seldom += [column] if others else []
    # Values that the sample missed are few, if there are any: only then are they counted.
    for start in range(0, len(seldom), TOGETHER):
        group = seldom[start : start + TOGETHER]
        distinct = data.agg(*[F.approx_count_distinct(F.col(f"`{c}`"), 0.01) for c in group]).collect()[0]
        for column, n in zip(group, distinct, strict=True):
            result[column]["distinct"] = max(n, few[column].size + 1)
    return result


def examine(
    name: str, sample: np.ndarray, summary: dict[str, Any], limits: Normalization, override: FeatureType | None
) -> FeatureNormalization | str:
    """A feature's normalization, or why it is of no use."""
    evidence = {"count": float(summary["count"]), "missing": float(summary["missing"])}
    if summary["minimum"] is None:
        return "never present"
    low, high = as_seen(np.array([summary["minimum"], summary["maximum"]])).tolist()
    if reason := carries_nothing(evidence, low, high, limits, override):
        return reason
    if low == high:
        evidence |= {"minimum": low, "maximum": high, "distinct": 1.0, "mean": low, "stddev": 0.0}
        how = f"always {low:g} where it is there: what tells is whether it is"
        return FeatureNormalization(name=name, type="binary", how=how, evidence=evidence)
    if sample.size == 0 or np.ptp(sample) == 0:
        # Its other values are rarer than the sample shows: the ends of all rows are two of them.
        sample = np.append(sample, [low, high])
    evidence |= {"minimum": low, "maximum": high, "sample": float(sample.size)}
    evidence["distinct"] = float(summary.get("distinct", np.unique(sample).size))
    return identify(name, sample, evidence, limits, override)


def carries_nothing(
    evidence: dict[str, float], low: float, high: float, limits: Normalization, override: str | None
) -> str:
    """Why a feature is of no use, or nothing; `low` and `high` are of all rows."""
    missing = evidence["missing"] / (evidence["missing"] + evidence["count"])
    # Whether one that is not 0 is there may tell something, unless it nearly always is.
    if low == high and (low == 0 or missing < SELDOM):
        return f"constant at {low:g}"
    if missing > limits.max_missing_fraction and not override:
        return f"missing in {missing:.4%} of the rows"
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
    floor = float(1e-6 * np.ptp(values))
    shift = floor - float(values.min())
    lam, transformed = box_cox(values, shift)
    k2_box_cox = normality(transformed)
    evidence |= {"box_cox_lambda": lam, "box_cox_k2": k2_box_cox}
    low, high = evidence["minimum"], evidence["maximum"]
    in_unit = low >= 0 and high <= 1
    near = limits.probability_clamp
    logits = stats.logistic.ppf(np.clip(values, near, 1 - near))
    if override:
        type_, how = override, "set by hand"
    elif in_unit and count <= 2 and set(distinct) <= {0.0, 1.0}:
        type_, how = "binary", "only 0 and 1 occur"
    elif count <= limits.max_enum_values and np.all(distinct == np.round(distinct)):
        type_, how = "enum", f"{count:g} distinct integers"
    elif in_unit and np.ptp(logits) > 1e-3 and clamped(values, near) < MOST_CLAMPED:
        type_, how = "probability", "all values lie in [0, 1]"
    elif k2 < limits.normality_bound:
        type_, how = "continuous", f"K^2 {k2:.4g} is under {limits.normality_bound:g}"
    elif abs(lam - 1) > limits.box_cox_lambda_margin and k2_box_cox * limits.box_cox_gain <= k2:
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
            "box_cox_floor": floor,
        }
    elif type_ == "quantile":
        levels = np.linspace(0, 1, limits.quantiles + 1)
        parameters = {"quantiles": np.unique(np.quantile(values, levels)).tolist()}
    elif type_ == "enum":
        if distinct.size > MOST_ENUM_VALUES:
            raise StageError(
                f"normalization.overrides.{name}: {distinct.size:,} distinct values are too many for an enum, which is "
                f"an input for each; {MOST_ENUM_VALUES} at most"
            )
        parameters = {"values": distinct.tolist()}
    elif type_ == "probability":
        parameters = {"mean": float(logits.mean()), "stddev": float(logits.std()) or 1.0, "probability_clamp": near}
    return FeatureNormalization.model_validate(
        {"name": name, "type": type_, "how": how, "evidence": evidence, **parameters}
    )


def clamped(values: np.ndarray, near: float) -> float:
    """The share of values that a probability's clamp would make one with 0 or with 1."""
    return float((((values > 0) & (values < near)) | ((values < 1) & (values > 1 - near))).mean())


def normality(values: np.ndarray) -> float:
    """D'Agostino and Pearson's K^2 (1973): small for a normal sample; infinite when it cannot be had."""
    if values.size < 20:
        return 0.0
    with np.errstate(all="ignore"):
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
