"""The training data: each transition with its state, as it was known at the instant of the decision."""

from __future__ import annotations

import functools
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql import types as T

from components.features import store as feast_store
from components.spark import spark_session
from contracts.job import Features, JobSpec, Slate
from contracts.progress import report
from contracts.stage import StageError, read_record, stage
from contracts.transitions import ACTION_PREFIX, STATE_PREFIX

_TURN = "_turn"
REPOSITORY = "repository"
"""Of the log's own state, in the stage's directory."""


def join_features(spec: JobSpec, timeline: str | Path, output: str | Path) -> None:
    """Write `training/` (Parquet): the transitions with one column `state_<feature>` for each feature of the state.

    A log that carries its state has it in its rows already: it is published as a Feast view and service in
    `repository/`. Where the job names a feature service, its values are joined by Feast, point in time: a value
    stamped after the decision is never used, one at the same instant is, one older than its view's TTL is missing, and
    missing stays missing (null); features joined by `data.features.actionKey` are those of the action taken, columns
    `action_feature_<feature>`. Either way the online store gets the newest values, up to the last decision, or to now.
    """
    read_record(timeline)
    with stage("features", output) as (directory, facts), spark_session("features") as spark:
        source = Path(timeline) / "transitions"
        transitions = spark.read.parquet(str(source))
        training = directory / "training"
        settings = spec.data.features
        own = [name for name in _features(transitions, STATE_PREFIX) if STATE_PREFIX + name not in settings.keys]
        report(0, 3, f"{len(own)} features in the log" if own else "joining point in time")
        if not (settings.service or own):
            raise StageError(
                "features: no row of the log has state_features; log them, name their columns in data.stateColumns, or "
                "name a feature service in data.features"
            )
        if settings.service:
            store, service = feast_store.open_named(settings)
        described = transitions if spec.action_space == "discrete" else describe_actions(transitions, spec.slate)
        if settings.service:
            described = join_service(described, store, service, settings)
        if described is transitions:
            # The files as they are: an MDP stays in one of them, in order.
            shutil.copytree(source, training, copy_function=_link)
        else:
            described.repartition("mdp_id").sortWithinPartitions("mdp_id", "ordinal").write.parquet(str(training))
        if not settings.service:
            store, service = feast_store.publish(settings, directory / REPOSITORY, training, own)
        report(1, 3, "materializing online")
        first, last = transitions.agg(F.min("event_time"), F.max("event_time")).collect()[0]
        # Spark returns naive times in UTC. A store that had been brought up to a time to come would take nothing more
        # until then.
        facts["materialized"] = feast_store.materialize(
            store, service, first.replace(tzinfo=UTC), min(last.replace(tzinfo=UTC), datetime.now(UTC))
        )
        report(2, 3, "counting")
        written = spark.read.parquet(str(training))
        found = {prefix: _features(written, prefix) for prefix in (STATE_PREFIX, ACTION_PREFIX)}
        every = [prefix + name for prefix, names in found.items() for name in names]
        counted = written.agg(F.count("*"), *[F.avg(F.col(f"`{n}`").isNull().cast("int")) for n in every]).collect()[0]
        rows, expected = counted[0], transitions.count()
        if rows != expected:
            raise StageError(
                f"features: {expected} transitions in, {rows} out: the service {settings.service} has several values "
                "for one key and instant; give its source a created_timestamp_column, or one row for each"
            )
        missing = dict(zip(every, counted[1:], strict=True))
        facts |= {
            "rows": rows,
            "features": found[STATE_PREFIX],
            "action_features": found[ACTION_PREFIX],
            "missing_fraction": {n: round(missing[STATE_PREFIX + n], 6) for n in found[STATE_PREFIX]},
        }
        report(3, 3, f"{rows:,} rows")


def _features(frame: DataFrame, prefix: str) -> list[str]:
    return sorted(name.removeprefix(prefix) for name in frame.columns if name.startswith(prefix))


def _link(source: str, target: str) -> None:
    """A second name for a finished file, where the file system has such; else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def describe_actions(transitions: DataFrame, slate: Slate | None = None) -> DataFrame:
    """The transitions with a column for each of the numbers that describe their actions.

    Of slates they are those of one listed item, drawn by the hash of the row's key: what normalization looks at.
    """
    listed = F.flatten(F.transform(F.coalesce("possible_actions", F.array()), F.map_keys))
    one = F.col("action")
    if slate:
        drawn = F.pmod(F.xxhash64("mdp_id", "ordinal"), F.size("possible_actions").cast("long"))
        one = F.get("possible_actions", drawn.cast("int"))
    every = listed if slate else F.array_union(F.map_keys("action"), listed)
    names = sorted(row[0] for row in transitions.select(F.explode(every)).distinct().collect())
    return transitions.withColumns({ACTION_PREFIX + name: one[name] for name in names})


def _apart(instants: DataFrame, views: list[feast_store.View]) -> DataFrame:
    """The instants with the `_turn` in which Feast is asked for each: as good as always there is one.

    Feast tells the instants of a view with several keys apart by those keys' texts, one after another without anything
    between: (1, 23) and (12, 3) at one time are one to it, and so must not be asked for together.
    """
    turns = []
    for view in views:
        if len(view.keys) > 1:
            alike = F.concat(*[F.col(key).cast("string") for key in view.keys], F.col("event_timestamp").cast("string"))
            # Rows that miss a key find nothing, and need not be kept apart.
            apart = F.coalesce(alike, F.concat_ws(" ", "_mdp", "_step"))
            rank = F.dense_rank().over(Window.partitionBy(apart).orderBy(*view.keys))
            turns.append(F.when(alike.isNull(), 1).otherwise(rank).cast("string"))
    return instants.withColumn(_TURN, F.concat_ws(" ", *turns))


def _key(given: Column, kind: T.DataType) -> Column:
    """A key as the view has it; a whole number may be written as 7.0, as tools do that had missing ones beside it."""
    if not isinstance(kind, T.IntegralType):
        return given.try_cast(kind)
    number = given.try_cast("decimal(38,9)")
    return F.when(number == F.floor(number), number.try_cast(kind))


def join_service(transitions: DataFrame, store: Any, service: Any, settings: Features) -> DataFrame:
    """The transitions with the service's features joined as of each decision's event time."""
    views = feast_store.views_of(store, service)
    given = {"mdp_id": "mdp_id"} | {name: name for name in settings.keys}
    if settings.action_key:
        given[settings.action_key] = "action"
    keys: dict[str, T.DataType] = {}
    for view in views:
        for key, kind in view.keys.items():
            if key not in given:
                raise StageError(
                    f"data.features.service {settings.service}: view {view.name} is joined by {key}, which is neither "
                    f"mdp_id nor among data.features.keys {settings.keys}; name it there, or in actionKey"
                )
            keys[key] = kind
    instants = transitions.select(
        F.col("mdp_id").alias("_mdp"),
        F.col("sequence_number").alias("_step"),
        F.col("event_time").alias("event_timestamp"),
        *[_key(F.col(f"`{given[key]}`"), kind).alias(key) for key, kind in keys.items()],
    )
    instants = _apart(instants, views).persist()
    try:
        joined = functools.reduce(
            DataFrame.union,
            [
                store.get_historical_features(
                    entity_df=instants.where(F.col(_TURN) == turn).drop(_TURN), features=service
                ).to_spark_df()
                for turn in sorted(row[0] for row in instants.select(_TURN).distinct().collect())
            ],
        )
    except (PySparkException, feast_store.feast_error(), ValueError) as error:
        raise StageError(
            f"data.features.service {settings.service}: Feast cannot join it: {' '.join(str(error).split())[:400]}"
        ) from None
    clash = set(transitions.columns)
    columns = []
    for view in views:
        prefix = ACTION_PREFIX if settings.action_key in view.keys else STATE_PREFIX
        for name in view.features:
            if prefix + name in clash:
                raise StageError(f"features: {name} is in the log's own state and in view {view.name}; rename one")
            value = F.col(f"`{name}`").cast("double")
            # NaN is greater than infinity in Spark: what is no finite number is missing.
            columns.append(F.when(F.abs(value) < float("inf"), value).alias(prefix + name))
    values = joined.select("_mdp", "_step", *columns)
    same = (F.col("mdp_id") == F.col("_mdp")) & (F.col("sequence_number") == F.col("_step"))
    return transitions.join(values, same, "left").drop("_mdp", "_step", *settings.keys)
