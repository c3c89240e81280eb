"""What a timeline holds, in figures: the data report."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

from pyspark.sql import Column, DataFrame, Row
from pyspark.sql import functions as F

from contracts.transitions import STATE_PREFIX

BINS = 30
ENDS = ("truncated", "terminal")
SAMPLE_ROWS = 250_000
SKEW = 0.02
"""Of all rows in one MDP, and more than `MANY_TIMES` the mean: worth a warning."""
MANY_TIMES = 20


def mdps_by_length(transitions: DataFrame) -> list[Row]:
    """For each length that MDPs have, in order: how many `mdps`, and of those how many `over_days`, of `truncated` and
    `terminal` decisions, and the last of their ids.

    A list that is short: MDPs of n lengths have n^2 / 2 decisions at least.
    """
    days = F.to_date("event_time")
    of_mdp = transitions.groupBy("mdp_id").agg(
        F.count("*").alias("length"),
        (F.min(days) != F.max(days)).cast("int").alias("over_days"),
        *[F.sum(F.col(name).cast("int")).alias(name) for name in ENDS],
    )
    sums = [F.sum(name).alias(name) for name in ("over_days", *ENDS)]
    by_length = of_mdp.groupBy("length").agg(F.count("*").alias("mdps"), F.max("mdp_id").alias("last_id"), *sums)
    return sorted(by_length.collect(), key=lambda row: row["length"])


def describe(transitions: DataFrame, by_length: list[Row], features: list[str], metrics: list[str]) -> dict[str, Any]:
    """Ends of MDPs, histograms of lengths, metrics and propensities, action frequencies, coverage of the features.

    A histogram is {count, mean, minimum, maximum, edges [BINS + 1], counts [BINS]}; one that never varies has one bin.
    `mdps_over_days` counts the MDPs with decisions on more than one day, `largest_mdp` is the longest one, `warnings`
    says what people should look at. Where there are more than `SAMPLE_ROWS` rows, all but lengths and ends is of whole
    files with about as many, `described` in all: files hold MDPs by the hash of their ids.
    """
    rows = sum(row["length"] * row["mdps"] for row in by_length)
    longest = by_length[-1]
    samples = [transitions]
    if rows > SAMPLE_ROWS:
        files = sorted(map(unquote, transitions.inputFiles()))
        reader = transitions.sparkSession.read.schema(transitions.schema)
        samples.insert(0, reader.parquet(*files[: max(1, len(files) * SAMPLE_ROWS // rows)]))
    values = {f"metric {name}": F.col("metrics")[name] for name in metrics}
    counts = [F.count("*"), *[F.count(F.col(f"`{STATE_PREFIX}{name}`")) for name in features]]
    named = {"action": F.col("action")} if dict(transitions.dtypes)["action"] == "string" else {}
    propensity = {"propensity": F.col("action_probability")}
    looks = (distributions(sample, values | propensity, named, also=counts) for sample in samples)
    # A file may be empty.
    found, categories, (described, *counted) = next(look for look in looks if look[2][0])
    lengths = of_lengths(by_length)
    return {
        "described": described,
        **{name: sum(row[name] for row in by_length) for name in ENDS},
        "mdps_over_days": sum(row["over_days"] for row in by_length),
        "largest_mdp": {"mdp_id": longest["last_id"], "rows": longest["length"]},
        "warnings": warnings(longest["last_id"], longest["length"], rows, lengths["count"]),
        "actions": dict(sorted(categories.get("action", {}).items())),
        "coverage": {name: count / described for name, count in zip(features, counted, strict=True)},
        "lengths": lengths,
        "metrics": {name: found[f"metric {name}"] for name in metrics},
        "propensities": found["propensity"],
    }


def of_lengths(by_length: list[Row]) -> dict[str, Any]:
    """Their histogram."""
    mdps = sum(row["mdps"] for row in by_length)
    mean = sum(row["length"] * row["mdps"] for row in by_length) / mdps
    found = _histogram(mdps, mean, float(by_length[0]["length"]), float(by_length[-1]["length"]))
    edges, counts = found["edges"], found["counts"]
    for row in by_length:
        counts[bisect.bisect(edges, row["length"], hi=len(counts)) - 1] += row["mdps"]
    return found


def warnings(largest: str, length: int, rows: int, mdps: int) -> list[str]:
    if length / rows < SKEW or length < MANY_TIMES * rows / mdps:
        return []
    return [
        f"MDP {largest} holds {length / rows:.1%} of all rows, {length * mdps / rows:,.0f} times the mean: a robot, a "
        "default id? data.maxLength leaves it out"
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
        histograms[name] = found = _histogram(count, mean, low, high)
        bins = len(found["counts"])
        width = (high - low) / bins if bins else 0.0
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


def _histogram(count: int, mean: float | None, low: float | None, high: float | None) -> dict[str, Any]:
    """One whose bins are empty still."""
    edges: list[float] = []
    if low is not None and high is not None:
        bins = BINS if high > low else 1
        edges = [low + (high - low) / bins * b for b in range(bins)] + [high]
    bins = max(0, len(edges) - 1)
    return {"count": count, "mean": mean, "minimum": low, "maximum": high, "edges": edges, "counts": [0] * bins}
