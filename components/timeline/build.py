"""Transitions from a decision log: each decision with what followed it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from components.spark import spark_session
from components.timeline.quarantine import REASON, with_reason
from components.timeline.read import CORRUPT, UNREADABLE, read_log, read_outcomes
from contracts.job import JobSpec
from contracts.progress import report
from contracts.stage import StageError, stage


def build_timeline(spec: JobSpec, decision_log: str, outcomes: str | None, output: str | Path) -> None:
    """Write `transitions/` and `quarantine/` (Parquet) to `output`; every row in lands in exactly one of them.

    Transitions hold the log's columns and, per row: `ordinal` (1-based place in its MDP, rejected rows counted),
    `time_diff` (to the next decision, in units of sequence_number), `next_action`, `possible_next_actions`, `terminal`
    (the MDP ended here), `truncated` (the MDP went on, but what followed is not in the log), and `returns` (per metric,
    the discounted sum from here to the MDP's last logged step). Rows are sorted by MDP and ordinal; an MDP is never
    split over two files, so that the next state of a row is the next row's state. Raises `StageError` when the log is
    missing, empty, or rejected beyond `data.maxQuarantineFraction`.
    """
    with stage("timeline", output) as (directory, facts), spark_session("timeline") as spark:
        report(0, 3, "reading the log")
        log = read_log(spark, decision_log, spec.data)
        if outcomes:
            log, facts["outcomes"] = join_outcomes(spark, log, outcomes)
        checked = with_reason(log, spec.actions).cache()
        reasons = {r[REASON]: r["count"] for r in checked.groupBy(REASON).count().collect()}
        rows_in, rows_out = sum(reasons.values()), reasons.pop(None, 0)
        quarantined = rows_in - rows_out
        facts |= {"rows_in": rows_in, "rows_out": rows_out, "rows_quarantined": quarantined, "reasons": reasons}
        if rows_in == 0:
            raise StageError(f"data.decisionLog {decision_log}: the log is empty; check the path and the time window")
        rejected = checked.where(F.col(REASON).isNotNull())
        if quarantined > spec.data.max_quarantine_fraction * rows_in:
            raise StageError(_too_many(rejected, facts, spec, decision_log))
        report(1, 3, f"{rows_in:,} rows")
        rejected.write.parquet(str(directory / "quarantine"))
        transitions = add_what_followed(checked, spec)
        transitions.write.parquet(str(directory / "transitions"))
        report(2, 3, "reconciling")
        written = spark.read.parquet(str(directory / "transitions"))
        kept = written.count()
        set_aside = spark.read.parquet(str(directory / "quarantine")).count()
        if kept != rows_out or set_aside != quarantined:
            raise StageError(
                f"timeline: {rows_in} rows in, but {kept} out and {set_aside} quarantined; the log changed while it "
                "was read: run again on a log that is not being written"
            )
        facts |= describe(written)
        report(3, 3, f"{facts['mdps']:,} MDPs")


def join_outcomes(spark: SparkSession, log: DataFrame, path: str) -> tuple[DataFrame, dict[str, int]]:
    """Add to each decision the metrics that were reported for it later, and whether its MDP was said to have `ended`.

    Of a metric reported twice the later report counts. Also returns how many reports there were, and how many of them
    could not be parsed or match no decision.
    """
    outcomes = read_outcomes(spark, path).cache()
    readable = outcomes.where(F.col(CORRUPT).isNull())
    keys = log.select("mdp_id", "sequence_number").distinct()
    reports = outcomes.count()
    counts = {
        "reports": reports,
        "unparsable": reports - readable.count(),
        "unmatched": readable.join(keys, ["mdp_id", "sequence_number"], "left_anti").count(),
    }
    per_metric = readable.select(
        "mdp_id", "sequence_number", "event_time", "truncated", "ended", F.explode_outer("metrics")
    )
    per_metric = per_metric.groupBy("mdp_id", "sequence_number", "key").agg(
        F.max(F.struct("event_time", "value"))["value"].alias("value"),
        F.max("truncated").alias("truncated"),
        F.max("ended").alias("ended"),
    )
    reported = per_metric.groupBy("mdp_id", "sequence_number").agg(
        F.map_from_entries(F.collect_list(F.when(F.col("key").isNotNull(), F.struct("key", "value")))).alias(
            "_metrics"
        ),
        F.max("truncated").alias("_truncated"),
        F.max("ended").alias("ended"),
    )
    joined = log.join(reported, ["mdp_id", "sequence_number"], "left")
    # What the log had already is overwritten by what was reported later.
    kept = F.map_filter(
        F.coalesce("metrics", F.create_map().cast("map<string,double>")),
        lambda k, _: ~F.coalesce(F.map_contains_key("_metrics", k), F.lit(False)),
    )
    metrics = F.when(F.col("_metrics").isNull(), F.col("metrics")).otherwise(F.map_concat(kept, F.col("_metrics")))
    joined = joined.withColumns({"metrics": metrics, "truncated": F.coalesce("_truncated", "truncated")})
    return joined.select(*log.columns, F.coalesce("ended", F.lit(False)).alias("ended")), counts


def add_what_followed(checked: DataFrame, spec: JobSpec) -> DataFrame:
    """The rows fit for use, each with what followed it in its MDP; `checked` comes from `with_reason`."""
    in_order = Window.partitionBy("mdp_id").orderBy("sequence_number")
    # A rejected row is a hole: what came before it must not be joined to what came after.
    # One without a readable key has no place, and cuts nothing; one whose step has a good row as well is no hole.
    same_step = Window.partitionBy("mdp_id", "sequence_number")
    steps = (
        checked.where(F.col("mdp_id").isNotNull() & F.col("sequence_number").isNotNull())
        .withColumn("has_good", F.max(F.col(REASON).isNull()).over(same_step))
        .where(F.col(REASON).isNull() | ~F.col("has_good"))
        .drop("has_good")
    )
    before_hole = F.coalesce(F.lead(F.col(REASON).isNotNull()).over(in_order), F.lit(False))
    numbered = steps.withColumns({"before_hole": before_hole, "ordinal": F.row_number().over(in_order)})
    good = numbered.where(F.col(REASON).isNull())
    last = F.lead("sequence_number").over(in_order).isNull()
    cut = {
        "terminal": F.lit(False),
        "truncated": last,
        "column": F.coalesce(F.col("truncated"), F.lit(False)),
    }[spec.data.last_step] | F.col("before_hole")
    if "ended" in good.columns:
        # Where ends are reported, an MDP without one is still under way.
        cut = cut | (last & ~F.col("ended"))
    followed = good.withColumns(
        {
            "time_diff": F.lead("sequence_number").over(in_order) - F.col("sequence_number"),
            "next_action": F.lead("action").over(in_order),
            "possible_next_actions": F.lead("possible_actions").over(in_order),
            "truncated": cut,
            "terminal": last & ~cut,
        }
    )
    for column in ("time_diff", "next_action", "possible_next_actions"):
        followed = followed.withColumn(column, F.when(~F.col("truncated"), F.col(column)))
    # Spark sums a frame of preceding rows in linear time, of following rows in quadratic time: go backwards.
    from_here = (
        Window.partitionBy("mdp_id").orderBy(F.desc("sequence_number")).rowsBetween(Window.unboundedPreceding, 0)
    )
    names = sorted(r[0] for r in good.select(F.explode(F.map_keys("metrics"))).distinct().collect())
    longest = good.agg(F.max("ordinal")).collect()[0][0] or 0
    if 0 < spec.reward.discount < 1 and longest * math.log(spec.reward.discount) < -700:
        raise StageError(
            f"reward.discount {spec.reward.discount}: over an MDP of {longest} decisions it vanishes beyond what a "
            "number can hold; raise it, or end MDPs earlier"
        )
    factor = F.pow(F.lit(spec.reward.discount or 1.0), F.col("ordinal"))
    returns = []
    for name in names:
        logged = F.coalesce(F.col("metrics")[name], F.lit(0.0))
        total = F.sum(logged * factor).over(from_here) / factor if spec.reward.discount else logged
        returns += [F.lit(name), total]
    followed = followed.withColumn("returns", F.create_map(*returns).cast("map<string,double>"))
    return (
        followed.drop("before_hole", "ended", REASON, CORRUPT, UNREADABLE)
        .repartition("mdp_id")
        .sortWithinPartitions("mdp_id", "ordinal")
    )


def describe(transitions: DataFrame) -> dict[str, Any]:
    """MDPs, lengths and action frequencies of the transitions."""
    lengths = transitions.groupBy("mdp_id").agg(F.count("*").alias("length"))
    summary = lengths.agg(F.count("*"), F.avg("length"), F.max("length")).collect()[0]
    truncated = transitions.where("truncated").count()
    actions = {r["action"]: r["count"] for r in transitions.groupBy("action").count().orderBy("action").collect()}
    return {
        "mdps": summary[0],
        "mean_length": round(summary[1] or 0, 2),
        "max_length": summary[2],
        "truncated": truncated,
        "actions": actions,
    }


def _too_many(rejected: DataFrame, facts: dict[str, Any], spec: JobSpec, path: str) -> str:
    examples = {
        r[REASON]: r["mdp_id"] for r in rejected.groupBy(REASON).agg(F.first("mdp_id").alias("mdp_id")).collect()
    }
    table = "\n".join(
        f"  {reason:28} {count:>10,}  e.g. mdp_id {examples.get(reason)}" for reason, count in facts["reasons"].items()
    )
    return (
        f"{path}: {facts['rows_quarantined']:,} of {facts['rows_in']:,} rows were rejected, more than "
        f"data.maxQuarantineFraction {spec.data.max_quarantine_fraction} allows:\n{table}\n"
        "Mend the log, or raise the limit if these rows may be lost."
    )
