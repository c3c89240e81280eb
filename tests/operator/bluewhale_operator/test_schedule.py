"""When a scheduled job makes its children, and which it keeps."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from bluewhale_operator.outcome import get_condition
from bluewhale_operator.schedule import make_child, reconcile_schedule
from tests.operator.bluewhale_operator.worlds import make_job


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def scheduled(created: str = "2026-05-04T11:59:00Z", last: str | None = None, **schedule: Any) -> dict[str, Any]:
    job = make_job(schedule={"cron": "0 * * * *", **schedule})
    job["metadata"]["creationTimestamp"] = created
    job["status"] = {"lastScheduleTime": last} if last else {}
    return job


def child(name: str, ended: str | None = None, good: bool = True) -> dict[str, Any]:
    job = make_job(name)
    if ended:
        reason = "Promoted" if good else "StageFailed"
        done = {
            "type": "Complete" if good else "Failed",
            "status": "True",
            "reason": reason,
            "lastTransitionTime": ended,
        }
        job["status"] = {"conditions": [done], "completionTime": ended}
    return job


def made(outcome: Any) -> list[str]:
    return [c["metadata"]["annotations"]["bluewhale.io/scheduled-at"] for c in outcome.apply]


def reasons(outcome: Any) -> list[str]:
    return [event.reason.value for event in outcome.events]


def test_a_child_is_made_when_its_time_has_come_and_not_before() -> None:
    early = reconcile_schedule(scheduled(), [], at("2026-05-04T12:59:30"))
    assert made(early) == ["2026-05-04T12:00:00Z"]
    seen = scheduled(last="2026-05-04T12:00:00Z")
    waiting = reconcile_schedule(seen, [], at("2026-05-04T12:59:30"))
    assert made(waiting) == []
    assert waiting.requeue == pytest.approx(30)
    assert made(reconcile_schedule(seen, [], at("2026-05-04T13:00:00"))) == ["2026-05-04T13:00:00Z"]


def test_a_child_has_one_name_however_often_it_is_made() -> None:
    job, due = scheduled(), at("2026-05-04T12:00:00")
    assert make_child(job, due) == make_child(job, due)
    assert make_child(job, due)["metadata"]["name"] != make_child(job, at("2026-05-04T13:00:00"))["metadata"]["name"]


def test_a_child_is_its_parents_and_serves_its_parents_service() -> None:
    made = make_child(scheduled(), at("2026-05-04T12:00:00"))
    assert "schedule" not in made["spec"]
    assert made["spec"]["deploy"]["service"] == "shop"
    assert made["metadata"]["ownerReferences"][0]["name"] == "shop"


def test_of_many_missed_times_the_last_is_made_up_for() -> None:
    outcome = reconcile_schedule(scheduled(last="2026-05-01T00:00:00Z"), [], at("2026-05-04T12:10:00"))
    assert made(outcome) == ["2026-05-04T12:00:00Z"]


def test_a_time_that_was_missed_by_too_much_is_skipped_and_said() -> None:
    job = scheduled(last="2026-05-04T11:00:00Z", startingDeadlineSeconds=60)
    outcome = reconcile_schedule(job, [], at("2026-05-04T12:10:00"))
    assert (made(outcome), reasons(outcome)) == ([], ["RunSkipped"])
    assert outcome.status.last_schedule_time == "2026-05-04T12:00:00Z"  # said once


@pytest.mark.parametrize(
    ("policy", "children", "deleted"), [("Allow", 1, []), ("Forbid", 0, []), ("Replace", 1, ["shop-1"])]
)
def test_a_run_that_is_still_at_work(policy: str, children: int, deleted: list[str]) -> None:
    job = scheduled(last="2026-05-04T12:00:00Z", concurrencyPolicy=policy)
    outcome = reconcile_schedule(job, [child("shop-1")], at("2026-05-04T13:00:01"))
    assert len(outcome.apply) == children
    assert [d.name for d in outcome.delete] == deleted


def test_a_run_that_has_ended_is_in_nobodys_way() -> None:
    job = scheduled(last="2026-05-04T12:00:00Z")
    outcome = reconcile_schedule(job, [child("shop-1", "2026-05-04T12:30:00Z")], at("2026-05-04T13:00:01"))
    assert made(outcome) == ["2026-05-04T13:00:00Z"]


def test_a_child_that_is_there_before_its_time_was_written_down_is_no_other_run() -> None:
    job = scheduled(last="2026-05-04T12:00:00Z")
    there = child(make_child(job, at("2026-05-04T13:00:00"))["metadata"]["name"])
    outcome = reconcile_schedule(job, [there], at("2026-05-04T13:00:01"))
    assert reasons(outcome) == ["ChildCreated"]
    assert outcome.status.active == [there["metadata"]["name"]]


def test_history_keeps_the_newest_of_both_kinds() -> None:
    job = scheduled(last="2026-05-04T12:00:00Z", successfulRunsHistoryLimit=1, failedRunsHistoryLimit=0)
    children = [
        child("old", "2026-05-04T09:00:00Z"),
        child("new", "2026-05-04T10:00:00Z"),
        child("bad", "2026-05-04T11:00:00Z", good=False),
        child("at-work"),
    ]
    outcome = reconcile_schedule(job, children, at("2026-05-04T12:30:00"))
    assert [d.name for d in outcome.delete] == ["old", "bad"]


@pytest.mark.parametrize(
    ("cron", "last", "now", "due"),
    [
        # Berlin's clocks go from 02:00 to 03:00 on 2026-03-29, and from 03:00 to 02:00 on 2026-10-25.
        ("0 9 * * *", "2026-03-28T12:00:00Z", "2026-03-29T07:00:00", ["2026-03-29T07:00:00Z"]),
        ("0 9 * * *", "2026-10-24T12:00:00Z", "2026-10-25T08:00:00", ["2026-10-25T08:00:00Z"]),
        ("30 2 * * *", "2026-03-28T12:00:00Z", "2026-03-29T05:00:00", ["2026-03-29T01:00:00Z"]),
    ],
)
def test_times_are_those_of_the_time_zone(cron: str, last: str, now: str, due: list[str]) -> None:
    job = scheduled(created="2026-01-01T00:00:00Z", last=last, cron=cron, timeZone="Europe/Berlin")
    job["spec"]["schedule"]["startingDeadlineSeconds"] = 86_400
    assert made(reconcile_schedule(job, [], at(now))) == due


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"cron": "99 * * * *"}, "spec.schedule"),
        ({"timeZone": "Europe/Atlantis"}, "Atlantis"),
        ({"cron": "daily"}, "cron"),
    ],
)
def test_a_schedule_that_cannot_be_read_is_refused_in_the_status(schedule: dict[str, str], words: str) -> None:
    outcome = reconcile_schedule(scheduled(**schedule), [], at("2026-05-04T12:30:00"))
    condition = get_condition(outcome.status.conditions, "Accepted")
    assert condition is not None
    assert (condition.status, condition.reason) == ("False", "InvalidSpec")
    assert words in condition.message
    assert outcome.apply == []


def test_a_suspended_schedule_makes_nothing_and_catches_nothing_up() -> None:
    job = scheduled(last="2026-05-04T11:00:00Z")
    job["spec"]["suspend"] = True
    outcome = reconcile_schedule(job, [], at("2026-05-04T12:00:01"))
    assert (outcome.apply, outcome.status.phase, outcome.status.next_schedule_time) == ([], "Suspended", None)
    job["status"] = outcome.status.model_dump(by_alias=True, exclude_none=True, mode="json")
    job["spec"]["suspend"] = False
    assert reconcile_schedule(job, [], at("2026-05-04T12:30:00")).apply == []
