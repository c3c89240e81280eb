"""Discounted sums of the metrics to come, in one pass over each MDP from its end to its beginning."""

from __future__ import annotations

import math

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql.window import WindowSpec

LARGEST_EXPONENT = 600.0
"""Of e, in a weight whose sums and quotients a double still holds."""


def backwards(*within: str) -> WindowSpec:
    """Each MDP's rows from its end to its beginning: only over preceding rows is a sum to the end linear."""
    return Window.partitionBy("mdp_id", *within).orderBy(F.desc("sequence_number"))


def so_far(*within: str) -> WindowSpec:
    return backwards(*within).rowsBetween(Window.unboundedPreceding, 0)


def sums_in_one(longest: float, discount: float) -> bool:
    """Whether the returns of an MDP that lasts so long, in units of the discount, can be summed in one go."""
    return not discount or longest * -math.log(discount) <= LARGEST_EXPONENT


def add_returns(
    rows: DataFrame,
    logged: dict[str, Column],
    discount: float,
    elapsed: Column,
    longest: float,
    along: dict[str, Column],
) -> DataFrame:
    """Add `returns`: per metric the sum over k >= t of discount^(elapsed_t - elapsed_k) m_k, to the MDP's last row.

    `logged` is each metric of a row, null for nothing. `elapsed` is what lies between a row and its MDP's end, in units
    of the discount, and `longest` the most of it. Columns taken `along` cost no pass of their own. `_elapsed` is left
    for `add_returns_over`: the same in powers of e.
    """
    metrics, values = list(logged), [F.coalesce(value, F.lit(0.0)) for value in logged.values()]
    rate = -math.log(discount) if discount else 0.0
    rows = rows.withColumn("_elapsed", elapsed * rate)
    if not discount:
        return rows.withColumns(along | {"returns": _by_name(metrics, values)})
    if sums_in_one(longest, discount):
        # In units of the MDP's last row: going backwards the weight only grows, and what lies far ahead fades.
        weight = F.exp("_elapsed")
        sums = [F.sum(value * weight).over(so_far()) / weight for value in values]
        return rows.withColumns(along | {"returns": _by_name(metrics, sums)})
    # Over more than that no double holds the weights: sum within blocks, and add to each row what the block after its
    # own came to. What comes later still is worth nothing.
    block = F.floor(F.col("_elapsed") / LARGEST_EXPONENT)
    weight = F.exp(F.col("_elapsed") - F.col("_block") * LARGEST_EXPONENT)
    rows = rows.withColumn("_block", block)
    rows = rows.withColumns(
        along
        | {
            "_inside": F.array(*[F.sum(value * weight).over(so_far("_block")) / weight for value in values]),
            "_block_ends": F.lead("_block").over(backwards()) != F.col("_block"),
        }
    )
    ended = F.when(F.col("_block_ends"), F.struct("_elapsed", "_inside"))
    before = backwards().rowsBetween(Window.unboundedPreceding, -1)
    rows = rows.withColumn("_after", F.last(ended, ignorenulls=True).over(before))
    fade = F.exp(F.col("_after._elapsed") - F.col("_elapsed"))
    sums = [
        F.col("_inside")[i] + F.coalesce(fade * F.col("_after._inside")[i], F.lit(0.0)) for i in range(len(metrics))
    ]
    return rows.withColumn("returns", _by_name(metrics, sums)).drop("_block", "_inside", "_block_ends", "_after")


def add_returns_over(rows: DataFrame, n: int, metrics: list[str], discount: float, cut: Column) -> DataFrame:
    """Add `returns_<n>`: the same sum over n decisions, or to the MDP's end; null where it is `cut` before."""
    # The sum to the end less what it holds from n decisions on.
    later = F.lag(F.struct("_elapsed", "returns"), n).over(backwards())
    last_cut = F.max(F.when(cut, F.col("step"))).over(so_far())
    rows = rows.withColumns({"_later": later, "_cut_at": last_cut})
    fade = F.exp(F.col("_later._elapsed") - F.col("_elapsed")) if discount else F.lit(0.0)
    sums = [F.col("returns")[m] - F.coalesce(fade * F.col("_later.returns")[m], F.lit(0.0)) for m in metrics]
    known = F.col("_cut_at").isNull() | (F.col("_cut_at") <= F.col("step") - (n - 1))
    return rows.withColumn(f"returns_{n}", F.when(known, _by_name(metrics, sums))).drop("_later", "_cut_at")


def _by_name(metrics: list[str], values: list[Column]) -> Column:
    pairs = [part for name, value in zip(metrics, values, strict=True) for part in (F.lit(name), value)]
    return F.create_map(*pairs).cast("map<string,double>")
