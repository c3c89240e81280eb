"""Transitions from a decision log: each decision with what followed it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyspark.sql import Column, DataFrame, Observation, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql.window import WindowSpec

from components.spark import spark_session
from components.timeline.describe import describe
from components.timeline.page import write_page
from components.timeline.quarantine import DUPLICATE, REASON, REASONS, not_finite, with_reason
from components.timeline.read import CORRUPT, UNREADABLE, read_log, read_outcomes
from contracts.job import JobSpec
from contracts.progress import report
from contracts.stage import StageError, stage

LEFT_OUT = "left_out"
HASHES = 1_000_000


def build_timeline(spec: JobSpec, decision_log: str, outcomes: str | None, output: str | Path) -> None:
    """Write `transitions/` and `quarantine/` (Parquet), `report.json` and `report.html` to `output`.

    Every row that is read lands in exactly one of the two, or is counted as left out by the job's own sampling or
    limits. Transitions hold the log's columns and, per row: `ordinal` (1-based place in its MDP, rejected ones too),
    `time_diff` (to the next decision, in units of sequence_number), `next_action`, `possible_next_actions`, `terminal`
    (the MDP ended here), `truncated` (the MDP went on, but what followed is not in the log), `returns` (per metric,
    the discounted sum from here to the MDP's last logged step), and where the job asks for them `returns_<n>` (over n
    decisions, null where the log breaks off before) and `reward_timeline` (the metrics of the decisions from here on,
    in their order). Rows are sorted by MDP and ordinal; an MDP is never split over two files, so that the next state of
    a row is the next row's state. Raises `StageError` when the log is missing, empty, or rejected beyond
    `data.maxQuarantineFraction`.
    """
    with stage("timeline", output) as (directory, facts), spark_session("timeline") as spark:
        report(0, 4, "reading the log")
        log = read_log(spark, decision_log, spec.data)
        if outcomes:
            log, facts["outcomes"] = join_outcomes(spark, log, outcomes, spec.data.outcome_wait_seconds)
            log = log.cache()
        checked = with_reason(log, spec.actions)
        plan = make_plan(checked, spec)
        numbered = number_steps(checked, plan)
        seen = Observation("rows")
        counted = numbered.observe(seen, F.count(F.lit(1)).alias("rows"), *_counts())
        report(1, 4, "ordering MDPs")
        kept_rows = Observation("kept")
        followed = add_what_followed(counted, spec, plan).observe(kept_rows, F.sum("before_its_time").alias("n"))
        followed.drop("before_its_time").write.parquet(str(directory / "transitions"))
        counts = seen.get
        reasons = {name: n for name, n in counts.items() if name not in ("rows", LEFT_OUT) and n}
        left_out, quarantined = counts[LEFT_OUT] or 0, sum(reasons.values())
        rows_out = counts["rows"] - quarantined - left_out
        facts |= {
            "rows_in": counts["rows"], "rows_out": rows_out, "rows_quarantined": quarantined,
            "rows_left_out": left_out, "reasons": reasons,
        }  # fmt: skip
        if not counts["rows"]:
            raise StageError(f"data.decisionLog {decision_log}: the log is empty; check the path and the time window")
        report(2, 4, f"{counts['rows']:,} rows")
        rejected = numbered.where(F.col(REASON).isNotNull() & ~F.col(LEFT_OUT)).drop(*_HELPERS)
        if quarantined > spec.data.max_quarantine_fraction * (counts["rows"] - left_out):
            raise StageError(_too_many(rejected, facts, spec, decision_log))
        (rejected if quarantined else rejected.limit(0)).write.parquet(str(directory / "quarantine"))
        report(3, 4, "reconciling")
        written = spark.read.parquet(str(directory / "transitions"))
        kept = written.count()
        set_aside = spark.read.parquet(str(directory / "quarantine")).count()
        if kept != rows_out or set_aside != quarantined:
            raise StageError(
                f"timeline: {counts['rows']} rows in, but {kept} out and {set_aside} quarantined; the log changed "
                "while it was read: run again on a log that is not being written"
            )
        if not kept:
            raise StageError(
                f"data.decisionLog {decision_log}: no row is left of {counts['rows']}: see `data`'s limits"
            )
        facts["out_of_order"] = kept_rows.get["n"] or 0
        document = facts | describe(written)
        (directory / "report.json").write_text(json.dumps(document, indent=2, allow_nan=False))
        write_page(document, directory / "report.html")
        lengths = document["lengths"]
        facts |= {
            "mdps": lengths["count"],
            "mean_length": round(lengths["mean"], 2),
            "max_length": int(lengths["maximum"]),
            **{name: document[name] for name in ("truncated", "actions", "mdps_over_days")},
        }
        report(4, 4, f"{facts['mdps']:,} MDPs")


def join_outcomes(
    spark: SparkSession, log: DataFrame, path: str, wait_seconds: int | None = None
) -> tuple[DataFrame, dict[str, int]]:
    """Add to each decision the metrics that were reported for it later, and whether its MDP was said to have `ended`.

    Of a metric reported twice the later report counts. Reports that came more than `wait_seconds` after their decision
    are not used: a run over the same days gives the same result whenever it is made. Also returns how many reports
    there were, and how many of them could not be read, match no decision, or came late.
    """
    outcomes = read_outcomes(spark, path).cache()
    readable = outcomes.where(F.col(CORRUPT).isNull()).drop(CORRUPT, UNREADABLE)
    decided = log.groupBy("mdp_id", "sequence_number").agg(F.min("event_time").alias("decided"))
    matched = readable.join(decided, ["mdp_id", "sequence_number"])
    late = F.lit(False)
    if wait_seconds is not None:
        late = F.coalesce(
            F.col("event_time") > F.col("decided") + F.expr(f"interval {wait_seconds} seconds"), F.lit(False)
        )
    matched = matched.withColumn("late", late)
    reports, fine = outcomes.count(), readable.count()
    found = matched.agg(F.count("*"), F.coalesce(F.sum(F.col("late").cast("int")), F.lit(0))).collect()[0]
    counts = {"reports": reports, "unparsable": reports - fine, "unmatched": fine - found[0], "late": found[1]}
    per_metric = matched.where(~F.col("late")).select(
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
    if readable.where(F.col("ended").isNotNull()).isEmpty():
        # Nobody tells of ends: the job's lastStep decides.
        return joined.select(*log.columns), counts
    return joined.select(*log.columns, F.coalesce("ended", F.lit(False)).alias("ended")), counts


@dataclass(frozen=True)
class Plan:
    """What must be known of the whole log before its rows are put in order."""

    metrics: list[str]
    shortest: int
    longest: int | None  # None: whatever the length
    sampled: float
    seed: int


def make_plan(checked: DataFrame, spec: JobSpec) -> Plan:
    """Look over the log: its metrics, and the keys of its rows."""
    data = spec.data
    keys = F.array_distinct(F.flatten(F.collect_set(F.map_keys("metrics"))))
    finite = ~F.coalesce(F.exists(F.map_values("metrics"), not_finite), F.lit(False))
    names = checked.where(finite).agg(keys).collect()[0][0]
    lengths = checked.groupBy("mdp_id").agg(F.count_distinct("sequence_number").alias("length"))
    percentile = F.percentile_approx("length", data.max_length_percentile or 1.0, 10_000)
    has_place = F.col("mdp_id").isNotNull() & (F.col("mdp_id") != "")
    most, limit = lengths.where(has_place).agg(F.max("length"), percentile).collect()[0]
    limits = [data.max_length] if data.max_length else []
    if data.max_length_percentile and limit:
        limits.append(int(limit))
    longest = min(limits) if limits else None
    steps = min(most or 0, longest or most or 0)
    if 0 < spec.reward.discount < 1 and steps * math.log(spec.reward.discount) < -700:
        raise StageError(
            f"reward.discount {spec.reward.discount}: over an MDP of {steps} decisions it vanishes beyond what a "
            "number can hold; raise it, end MDPs earlier, or set data.maxLength"
        )
    return Plan(sorted(names), data.min_length, longest, data.sample_fraction, spec.seed)


_HELPERS = ("first", "step", "steps", LEFT_OUT)


def number_steps(checked: DataFrame, plan: Plan) -> DataFrame:
    """Every row with its place: `step` (0 for the last of its MDP), `steps` in all, `first` of its step, `left_out`.

    Of rows with the same (mdp_id, sequence_number) the earliest good one stays, other good ones are duplicates.
    """
    # All that follows goes backwards in time, so that rows are sorted for it once: a sum over the rows from one to the
    # MDP's end is linear only over preceding rows.
    backwards = Window.partitionBy("mdp_id").orderBy(
        F.desc("sequence_number"), F.col(REASON).isNotNull(), "event_time", _all_else(checked)
    )
    has_place = F.col("mdp_id").isNotNull() & (F.col("mdp_id") != "") & F.col("sequence_number").isNotNull()
    same = F.lag("sequence_number").over(backwards).eqNullSafe(F.col("sequence_number"))
    rows = checked.withColumn("first", has_place & ~same)
    good = F.col(REASON).isNull()
    rows = rows.withColumns(
        {
            REASON: F.when(good & ~F.col("first"), F.lit(DUPLICATE)).otherwise(F.col(REASON)),
            "step": F.sum(F.col("first").cast("int")).over(backwards.rowsBetween(Window.unboundedPreceding, 0)) - 1,
            "steps": F.sum(F.col("first").cast("int")).over(Window.partitionBy("mdp_id")),
        }
    )
    out = F.lit(False)
    if plan.sampled < 1:
        place = F.pmod(F.xxhash64("mdp_id", F.lit(plan.seed)), F.lit(HASHES))
        out = out | (place >= int(plan.sampled * HASHES))
    if plan.shortest > 1:
        out = out | (F.col("steps") < plan.shortest)
    if plan.longest:
        out = out | (F.col("steps") > plan.longest)
    return rows.withColumn(LEFT_OUT, has_place & out)


def _all_else(checked: DataFrame) -> Column:
    """A hash of the row, so that of two at the same step and instant the same one stays whenever it is asked."""
    columns: list[Column] = []
    for name, kind in checked.dtypes:
        columns += [F.map_keys(name), F.map_values(name)] if kind.startswith("map") else [F.col(name)]
    return F.xxhash64(*columns)


def add_what_followed(numbered: DataFrame, spec: JobSpec, plan: Plan) -> DataFrame:
    """The rows fit for use, each with what followed it in its MDP; `numbered` comes from `number_steps`."""
    # A rejected row is a hole: what came before it must not be joined to what came after. One without a readable key
    # has no place, and cuts nothing; one whose step has a good row as well is no hole.
    backwards = _backwards()
    steps = numbered.where(F.col("first") & ~F.col(LEFT_OUT))
    good = F.col(REASON).isNull()
    last = F.lag("step").over(backwards).isNull()
    before_hole = ~last & ~F.lag(good).over(backwards)
    cut = {
        "terminal": F.lit(False),
        "truncated": last,
        "column": F.coalesce(F.col("truncated"), F.lit(False)),
    }[spec.data.last_step] | before_hole
    if "ended" in numbered.columns:
        # Where ends are reported, an MDP without one is still under way.
        cut = cut | (last & ~F.col("ended"))
    followed = steps.withColumns({"_good": good, "_truncated": cut, "_last": last})
    known = ~F.col("_truncated")
    before = {
        name: F.lag(name).over(backwards) for name in ("sequence_number", "event_time", "action", "possible_actions")
    }
    added = {
        # For the stage to count: the next decision's time lies before this one's.
        "before_its_time": F.coalesce(~before_hole & (before["event_time"] < F.col("event_time")), F.lit(False)).cast(
            "int"
        ),
        "ordinal": (F.col("steps") - F.col("step")).cast("int"),
        "time_diff": F.when(known, before["sequence_number"] - F.col("sequence_number")),
        "next_action": F.when(known, before["action"]),
        "possible_next_actions": F.when(known, before["possible_actions"]),
        "truncated": F.col("_truncated"),
        "terminal": F.col("_last") & known,
        **_returns(spec, plan),
    }
    followed = followed.withColumns(added).where("_good")
    helpers = (*_HELPERS, REASON, CORRUPT, UNREADABLE, "ended", "_good", "_truncated", "_last")
    return followed.drop(*helpers).sortWithinPartitions("mdp_id", "ordinal")


def _returns(spec: JobSpec, plan: Plan) -> dict[str, Column]:
    """Sums of the metrics from each decision on."""
    backwards = _backwards()
    from_here = backwards.rowsBetween(Window.unboundedPreceding, 0)
    discount, good = spec.reward.discount, F.col("_good")
    # In units of the MDP's first step: going backwards the factor only grows.
    factor = F.pow(F.lit(discount or 1.0), F.col("steps") - F.col("step"))
    logged = {m: F.when(good, F.coalesce(F.col("metrics")[m], F.lit(0.0))).otherwise(F.lit(0.0)) for m in plan.metrics}

    def over(frame: Any) -> Column:
        pairs: list[Column] = []
        for name, value in logged.items():
            pairs += [F.lit(name), F.sum(value * factor).over(frame) / factor if discount else value]
        return F.create_map(*pairs).cast("map<string,double>")

    columns = {"returns": over(from_here)}
    cut = F.coalesce(F.col("_truncated"), F.lit(False)) | ~good
    for n in spec.data.n_steps:
        frame = backwards.rowsBetween(1 - n, 0)
        broken = F.max(cut.cast("int")).over(frame) > 0
        # Cut at the n-th decision itself, all n are known.
        whole = (F.max(cut.cast("int")).over(backwards.rowsBetween(2 - n, 0)) if n > 1 else F.lit(0)) == 0
        reached = F.count(F.lit(1)).over(frame) == n
        columns[f"returns_{n}"] = F.when(~broken | (whole & reached), over(frame))
    if k := spec.data.reward_timeline_steps:
        logged_metrics = F.coalesce(F.col("metrics"), F.create_map().cast("map<string,double>"))
        shown = F.struct(cut.alias("cut"), logged_metrics.alias("metrics"))
        ahead = F.reverse(F.collect_list(shown).over(backwards.rowsBetween(1 - k, 0)))
        until = F.array_position(F.transform(ahead, lambda step: step["cut"]), True)
        within = F.when(until > 0, F.slice(ahead, 1, until.cast("int"))).otherwise(ahead)
        columns["reward_timeline"] = F.transform(within, lambda step: step["metrics"])
    return columns


def _backwards() -> WindowSpec:
    return Window.partitionBy("mdp_id").orderBy(F.desc("sequence_number"))


def _counts() -> list[Column]:
    """How many rows of each kind there are; those left out by the job count as nothing else."""
    kept = ~F.col(LEFT_OUT)
    kinds = {name: kept & (F.col(REASON) == name) for name in REASONS}
    return [F.sum(kind.cast("long")).alias(name) for name, kind in (kinds | {LEFT_OUT: F.col(LEFT_OUT)}).items()]


def _too_many(rejected: DataFrame, facts: dict[str, Any], spec: JobSpec, path: str) -> str:
    examples = {
        r[REASON]: r["mdp_id"] for r in rejected.groupBy(REASON).agg(F.first("mdp_id").alias("mdp_id")).collect()
    }
    table = "\n".join(
        f"  {reason:28} {count:>10,}  e.g. mdp_id {examples.get(reason)}" for reason, count in facts["reasons"].items()
    )
    used = facts["rows_in"] - facts["rows_left_out"]
    return (
        f"{path}: {facts['rows_quarantined']:,} of {used:,} rows were rejected, more than "
        f"data.maxQuarantineFraction {spec.data.max_quarantine_fraction} allows:\n{table}\n"
        "Mend the log, or raise the limit if these rows may be lost."
    )
