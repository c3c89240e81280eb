"""State as it was known at the decision, joined by a real Feast on a real Spark."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.features.point_in_time import SERVICE, join_features, open_feature_store
from components.spark import spark_session
from contracts.decision_log import SCHEMA
from contracts.job import JobSpec
from contracts.stage import RECORD, StageError

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
SPEC = JobSpec.model_validate({"actions": ["a", "b"], "features": {"ttlSeconds": 60}})


def timeline(directory: Path, rows: list[dict[str, Any]]) -> Path:
    """A finished timeline stage with the given rows."""
    schema = pa.schema([SCHEMA.field(n) for n in ("mdp_id", "sequence_number", "event_time", "state_features")])
    table = pa.Table.from_pylist(
        [row | {"state_features": list(row["state_features"].items())} for row in rows], schema=schema
    ).append_column("ordinal", pa.array([row["sequence_number"] + 1 for row in rows]))
    (directory / "transitions").mkdir(parents=True)
    pq.write_table(table, directory / "transitions" / "part.parquet")
    (directory / RECORD).write_text("{}")
    return directory


def row(mdp: str, step: int, **state: float) -> dict[str, Any]:
    return {
        "mdp_id": mdp,
        "sequence_number": step,
        "event_time": NOON + timedelta(seconds=step),
        "state_features": state,
    }


def test_each_decision_gets_its_own_state_and_the_online_store_the_newest(tmp_path):
    from feast import FeatureStore

    rows = [row(f"m{m}", step, x=10.0 * m + step, y=float(step)) for m in range(5) for step in range(4)]
    rows[7]["state_features"].pop("y")
    join_features(SPEC, timeline(tmp_path / "timeline", rows), tmp_path / "out")

    joined = pq.read_table(tmp_path / "out" / "training").to_pylist()
    assert len(joined) == 20
    for found in joined:
        mdp, step = int(found["mdp_id"][1:]), found["sequence_number"]
        assert found["state_x"] == 10.0 * mdp + step
        assert found["state_y"] == (None if (mdp, step) == (1, 3) else float(step))
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["missing_fraction"] == {"x": 0.0, "y": 0.05}

    store = FeatureStore(repo_path=str(tmp_path / "out" / "repository"))
    online = store.get_online_features(
        features=store.get_feature_service(SERVICE), entity_rows=[{"mdp_id": "m0"}, {"mdp_id": "m4"}, {"mdp_id": "no"}]
    ).to_dict()
    assert online["x"] == [3.0, 43.0, None]
    assert online["y"] == [3.0, 3.0, None]


def test_features_may_be_called_by_numbers(tmp_path):
    rows = [{**row("m", step), "state_features": {"0": 1.0 * step, "17": -1.0}} for step in range(2)]
    join_features(SPEC, timeline(tmp_path / "timeline", rows), tmp_path / "out")
    joined = pq.read_table(tmp_path / "out" / "training").sort_by("ordinal").to_pylist()
    assert [(found["state_0"], found["state_17"]) for found in joined] == [(0.0, -1.0), (1.0, -1.0)]
    assert json.loads((tmp_path / "out" / RECORD).read_text())["features"] == ["0", "17"]


def test_a_later_value_is_never_used_one_of_the_same_instant_is_and_an_old_one_is_missing(tmp_path):
    stamped = pa.table(
        {
            "mdp_id": ["late", "same", "early", "old", "two", "two"],
            "event_time": pa.array(
                [NOON + timedelta(seconds=s) for s in (1, 0, -59, -61, -20, -10)], pa.timestamp("us", "UTC")
            ),
            "x": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        }
    )
    (tmp_path / "source").mkdir()
    pq.write_table(stamped, tmp_path / "source" / "part.parquet")
    with spark_session("test") as spark:
        store, service = open_feature_store(SPEC, tmp_path / "repository", tmp_path / "source", ["x"])
        keys = spark.createDataFrame(
            [(mdp, NOON) for mdp in ("late", "same", "early", "old", "two", "unknown")],
            "mdp_id string, event_timestamp timestamp",
        )
        joined = store.get_historical_features(entity_df=keys, features=service).to_spark_df().collect()
    assert {r["mdp_id"]: r["x"] for r in joined} == {
        "late": None,
        "same": 2.0,
        "early": 3.0,
        "old": None,
        "two": 6.0,
        "unknown": None,
    }


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "no row of the log has state_features"),
        ({"user.age": 1.0}, "letters, digits and _ only"),
        ({"event_time": 1.0}, "'event_time' has the name of a key column"),
    ],
)
def test_a_state_that_cannot_be_joined_is_refused(tmp_path, state, message):
    with pytest.raises(StageError, match=message):
        join_features(SPEC, timeline(tmp_path / "timeline", [row("m", 0, **state)]), tmp_path / "out")
    assert not (tmp_path / "out" / RECORD).exists()


def test_decisions_of_one_instant_are_refused_not_mixed_up(tmp_path):
    rows = [row("m", 0, x=1.0), row("m", 1, x=2.0) | {"event_time": NOON}]
    with pytest.raises(StageError, match="mdp_id m has 2 decisions at"):
        join_features(SPEC, timeline(tmp_path / "timeline", rows), tmp_path / "out")
