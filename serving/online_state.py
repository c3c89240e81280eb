"""A decision's state from Feast's online store: what training joined for the same instant."""

from __future__ import annotations

import importlib
import math
import sqlite3
import time
from datetime import UTC, datetime
from typing import Any

from contracts.transitions import FEAST_NAME_TAG


class OnlineState:
    """Reads the state features of a Feast feature service, for `PolicyClient.decide`.

    >>> state = OnlineState("feature_repository", "shop")        # doctest: +SKIP
    >>> decision = client.decide("user-7", 0, state.read(mdp_id="user-7"))  # doctest: +SKIP
    """

    def __init__(self, repository: str, service: str, action_key: str | None = None) -> None:
        """Views joined by `action_key` describe actions, and are left out. What is not there raises Feast's errors."""
        from feast import FeatureStore

        self._store = FeatureStore(repo_path=repository)
        if self._store.config.online_store.type == "sqlite":
            _read_stamps_in_utc()
        self._features: list[str] = []
        self._names: dict[str, str] = {}
        self._ttl: dict[str, float] = {}
        self._keys: dict[str, type] = {}
        projections: list[Any] = self._store.get_feature_service(service).feature_view_projections
        for projection in projections:
            view = self._store.get_feature_view(projection.name)
            keys = {projection.join_key_map.get(c.name, c.name): c.dtype for c in view.entity_columns}
            if action_key in keys:
                continue
            self._keys |= {key: str if str(kind) == "String" else int for key, kind in keys.items()}
            for field in projection.features:
                self._features.append(f"{projection.name_to_use()}:{field.name}")
                self._names[field.name] = field.tags.get(FEAST_NAME_TAG, field.name)
                self._ttl[field.name] = view.ttl.total_seconds() if view.ttl else float("inf")

    def read(self, at: datetime | None = None, **keys: Any) -> dict[str, float]:
        """The features of these join keys by name, without those missing, or older at `at` (now) than their TTL.

        An `at` without a time zone is in UTC. Ages are in whole seconds. A store holds the newest values alone: an `at`
        before their time finds nothing.
        Raises KeyError for a join key that is not given.
        """
        for key in self._keys:
            if key not in keys:
                raise KeyError(f"{key}: the service joins by it; give all of {', '.join(self._keys)}")
        row = {key: kind(keys[key]) for key, kind in self._keys.items()}
        found = self._store.get_online_features(features=self._features, entity_rows=[row])
        values = found.to_dict(include_event_timestamps=True)
        # Feast's offline join heeds a view's TTL, its online reads do not. Stamps are whole seconds in some stores.
        now = (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() if at else time.time()
        return {
            own: float(values[name][0])
            for name, own in self._names.items()
            if values[name][0] is not None
            and math.isfinite(values[name][0])
            and 0 <= int(now) - values[f"{name}__ts"][0] <= self._ttl[name]
        }


def _read_stamps_in_utc() -> None:
    """Feast takes stamps in sqlite for local time, and a job, which runs in UTC, has written them.

    What is materialized by hand must be so as well.
    """
    # What it registers is replaced here.
    importlib.import_module("feast.infra.online_stores.sqlite")

    def stamp(seconds: bytes) -> datetime:
        return datetime.fromtimestamp(int(seconds), UTC).replace(tzinfo=None)

    sqlite3.register_converter("timestamp", stamp)
