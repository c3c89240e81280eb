"""What serving reads is what training read: Feast's online stores beside its point-in-time join."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from feast import FeatureStore

from components.features.point_in_time import REPOSITORY, join_features
from components.features.store import SERVICE, VIEW
from contracts.job import JobSpec
from serving.online_state import OnlineState
from tests.components.features.test_point_in_time import NOON, apply, joined, named, repository, row, timeline

pytestmark = pytest.mark.usefixtures("spark")


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Redis that keeps nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = shutil.which("redis-server")
    assert server, "redis-server is not on PATH: make install brings it"
    command = [server, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    process = subprocess.Popen(command, cwd=tmp_path_factory.mktemp("redis"), stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert time.monotonic() < deadline, "Redis does not answer"
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def spec(store: dict[str, Any], project: str = "bluewhale") -> JobSpec:
    features = {"ttlSeconds": 3600, "project": project, "onlineStore": store}
    return JobSpec.model_validate({"actions": ["a", "b"], "data": {"features": features}})


def online(output: Path, mdp: str, at: int = 0) -> dict[str, float]:
    """What serving would read, so many seconds after noon."""
    return OnlineState(str(output / REPOSITORY), SERVICE).read(NOON + timedelta(seconds=at), mdp_id=mdp)


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
class TestTheStateAtServing:
    def store(self, kind: str, redis: str) -> dict[str, Any]:
        return {"type": "sqlite"} if kind == "sqlite" else {"type": "redis", "connection_string": redis}

    def test_is_the_state_of_the_log_at_the_same_instant(self, kind: str, redis: str, tmp_path: Path) -> None:
        mdps = range(4)
        rows = [row(f"m{m}", s, state_x=0.1 * m + s, state_7=float(-s)) for m in mdps for s in range(3 + m)]
        rows[2].pop("state_7")  # the newest row of m0: missing stays missing
        join_features(spec(self.store(kind, redis), "same"), timeline(tmp_path / "timeline", rows), tmp_path / "out")
        for m in mdps:
            newest = [r for r in joined(tmp_path / "out") if r["mdp_id"] == f"m{m}"][-1]
            expected = {name: newest[f"state_{name}"] for name in ("x", "7") if newest[f"state_{name}"] is not None}
            assert online(tmp_path / "out", f"m{m}", at=10) == expected

    def test_is_the_state_that_a_named_service_joined_for_the_same_instant(
        self, kind: str, redis: str, tmp_path: Path
    ) -> None:
        """Every MDP asked at one instant, with values that are fresh, just in time, out of date and never there."""
        path = repository(tmp_path / "repository")
        if kind == "redis":
            text = (path / "feature_store.yaml").read_text()
            store = f'{{type: redis, connection_string: "{redis}"}}'
            text = text.replace("{type: sqlite, path: online.db}", store).replace(
                "project: shop", "project: shop_redis"
            )
            (path / "feature_store.yaml").write_text(text)
            apply(path)
        rows = [row(mdp, 0, at=0, action="a", shop="8") for mdp in ("same", "early", "old", "two", "unknown")]
        join_features(named(path), timeline(tmp_path / "timeline", rows), tmp_path / "out")
        state = OnlineState(str(path), "shop", action_key="item")
        for found in joined(tmp_path / "out"):
            trained = {name: found[f"state_{name}"] for name in ("age", "open") if found[f"state_{name}"] is not None}
            assert state.read(NOON, mdp_id=found["mdp_id"], shop=8) == trained

    def test_is_that_of_the_last_of_decisions_at_one_instant(self, kind: str, redis: str, tmp_path: Path) -> None:
        rows = [row("m", step, at=0, state_x=float(step)) for step in range(5)]
        join_features(spec(self.store(kind, redis), "tied"), timeline(tmp_path / "timeline", rows), tmp_path / "out")
        assert online(tmp_path / "out", "m") == {"x": 4.0}

    def test_is_missing_where_it_is_too_old(self, kind: str, redis: str, tmp_path: Path) -> None:
        rows = [row("m", 0, state_x=1.0)]
        join_features(spec(self.store(kind, redis), "old"), timeline(tmp_path / "timeline", rows), tmp_path / "out")
        assert online(tmp_path / "out", "m", at=3600) == {"x": 1.0}
        assert online(tmp_path / "out", "m", at=3601) == {}


def test_an_instant_without_a_time_zone_is_in_utc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("m", 0, state_x=1.0)]
    join_features(spec({"type": "sqlite"}), timeline(tmp_path / "timeline", rows), tmp_path / "out")
    state = OnlineState(str(tmp_path / "out" / REPOSITORY), SERVICE)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert state.read(NOON.replace(tzinfo=None), mdp_id="m") == {"x": 1.0}
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_join_key_that_is_not_given_is_named(tmp_path: Path) -> None:
    join_features(
        spec({"type": "sqlite"}), timeline(tmp_path / "timeline", [row("m", 0, state_x=1.0)]), tmp_path / "out"
    )
    with pytest.raises(KeyError, match="mdp_id: the service joins by it"):
        OnlineState(str(tmp_path / "out" / REPOSITORY), SERVICE).read(user="m")


def test_a_run_over_older_days_does_not_take_the_store_back(redis: str, tmp_path: Path) -> None:
    job = spec({"type": "redis", "connection_string": redis}, "days")
    for name, steps in (("new", 5), ("old", 3)):
        rows = [row("m", step, state_x=float(step)) for step in range(steps)]
        join_features(job, timeline(tmp_path / name, rows), tmp_path / f"out-{name}")
    assert online(tmp_path / "out-old", "m", at=10) == {"x": 4.0}


def test_a_decision_dated_in_the_future_does_not_keep_the_store_from_those_to_come(tmp_path: Path) -> None:
    rows = [row("m", 0, state_x=1.0), row("m", 1, at=100 * 365 * 86_400, state_x=2.0)]
    join_features(spec({"type": "sqlite"}), timeline(tmp_path / "timeline", rows), tmp_path / "out")
    view = FeatureStore(repo_path=str(tmp_path / "out" / REPOSITORY)).get_feature_view(VIEW)
    assert [end <= datetime.now(UTC) for _, end in view.materialization_intervals] == [True]


def test_projects_keep_apart_what_has_the_same_name(redis: str, tmp_path: Path) -> None:
    store = {"type": "redis", "connection_string": redis}
    for project, value in (("one", 1.0), ("two", 2.0)):
        rows = [row("m", 0, state_x=value)]
        join_features(spec(store, project), timeline(tmp_path / f"t{project}", rows), tmp_path / project)
    assert [online(tmp_path / project, "m") for project in ("one", "two")] == [{"x": 1.0}, {"x": 2.0}]
