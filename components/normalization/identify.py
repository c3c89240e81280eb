"""Find out what each feature is, after the paper's Algorithm 1 (Gauci et al. 2019, arXiv 1811.00260)."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from pyspark.sql import functions as F
from scipy import stats

from components.normalization.spec import FeatureNormalization, NormalizationSpec
from components.spark import spark_session
from contracts.job import JobSpec, Normalization
from contracts.progress import report
from contracts.stage import StageError, read_record, stage

PROBABILITY_CLAMP = 1e-5


def identify_features(spec: JobSpec, features: str | Path, output: str | Path) -> None:
    """Write `spec.json`, a `NormalizationSpec`, found from the features stage's training data.

    Spark counts and summarizes every feature in one pass, and draws one sample for the tests of normality.
    Raises `StageError` when no feature is left to learn from.
    """
    names: list[str] = read_record(features)["features"]
    with stage("normalization", output) as (directory, facts), spark_session("normalization") as spark:
        data = spark.read.parquet(str(Path(features) / "training")).select(
            *[F.col(f"state_{n}").alias(n) for n in names]
        )
        report(0, 2, "summary statistics")
        summary = data.agg(
            F.count("*").alias("rows"),
            *[F.count(F.col(n)).alias(f"count {n}") for n in names],
            *[F.approx_count_distinct(n).alias(f"distinct {n}") for n in names],
            *[F.min(n).alias(f"minimum {n}") for n in names],
            *[F.max(n).alias(f"maximum {n}") for n in names],
        ).collect()[0]
        fraction = min(1.0, spec.normalization.sample_rows / max(1, summary["rows"]))
        report(1, 2, "sample")
        sample = data if fraction == 1.0 else data.sample(fraction=fraction, seed=spec.seed)
        columns = sample.toArrow()
        found: list[FeatureNormalization] = []
        dropped: dict[str, str] = {}
        for name in names:
            values = columns[name].drop_null().to_numpy().astype(np.float64)
            # Spark's count of distinct values is an estimate: where the sample is all there is, its own is exact.
            distinct = summary[f"distinct {name}"] if fraction < 1 else np.unique(values).size
            evidence = {
                "count": float(summary[f"count {name}"]),
                "missing": float(summary["rows"] - summary[f"count {name}"]),
                "distinct": float(distinct),
            }
            low, high = summary[f"minimum {name}"], summary[f"maximum {name}"]
            override = spec.normalization.overrides.get(name)
            if reason := carries_nothing(values, evidence, low, high, spec.normalization, override):
                dropped[name] = reason
                continue
            evidence |= {"minimum": float(low), "maximum": float(high)}
            found.append(identify(name, values, evidence, spec.normalization, override))
        if unknown := set(spec.normalization.overrides) - set(names):
            raise StageError(
                f"normalization.overrides.{sorted(unknown)[0]}: no such feature; there are {', '.join(names)}"
            )
        if not found:
            raise StageError(f"normalization: no feature carries information: {dropped}")
        NormalizationSpec(inputs=names, features=found, dropped=dropped).write(directory / "spec.json")
        facts |= {"types": {f.name: f.type for f in found}, "dropped": dropped}
        report(2, 2, f"{len(found)} features")


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
    positive = values + shift
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lam = float(np.clip(stats.boxcox_normmax(positive, method="mle"), -2.0, 2.0))
    return lam, stats.boxcox(positive, lmbda=lam)
