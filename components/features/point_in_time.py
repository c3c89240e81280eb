"""State features by Feast: what was known of an MDP at the instant of each decision."""

from __future__ import annotations

import contextlib
import io
import os
import re
import warnings
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any

import yaml
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from components.spark import spark_session
from contracts.job import JobSpec
from contracts.progress import report
from contracts.stage import StageError, read_record, stage

VIEW = "state"
SERVICE = "policy_state"
PREFIX = "state_"
"""Of the state's columns in the training data."""

_RESERVED = {"mdp_id", "event_time", "event_timestamp", "sequence_number"}


def join_features(spec: JobSpec, timeline: str | Path, output: str | Path) -> None:
    """Write `training/` (Parquet: the transitions, one `state_<feature>` column per feature) and a Feast repository.

    The log's state features are published as a Feast source, and each decision's state is joined back from it by
    (mdp_id, event time): a value stamped after the decision is never used, one at the same instant is, one older than
    `features.ttlSeconds` is missing, and missing stays missing (null). The newest values go to the online store.
    """
    read_record(timeline)
    with stage("features", output) as (directory, facts), spark_session("features") as spark:
        transitions = spark.read.parquet(str(Path(timeline) / "transitions"))
        names = sorted(r[0] for r in transitions.select(F.explode(F.map_keys("state_features"))).distinct().collect())
        if not names:
            raise StageError("features: no row of the log has state_features; log them, or name a feature service")
        if clash := _RESERVED.intersection(n.lower() for n in names):
            raise StageError(f"features: state feature {sorted(clash)[0]!r} has the name of a key column; rename it")
        fields = {name: field_name(name) for name in names}
        same_instant = transitions.groupBy("mdp_id", "event_time").count().where("count > 1")
        if first := same_instant.first():
            raise StageError(
                f"features: mdp_id {first['mdp_id']} has {first['count']} decisions at {first['event_time']}, and "
                f"{same_instant.count()} instants are like it: a state is found by MDP and event time; log event_time "
                "so finely that it tells decisions apart"
            )
        report(0, 3, f"{len(names)} features")
        source = directory / "source"
        values = [F.col("state_features")[name].alias(field) for name, field in fields.items()]
        transitions.select("mdp_id", "event_time", *values).write.parquet(str(source))
        repository = directory / "repository"
        store, service = open_feature_store(spec, repository, source, list(fields.values()))
        report(1, 3, "joining point in time")
        keys = transitions.select("mdp_id", "sequence_number", F.col("event_time").alias("event_timestamp"))
        joined: DataFrame = store.get_historical_features(entity_df=keys, features=service).to_spark_df()
        values = [F.col(field).cast("double").alias(PREFIX + name) for name, field in fields.items()]
        state = joined.select("mdp_id", "sequence_number", *values)
        training = transitions.drop("state_features").join(state, ["mdp_id", "sequence_number"], "left")
        training = training.repartition("mdp_id").sortWithinPartitions("mdp_id", "ordinal")
        training.write.parquet(str(directory / "training"))
        report(2, 3, "materializing online")
        earliest, latest = transitions.agg(F.min("event_time"), F.max("event_time")).collect()[0]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            # Feast's window is (start, end]; it wants aware times, Spark returns naive ones in UTC.
            store.materialize((earliest - timedelta(seconds=1)).replace(tzinfo=UTC), latest.replace(tzinfo=UTC))
        written = spark.read.parquet(str(directory / "training"))
        missing = written.agg(*[F.avg(F.col(PREFIX + n).isNull().cast("int")).alias(n) for n in names]).collect()[0]
        rows, expected = written.count(), transitions.count()
        if rows != expected:
            raise StageError(f"features: {expected} transitions in, {rows} out")
        facts |= {"rows": rows, "features": names, "missing_fraction": {n: round(missing[n], 6) for n in names}}
        report(3, 3, f"{rows:,} rows")


def field_name(feature: str) -> str:
    """Feast's name of a feature; an id that is a number is called `feature_<id>` there. Raises `StageError`."""
    name = f"feature_{feature}" if feature.isdecimal() else feature
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise StageError(f"features: state feature {feature!r}: Feast takes letters, digits and _ only; rename it")
    return name


def open_feature_store(spec: JobSpec, repository: Path, source: Path, names: list[str]) -> tuple[Any, Any]:
    """A Feast store at `repository` with the state's feature view and service applied; repeatable."""
    # Imported here: Feast takes seconds to import, and only this stage needs it.
    os.environ.setdefault("FEAST_USAGE", "False")
    warnings.filterwarnings("ignore", category=RuntimeWarning, message="The spark")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    from feast import Entity, FeatureService, FeatureStore, FeatureView, Field
    from feast.infra.offline_stores.contrib.spark_offline_store.spark_source import SparkSource
    from feast.types import Float64
    from feast.value_type import ValueType

    repository.mkdir(parents=True, exist_ok=True)
    online = spec.features.online_store.model_dump()
    if online["type"] == "sqlite":
        online.setdefault("path", str(repository / "online.db"))
    config = {
        "project": spec.features.project,
        "provider": "local",
        "registry": str(repository / "registry.db"),
        "offline_store": {"type": "spark"},
        "online_store": online,
        "entity_key_serialization_version": 3,
        # One row per MDP is all that serving reads; without this Feast writes every row, the last one winning.
        "materialization": {"pull_latest_features": True},
    }
    (repository / "feature_store.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    mdp = Entity(name="mdp_id", join_keys=["mdp_id"], value_type=ValueType.STRING)
    view = FeatureView(
        name=VIEW,
        entities=[mdp],
        ttl=timedelta(seconds=spec.features.ttl_seconds),
        schema=[Field(name=name, dtype=Float64) for name in names],
        source=SparkSource(name=VIEW, path=str(source), file_format="parquet", timestamp_field="event_time"),
    )
    store = FeatureStore(repo_path=str(repository))
    store.apply([mdp, view, FeatureService(name=SERVICE, features=[view])])
    return store, store.get_feature_service(SERVICE)
