"""The data report: figures of a known timeline, and its page; on a real Spark."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import Row

from components.timeline.build import build_timeline
from components.timeline.describe import BINS, describe, distributions, mdps_by_length, of_lengths, warnings
from contracts.job import JobSpec

DAY = datetime(2026, 1, 1, 23, 59, 58)
SCHEMA = (
    "mdp_id string, ordinal int, event_time timestamp, state_age double, state_visits double, action string, "
    "action_probability double, metrics map<string,double>, terminal boolean, truncated boolean"
)


def row(mdp: str, ordinal: int, seconds: int, **changes: Any) -> dict[str, Any]:
    return {
        "mdp_id": mdp, "ordinal": ordinal, "event_time": DAY + timedelta(seconds=seconds),
        "state_age": 30.0, "state_visits": None, "action": "left", "action_probability": 0.5,
        "metrics": {"reward": float(ordinal)}, "terminal": False, "truncated": False,
    } | changes  # fmt: skip


ROWS = [
    row("a", 1, 0),
    row("a", 2, 5, action="right", action_probability=0.25),
    row("a", 3, 4, terminal=True),
    row("b", 1, 0, truncated=True, state_age=None, state_visits=2.0, metrics=None, action_probability=None),
]


@pytest.fixture(scope="module")
def found(spark, tmp_path_factory) -> dict[str, Any]:
    path = str(tmp_path_factory.mktemp("timeline") / "transitions")
    spark.createDataFrame(ROWS, SCHEMA).write.parquet(path)
    written = spark.read.parquet(path)
    return describe(written, mdps_by_length(written), ["age", "visits"], ["reward"])


def test_rows_ends_and_orders_are_counted(found):
    assert (found["terminal"], found["truncated"]) == (1, 1)
    assert found["mdps_over_days"] == 1
    assert found["largest_mdp"] == {"mdp_id": "a", "rows": 3}


def test_actions_features_and_lengths_are_counted(found):
    assert found["actions"] == {"left": 3, "right": 1}
    assert found["coverage"] == {"age": 0.75, "visits": 0.25}
    assert (found["lengths"]["count"], found["lengths"]["mean"]) == (2, 2.0)


def test_a_value_that_is_not_logged_is_not_counted(found):
    assert found["propensities"]["count"] == 3
    assert found["metrics"]["reward"]["count"] == 3


def test_one_mdp_that_holds_far_too_many_rows_is_warned_of():
    [said] = warnings("robot", 5000, rows=100_000, mdps=2000)
    assert "MDP robot holds 5.0% of all rows, 100 times the mean" in said
    assert warnings("robot", 5000, rows=100_000, mdps=20) == [], "as long as the others"
    assert warnings("robot", 5000, rows=1_000_000, mdps=20_000) == [], "too little to matter"


def test_the_histogram_of_lengths_holds_every_mdp_once():
    found = of_lengths([Row(length=n, mdps=2) for n in range(1, 32)])
    assert (found["count"], found["mean"], found["minimum"], found["maximum"]) == (62, 16.0, 1.0, 31.0)
    assert found["counts"] == [2] * 29 + [4], "the last bin has both of its edges"
    assert of_lengths([Row(length=7, mdps=3)])["counts"] == [3]


def test_a_histogram_holds_every_value_once(spark):
    frame = spark.range(1001).selectExpr("cast(id as double) as x", "7.0D as same", "cast(null as double) as none")
    found, *_ = distributions(frame, {name: frame[name] for name in frame.columns})
    assert sum(found["x"]["counts"]) == 1001 == found["x"]["count"]
    assert (len(found["x"]["counts"]), len(found["x"]["edges"])) == (BINS, BINS + 1)
    assert max(found["x"]["counts"]) - min(found["x"]["counts"]) <= 1
    assert (found["same"]["counts"], found["same"]["edges"]) == ([1001], [7.0, 7.0])
    assert (found["none"]["counts"], found["none"]["edges"], found["none"]["count"]) == ([], [], 0)


def test_the_stage_leaves_a_page_that_needs_nothing_from_elsewhere(tmp_path: Path):
    rows = [
        {
            "mdp_id": f"m{i % 7}", "sequence_number": i, "event_time": f"2026-01-01T00:00:{i:02d}Z", "action": "left",
            "state_features": {"x": float(i)}, "metrics": {"reward": 1.0},
        }
        for i in range(50)
    ]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*rows, rows[0] | {"action": "jump"}]))
    spec = JobSpec.model_validate({"actions": ["left", "right"], "data": {"maxQuarantineFraction": 0.5}})
    build_timeline(spec, str(tmp_path / "log.jsonl"), None, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 1
    for outside in ("<script", "<link", "<img", "src=", "@import"):
        assert outside not in page
    for said in (
        "Rows read",
        "51",
        "unknown action",
        "reward per decision",
        "not logged",
        "rows that have the feature",
    ):
        assert said in page
