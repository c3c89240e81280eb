"""What the controllers report: conditions with reasons from closed lists, and the figures beside them.

Conditions are the truth. `phase`, `reason` and the other one-word fields are derived from them, for people and for
printer columns.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

LAST_VERDICTS = 10
"""Canary looks kept in a status."""


class Reason(StrEnum):
    """Why a condition is what it is."""

    # Accepted
    VALID = "Valid"
    INVALID_SPEC = "InvalidSpec"
    # PipelineBackendAvailable
    REACHABLE = "Reachable"
    UNREACHABLE = "Unreachable"
    # Suspended
    SUSPENDED = "Suspended"
    RESUMED = "Resumed"
    # Stalled
    IMAGE_PULL_FAILED = "ImagePullFailed"
    UNSCHEDULABLE = "Unschedulable"
    QUOTA_EXCEEDED = "QuotaExceeded"
    MISSING_DEPENDENCY = "MissingDependency"
    RECONCILE_FAILED = "ReconcileFailed"
    MOVING = "Moving"
    # Evaluated
    GATE_PASSED = "GatePassed"
    GATE_DISABLED = "GateDisabled"
    STOPPED_BY_GATE = "StoppedByGate"
    # RolledOut
    IN_PROGRESS = "InProgress"
    PAUSED = "Paused"
    PROMOTED = "Promoted"
    ADOPTED = "Adopted"
    ROLLED_BACK = "RolledBack"
    ABORTED = "Aborted"
    SUPERSEDED = "Superseded"
    # Complete, Failed
    EXPORTED = "Exported"
    RETRYING = "Retrying"
    STAGE_FAILED = "StageFailed"
    BACKOFF_LIMIT_EXCEEDED = "BackoffLimitExceeded"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    # Scheduled
    SCHEDULE_ACTIVE = "ScheduleActive"
    # Ready (PolicyService)
    MODELS_READY = "ModelsReady"
    MODELS_NOT_READY = "ModelsNotReady"


class StatusModel(BaseModel):
    # What a newer controller wrote is kept by the API server and passed over here.
    model_config = ConfigDict(
        alias_generator=to_camel, extra="ignore", validate_by_name=True, validate_by_alias=True, use_enum_values=True
    )


class Condition(StatusModel):
    """A metav1.Condition."""

    type: str = Field(description="What is spoken of.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it is so.")
    reason: Reason = Field(description="Why, in one word of a closed list.")
    message: str = Field("", max_length=32768, description="Why, for people: what was wrong, where, and what to do.")
    last_transition_time: str = Field(description="When the status last changed.")
    observed_generation: int = Field(0, description="The spec's generation that this speaks of.")


StageState = Literal["Pending", "Running", "Succeeded", "Cached", "Failed", "Skipped"]


class StageStatus(StatusModel):
    """One stage of the pipeline, in its newest attempt."""

    name: str = Field(description="The stage.")
    state: StageState = Field("Pending", description="How it stands.")
    attempts: int = Field(0, description="Times it was started.")
    start_time: str | None = Field(None, description="Start of the newest attempt.")
    completion_time: str | None = Field(None, description="End of the newest attempt.")
    message: str = Field("", max_length=4096, description="What it made, or why it failed.")
    artifact: str | None = Field(None, description="URI of its output.")
    pod: str | None = Field(None, description="The pod of the newest attempt.")


class CpeStatus(StatusModel):
    """The gate's estimate."""

    estimator: str = Field(description="Whose estimate it is.")
    metric: str = Field(description="Of which metric.")
    value: float | None = Field(None, description="Relative to the logged policy, which is 1.")
    lower: float | None = Field(None, description="Lower end of its interval.")
    upper: float | None = Field(None, description="Upper end of its interval.")
    verdict: str = Field(description="The gate's: pass, fail, inconclusive or disabled.")
    summary: str = Field(description="The above on one line.")


class WorkersStatus(StatusModel):
    """Training workers."""

    current: int = Field(0, description="At work now.")
    max: int = Field(1, description="At most.")
    summary: str = Field("0/1", description="current/max.")


class CheckStatus(StatusModel):
    """One check of a canary look."""

    name: str = Field(description="reward, errors or latency.")
    verdict: Literal["pass", "fail", "inconclusive", "error"] = Field(description="What it found.")
    message: str = Field("", max_length=1024, description="The figures.")


class LookStatus(StatusModel):
    """One look at the canary."""

    time: str = Field(description="When.")
    weight: str = Field(description="Share of MDPs that the candidate answered.")
    checks: list[CheckStatus] = Field([], max_length=8, description="What each check found.")


class RolloutStatus(StatusModel):
    """The canary, as the PolicyService has it."""

    service: str = Field(description="The PolicyService.")
    weight: str = Field("0%", description="Share of MDPs that the candidate answers.")
    step: int = Field(0, description="Of spec.canary.weights, from 0.")
    verdicts: list[LookStatus] = Field([], max_length=LAST_VERDICTS, description="The last looks, newest last.")


class RunStatus(StatusModel):
    """The pipeline run of the newest attempt."""

    name: str = Field(description="Its name, unique to job, generation and attempt.")
    id: str | None = Field(None, description="KFP's id; absent while it is being submitted.")
    claimed_by: str | None = Field(None, description="The controller that submits it.")
    claim_time: str | None = Field(None, description="Since when; a claim that is not followed by an id expires.")


JobPhase = Literal[
    "Pending", "Running", "Suspended", "RollingOut", "Succeeded", "StoppedByGate", "RolledBack", "Failed", "Scheduled"
]


class JobStatus(StatusModel):
    """Status of an RLTrainingJob."""

    observed_generation: int = Field(0, description="The spec's generation that this speaks of.")
    phase: JobPhase = Field("Pending", description="Derived from the conditions, for people.")
    reason: str = Field("", description="Of the condition that decides the phase.")
    stage: str = Field("", description="The stage at work, or the last one.")
    conditions: list[Condition] = Field([], max_length=16, description="The truth.")
    stages: list[StageStatus] = Field([], max_length=16, description="Every stage.")
    attempts: int = Field(0, description="Pipeline runs submitted.")
    run: RunStatus | None = Field(None, description="The newest pipeline run.")
    start_time: str | None = Field(None, description="When the job, or its resumption, began.")
    completion_time: str | None = Field(None, description="When it ended.")
    retry_time: str | None = Field(None, description="Not before this is a failed stage tried again.")
    policy: str = Field("", description="The exported policy's digest, cut to 12 characters.")
    candidate: str | None = Field(None, description="Its whole digest.")
    cpe: CpeStatus | None = Field(None, description="The gate's estimate.")
    workers: WorkersStatus | None = Field(None, description="Training workers.")
    rollout: RolloutStatus | None = Field(None, description="The canary.")
    retried: str | None = Field(None, description="The last retry that was asked for and granted.")
    last_schedule_time: str | None = Field(None, description="When the last child was due.")
    next_schedule_time: str | None = Field(None, description="When the next one is due.")
    active: list[str] = Field([], max_length=100, description="Children at work.")


class PolicyServed(StatusModel):
    """A policy that is served."""

    digest: str = Field(description="Of the bundle.")
    version: str = Field(description="Triton's model version.")


class Tried(StatusModel):
    """The candidate last decided on: it is not tried again until its attempt is raised."""

    digest: str = Field(description="Of the bundle.")
    attempt: int = Field(0, description="Which of its attempts.")
    outcome: Reason = Field(description="What came of it.")
    message: str = Field("", max_length=4096, description="Why.")


class PolicyServiceStatus(StatusModel):
    """Status of a PolicyService."""

    observed_generation: int = Field(0, description="The spec's generation that this speaks of.")
    phase: Literal["Pending", "Serving", "Canary", "Paused", "Degraded"] = Field("Pending", description="Derived.")
    reason: str = Field("", description="Of the condition that decides the phase.")
    conditions: list[Condition] = Field([], max_length=16, description="The truth.")
    stable: PolicyServed | None = Field(None, description="The policy that serves.")
    candidate: PolicyServed | None = Field(None, description="The policy that is being tried.")
    attempt: int = Field(0, description="Of the candidate.")
    weight: str = Field("0%", description="Share of MDPs that the candidate answers.")
    step: int = Field(0, description="Of spec.canary.weights, from 0.")
    step_time: str | None = Field(None, description="When the step began.")
    baseline: dict[str, float] = Field({}, description="Counters at the step's start.")
    errors: int = Field(0, description="Looks in a row that could not measure.")
    verdicts: list[LookStatus] = Field([], max_length=LAST_VERDICTS, description="The last looks, newest last.")
    tried: Tried | None = Field(None, description="The candidate last decided on.")
    aborted: str | None = Field(None, description="The last abort that was asked for by annotation, and seen.")
    promoted: str | None = Field(None, description="Likewise, the last promotion.")
    salt: str = Field("", description="Of the hash that draws MDPs to the candidate; a new one for each candidate.")
    replicas: str = Field("0/1", description="Ready/wanted.")
    endpoint: str = Field("", description="gRPC address inside the cluster.")
