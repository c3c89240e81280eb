"""Transitions from a decision log: each decision with what followed it."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyspark.sql import Column, DataFrame, Observation, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql import types as T

from components.spark import spark_session
from components.timeline import state
from components.timeline.describe import describe, mdps_by_length
from components.timeline.outcomes import join_outcomes
from components.timeline.page import write_page
from components.timeline.quarantine import DUPLICATE, REASON, with_reason
from components.timeline.read import AS_IT_WAS, UNREADABLE, read_log, without_nulls
from components.timeline.returns import add_returns, add_returns_over, backwards, so_far, sums_in_one
from contracts.job import JobSpec
from contracts.progress import report
from contracts.stage import StageError, TransientError, stage
from contracts.transitions import NEXT_STATE_PREFIX, STATE_PREFIX

LEFT_OUT = "left_out"
HASHES = 1_000_000
BUCKETS = 1 << 12, 1 << 16
"""Of MDPs, to count rows in: fewer take less time, more tell long MDPs from many of them."""
HEAD_ROWS = 1000
MOST_FEATURES = 20_000
ENDED = "terminal"
"""What a last step is where the job does not say."""
OPEN = 0.01
"""Share of the decisions whose wait for outcomes may go on beyond the last one: that of the last ones always does."""


def build_timeline(spec: JobSpec, decision_log: str, outcomes: str | None, output: str | Path) -> None:
    """Write `transitions/` and `quarantine/` (Parquet), `report.json` and `report.html` to `output`.

    Every row that is read lands in exactly one of the two, or is counted as left out by the job's own sampling or
    limits. Transitions hold the log's columns, its state as one column `state_<feature>` each (null where missing), and
    per row: `ordinal` (1-based place in its MDP, rejected ones too), `time_diff` (to the next decision, in units of
    sequence_number), `next_action`, `possible_next_actions`, `terminal` (the MDP ended here), `truncated` (the MDP went
    on, but what followed is not in the log), `returns` (per metric, the discounted sum from here to the MDP's last
    logged step), and where the job asks for them `returns_<n>` (over n decisions, null where the log breaks off
    before), `reward_timeline` (the metrics of the decisions from here on, in their order) and `next_state_<feature>`.
    Rows are sorted by MDP and ordinal; an MDP is never split over two files, so that the next state of a row is the
    next row's state. Outcomes that cannot be read go to `quarantine_outcomes/`. Raises `StageError` when the log is
    missing, empty, or rejected beyond `data.maxQuarantineFraction`, and `TransientError` when it changed while it was
    read.
    """
    with stage("timeline", output) as (directory, facts), spark_session("timeline") as spark:
        report(0, 4, "reading the log")
        log = read_log(spark, decision_log, spec.data, spec.action_space)
        if outcomes:
            aside = directory / "quarantine_outcomes"
            log, facts["outcomes"] = join_outcomes(spark, log, outcomes, spec.data, aside)
            reported, lost = facts["outcomes"]["reports"], facts["outcomes"]["unparsable"]
            if lost > spec.data.max_quarantine_fraction * reported:
                raise StageError(_too_many(lost, reported, *count_reasons(spark, aside), spec, outcomes))
        checked = whole = with_reason(log, spec)
        if outcomes:
            # What is held is computed for every row: of a good one its columns are enough, until it is set aside.
            of_text = whole.schema[AS_IT_WAS].metadata
            checked = whole.withColumn(AS_IT_WAS, F.when(F.col(REASON).isNotNull(), F.col(AS_IT_WAS)))
            checked = checked.withMetadata(AS_IT_WAS, of_text).cache()
        used = in_sample(checked, spec)
        names = look_at(used)
        report(1, 4, "ordering MDPs")
        plan = make_plan(used, spec, names or all_names(used))
        columns, counts = write_transitions(checked, spec, plan, directory / "transitions")
        if counts["unknown"]:
            plan = make_plan(used, spec, all_names(used))
            columns, counts = write_transitions(checked, spec, plan, directory / "transitions")
        rows = counts["used"] if used is checked else checked.count()
        rejected, left_out = counts["rejected"], rows - counts["used"] + counts[LEFT_OUT]
        if not rows:
            raise StageError(f"data.decisionLog {decision_log}: the log is empty; check the path and the time window")
        report(2, 4, f"{rows:,} rows")
        set_aside(used, in_sample(whole, spec), plan, directory / "quarantine", nothing=not rejected)
        reasons, examples = count_reasons(spark, directory / "quarantine") if rejected else ({}, {})
        facts |= {
            "rows_in": rows, "rows_out": rows - rejected - left_out, "rows_quarantined": rejected,
            "rows_left_out": left_out, "reasons": reasons,
        }  # fmt: skip
        if rejected > spec.data.max_quarantine_fraction * (rows - left_out):
            raise StageError(_too_many(rejected, rows - left_out, reasons, examples, spec, decision_log))
        report(3, 4, "reconciling")
        written = spark.read.schema(columns).parquet(str(directory / "transitions"))
        by_length = mdps_by_length(written)
        kept = sum(row["length"] * row["mdps"] for row in by_length)
        if kept != facts["rows_out"] or sum(reasons.values()) != rejected:
            raise TransientError(
                f"timeline: {rows} rows in, but {kept} out and {sum(reasons.values())} quarantined; the log changed "
                "while it was read, or an executor was lost: run again on a log that is not being written"
            )
        if not kept:
            why = f"rejected: {reasons}" if rejected else "all were left out by `data`'s sample and limits"
            raise StageError(f"data.decisionLog {decision_log}: no row is left of {rows}; {why}")
        facts["out_of_order"] = counts["before_its_time"]
        document = facts | describe(written, by_length, sorted(plan.features), sorted(plan.metrics))
        if overruled := counts["overruled"]:
            document["warnings"].append(
                f"{overruled:,} MDPs end in a step that the log calls truncated, and that data.lastStep "
                f"{spec.data.last_step or ENDED} takes for their end: column would take the log's word"
            )
        # Where ends are reported, those go before.
        unreported = "ended" not in log.columns
        if unreported and spec.data.last_step == "column" and not counts["told"]:
            document["warnings"].append(
                "no row of the log has truncated, which data.lastStep column goes by: all last steps are taken for "
                "ends of their MDPs"
            )
        if unreported and not spec.data.last_step and document["lengths"]["maximum"] > 1:
            document["warnings"].append(
                "data.lastStep is not set: all last steps are taken for ends of their MDPs. Say terminal if they are, "
                "truncated if the log's window cuts MDPs off, column if the log tells"
            )
        reported = facts.get("outcomes", {})
        if reported and (readable := reported["reports"] - reported["unparsable"]) == reported["unmatched"] > 0:
            document["warnings"].append(
                f"data.outcomes: none of {readable:,} outcomes is of a decision in the log: their mdp_id and "
                "sequence_number must be the decision's own, in the same unit"
            )
        if (still := reported.get("open", 0)) > OPEN * rows:
            document["warnings"].append(
                f"for {still:,} of {rows:,} decisions data.outcomeWaitSeconds goes on beyond the last outcome: if "
                "outcomes are still coming, theirs are missing here. Run again later, or leave their days out by "
                "data.partition"
            )
        for warning in document["warnings"]:
            print(warning, file=sys.stderr, flush=True)
        (directory / "report.json").write_text(json.dumps(document, indent=2, allow_nan=False))
        write_page(document, directory / "report.html")
        lengths = document["lengths"]
        facts |= {
            "mdps": lengths["count"],
            "mean_length": round(lengths["mean"], 2),
            "max_length": int(lengths["maximum"]),
            "features": len(plan.features),
            **{name: document[name] for name in ("truncated", "described", "actions", "mdps_over_days", "warnings")},
        }
        report(4, 4, f"{facts['mdps']:,} MDPs")


def write_transitions(checked: DataFrame, spec: JobSpec, plan: Plan, path: Path) -> tuple[T.StructType, dict[str, int]]:
    """Write the transitions; returns their columns, and what was counted on the way.

    Of rows those `used`, `rejected`, `left_out` by a limit and `before_its_time`; `told`, whose `truncated` is known;
    `overruled`, last steps that the log calls truncated and the job terminal; `unknown`, rows with names that the plan
    does not know: where there are some, what was written is of no use.
    """
    read, placed, followed = Observation("read"), Observation("placed"), Observation("followed")
    # Counted when rows are small: to be counted, they must be laid out whole.
    rows = compact(in_sample(checked, spec), plan).observe(
        read,
        F.count(F.lit(1)).alias("used"),
        F.count("row.truncated").alias("told"),
        _number_of(F.col("unknown")).alias("unknown"),
    )
    numbered = number_steps(rows, plan).observe(
        placed,
        _number_of(F.col(LEFT_OUT)).alias(LEFT_OUT),
        _number_of(~F.col(LEFT_OUT) & F.col(REASON).isNotNull()).alias("rejected"),
    )
    counted = ("before_its_time", "overruled")
    transitions = add_what_followed(numbered, spec, plan).observe(
        followed, *[_number_of(F.col(name)).alias(name) for name in counted]
    )
    written = transitions.drop(*counted)
    written.write.mode("overwrite").parquet(str(path))
    return written.schema, {name: n or 0 for seen in (read, placed, followed) for name, n in seen.get.items()}


def _number_of(condition: Column) -> Column:
    return F.sum(condition.cast("long"))


@dataclass(frozen=True)
class Plan:
    """What must be known of the whole log before its rows are put in order."""

    features: list[str]
    """Of the state, in the order of most of the rows."""
    metrics: list[str]
    shortest: int
    longest: int | None  # None: whatever the length
    elapsed: float
    """The most that lies between an MDP's first and last row, in units of the discount."""


def in_sample(checked: DataFrame, spec: JobSpec) -> DataFrame:
    """The rows of the MDPs that the job samples, and as many of those without one."""
    if spec.data.sample_fraction == 1:
        return checked
    # All rows without an MDP beside few with one would be too many to be rejected. A torn line has nothing but its
    # text; that of other rows is made of all their columns, which need not be read.
    torn = F.col(AS_IT_WAS) if checked.schema[AS_IT_WAS].metadata else F.concat_ws(" ", "sequence_number", "event_time")
    whose = F.coalesce(F.nullif("mdp_id", F.lit("")), torn)
    place = F.pmod(F.xxhash64(whose, F.lit(spec.seed)), F.lit(HASHES))
    return checked.where(place < int(spec.data.sample_fraction * HASHES))


Names = tuple[list[str], list[str]]
"""Of the state's features and of the metrics, in the order of most rows."""


def look_at(used: DataFrame) -> Names | None:
    """The names in the first good rows, where all have the same ones: then the others will too, most likely."""
    good = used.where(F.col(REASON).isNull())
    head = good.select(F.map_keys("state_features"), F.map_keys(without_nulls(F.col("metrics")))).take(HEAD_ROWS)
    if len({(tuple(state or ()), tuple(metrics or ())) for state, metrics in head}) != 1:
        return None
    return head[0][0] or [], head[0][1] or []


def all_names(used: DataFrame) -> Names:
    """The names in all rows that are not rejected."""
    # Most rows have the same names: few different sets of them are left to be taken apart.
    good = used.where(F.col(REASON).isNull())
    keys = [F.map_keys("state_features").alias("state"), F.map_keys(without_nulls(F.col("metrics"))).alias("metrics")]
    sets = good.groupBy(*keys).count().cache()
    names = (
        sets.select(F.lit("state").alias("of"), F.explode("state").alias("name"))
        .union(sets.select(F.lit("metrics"), F.explode("metrics")))
        .distinct()
        .groupBy("of")
        .agg(F.sort_array(F.collect_list("name")).alias("names"))
    )
    found: dict[str, list[str]] = {row["of"]: row["names"] for row in names.collect()}
    usual = sets.agg(F.max_by("state", "count")).collect()[0][0] or []
    sets.unpersist()
    features = found.get("state", [])
    return usual + [name for name in features if name not in set(usual)], found.get("metrics", [])


def check_names(features: list[str]) -> None:
    """Raise `StageError` for features that cannot be a column each."""
    if len(features) > MOST_FEATURES:
        raise StageError(
            f"data.decisionLog: state_features has {len(features):,} different names, such as {features[0]!r} and "
            f"{features[-1]!r}: more than {MOST_FEATURES:,} features cannot be columns; is an id among the names?"
        )
    lower: dict[str, str] = {}
    for name in features:
        if "`" in name:
            raise StageError(f"data.decisionLog: state feature {name!r}: a backtick cannot be in a column's name")
        if other := lower.get(name.lower()):
            how = "is there twice in a row" if other == name else f"and {other!r} are one column to Spark; rename one"
            raise StageError(f"data.decisionLog: state feature {name!r} {how}")
        lower[name.lower()] = name


def make_plan(used: DataFrame, spec: JobSpec, names: Names) -> Plan:
    """Look over the log for how long its MDPs are."""
    data, interval = spec.data, spec.reward.discount_interval
    check_names(names[0])
    limit = data.max_length
    with_id = used.where(F.col("mdp_id").isNotNull() & (F.col("mdp_id") != ""))
    if data.max_length_percentile or interval:
        span = F.max("sequence_number") - F.min("sequence_number")
        lengths = with_id.groupBy("mdp_id").agg(F.count_distinct("sequence_number").alias("length"), span.alias("span"))
        percentile = F.percentile_approx("length", data.max_length_percentile or 1.0, 10_000)
        longest, quantile, widest = lengths.agg(F.max("length"), percentile, F.max("span")).collect()[0]
        if data.max_length_percentile and quantile:
            limit = min(limit or quantile, quantile)
        elapsed = (widest or 0) / interval if interval else float(longest or 0)
    else:
        # No MDP has more rows than all that share its bucket have: that is all that need be known, and soon counted.
        for buckets in BUCKETS:
            rows = with_id.groupBy(F.pmod(F.xxhash64("mdp_id"), F.lit(buckets)).alias("bucket")).count()
            elapsed = float(rows.agg(F.max("count")).collect()[0][0] or 0)
            if sums_in_one(elapsed, spec.reward.discount):
                break
    return Plan(*names, data.min_length, limit, elapsed)


def compact(used: DataFrame, plan: Plan) -> DataFrame:
    """The rows with their state as an array in the plan's order, and all that only comes along in one struct, `row`.

    A third of the bytes to move and to sort, and two fields to copy. Metrics that are null are gone. `unknown` tells of
    names that are not in the plan, in a row that is not rejected.
    """
    rows = _with_tie(used, plan)
    metrics = without_nulls(F.col("metrics"))
    named = state.has_others(F.col("odd"), plan.features) | state.has_others(metrics, plan.metrics)
    passed_on = [name for name in used.columns if name not in (*_PLACE, *_NOTES, "state_features")]
    brought = [metrics.alias(name) if name == "metrics" else F.col(f"`{name}`") for name in passed_on]
    return rows.select(
        *[name for name in (*_PLACE, "tie", "state") if name in rows.columns],
        (F.col(REASON).isNull() & named).alias("unknown"),
        F.struct(*brought).alias("row"),
    )


_PLACE = ("mdp_id", "sequence_number", "event_time", REASON, "ended")
_NOTES = (AS_IT_WAS, UNREADABLE)


def _with_tie(used: DataFrame, plan: Plan) -> DataFrame:
    """Add `state`, an array, and `tie`, a hash of all else, which order rows at the same step and instant.

    So the same one of them stays whenever it is asked; a feature that is null and one that is absent are alike. `odd`
    is a state without the usual order of its names.
    """
    values, odd = state.in_usual_order("state_features", plan.features)
    rows = used.withColumns({"values": values, "odd": odd})
    hashed: list[Column] = []
    # To look at the map once more would be to copy it.
    others = [(name, kind) for name, kind in used.dtypes if name not in ("state_features", *_NOTES)]
    for name, kind in others:
        column = F.col(f"`{name}`")
        if kind.startswith("map"):
            hashed += [F.map_keys(column), *_with_nulls(F.map_values(column))]
        elif kind == "array<double>":
            hashed += _with_nulls(column)
        else:
            hashed.append(F.to_json(column) if kind.startswith("array<map") else column)
    # A null is hashed as if it were not there.
    nulls = F.array(*[F.col(f"`{name}`").isNull() for name, _ in others])
    array = state.as_array("values", "odd", plan.features)
    return rows.withColumns({"tie": F.xxhash64(*hashed, nulls), "state": array}).drop("values")


def _with_nulls(values: Column) -> list[Column]:
    """An array of numbers for a hash, which leaves nulls out: where there are some, its text as well."""
    # What is not there is null, not false, in an array that holds one.
    holds_null = values.isNotNull() & F.array_contains(values, float("nan")).isNull()
    return [values, F.when(holds_null, F.to_json(values))]


def number_steps(rows: DataFrame, plan: Plan) -> DataFrame:
    """Every row with its place: `step` (0 for the last of its MDP), `first` of it or not, `left_out` by a limit or not.

    Of rows with the same (mdp_id, sequence_number) the earliest good one stays, other good ones are duplicates.
    """
    rows = rows.withColumn("bad", F.col(REASON).isNotNull())
    # All that follows goes backwards in time, and takes the rows of a step in the order that they are put in here.
    order: list[str | Column] = ["mdp_id", F.desc("sequence_number"), "bad", "event_time", "tie", "state"]
    rows = rows.repartition("mdp_id").sortWithinPartitions(*order)
    has_place = F.col("mdp_id").isNotNull() & (F.col("mdp_id") != "") & F.col("sequence_number").isNotNull()
    same = F.lag("sequence_number").over(backwards()).eqNullSafe(F.col("sequence_number"))
    rows = rows.withColumns({"first": has_place & ~same, "step": F.dense_rank().over(backwards()) - 1})
    duplicate = ~F.col("bad") & ~F.col("first")
    rows = rows.withColumn(REASON, F.when(duplicate, F.lit(DUPLICATE)).otherwise(F.col(REASON)))
    out = F.lit(False)
    if plan.shortest > 1 or plan.longest:
        steps = F.sum(F.col("first").cast("int")).over(Window.partitionBy("mdp_id"))
        rows = rows.withColumn("steps", steps)
        out = (F.col("steps") < plan.shortest) | (F.col("steps") > (plan.longest or math.inf))
    return rows.withColumn(LEFT_OUT, has_place & out).drop("steps", "bad")


def add_what_followed(numbered: DataFrame, spec: JobSpec, plan: Plan) -> DataFrame:
    """The rows fit for use, each with what followed it in its MDP; `numbered` comes from `number_steps`."""
    # A rejected row is a hole: what came before it must not be joined to what came after. One without a readable key
    # has no place, and cuts nothing; one whose step has a good row as well is no hole.
    rows = numbered.where(F.col("first") & ~F.col(LEFT_OUT)).withColumn("_good", F.col(REASON).isNull())
    moved = ["sequence_number", "event_time", "row.action", "row.possible_actions", "_good"]
    if spec.data.full_rows:
        moved.append("state")
    whole = backwards().rowsBetween(Window.unboundedPreceding, Window.unboundedFollowing)
    along = {"_steps": F.count(F.lit(1)).over(whole), "_next": F.lag(F.struct(*moved)).over(backwards())}
    interval = spec.reward.discount_interval
    latest = F.max("sequence_number").over(so_far())
    elapsed = (latest - F.col("sequence_number")) / interval if interval else F.col("step").cast("double")
    logged = {name: F.when(F.col("_good"), F.col("row.metrics")[name]) for name in plan.metrics}
    rows = add_returns(rows, logged, spec.reward.discount, elapsed, plan.elapsed, along)
    last = F.col("_next").isNull()
    before_hole = ~last & ~F.col("_next._good")
    # Where ends are reported, an MDP without one is still under way.
    open_ended = last & ~F.col("ended") if "ended" in numbered.columns else F.lit(False)
    cut = (
        before_hole
        | {
            "terminal": open_ended,
            "truncated": open_ended if "ended" in numbered.columns else last,
            "column": open_ended | F.coalesce(F.col("row.truncated"), F.lit(False)),
        }[spec.data.last_step or ENDED]
    )
    rows = rows.withColumn("_truncated", cut)
    broken = F.col("_truncated") | ~F.col("_good")
    for n in spec.data.n_steps:
        rows = add_returns_over(rows, n, plan.metrics, spec.reward.discount, broken)
    if k := spec.data.reward_timeline_steps:
        rows = rows.withColumn("reward_timeline", _metrics_ahead(k, broken))
    known = ~F.col("_truncated")
    before_its_time = ~before_hole & (F.col("_next.event_time") < F.col("event_time"))
    rows = rows.withColumn("before_its_time", F.coalesce(before_its_time, F.lit(False)))
    brought = [name for name in rows.select("row.*").columns if name != "truncated"]
    columns = {
        **{name: F.col(name) for name in ("mdp_id", "sequence_number", "event_time")},
        **{name: F.col(f"row.`{name}`") for name in brought},
        "ordinal": (F.col("_steps") - F.col("step")).cast("int"),
        "time_diff": F.when(known, F.col("_next.sequence_number") - F.col("sequence_number")),
        "next_action": F.when(known, F.col("_next.action")),
        "possible_next_actions": F.when(known, F.col("_next.possible_actions")),
        "terminal": last & known,
        "truncated": F.col("_truncated"),
        **{name: F.col(name) for name in rows.columns if name.startswith(("returns", "reward_timeline"))},
        "before_its_time": F.col("before_its_time"),
        "overruled": last & known & F.coalesce(F.col("row.truncated"), F.lit(False)),
    }
    states = state.columns(F.col("state"), plan.features, STATE_PREFIX)
    if spec.data.full_rows:
        states += state.columns(F.when(known, F.col("_next.state")), plan.features, NEXT_STATE_PREFIX)
    in_order = rows.where("_good").sortWithinPartitions("mdp_id", "sequence_number")
    return in_order.select(*[column.alias(name) for name, column in columns.items()], *states)


def _metrics_ahead(k: int, broken: Column) -> Column:
    """The metrics of the next k decisions, as far as they are known."""
    logged = F.coalesce(F.col("row.metrics"), F.create_map().cast("map<string,double>"))
    shown = F.struct(broken.alias("broken"), logged.alias("metrics"))
    ahead = F.reverse(F.collect_list(shown).over(backwards().rowsBetween(1 - k, 0)))
    until = F.array_position(F.transform(ahead, lambda step: step["broken"]), True)
    within = F.when(until > 0, F.slice(ahead, 1, until.cast("int"))).otherwise(ahead)
    return F.transform(within, lambda step: step["metrics"])


def set_aside(used: DataFrame, whole: DataFrame, plan: Plan, path: Path, nothing: bool) -> None:
    """Write the rejected rows of `used` as they are in `whole`, each with its reason."""
    # Only an MDP with a row that is bad, or there twice, need be put in order again.
    rejected = F.max(F.col(REASON).isNotNull()) | (F.count("sequence_number") > F.count_distinct("sequence_number"))
    affected = used.groupBy("mdp_id").agg(rejected.alias("affected")).where("affected")
    theirs = whole.alias("whole").join(affected.alias("a"), F.expr("whole.mdp_id <=> a.mdp_id"), "left_semi")
    numbered = number_steps(_with_tie(theirs, plan), plan).where(F.col(REASON).isNotNull() & ~F.col(LEFT_OUT))
    rows = numbered.drop("first", "step", LEFT_OUT, "tie", "state", "odd")
    if nothing:
        # Its columns are there, without the work of finding no row.
        rows = rows.limit(0)
    rows.write.parquet(str(path))


def count_reasons(spark: SparkSession, quarantine: Path) -> tuple[dict[str, int], dict[str, Any]]:
    """How many rows were set aside for each reason, and what tells of one."""
    found = (
        spark.read.parquet(str(quarantine))
        .groupBy(REASON)
        .agg(F.count("*").alias("n"), F.first(_named(), ignorenulls=True).alias("example"))
        .orderBy(REASON)
        .collect()
    )
    return {row[REASON]: row["n"] for row in found}, {row[REASON]: row["example"] for row in found}


def _named() -> Column:
    step = F.concat(F.lit(", sequence_number "), F.col("sequence_number"))
    return F.coalesce(
        F.concat(F.lit("mdp_id "), "mdp_id", F.coalesce(step, F.lit(""))),
        F.substring(AS_IT_WAS, 1, 80),
    )


def _too_many(
    rejected: int, rows: int, reasons: dict[str, int], examples: dict[str, Any], spec: JobSpec, path: str
) -> str:
    table = "\n".join(f"  {reason:28} {count:>10,}  e.g. {examples[reason]}" for reason, count in reasons.items())
    return (
        f"{path}: {rejected:,} of {rows:,} rows were rejected, more than "
        f"data.maxQuarantineFraction {spec.data.max_quarantine_fraction} allows:\n{table}\n"
        "Mend the log, or raise the limit if these rows may be lost."
    )
