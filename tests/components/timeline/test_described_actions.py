"""Decisions whose action is numbers by name: parametric and continuous action spaces, on a real Spark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.timeline.build import build_timeline
from contracts.decision_log import schema
from contracts.job import JobSpec

pytestmark = pytest.mark.usefixtures("spark")

SOFA, LAMP = {"price": 900.0, "blue": 1.0}, {"price": 40.0, "blue": 0.0}


def spec(space: str, **data: Any) -> JobSpec:
    return JobSpec.model_validate({"actionSpace": space, "data": {"maxQuarantineFraction": 1.0, **data}})


def decision(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "mdp_id": "m", "sequence_number": step, "event_time": f"2026-01-01T00:00:{step:02d}Z", "action": SOFA,
        "possible_actions": [LAMP, SOFA], "state_features": {"x": 1.0}, "metrics": {"reward": 1.0},
    } | changes  # fmt: skip


def build(job: JobSpec, rows: list[dict[str, Any]], directory: Path) -> tuple[list[dict], list[dict]]:
    log = directory / "log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_timeline(job, str(log), None, directory / "out")
    written, rejected = (pq.read_table(directory / "out" / name).to_pylist() for name in ("transitions", "quarantine"))
    return sorted(written, key=lambda row: row["ordinal"]), rejected


def test_the_next_action_and_those_that_were_possible_follow(tmp_path):
    rows, rejected = build(
        spec("parametric"), [decision(0), decision(1, action=LAMP, possible_actions=[LAMP])], tmp_path
    )
    assert rejected == []
    assert [dict(row["action"]) for row in rows] == [SOFA, LAMP]
    assert dict(rows[0]["next_action"]) == LAMP
    assert [dict(one) for one in rows[0]["possible_next_actions"]] == [LAMP]
    assert rows[1]["next_action"] is None


def test_an_action_that_cannot_be_used_has_its_reason(tmp_path):
    bad = [
        ("action_not_possible", {"action": {"price": 1.0}}),
        ("missing_action", {"action": None}),
        ("missing_action", {"action": {}}),
        ("non_finite_action", {"action": {"price": "NaN"}}),
        ("non_finite_action", {"possible_actions": [SOFA, {"price": "Infinity"}]}),
        ("unreadable_action", {"action": {"price": "cheap"}}),
        ("unreadable_possible_actions", {"possible_actions": [{"price": "cheap"}]}),
    ]
    _, rejected = build(
        spec("parametric"), [decision(0), *[decision(i + 1, **change) for i, (_, change) in enumerate(bad)]], tmp_path
    )
    found = {row["sequence_number"]: row["quarantine_reason"] for row in rejected}
    assert found == {i + 1: reason for i, (reason, _) in enumerate(bad)}


def test_the_order_of_an_actions_numbers_means_nothing(tmp_path):
    rows, rejected = build(spec("parametric"), [decision(0, action={"blue": 1.0, "price": 900.0})], tmp_path)
    assert (len(rows), rejected) == (1, [])


def test_a_continuous_action_is_chosen_freely(tmp_path):
    rows, rejected = build(
        spec("continuous"), [decision(0, action={"throttle": -0.3}, possible_actions=None)], tmp_path
    )
    assert rejected == []
    assert dict(rows[0]["action"]) == {"throttle": -0.3}


def test_parquet_holds_them_as_maps(tmp_path):
    contract = schema("parametric")
    row = decision(0) | {"event_time": None, "truncated": None, "policy_version": None, "action_probability": 0.5}
    row |= {name: list(row[name].items()) for name in ("action", "state_features", "metrics")}
    row["possible_actions"] = [list(one.items()) for one in row["possible_actions"]]
    table = pa.Table.from_pylist([row], schema=contract)
    pq.write_table(table, tmp_path / "log.parquet")
    build_timeline(spec("parametric"), str(tmp_path / "log.parquet"), None, tmp_path / "out")
    [found] = pq.read_table(tmp_path / "out" / "transitions").to_pylist()
    assert dict(found["action"]) == SOFA


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"actionSpace": "continuous", "actions": ["a", "b"]}, "actions are discrete"),
        ({"actions": ["a"]}, "two or more discrete actions"),
        ({}, "two or more discrete actions"),
    ],
)
def test_a_job_names_actions_where_they_are_discrete(spec, message):
    with pytest.raises(ValueError, match=message):
        JobSpec.model_validate(spec)


CHAIR = {"price": 90.0, "blue": 0.5}


def slates(**data: Any) -> JobSpec:
    document = {"actionSpace": "slate", "slate": {"size": 2}, "data": {"maxQuarantineFraction": 1.0, **data}}
    return JobSpec.model_validate(document)


def shown(step: int, **changes: Any) -> dict[str, Any]:
    given = {"action": [SOFA, LAMP], "possible_actions": [LAMP, CHAIR, SOFA], "metrics": {"reward": 1.0, "choice": 2.0}}
    return decision(step, **given | changes)


def test_the_next_slate_follows(tmp_path):
    rows, rejected = build(slates(), [shown(0), shown(1, action=[LAMP, CHAIR])], tmp_path)
    assert rejected == []
    assert [[dict(item) for item in row["action"]] for row in rows] == [[SOFA, LAMP], [LAMP, CHAIR]]
    assert [dict(item) for item in rows[0]["next_action"]] == [LAMP, CHAIR]
    assert [dict(item) for item in rows[0]["possible_next_actions"]] == [LAMP, CHAIR, SOFA]


def test_a_slate_that_cannot_be_used_has_its_reason(tmp_path):
    bad = [
        ("missing_action", {"action": None}),
        ("missing_action", {"action": []}),
        ("slate_of_other_size", {"action": [SOFA]}),
        ("missing_possible_actions", {"possible_actions": None}),
        ("non_finite_action", {"action": [SOFA, LAMP | {"blue": "NaN"}]}),
        ("non_finite_action", {"possible_actions": [SOFA, LAMP, {"price": "Infinity"}]}),
        ("action_not_possible", {"action": [SOFA, {"price": 1.0}]}),
        ("action_not_possible", {"action": [SOFA, SOFA]}),
        ("missing_possible_actions", {"possible_actions": []}),
        ("unreadable_action", {"action": [SOFA, {"price": "cheap"}]}),
        ("choice_not_on_slate", {"metrics": {"choice": 3.0}}),
        ("choice_not_on_slate", {"metrics": {"choice": 0.5}}),
        ("choice_not_on_slate", {"metrics": {"choice": -1.0}}),
    ]
    rows, rejected = build(
        slates(), [shown(0), *[shown(i + 1, **change) for i, (_, change) in enumerate(bad)]], tmp_path
    )
    found = {row["sequence_number"]: row["quarantine_reason"] for row in rejected}
    assert found == {i + 1: reason for i, (reason, _) in enumerate(bad)}
    assert len(rows) == 1


def test_an_empty_item_is_no_item(tmp_path):
    as_items = [list(item.items()) for item in (SOFA, LAMP, CHAIR)]
    bad = [
        ("missing_action", {"action": [as_items[0], None]}),
        ("missing_action", {"action": [as_items[0], []]}),
        ("missing_possible_actions", {"possible_actions": [*as_items, None]}),
        ("missing_possible_actions", {"possible_actions": [*as_items, []]}),
    ]
    good = {"action": as_items[:2], "possible_actions": as_items, "state_features": [("x", 1.0)], "metrics": []}
    nothing = {"action_probability": None, "truncated": None, "policy_version": None, "event_time": None}
    rows = [shown(i) | nothing | good | change for i, change in enumerate([{}, *(change for _, change in bad)])]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema("slate")), tmp_path / "log.parquet")
    build_timeline(slates(), str(tmp_path / "log.parquet"), None, tmp_path / "out")
    rejected = pq.read_table(tmp_path / "out" / "quarantine").to_pylist()
    found = {row["sequence_number"]: row["quarantine_reason"] for row in rejected}
    assert found == {i + 1: reason for i, (reason, _) in enumerate(bad)}


def test_nothing_may_be_chosen_and_items_may_be_alike(tmp_path):
    twice = {"action": [LAMP, LAMP], "possible_actions": [LAMP, SOFA, LAMP]}
    rows, rejected = build(
        slates(), [shown(0, metrics={"reward": 0.0}), shown(1, metrics={"choice": 0.0}), shown(2, **twice)], tmp_path
    )
    assert (len(rows), rejected) == (3, [])


def test_what_was_chosen_may_be_reported_later(tmp_path):
    outcome = {"mdp_id": "m", "sequence_number": 0, "event_time": "2026-01-01T01:00:00Z", "metrics": {"choice": 1.0}}
    (tmp_path / "outcomes.jsonl").write_text(json.dumps(outcome) + "\n")
    (tmp_path / "log.jsonl").write_text(json.dumps(shown(0, metrics={"reward": 1.0})) + "\n")
    build_timeline(slates(), str(tmp_path / "log.jsonl"), str(tmp_path / "outcomes.jsonl"), tmp_path / "out")
    [row] = pq.read_table(tmp_path / "out" / "transitions").to_pylist()
    assert dict(row["metrics"]) == {"reward": 1.0, "choice": 1.0}
