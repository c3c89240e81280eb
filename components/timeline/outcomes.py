"""Metrics that were reported after their decision."""

from __future__ import annotations

from pathlib import Path

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from components.timeline.quarantine import REASON, of_reading
from components.timeline.read import AS_IT_WAS, UNREADABLE, counted_in_millionths, read_outcomes
from contracts.job import Data
from contracts.stage import StageError


def join_outcomes(
    spark: SparkSession, log: DataFrame, path: str, data: Data | None = None, quarantine: Path | None = None
) -> tuple[DataFrame, dict[str, int]]:
    """Add to each decision the metrics that were reported for it later, and whether its MDP was said to have `ended`.

    Of a metric reported twice the later report counts. Reports that came later than `data` has them waited for,
    or do not say when, are not used: once that time has passed for all, a run over the same days gives the same result
    whenever it is made. Also returns how many reports there were, how many of them could not be read, match no
    decision, or came late, and for how many decisions the wait is `open` still: it goes on beyond the last report.
    Those that cannot be read are written to `quarantine`, each with its reason; a metric that is not finite rejects the
    decision that it is of.
    Whether ends are reported at all is told by all reports that had come when the last wait was over.
    Raises `StageError` where the last steps are to be told by a column and nobody tells of any.
    """
    data = data or Data()
    wait_seconds = data.outcome_wait_seconds
    whole = read_outcomes(spark, path, data, counted_in_millionths(log))
    outcomes = whole.drop(AS_IT_WAS).cache()
    readable = outcomes.where(F.col(UNREADABLE).isNull()).drop(UNREADABLE)
    decided = log.groupBy("mdp_id", "sequence_number").agg(F.min("event_time").alias("decided"))
    matched = readable.join(decided, ["mdp_id", "sequence_number"])
    late, wait = F.lit(False), F.expr(f"interval {wait_seconds or 0} seconds")
    if wait_seconds is not None:
        # One without a time may have come at any: counted in, it would change what a run of another day gives.
        late = F.coalesce(F.col("event_time") > F.col("decided") + wait, F.lit(True))
    matched = matched.withColumn("late", late)
    reports, fine = outcomes.count(), readable.count()
    if quarantine and fine < reports:
        rejected = whole.where(F.col(UNREADABLE).isNotNull()).withColumn(REASON, of_reading())
        rejected.drop(UNREADABLE).write.parquet(str(quarantine))
    if wait_seconds is not None and fine and readable.where(F.col("event_time").isNotNull()).isEmpty():
        raise StageError(
            f"data.outcomeWaitSeconds: no outcome of {path} says when it came, in its column "
            f"{data.outcome_columns.event_time or 'event_time'}; have it written, name it in "
            "data.outcomeColumns.eventTime, or use all outcomes"
        )
    found = matched.agg(F.count("*"), F.count_if("late")).collect()[0]
    counts = {
        "reports": reports,
        "unparsable": reports - fine,
        "unmatched": fine - found[0],
        "late": found[1],
        "open": 0,
    }
    if wait_seconds is not None:
        last_report = F.max(F.unix_micros("event_time")).alias("last_report")
        still = F.unix_micros(F.col("event_time") + wait) > F.col("last_report")
        counts["open"] = log.crossJoin(F.broadcast(readable.agg(last_report))).where(still).count()
    per_metric = matched.where(~F.col("late")).select(
        "mdp_id", "sequence_number", "event_time", "truncated", "ended", F.explode_outer("metrics")
    )
    per_metric = per_metric.groupBy("mdp_id", "sequence_number", "key").agg(
        F.max(F.struct("event_time", "value"))["value"].alias("value"),
        F.max("truncated").alias("truncated"),
        F.max("ended").alias("ended"),
    )
    reported = per_metric.groupBy("mdp_id", "sequence_number").agg(
        F.map_from_entries(
            F.array_sort(F.collect_list(F.when(F.col("key").isNotNull(), F.struct("key", "value"))))
        ).alias("_metrics"),
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
    by_then = readable
    if wait_seconds is not None:
        # What is reported when all waits are over must not change what is known of these days.
        last_decision = log.agg(F.max("event_time").alias("last_decision"))
        by_then = readable.crossJoin(F.broadcast(last_decision)).where(
            F.col("event_time") <= F.col("last_decision") + wait
        )
    ends, cuts = by_then.agg(F.count("ended"), F.count("truncated")).collect()[0]
    if not ends:
        if data.last_step == "column" and not (
            cuts or log.where(F.col("truncated").isNotNull()).select(F.lit(1)).take(1)
        ):
            raise StageError(
                f"data.lastStep column: neither the log nor {path} tells of last steps, by truncated or ended: "
                "have it written, name it in data.columns or data.outcomeColumns, or say terminal or truncated"
            )
        # Nobody tells of ends: the job's lastStep decides.
        return joined.select(*log.columns), counts
    return joined.select(*log.columns, F.coalesce("ended", F.lit(False)).alias("ended")), counts
