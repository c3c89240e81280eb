"""What a reconcile decides: pure values, carried out by the controller."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel

from contracts.status import Condition, Reason

GROUP = "bluewhale.io"
API_VERSION = f"{GROUP}/v1alpha1"
MANAGED_BY = f"{GROUP}/operator"
JOB_LABEL = f"{GROUP}/job"
SERVICE_LABEL = f"{GROUP}/service"
FIELD_MANAGER = "bluewhale-operator"

Object = dict[str, Any]


class EventReason(StrEnum):
    """The closed list of reasons of the Events that the controllers record."""

    RUN_SUBMITTED = "RunSubmitted"
    RUN_TERMINATED = "RunTerminated"
    STAGE_STARTED = "StageStarted"
    STAGE_SUCCEEDED = "StageSucceeded"
    STAGE_FAILED = "StageFailed"
    STAGE_RETRIED = "StageRetried"
    STALLED = "Stalled"
    BACKEND_UNAVAILABLE = "BackendUnavailable"
    BACKEND_AVAILABLE = "BackendAvailable"
    INVALID_SPEC = "InvalidSpec"
    SUSPENDED = "Suspended"
    RESUMED = "Resumed"
    STOPPED_BY_GATE = "StoppedByGate"
    ROLLOUT_STARTED = "RolloutStarted"
    WEIGHT_RAISED = "WeightRaised"
    PROMOTED = "Promoted"
    ROLLED_BACK = "RolledBack"
    ABORTED = "Aborted"
    PAUSED = "Paused"
    JOB_COMPLETED = "JobCompleted"
    JOB_FAILED = "JobFailed"
    CHILD_CREATED = "ChildCreated"
    RUN_SKIPPED = "RunSkipped"
    CLEANUP_GAVE_UP = "CleanupGaveUp"
    RECONCILE_FAILED = "ReconcileFailed"


@dataclass(frozen=True)
class Event:
    """A Kubernetes Event about the object that is reconciled."""

    reason: EventReason
    message: str
    type: Literal["Normal", "Warning"] = "Normal"


@dataclass(frozen=True)
class Reference:
    """An object to be deleted."""

    api_version: str
    kind: str
    name: str


@dataclass
class Outcome:
    """A new status, and what to do: objects are applied server-side, in order; then objects deleted, events recorded.

    `requeue` is the number of seconds after which to look again without being told to; None waits for a change.
    """

    status: BaseModel
    apply: list[Object] = field(default_factory=list)
    delete: list[Reference] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    requeue: float | None = None


def set_condition(
    conditions: list[Condition],
    type: str,
    status: Literal["True", "False", "Unknown"] | bool,
    reason: Reason,
    message: str,
    generation: int,
    now: datetime,
) -> bool:
    """Set a condition in place; returns whether its status or reason changed.

    The transition time moves with the status only, as the API conventions say.
    """
    word: Literal["True", "False", "Unknown"] = status if isinstance(status, str) else "True" if status else "False"
    old = get_condition(conditions, type)
    since = old.last_transition_time if old and old.status == word else timestamp(now)
    new = Condition(
        type=type, status=word, reason=reason, message=message, last_transition_time=since,
        observed_generation=generation,
    )  # fmt: skip
    if old:
        conditions[conditions.index(old)] = new
    else:
        conditions.append(new)
    return old is None or (old.status, old.reason) != (new.status, new.reason)


def forget_failed_reconcile(conditions: list[Condition], generation: int, now: datetime) -> None:
    """A reconcile that gets this far has not failed; if it does later, that is told anew."""
    stalled = get_condition(conditions, "Stalled")
    if stalled and stalled.status == "True" and stalled.reason == Reason.RECONCILE_FAILED:
        set_condition(conditions, "Stalled", False, Reason.MOVING, "", generation, now)


def get_condition(conditions: list[Condition], type: str) -> Condition | None:
    return next((c for c in conditions if c.type == type), None)


def is_true(conditions: list[Condition], type: str) -> bool:
    condition = get_condition(conditions, type)
    return condition is not None and condition.status == "True"


def timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC with whole seconds, as Kubernetes writes times."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def owner_reference(owner: Object) -> dict[str, Any]:
    """The controlling owner of a child."""
    return {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }
