"""What a timeline holds, in figures: the data report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from contracts.transitions import STATE_PREFIX

BINS = 30
SAMPLE_ROWS = 250_000
SKEW = 0.02
"""Of all rows in one MDP, and more than `MANY_TIMES` the mean: worth a warning."""
MANY_TIMES = 20


def describe(transitions: DataFrame, rows: int, features: list[str], metrics: list[str]) -> dict[str, Any]:
    """Ends of MDPs, histograms of lengths, metrics and propensities, action frequencies, coverage of the features.

    A histogram is {count, mean, minimum, maximum, edges [BINS + 1], counts [BINS]}; one that never varies has one bin.
    `mdps_over_days` counts the MDPs with decisions on more than one day, `largest_mdp` is the longest one, `warnings`
    says what people should look at. Where there are more than `SAMPLE_ROWS` rows, all but lengths and ends is of whole
    files with about as many, `described` in all: files hold MDPs by the hash of their ids.
    """
    days = F.to_date("event_time")
    mdps = (
        transitions.groupBy("mdp_id")
        .agg(
            F.count("*").cast("double").alias("length"),
            (F.min(days) != F.max(days)).cast("int").alias("over_days"),
            F.sum(F.col("truncated").cast("int")).alias("truncated"),
            F.sum(F.col("terminal").cast("int")).alias("terminal"),
        )
        .cache()
    )
    largest_of = F.max(F.struct("length", "mdp_id"))
    over_all = [F.count("*"), F.sum("over_days"), largest_of, F.sum("truncated"), F.sum("terminal")]
    of_mdps, _, (count, over_days, largest, truncated, terminal) = distributions(
        mdps, {"length": F.col("length")}, also=over_all
    )
    sample = transitions
    if rows > SAMPLE_ROWS:
        files = sorted(map(unquote, transitions.inputFiles()))
        reader = transitions.sparkSession.read.schema(transitions.schema)
        sample = reader.parquet(*files[: max(1, len(files) * SAMPLE_ROWS // rows)])
        if sample.isEmpty():
            sample = transitions
    values = {f"metric {name}": F.col("metrics")[name] for name in metrics}
    counts = [F.count("*"), *[F.count(F.col(f"`{STATE_PREFIX}{name}`")) for name in features]]
    named = {"action": F.col("action")} if dict(transitions.dtypes)["action"] == "string" else {}
    propensity = {"propensity": F.col("action_probability")}
    found, categories, (described, *counted) = distributions(sample, values | propensity, named, also=counts)
    return {
        "described": described,
        "truncated": truncated,
        "terminal": terminal,
        "mdps_over_days": over_days,
        "largest_mdp": {"mdp_id": largest["mdp_id"], "rows": int(largest["length"])},
        "warnings": warnings(largest, rows, count),
        "actions": dict(sorted(categories.get("action", {}).items())),
        "coverage": {name: count / described for name, count in zip(features, counted, strict=True)},
        "lengths": of_mdps["length"],
        "metrics": {name: found[f"metric {name}"] for name in metrics},
        "propensities": found["propensity"],
    }


def warnings(largest: Any, rows: int, mdps: int) -> list[str]:
    share = largest["length"] / rows
    if share < SKEW or largest["length"] < MANY_TIMES * rows / mdps:
        return []
    return [
        f"MDP {largest['mdp_id']} holds {share:.1%} of all rows, {largest['length'] * mdps / rows:,.0f} times the "
        "mean: a robot, a default id? data.maxLength leaves it out"
    ]


def distributions(
    frame: DataFrame, numbers: dict[str, Column], names: dict[str, Column] | None = None, also: Sequence[Column] = ()
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, int]], list[Any]]:
    """The histogram of each column of numbers over the rows that have it, and how often each of the names occurs.

    Two passes, whatever the number of columns; what is asked `also` of all rows comes with the first.
    """
    parts = [part for value in numbers.values() for part in (F.count(value), F.avg(value), F.min(value), F.max(value))]
    seen = list(frame.agg(*also, *parts).collect()[0])
    asked, ends = seen[: len(also)], seen[len(also) :]
    histograms: dict[str, dict[str, Any]] = {}
    places = dict(names or {})
    for name, value in numbers.items():
        (count, mean, low, high), ends = ends[:4], ends[4:]
        bins = BINS if count and high > low else 1 if count else 0
        width = (high - low) / bins if bins else 0.0
        edges = [low + width * b for b in range(bins)] + [high] if bins else []
        found = {"count": count, "mean": mean, "minimum": low, "maximum": high, "edges": edges, "counts": [0] * bins}
        histograms[name] = found
        place = F.least(F.floor((value - low) / width), F.lit(bins - 1)) if width else F.lit(0)
        places[name] = F.when(value.isNotNull(), place).cast("string")
    pairs = [F.struct(F.lit(of).alias("of"), place.alias("place")) for of, place in places.items()]
    occurs: dict[str, dict[str, int]] = {}
    for of, place, count in frame.select(F.inline(F.array(*pairs))).groupBy("of", "place").count().collect():
        if of in histograms and place is not None:
            histograms[of]["counts"][int(place)] = count
        elif of not in histograms:
            occurs.setdefault(of, {})[place] = count
    return histograms, occurs, asked
