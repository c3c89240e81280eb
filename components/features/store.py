"""Feast: the feature service that a job names, or one made of the log's own state."""

from __future__ import annotations

import contextlib
import io
import os
import re
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml
from pyspark.sql import types as T

from contracts.job import Features
from contracts.stage import StageError
from contracts.transitions import FEAST_NAME_TAG, STATE_PREFIX

VIEW = "state"
SERVICE = "policy_state"

ONLINE_ROWS = 10_000
"""That are written to the online store at a time."""

_PLACE = "_place_in_mdp"
_RESERVED = {"mdp_id", "event_time", "event_timestamp", "sequence_number", "ordinal", _PLACE}
_KEY_TYPES: dict[str, T.DataType] = {"STRING": T.StringType(), "INT64": T.LongType(), "INT32": T.IntegerType()}
_NUMBERS = ("Int32", "Int64", "Float32", "Float64", "Bool")
_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class View:
    """A feature view as a service sees it."""

    name: str
    keys: dict[str, T.DataType]
    features: list[str]


def _feast() -> Any:
    # Imported late: Feast takes seconds to import, and only this stage needs it.
    os.environ.setdefault("FEAST_USAGE", "False")
    warnings.filterwarnings("ignore", category=RuntimeWarning, message="The spark")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    import feast

    return feast


def feast_error() -> type[Exception]:
    """What Feast's own errors derive from."""
    _feast()
    from feast.errors import FeastError

    error: type[Exception] = FeastError
    return error


def open_named(settings: Features) -> tuple[Any, Any]:
    """The store and the service that the job names; raises `StageError` for what is not there or not on Spark."""
    _feast()
    from feast.errors import FeastObjectNotFoundException

    path = Path(str(settings.repository))
    if not (path / "feature_store.yaml").is_file():
        raise StageError(f"data.features.repository {path}: no feature_store.yaml there")
    store = _open(path)
    if (kind := store.config.offline_store.type) != "spark":
        raise StageError(
            f"data.features.repository {path}: its offline_store is {kind}; set `offline_store: {{type: spark}}`, the "
            "engine that joins point in time here"
        )
    try:
        return store, store.get_feature_service(settings.service)
    except FeastObjectNotFoundException:
        there = ", ".join(sorted(s.name for s in store.list_feature_services())) or "none"
        raise StageError(
            f"data.features.service {settings.service}: not in the registry of {path}; there are: {there}. Run "
            "`feast apply` there after a change"
        ) from None


def _open(repository: Path) -> Any:
    store = _feast().FeatureStore(repo_path=str(repository))
    # The newest row of a key is all that serving reads; else Feast takes every row through the driver.
    store.config.materialization_config.pull_latest_features = True
    # Else all of them are turned into the online store's own form at once.
    store.config.materialization_config.online_write_batch_size = ONLINE_ROWS
    return store


def views_of(store: Any, service: Any) -> list[View]:
    """The views of a service, their join keys by the names that the service gives them, and their features.

    Raises `StageError` for a feature that is no number.
    """
    views = []
    for projection in service.feature_view_projections:
        try:
            view = store.get_feature_view(projection.name)
        except feast_error():
            raise StageError(
                f"data.features.service {service.name}: {projection.name} is no view of a source; on-demand "
                "and stream views cannot be joined by Spark"
            ) from None
        kinds = {c.name: _KEY_TYPES.get(c.dtype.to_value_type().name, T.StringType()) for c in view.entity_columns}
        for field in projection.features:
            if str(field.dtype) not in _NUMBERS:
                raise StageError(
                    f"data.features.service {service.name}: {projection.name_to_use()}.{field.name} is a "
                    f"{field.dtype}; a policy learns from numbers: encode it in the view's source"
                )
        keys = {projection.join_key_map.get(name, name): kind for name, kind in kinds.items()}
        views.append(View(projection.name_to_use(), keys, [field.name for field in projection.features]))
    return views


def publish(settings: Features, repository: Path, source: Path, features: list[str]) -> tuple[Any, Any]:
    """A Feast repository with the training data's own state as a view and a service; repeatable."""
    feast = _feast()
    from feast.infra.offline_stores.contrib.spark_offline_store.spark_source import SparkSource
    from feast.types import Float64
    from feast.value_type import ValueType

    if clash := _RESERVED.intersection(name.lower() for name in features):
        raise StageError(f"features: state feature {sorted(clash)[0]!r} has the name of a key column; rename it")
    fields = {name: field_name(name) for name in features}
    if len(set(fields.values())) != len(fields):
        twice = next(f for f in fields.values() if list(fields.values()).count(f) > 1)
        raise StageError(f"features: two state features are called {twice} in Feast; rename one")
    repository.mkdir(parents=True, exist_ok=True)
    online = settings.online_store.model_dump()
    if online["type"] == "sqlite":
        online.setdefault("path", str(repository / "online.db"))
    config = {
        "project": settings.project,
        "provider": "local",
        "registry": str(repository / "registry.db"),
        "offline_store": {"type": "spark"},
        "online_store": online,
        "entity_key_serialization_version": 3,
    }
    (repository / "feature_store.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    mdp = feast.Entity(name="mdp_id", join_keys=["mdp_id"], value_type=ValueType.STRING)
    view = feast.FeatureView(
        name=VIEW,
        entities=[mdp],
        ttl=timedelta(seconds=settings.ttl_seconds),
        schema=[feast.Field(name=field, dtype=Float64, tags={FEAST_NAME_TAG: name}) for name, field in fields.items()],
        source=SparkSource(
            name=VIEW,
            path=str(source),
            file_format="parquet",
            timestamp_field="event_time",
            # Of decisions at one instant, the last is the newest.
            created_timestamp_column=_PLACE,
            field_mapping={STATE_PREFIX + name: field for name, field in fields.items()} | {"ordinal": _PLACE},
        ),
    )
    store = _open(repository)
    store.apply([mdp, view, feast.FeatureService(name=SERVICE, features=[view])])
    return store, store.get_feature_service(SERVICE)


def field_name(feature: str) -> str:
    """Feast's name of a feature; an id that is a number is called `feature_<id>` there. Raises `StageError`."""
    name = f"feature_{feature}" if feature.isdecimal() else feature
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise StageError(f"features: state feature {feature!r}: Feast takes letters, digits and _ only; rename it")
    return name


def materialize(store: Any, service: Any, first: datetime, last: datetime) -> list[str]:
    """Bring the service's views in the online store up to `last`; returns the views that were behind.

    A view goes on from where it was left. One that was never there takes what the decision at `first` could see, and
    all since.
    """
    behind = []
    for projection in service.feature_view_projections:
        view = store.get_feature_view(projection.name)
        if not view.online:
            continue
        start = first - view.ttl if view.ttl else _LONG_AGO
        # Feast's own rule for a new view would begin at today's date.
        if ends := [end for _, end in view.materialization_intervals]:
            start = max(ends)
        if start < last:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                store.materialize(start, last, feature_views=[view.name])
            behind.append(view.name)
    return behind
