"""What a timeline holds, in figures: the data report."""

from __future__ import annotations

from typing import Any

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

BINS = 30
COVERAGE_ROWS = 200_000


def describe(transitions: DataFrame) -> dict[str, Any]:
    """Ends of MDPs, histograms of lengths, metrics and propensities, action frequencies, coverage of the features.

    A histogram is {count, mean, minimum, maximum, edges [BINS + 1], counts [BINS]}; one that never varies has one bin.
    `mdps_over_days` counts the MDPs with decisions on more than one day, `largest_mdp` is the longest one. Coverage is
    of a sample of the rows when there are many.
    """
    mdps = (
        transitions.groupBy("mdp_id")
        .agg(
            F.count("*").cast("double").alias("length"),
            (F.min(F.to_date("event_time")) != F.max(F.to_date("event_time"))).cast("int").alias("over_days"),
        )
        .cache()
    )
    totals = mdps.agg(F.sum("over_days"), F.max(F.struct("length", "mdp_id"))).collect()[0]
    rows, truncated, terminal, names = transitions.agg(
        F.count("*"),
        F.sum(F.col("truncated").cast("int")),
        F.sum(F.col("terminal").cast("int")),
        F.array_distinct(F.flatten(F.collect_set(F.map_keys("metrics")))),
    ).collect()[0]
    metrics = sorted(names)
    sample = transitions.sample(fraction=COVERAGE_ROWS / rows, seed=0) if rows > COVERAGE_ROWS else transitions
    present = sample.select(F.explode("state_features")).where(F.col("value").isNotNull())
    coverage = present.groupBy("key").count().orderBy("key").collect()
    sampled = sample.count()
    actions = transitions.groupBy("action").count().orderBy("action").collect()
    values = {f"metric {name}": F.col("metrics")[name] for name in metrics}
    found = histograms(transitions, values | {"propensity": F.col("action_probability")})
    return {
        "truncated": truncated,
        "terminal": terminal,
        "mdps_over_days": totals[0],
        "largest_mdp": {"mdp_id": totals[1]["mdp_id"], "rows": int(totals[1]["length"])},
        "actions": {row["action"]: row["count"] for row in actions},
        "coverage": {row["key"]: row["count"] / sampled for row in coverage},
        "lengths": histograms(mdps, {"length": F.col("length")})["length"],
        "metrics": {name: found[f"metric {name}"] for name in metrics},
        "propensities": found["propensity"],
    }


def histograms(frame: DataFrame, values: dict[str, Column]) -> dict[str, dict[str, Any]]:
    """The distribution of each column over the rows that have it: two passes, whatever the number of columns."""
    ends = frame.agg(
        *[part for value in values.values() for part in (F.count(value), F.avg(value), F.min(value), F.max(value))]
    ).collect()[0]
    result, counts = {}, []
    for i, (name, value) in enumerate(values.items()):
        count, mean, low, high = ends[4 * i : 4 * i + 4]
        bins = BINS if count and high > low else 1 if count else 0
        width = (high - low) / bins if bins else 0.0
        edges = [low + width * b for b in range(bins)] + [high] if bins else []
        result[name] = {"count": count, "mean": mean, "minimum": low, "maximum": high, "edges": edges}
        place = F.least(F.floor((value - low) / width), F.lit(bins - 1)) if width else F.lit(0)
        counts += [F.sum((value.isNotNull() & (place == b)).cast("long")) for b in range(bins)]
    heights = list(frame.agg(*counts).collect()[0]) if counts else []
    for found in result.values():
        bins = max(len(found["edges"]) - 1, 0)
        found["counts"], heights = heights[:bins], heights[bins:]
    return result
