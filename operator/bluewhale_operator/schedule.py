"""A scheduled RLTrainingJob runs nothing itself: at its times it makes children that do."""

from __future__ import annotations

from datetime import datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError
from pydantic import ValidationError

from bluewhale_operator.outcome import (
    API_VERSION,
    GROUP,
    Event,
    EventReason,
    Object,
    Outcome,
    Reference,
    forget_failed_reconcile,
    is_true,
    owner_reference,
    parse_time,
    set_condition,
    timestamp,
)
from bluewhale_operator.training_job import SCHEDULED_AT, finished, parse
from contracts.job import Schedule, explain
from contracts.status import JobStatus, Reason

SCHEDULE_LABEL = f"{GROUP}/schedule"


def reconcile_schedule(job: Object, children: list[Object], now: datetime) -> Outcome:
    """Make the child that is due, by a name that its time gives it, and delete the oldest beyond the history limits."""
    status = JobStatus.model_validate(job.get("status") or {})
    generation = job["metadata"].get("generation", 1)
    status.observed_generation = generation
    out = Outcome(status)
    forget_failed_reconcile(status.conditions, generation, now)
    try:
        schedule = parse(job).spec.schedule
        assert schedule is not None
        zone = ZoneInfo(schedule.time_zone)
        CronSim(schedule.cron, now)
    except (ValidationError, ZoneInfoNotFoundError, CronSimError, ValueError) as error:
        if isinstance(error, ValidationError):
            text = "; ".join(explain(e) for e in error.errors())
        else:
            text = f"spec.schedule: {error}"
        if set_condition(status.conditions, "Accepted", False, Reason.INVALID_SPEC, text, generation, now):
            out.events.append(Event(EventReason.INVALID_SPEC, text, "Warning"))
        status.phase, status.reason = "Failed", Reason.INVALID_SPEC
        return out
    set_condition(status.conditions, "Accepted", True, Reason.VALID, "", generation, now)
    created = parse_time(job["metadata"]["creationTimestamp"])
    last = parse_time(status.last_schedule_time) if status.last_schedule_time else created
    due = _last_due(schedule, zone, last, now)
    running = [c for c in children if not finished(_status(c)) and not c["metadata"].get("deletionTimestamp")]
    suspended = job["spec"].get("suspend", False)
    if due and not suspended:
        child = make_child(job, due)
        # It may be there already, when the status was not written any more.
        others = [c for c in running if c["metadata"]["name"] != child["metadata"]["name"]]
        late = (now - due).total_seconds()
        if late > schedule.starting_deadline_seconds:
            _skip(out, due, f"it was missed by {late:.0f} s, more than spec.schedule.startingDeadlineSeconds")
        elif others and schedule.concurrency_policy == "Forbid":
            _skip(out, due, f"{others[0]['metadata']['name']} is still at work (concurrencyPolicy Forbid)")
        else:
            if schedule.concurrency_policy == "Replace":
                out.delete += [_reference(c) for c in others]
                others = []
            out.apply.append(child)
            out.events.append(Event(EventReason.CHILD_CREATED, child["metadata"]["name"]))
            running = [*others, child]
    if due:
        status.last_schedule_time = timestamp(due)
    following = next(CronSim(schedule.cron, now.astimezone(zone)))
    status.next_schedule_time = None if suspended else timestamp(following)
    status.active = sorted(c["metadata"]["name"] for c in running)
    out.delete += _beyond_history(schedule, children)
    reason = Reason.SUSPENDED if suspended else Reason.SCHEDULE_ACTIVE
    text = f"next at {status.next_schedule_time}" if not suspended else "spec.suspend is true: no children are made"
    set_condition(status.conditions, "Scheduled", not suspended, reason, text, generation, now)
    status.phase, status.reason = ("Suspended" if suspended else "Scheduled"), reason
    out.requeue = None if suspended else min(60.0, max(0.5, (following - now).total_seconds()))
    return out


def make_child(job: Object, due: datetime) -> Object:
    """The child for a time: its name is the time's, so that making it twice makes one."""
    meta = job["metadata"]
    spec = {k: v for k, v in job["spec"].items() if k != "schedule"}
    # The children's policies are versions of one service.
    spec["deploy"] = {"service": meta["name"], **spec.get("deploy", {})}
    return {
        "apiVersion": API_VERSION,
        "kind": "RLTrainingJob",
        "metadata": {
            "name": f"{meta['name']}-{int(due.timestamp() // 60)}",
            "namespace": meta["namespace"],
            "labels": {**(meta.get("labels") or {}), SCHEDULE_LABEL: meta["name"]},
            "annotations": {SCHEDULED_AT: timestamp(due), f"{GROUP}/data-version": timestamp(due)},
            "ownerReferences": [owner_reference(job)],
        },
        "spec": spec,
    }


def _last_due(schedule: Schedule, zone: ZoneInfo, last: datetime, now: datetime) -> datetime | None:
    """The newest time in (last, now]; of several missed ones only the last is made up for."""
    # Times missed by more than a day and the deadline cannot be due: there is no need to walk through them.
    start = max(last, now - timedelta(seconds=schedule.starting_deadline_seconds) - timedelta(days=1))
    due = None
    for moment in CronSim(schedule.cron, start.astimezone(zone)):
        if moment > now:
            break
        due = moment
    return due


def _skip(out: Outcome, due: datetime, why: str) -> None:
    out.events.append(Event(EventReason.RUN_SKIPPED, f"the run of {timestamp(due)} is skipped: {why}", "Warning"))


def _beyond_history(schedule: Schedule, children: list[Object]) -> list[Reference]:
    ended = sorted((c for c in children if finished(_status(c))), key=lambda c: _status(c).completion_time or "")
    good = [c for c in ended if is_true(_status(c).conditions, "Complete")]
    bad = [c for c in ended if c not in good]
    keep_good, keep_bad = schedule.successful_runs_history_limit, schedule.failed_runs_history_limit
    surplus = good[: max(0, len(good) - keep_good)] + bad[: max(0, len(bad) - keep_bad)]
    return [_reference(c) for c in surplus]


def _status(job: Object) -> JobStatus:
    return JobStatus.model_validate(job.get("status") or {})


def _reference(job: Object) -> Reference:
    return Reference(API_VERSION, "RLTrainingJob", job["metadata"]["name"])
