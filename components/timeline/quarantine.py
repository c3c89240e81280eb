"""Which rows of a decision log cannot be used, and why."""

from __future__ import annotations

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from components.timeline.read import LINE, UNREADABLE
from contracts.job import JobSpec, Slate

REASON = "quarantine_reason"
DUPLICATE = "duplicate_step"
SMALLEST_PROBABILITY = 1e-30
"""A smaller one would make importance weights overflow."""
LARGEST = 3.4028234663852886e38
"""Of the numbers that float32 holds."""


def with_reason(log: DataFrame, spec: JobSpec) -> DataFrame:
    """Add the column `quarantine_reason`: the first thing wrong with a row by itself, null when it is fit for use.

    The reasons: `unparsable` (a line), `unreadable_<column>`, `missing_<column>` of a key, the time or the action,
    `unknown_action`, `action_not_possible`, `probability_out_of_range`, `non_finite_feature`, `non_finite_action`,
    `non_finite_metric`, `missing_possible_actions`, and of slates `slate_of_other_size`, `choice_not_on_slate`. An item
    without a number counts as missing. `duplicate_step` is told when rows are put in order.
    """
    checks: list[tuple[str, Column]] = [
        ("missing_mdp_id", F.col("mdp_id").isNull() | (F.col("mdp_id") == "")),
        ("missing_sequence_number", F.col("sequence_number").isNull()),
        ("missing_event_time", F.col("event_time").isNull()),
        *_of_action(spec),
        # Null is a log without propensities; NaN compares greater than any number in Spark. Of numbers it is a density.
        (
            "probability_out_of_range",
            ~F.col("action_probability").between(
                F.lit(SMALLEST_PROBABILITY), F.lit(1e300 if spec.action_space == "continuous" else 1.0)
            ),
        ),
        ("non_finite_feature", not_finite("state_features")),
        ("non_finite_metric", not_finite("metrics")),
    ]
    return log.withColumn(REASON, F.coalesce(of_reading(), *[F.when(check, F.lit(name)) for name, check in checks]))


def of_reading() -> Column:
    """Why a row could not be read, null where it could."""
    torn = F.when(F.col(UNREADABLE) == LINE, F.lit("unparsable"))
    return F.coalesce(torn, F.concat(F.lit("unreadable_"), UNREADABLE))


def _of_action(spec: JobSpec) -> list[tuple[str, Column]]:
    if spec.slate:
        return _slate(spec.slate)
    return _named_action(spec.actions) if spec.action_space == "discrete" else _described_action()


def _named_action(actions: list[str]) -> list[tuple[str, Column]]:
    known = F.array(*[F.lit(a) for a in actions])
    possible = F.coalesce(F.col("possible_actions"), known)
    return [
        ("missing_action", F.col("action").isNull() | (F.col("action") == "")),
        ("unknown_action", ~F.array_contains(known, F.col("action"))),
        ("action_not_possible", ~F.coalesce(F.array_contains(possible, F.col("action")), F.lit(False))),
    ]


def _comparable(action: Column) -> Column:
    """Maps are not comparable in Spark, and have no order."""
    return F.array_sort(F.map_entries(action))


def _described_action() -> list[tuple[str, Column]]:
    among = F.exists("possible_actions", lambda one: _comparable(one) == _comparable(F.col("action")))
    return [
        ("missing_action", F.col("action").isNull() | (F.size("action") == 0)),
        ("missing_possible_actions", F.exists("possible_actions", _empty)),
        ("non_finite_action", not_finite("action") | F.exists("possible_actions", not_finite)),
        ("action_not_possible", F.col("possible_actions").isNotNull() & ~F.coalesce(among, F.lit(False))),
    ]


def _slate(slate: Slate) -> list[tuple[str, Column]]:
    def not_listed(both: Column) -> Column:
        """Whether an item is shown more often than it is there to be shown."""

        def times(items: str, item: Column) -> Column:
            return F.size(F.filter(both[items], lambda other: other == item))

        return F.exists(both["shown"], lambda item: times("shown", item) > times("listed", item))

    # An array of one: what is computed for it is computed once.
    both = F.array(
        F.struct(
            F.transform("action", _comparable).alias("shown"),
            F.transform("possible_actions", _comparable).alias("listed"),
        )
    )
    choice = F.coalesce(F.col("metrics")[slate.choice], F.lit(0.0))
    return [
        ("missing_action", F.col("action").isNull() | (F.size("action") == 0) | F.exists("action", _empty)),
        ("slate_of_other_size", F.size("action") != slate.size),
        ("missing_possible_actions", F.col("possible_actions").isNull() | F.exists("possible_actions", _empty)),
        ("non_finite_action", F.exists("action", not_finite) | F.exists("possible_actions", not_finite)),
        ("action_not_possible", F.exists(both, not_listed)),
        ("choice_not_on_slate", ~choice.between(0, slate.size) | (choice != F.floor(choice))),
    ]


def _empty(item: Column) -> Column:
    return item.isNull() | (F.size(item) == 0)


def not_finite(features: str | Column) -> Column:
    """Whether a map holds NaN, or what is infinite as the float32 that training reads."""
    # NaN is greater than infinity in Spark; the extremes are found in compiled code, a lambda is interpreted.
    values = F.map_values(features)
    high, low = F.array_max(values), F.array_min(values)
    return F.coalesce((high > LARGEST) | (low < -LARGEST), F.lit(False))
