"""What serving reads is what training read: Feast's online stores beside its point-in-time join."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from components.features.point_in_time import SERVICE, join_features
from contracts.job import JobSpec
from tests.components.features.test_point_in_time import row, timeline


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
    return JobSpec.model_validate(
        {"actions": ["a", "b"], "features": {"ttlSeconds": 3600, "project": project, "onlineStore": store}}
    )


def online(output: Path, mdps: list[str]) -> dict[str, list[Any]]:
    from feast import FeatureStore

    store = FeatureStore(repo_path=str(output / "repository"))
    entities = [{"mdp_id": mdp} for mdp in mdps]
    found: dict[str, list[Any]] = store.get_online_features(
        features=store.get_feature_service(SERVICE), entity_rows=entities
    ).to_dict()
    return found


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_the_state_at_serving_is_the_state_joined_for_training_at_the_same_instant(
    kind: str, redis: str, tmp_path: Path
) -> None:
    store = {"type": "sqlite"} if kind == "sqlite" else {"type": "redis", "connection_string": redis}
    rows = [row(f"m{m}", step, x=0.1 * m + step, y=float(-step)) for m in range(4) for step in range(3 + m)]
    rows[2]["state_features"].pop("y")  # the newest row of m0: missing stays missing
    join_features(spec(store, "same"), timeline(tmp_path / "timeline", rows), tmp_path / "out")
    joined = pq.read_table(tmp_path / "out" / "training").to_pylist()
    mdps = [f"m{m}" for m in range(4)]
    newest = {m: max((r for r in joined if r["mdp_id"] == m), key=lambda r: r["ordinal"]) for m in mdps}
    served = online(tmp_path / "out", mdps)
    for name in ("x", "y"):
        assert served[name] == [newest[mdp][f"state_{name}"] for mdp in mdps]
    assert served["y"][0] is None


def test_a_run_over_older_days_does_not_take_the_store_back(redis: str, tmp_path: Path) -> None:
    job = spec({"type": "redis", "connection_string": redis}, "days")
    join_features(job, timeline(tmp_path / "new", [row("m", step, x=float(step)) for step in range(5)]), tmp_path / "a")
    join_features(job, timeline(tmp_path / "old", [row("m", step, x=float(step)) for step in range(3)]), tmp_path / "b")
    assert online(tmp_path / "b", ["m"])["x"] == [4.0]


def test_projects_keep_apart_what_has_the_same_name(redis: str, tmp_path: Path) -> None:
    store = {"type": "redis", "connection_string": redis}
    for project, value in (("one", 1.0), ("two", 2.0)):
        join_features(
            spec(store, project), timeline(tmp_path / f"t{project}", [row("m", 0, x=value)]), tmp_path / project
        )
    assert [online(tmp_path / project, ["m"])["x"] for project in ("one", "two")] == [[1.0], [2.0]]
