"""Which rows of a decision log cannot be used, and why."""

from __future__ import annotations

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from components.timeline.read import CORRUPT, UNREADABLE
from contracts.decision_log import SCHEMA
from contracts.job import REWARD

REASON = "quarantine_reason"
DUPLICATE = "duplicate_step"
SMALLEST_PROBABILITY = 1e-30
"""A smaller one would make importance weights overflow."""


REASONS = (
    "unparsable",
    *(f"unreadable_{name}" for name in (*SCHEMA.names, REWARD)),
    "missing_mdp_id",
    "missing_sequence_number",
    "missing_event_time",
    "missing_action",
    "unknown_action",
    "action_not_possible",
    "probability_out_of_range",
    "non_finite_feature",
    "non_finite_metric",
    DUPLICATE,
)


def with_reason(log: DataFrame, actions: list[str]) -> DataFrame:
    """Add the column `quarantine_reason`: the first thing wrong with a row by itself, null when it is fit for use."""
    possible = F.coalesce(F.col("possible_actions"), F.array(*[F.lit(a) for a in actions]))
    known = F.array(*[F.lit(a) for a in actions])
    checks: list[tuple[str, Column]] = [
        ("missing_mdp_id", F.col("mdp_id").isNull() | (F.col("mdp_id") == "")),
        ("missing_sequence_number", F.col("sequence_number").isNull()),
        ("missing_event_time", F.col("event_time").isNull()),
        ("missing_action", F.col("action").isNull() | (F.col("action") == "")),
        ("unknown_action", ~F.array_contains(known, F.col("action"))),
        ("action_not_possible", ~F.coalesce(F.array_contains(possible, F.col("action")), F.lit(False))),
        # Null is a log without propensities; NaN compares greater than any number in Spark.
        ("probability_out_of_range", ~F.col("action_probability").between(F.lit(SMALLEST_PROBABILITY), F.lit(1.0))),
        ("non_finite_feature", F.exists(F.map_values("state_features"), not_finite)),
        ("non_finite_metric", F.exists(F.map_values("metrics"), not_finite)),
    ]
    reason = F.coalesce(
        F.when(F.col(CORRUPT).isNotNull() & F.col(UNREADABLE).isNull(), F.lit("unparsable")),
        F.concat(F.lit("unreadable_"), UNREADABLE),
        *[F.when(check, F.lit(name)) for name, check in checks],
    )
    return log.withColumn(REASON, reason)


def not_finite(value: Column) -> Column:
    return F.isnan(value) | (F.abs(value) == float("inf"))
