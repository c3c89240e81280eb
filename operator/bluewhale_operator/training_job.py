"""RLTrainingJob: from what is wished and what is seen to a status and what to do next. Pure: no clock, no network.

A job goes through claim -> run -> rollout -> end. Every step is decided from the status and from what is observed, so
that a controller killed after any write goes on where it was, and does nothing twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from pydantic import ValidationError

from bluewhale_operator.backend import PipelineRun
from bluewhale_operator.outcome import (
    API_VERSION,
    GROUP,
    MANAGED_BY,
    Event,
    EventReason,
    Object,
    Outcome,
    Reference,
    forget_failed_reconcile,
    get_condition,
    is_true,
    parse_time,
    set_condition,
    timestamp,
)
from bluewhale_operator.pods import (
    ROLE_LABEL,
    Stall,
    find_stall,
    last_words,
    record_of,
    stage_of,
    started_at,
    succeeded,
)
from contracts.job import RLTrainingJob, explain
from contracts.status import (
    CpeStatus,
    JobStatus,
    PolicyServiceStatus,
    Reason,
    RolloutStatus,
    RunStatus,
    StageStatus,
    WorkersStatus,
)

STAGES = (
    "timeline", "features", "normalization", "understanding", "training", "evaluation", "export", "rollout",
)  # fmt: skip
"""What every job goes through; one without a log of its own is simulated before."""
FINALIZER = f"{GROUP}/pipeline-run"
RETRY_ANNOTATION = f"{GROUP}/retry"
SCHEDULED_AT = f"{GROUP}/scheduled-at"

CLAIM_SECONDS = 30.0
"""A claim to submit a run that is not followed by the run expires after this."""
CLEANUP_SECONDS = 120.0
"""A deleted job waits this long for a backend that cannot be reached, then goes and leaves its run to the backend."""
STALL_SECONDS = 600.0
"""An image that cannot be pulled, or a missing secret, fails the job after this."""
POLL_SECONDS = 5.0
IDLE_SECONDS = 60.0


@dataclass(frozen=True)
class Observed:
    """What the controller saw, just now."""

    run: PipelineRun | None = None
    backend_error: str = ""
    """Why the backend cannot be used; empty when it can."""
    submission_refused: str = ""
    """What the backend said when it turned the run away for good."""
    pods: list[Object] = field(default_factory=list)
    logs: dict[str, str] = field(default_factory=dict)
    """The last lines of pods that failed without a word."""
    messages: list[str] = field(default_factory=list)
    """What is told of children that could not be made, or cannot start, elsewhere than in the pods themselves."""
    at_work: list[Reference] = field(default_factory=list)
    """Training jobs and Spark executors of this job, of whichever run, that have not ended."""
    service: Object | None = None


@dataclass
class JobOutcome(Outcome):
    """Beside the objects: what to do with the pipeline run and the finalizer."""

    status: JobStatus
    submit: bool = False
    terminate: str | None = None
    finalizer: bool = False


def reconcile(job: Object, observed: Observed, now: datetime, identity: str) -> JobOutcome | None:
    """Decide; None when the job is another controller's.

    `identity` names this controller in its claim to submit a run.
    """
    if job["spec"].get("managedBy", MANAGED_BY) != MANAGED_BY:
        return None
    status = JobStatus.model_validate(job.get("status") or {})
    step = _Step(job, status, observed, now, identity)
    if job["metadata"].get("deletionTimestamp"):
        return step.clean_up()
    step.decide()
    step.derive()
    return step.outcome


def parse(job: Object) -> RLTrainingJob:
    """The typed job; raises `ValidationError`."""
    meta = {k: job["metadata"][k] for k in ("name", "namespace") if k in job["metadata"]}
    return RLTrainingJob.model_validate(
        {"apiVersion": job["apiVersion"], "kind": job["kind"], "metadata": meta, "spec": job["spec"]}
    )


def run_name(job: Object, attempt: int) -> str:
    """Unique to the object, its generation and the attempt: who finds a run of this name need not submit another."""
    meta = job["metadata"]
    return f"{meta['name']}-{meta['uid'][:8]}-g{meta.get('generation', 1)}-a{attempt}"


def finished(status: JobStatus) -> bool:
    return is_true(status.conditions, "Complete") or is_true(status.conditions, "Failed")


def at_rest(job: Object) -> bool:
    """Whether the job is finished, and nothing of it is left outside: there is nothing to observe."""
    status = JobStatus.model_validate(job.get("status") or {})
    return finished(status) and not _holds(job) and not _retry_asked(job, status)


def _holds(job: Object) -> bool:
    """Whether the job's run is not yet known to have ended."""
    return FINALIZER in job["metadata"].get("finalizers", [])


def _retry_asked(job: Object, status: JobStatus) -> bool:
    """`kubectl bluewhale retry` sets an annotation: a value that has not been seen yet starts a failed job again.

    Not before its last run has ended, or there would be two.
    """
    asked = (job["metadata"].get("annotations") or {}).get(RETRY_ANNOTATION)
    return bool(asked) and asked != status.retried and is_true(status.conditions, "Failed") and not _holds(job)


class _Step:
    """One reconcile, written as the steps that it takes."""

    def __init__(self, job: Object, status: JobStatus, observed: Observed, now: datetime, identity: str) -> None:
        self.job, self.status, self.observed, self.now, self.identity = job, status, observed, now, identity
        self.generation = job["metadata"].get("generation", 1)
        self.outcome = JobOutcome(status, finalizer=_holds(job))
        self.records = _records(observed.pods)

    # -- the decision ------------------------------------------------------------------------------------------------

    def decide(self) -> None:
        status, out = self.status, self.outcome
        status.observed_generation = self.generation
        forget_failed_reconcile(status.conditions, self.generation, self.now)
        if _retry_asked(self.job, status):
            self._start_again()
        if finished(status):
            self._expire()
            return
        try:
            self.spec = parse(self.job).spec
        except ValidationError as error:
            text = "; ".join(explain(e) for e in error.errors())
            if self._condition("Accepted", False, Reason.INVALID_SPEC, text):
                self._event(EventReason.INVALID_SPEC, text, warning=True)
            out.finalizer = status.run is not None and out.finalizer
            return
        self._condition("Accepted", True, Reason.VALID, "")
        if not status.stages:
            first = ("simulation",) if self.spec.simulation else ()
            status.stages = [StageStatus(name=name) for name in (*first, *STAGES)]
        self._backend_condition()
        self._resolve_run()
        if self.spec.suspend:
            self._suspend()
            return
        if is_true(status.conditions, "Suspended"):
            self._condition("Suspended", False, Reason.RESUMED, "")
            self._event(EventReason.RESUMED, "goes on from the stages that are finished")
            status.start_time = timestamp(self.now)
        if self._past_deadline():
            return
        if status.run is None:
            self._claim()
        elif status.run.id is None:
            self._submit()
        elif self.observed.run is None:
            if self._reachable and status.rollout:
                self._follow_rollout(status.rollout.service)
            elif self._reachable:
                self._attempt_failed("the pipeline run is gone: it was deleted in Kubeflow Pipelines", None, True)
            out.requeue = POLL_SECONDS
        else:
            self._follow(self.observed.run)

    def clean_up(self) -> JobOutcome:
        """The job is being deleted: end what runs outside of it, but never wait for long."""
        status, out = self.status, self.outcome
        run, deleted = self.observed.run, parse_time(self.job["metadata"]["deletionTimestamp"])
        if not out.finalizer:
            return out
        if self.observed.backend_error and status.run:
            waited = (self.now - deleted).total_seconds()
            if waited < CLEANUP_SECONDS:
                out.requeue = min(POLL_SECONDS, CLEANUP_SECONDS - waited)
                return out
            self._event(
                EventReason.CLEANUP_GAVE_UP,
                f"the pipeline run {status.run.name} could not be ended within {CLEANUP_SECONDS:.0f} s "
                f"({self.observed.backend_error}); end it in Kubeflow Pipelines if it is still there",
                warning=True,
            )
        elif run and not run.ended:
            self._terminate(run)
            out.requeue = POLL_SECONDS / 5
            return out
        out.delete += self.observed.at_work
        out.finalizer = False
        return out

    # -- before the run ----------------------------------------------------------------------------------------------

    @property
    def _reachable(self) -> bool:
        return not self.observed.backend_error

    def _backend_condition(self) -> None:
        before = get_condition(self.status.conditions, "PipelineBackendAvailable")
        if self.observed.backend_error:
            text = f"{self.observed.backend_error}. The job waits, and goes on by itself when the backend is there."
            if self._condition("PipelineBackendAvailable", False, Reason.UNREACHABLE, text):
                self._event(EventReason.BACKEND_UNAVAILABLE, text, warning=True)
        elif self._condition("PipelineBackendAvailable", True, Reason.REACHABLE, "") and before:
            self._event(EventReason.BACKEND_AVAILABLE, "Kubeflow Pipelines answers again")

    def _resolve_run(self) -> None:
        """A run that is found under the claimed name is ours, whoever submitted it."""
        run = self.status.run
        if run and run.id is None and self.observed.run:
            self.status.run = run.model_copy(update={"id": self.observed.run.id})
            self._event(EventReason.RUN_SUBMITTED, f"pipeline run {run.name} ({self.observed.run.id})")

    def _claim(self) -> None:
        """Write down that this controller is about to submit; of several, the API server lets one through."""
        status, out = self.status, self.outcome
        out.requeue = POLL_SECONDS
        if status.retry_time and self.now < parse_time(status.retry_time):
            out.requeue = max(0.5, (parse_time(status.retry_time) - self.now).total_seconds())
            return
        if not self._reachable:
            return
        out.finalizer = True
        status.retry_time = None
        status.start_time = status.start_time or timestamp(self.now)
        status.attempts += 1
        status.run = RunStatus(
            name=run_name(self.job, status.attempts), claimed_by=self.identity, claim_time=timestamp(self.now)
        )
        out.requeue = 0.0

    def _submit(self) -> None:
        status, out = self.status, self.outcome
        run = status.run
        assert run is not None
        out.requeue = POLL_SECONDS
        if self.observed.submission_refused:
            status.run = None
            self._fail(Reason.STAGE_FAILED, f"Kubeflow Pipelines refused the run: {self.observed.submission_refused}")
            return
        if not self._reachable:
            return
        if run.claimed_by != self.identity:
            left = CLAIM_SECONDS - (self.now - parse_time(run.claim_time or timestamp(self.now))).total_seconds()
            if left > 0:
                out.requeue = left
                return
            run = run.model_copy(update={"claimed_by": self.identity, "claim_time": timestamp(self.now)})
            status.run = run
            out.requeue = 0.0
            return
        out.submit = True
        out.requeue = 0.0

    def _suspend(self) -> None:
        status, out = self.status, self.outcome
        run = self.observed.run
        if run and not run.ended:
            self._terminate(run)
            out.requeue = POLL_SECONDS / 5
        elif status.run and not self._reachable:
            out.requeue = POLL_SECONDS
            return
        else:
            status.run = None
            out.delete += self.observed.at_work
        for stage in status.stages:
            if stage.state == "Running":
                _reset(stage)
        status.workers = None
        if self._condition("Suspended", True, Reason.SUSPENDED, "spec.suspend is true; finished stages are kept"):
            self._event(EventReason.SUSPENDED, "the pipeline run is ended; finished stages are kept")

    def _past_deadline(self) -> bool:
        limit, start = self.spec.active_deadline_seconds, self.status.start_time
        if limit is None or start is None or self._rolling_out():
            return False
        left = (parse_time(start) + timedelta(seconds=limit) - self.now).total_seconds()
        if left > 0:
            return False
        self._end_run()
        text, stalled = f"at work for more than spec.activeDeadlineSeconds ({limit} s)", self._stalled_by()
        self._fail(Reason.DEADLINE_EXCEEDED, f"{text}; at last {stalled}" if stalled else text)
        return True

    def _rolling_out(self) -> bool:
        return get_condition(self.status.conditions, "RolledOut") is not None

    # -- the run -----------------------------------------------------------------------------------------------------

    def _follow(self, run: PipelineRun) -> None:
        self.outcome.requeue = POLL_SECONDS
        self._mirror(run)
        if run.state == "SUCCEEDED":
            self._after_run()
            return
        stall = None if run.ended else find_stall(self.observed.pods, self.observed.messages)
        self._stalled(stall)
        if stall and stall.hopeless and self._stalled_for() > STALL_SECONDS:
            self._end_run()
            self._fail(stall.reason, f"{stall.message} (for {STALL_SECONDS / 60:.0f} minutes)")
        elif run.state in ("FAILED", "CANCELED", "SKIPPED"):
            stage = self._failed_stage(run)
            record = self.records.get(stage.name, {})
            if run.state == "CANCELED":
                self._fail(Reason.ABORTED, "the pipeline run was ended in Kubeflow Pipelines")
                return
            why = stage.message or run.error or "no reason was given; see the stage's log"
            useless = record.get("status") == "failed" and not record.get("retryable", True)
            self._attempt_failed(why, stage, retryable=not useless)

    def _mirror(self, run: PipelineRun) -> None:
        """Bring every stage's state up to what the run, its pods and their records say."""
        for stage in self.status.stages:
            before = stage.state
            pods = [p for p in self.observed.pods if stage_of(p) == stage.name]
            state = _state_of(stage.name, run, pods, self.records)
            if before in ("Succeeded", "Cached") and not pods:
                continue  # finished in an earlier attempt: the cache will bring it back
            if state in ("Running", "Failed", "Succeeded") and before not in ("Running", "Failed", "Succeeded"):
                stage.attempts += 1
                stage.start_time = min(filter(None, map(started_at, pods)), default=timestamp(self.now))
                stage.completion_time, stage.message = None, ""
                self._event(EventReason.STAGE_STARTED, f"{stage.name}, attempt {stage.attempts}")
            if pods:
                stage.pod = pods[-1]["metadata"]["name"]
            stage.state = state
            record = self.records.get(stage.name)
            if record and state == "Failed" and record.get("status") == "succeeded":
                # It did its work, and then could not hand it over: KFP's launcher knows why.
                stage.message = _error_of(stage.name, run, pods, self.observed.logs)[:4096]
            elif record:
                stage.message = str(record.get("message", ""))[:4096] or stage.message
                stage.artifact = record.get("artifact") or stage.artifact
                self._take(stage.name, record)
            if state in ("Succeeded", "Failed", "Cached") and stage.completion_time is None and state != before:
                stage.completion_time = timestamp(self.now)
                if state == "Succeeded":
                    self._event(EventReason.STAGE_SUCCEEDED, f"{stage.name}: {stage.message or 'done'}")
            if state == "Failed" and not stage.message:
                stage.message = _error_of(stage.name, run, pods, self.observed.logs)[:4096]
        self._count_workers()

    def _take(self, name: str, record: dict[str, Any]) -> None:
        """What a stage's record says of the policy."""
        if name == "evaluation" and (cpe := record.get("cpe")):
            figures = [cpe.get(k) for k in ("value", "lower", "upper")]
            text = "{:.2f} [{:.2f}, {:.2f}]".format(*figures) if None not in figures else "-"
            self.status.cpe = CpeStatus(summary=f"{text} {cpe.get('verdict', '')}".strip(), **cpe)
        if name == "export" and (policy := record.get("policy")):
            self.status.candidate = policy["digest"]
            self.status.policy = policy["digest"][:12]

    def _count_workers(self) -> None:
        training = next(s for s in self.status.stages if s.name == "training")
        if training.state == "Pending":
            return
        most = self.spec.training.workers.max
        workers = [p for p in self.observed.pods if p["metadata"].get("labels", {}).get(ROLE_LABEL) == "worker"]
        current = sum(p.get("status", {}).get("phase") == "Running" for p in workers)
        if training.state == "Running" and not workers and most == 1:
            current = 1
        self.status.workers = WorkersStatus(current=current, max=most, summary=f"{current}/{most}")

    def _failed_stage(self, run: PipelineRun) -> StageStatus:
        stages = self.status.stages
        failed = next((s for s in stages if s.state == "Failed"), None)
        stage = failed or next((s for s in stages if s.state in ("Running", "Pending")), stages[-1])
        pods = [p for p in self.observed.pods if stage_of(p) == stage.name]
        stage.state = "Failed"
        stage.message = stage.message or _error_of(stage.name, run, pods, self.observed.logs)[:4096]
        stage.completion_time = stage.completion_time or timestamp(self.now)
        return stage

    def _attempt_failed(self, why: str, stage: StageStatus | None, retryable: bool) -> None:
        """Try again from the failed stage, later each time; KFP's cache brings back what is finished."""
        status = self.status
        self.outcome.delete += self.observed.at_work
        name = stage.name if stage else "pipeline"
        attempts = stage.attempts if stage else status.attempts
        text = f"{name}: {why}"
        self._event(EventReason.STAGE_FAILED, text, warning=True)
        if not retryable:
            self._fail(Reason.STAGE_FAILED, text)
            return
        if attempts > self.spec.backoff_limit:
            self._fail(
                Reason.BACKOFF_LIMIT_EXCEEDED, f"{text} (tried {attempts} times, spec.backoffLimit allows no more)"
            )
            return
        delay = min(10 * 2 ** max(0, attempts - 1), 360)
        status.run, status.retry_time = None, timestamp(self.now + timedelta(seconds=delay))
        self._condition("Stalled", False, Reason.RETRYING, f"{text}; tried again in {delay} s")
        self._event(EventReason.STAGE_RETRIED, f"{name} is tried again in {delay} s")
        self._reset_unfinished()
        self.outcome.requeue = float(delay)

    def _reset_unfinished(self) -> None:
        for stage in self.status.stages:
            if stage.state not in ("Succeeded", "Cached"):
                _reset(stage)
        self.status.workers = None

    def _stalled(self, stall: Stall | None) -> None:
        if stall:
            before = get_condition(self.status.conditions, "Stalled")
            if before and before.reason != stall.reason:
                # Each reason has its own time, or a long wait for room would fail the first slow pull.
                self._condition("Stalled", False, Reason.MOVING, "")
            if self._condition("Stalled", True, stall.reason, stall.message):
                self._event(EventReason.STALLED, stall.message, warning=True)
        elif get_condition(self.status.conditions, "Stalled"):
            self._condition("Stalled", False, Reason.MOVING, "")

    def _stalled_by(self) -> str:
        condition = get_condition(self.status.conditions, "Stalled")
        return condition.message if condition and condition.status == "True" else ""

    def _stalled_for(self) -> float:
        condition = get_condition(self.status.conditions, "Stalled")
        return (self.now - parse_time(condition.last_transition_time)).total_seconds() if condition else 0.0

    def _end_run(self) -> None:
        if self.observed.run and not self.observed.run.ended:
            self._terminate(self.observed.run)

    def _terminate(self, run: PipelineRun) -> None:
        if run.state != "CANCELING":  # told already
            self.outcome.terminate = run.id

    # -- after the run -----------------------------------------------------------------------------------------------

    def _after_run(self) -> None:
        """The gate's word, then the canary's."""
        self._stalled(None)
        record = self.records.get("rollout", {})
        cpe = self.status.cpe
        if cpe:
            passed = cpe.verdict in ("pass", "disabled")
            reason = {"pass": Reason.GATE_PASSED, "disabled": Reason.GATE_DISABLED}.get(cpe.verdict)
            self._condition("Evaluated", passed, reason or Reason.STOPPED_BY_GATE, cpe.summary)
        if record.get("rollout") == "skipped" or (not record and cpe and cpe.verdict not in ("pass", "disabled")):
            text = str(record.get("message") or f"the gate did not let the policy pass: {cpe.summary if cpe else ''}")
            self._event(EventReason.STOPPED_BY_GATE, text, warning=True)
            self._fail(Reason.STOPPED_BY_GATE, text)
            return
        if record.get("rollout") == "exported":
            self._complete(Reason.EXPORTED, f"the policy is exported: {record.get('message', '')}".rstrip(": "))
            return
        service = self.spec.deploy.service or self.job["metadata"]["name"]
        if self.status.rollout is None:
            self.status.rollout = RolloutStatus(service=service)
        if record.get("rollout") == "created":
            self._adopted(service)
        else:
            self._follow_rollout(service)

    def _adopted(self, service: str) -> None:
        text = f"the first policy of PolicyService {service}: nothing was in service to compare it with"
        self._condition("RolledOut", True, Reason.ADOPTED, text)
        assert self.status.rollout is not None
        self.status.rollout = self.status.rollout.model_copy(update={"weight": "100%"})
        self._complete(Reason.ADOPTED, text)

    def _follow_rollout(self, name: str) -> None:
        service = self.observed.service
        if service is None:
            text = f"PolicyService {name} is gone: it was deleted before the rollout ended"
            self._condition("RolledOut", False, Reason.ABORTED, text)
            self._fail(Reason.ABORTED, text)
            return
        seen = PolicyServiceStatus.model_validate(service.get("status") or {})
        wished = service["spec"].get("candidate") or {}
        digest = self.status.candidate or (wished.get("digest") if wished.get("job") == self._name else None)
        attempt = wished.get("attempt", 0) if wished.get("digest") == digest else 0
        assert self.status.rollout is not None
        mirrored = {"weight": seen.weight, "step": seen.step, "verdicts": seen.verdicts}
        ours = seen.candidate is not None and seen.candidate.digest == digest
        tried = seen.tried if seen.tried and (seen.tried.digest, seen.tried.attempt) == (digest, attempt) else None
        if ours or tried:
            self.status.rollout = self.status.rollout.model_copy(update=mirrored)
        if seen.stable and seen.stable.digest == digest and not ours:
            self.status.rollout = self.status.rollout.model_copy(update={"weight": "100%"})
            text = tried.message if tried else f"PolicyService {name} serves the policy"
            self._condition("RolledOut", True, Reason.PROMOTED, text)
            self._event(EventReason.PROMOTED, text)
            self._complete(Reason.PROMOTED, text)
        elif tried:
            self._condition("RolledOut", False, Reason(tried.outcome), tried.message)
            self._event(EventReason.ROLLED_BACK, tried.message, warning=True)
            self._fail(Reason(tried.outcome), tried.message)
        elif wished.get("digest") != digest:
            text = f"PolicyService {name} has another candidate now ({str(wished.get('digest'))[:12]})"
            self._condition("RolledOut", False, Reason.SUPERSEDED, text)
            self._fail(Reason.SUPERSEDED, text)
        else:
            paused = service["spec"].get("paused", False)
            reason = Reason.PAUSED if paused else Reason.IN_PROGRESS
            if self._condition("RolledOut", "Unknown", reason, f"PolicyService {name}, weight {seen.weight}"):
                self._event(EventReason.ROLLOUT_STARTED, f"PolicyService {name}")

    def _complete(self, reason: Reason, message: str) -> None:
        self._end("Complete", reason, message)
        self._event(EventReason.JOB_COMPLETED, message)

    def _fail(self, reason: Reason, message: str) -> None:
        self._stalled(None)
        for stage in self.status.stages:
            if stage.state == "Running":
                # Its run is ended with the job, and nobody looks at it again.
                stage.state, stage.completion_time = "Failed", timestamp(self.now)
                stage.message = message[:4096]
        self._end("Failed", reason, message)
        self._event(EventReason.JOB_FAILED, message, warning=True)

    def _end(self, type: str, reason: Reason, message: str) -> None:
        self._condition(type, True, reason, message)
        self.status.completion_time = timestamp(self.now)
        if self.status.workers:
            most = self.status.workers.max
            self.status.workers = WorkersStatus(current=0, max=most, summary=f"0/{most}")
        self.outcome.requeue = 0.0

    def _expire(self) -> None:
        """Finished stays finished; the finalizer goes once the run has ended, the job itself by its time to live."""
        run, out = self.observed.run, self.outcome
        if run and not run.ended:
            self._terminate(run)
            out.requeue = POLL_SECONDS
        elif self._reachable or self.status.run is None:
            out.delete += self.observed.at_work
            out.finalizer = False
        elif out.finalizer:
            out.requeue = POLL_SECONDS
        ttl = self.job["spec"].get("ttlSecondsAfterFinished")
        if ttl is None or not self.status.completion_time:
            return
        left = (parse_time(self.status.completion_time) + timedelta(seconds=ttl) - self.now).total_seconds()
        if left <= 0:
            out.delete.append(Reference(API_VERSION, "RLTrainingJob", self._name))
        else:
            out.requeue = min(out.requeue or left, left)

    def _start_again(self) -> None:
        status = self.status
        status.retried = self.job["metadata"]["annotations"][RETRY_ANNOTATION]
        status.conditions = [
            c for c in status.conditions if c.type in ("Accepted", "PipelineBackendAvailable", "Suspended")
        ]
        status.run = status.retry_time = status.completion_time = status.start_time = None
        status.rollout = None
        self._reset_unfinished()
        for stage in status.stages:
            stage.attempts = 0
            if stage.name == "rollout":
                _reset(stage)
        self.observed = replace(self.observed, run=None, pods=[], messages=[])
        self.records = {}
        self._event(EventReason.STAGE_RETRIED, "by hand")

    # -- words -------------------------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        name: str = self.job["metadata"]["name"]
        return name

    def _condition(self, type: str, value: Any, reason: Reason, message: str) -> bool:
        return set_condition(self.status.conditions, type, value, reason, message, self.generation, self.now)

    def _event(self, reason: EventReason, message: str, warning: bool = False) -> None:
        self.outcome.events.append(Event(reason, message, "Warning" if warning else "Normal"))

    def derive(self) -> None:
        """The words that people read, from the conditions."""
        status = self.status
        status.phase, status.reason = derive_phase(status)
        at_work = [s for s in status.stages if s.state in ("Running", "Failed")]
        done = [s for s in status.stages if s.state in ("Succeeded", "Cached")]
        status.stage = (at_work or done[-1:] or status.stages[:1] or [StageStatus(name="")])[0].name


def derive_phase(status: JobStatus) -> tuple[Any, str]:
    """Phase and reason, from the conditions by type: never from their order."""

    def of(type: str) -> Any:
        return get_condition(status.conditions, type)

    if is_true(status.conditions, "Complete"):
        return "Succeeded", of("Complete").reason
    if is_true(status.conditions, "Failed"):
        reason = of("Failed").reason
        phases = {Reason.STOPPED_BY_GATE: "StoppedByGate", Reason.ROLLED_BACK: "RolledBack"}
        return phases.get(reason, "Failed"), reason
    for type in ("Accepted", "PipelineBackendAvailable"):
        if (condition := of(type)) and condition.status == "False":
            if type == "Accepted":
                return "Failed", condition.reason
            return ("Running" if status.run and status.run.id else "Pending"), condition.reason
    if is_true(status.conditions, "Suspended"):
        return "Suspended", Reason.SUSPENDED
    if is_true(status.conditions, "Stalled"):
        return "Running", of("Stalled").reason
    if rolled := of("RolledOut"):
        return "RollingOut", rolled.reason
    if status.run and status.run.id:
        return "Running", ""
    stalled = of("Stalled")
    return "Pending", stalled.reason if stalled and stalled.reason == Reason.RETRYING else ""


def _reset(stage: StageStatus) -> None:
    stage.state, stage.message = "Pending", ""
    stage.start_time = stage.completion_time = stage.artifact = stage.pod = None


def _records(pods: list[Object]) -> dict[str, dict[str, Any]]:
    """What each stage reported; the last component repeats the records of stages that came from the cache."""
    found: dict[str, dict[str, Any]] = {}
    for pod in pods:
        record = record_of(pod)
        if record:
            found = {**record.get("records", {}), **found, record["stage"]: record}
    return found


def _state_of(name: str, run: PipelineRun, own: list[Object], records: dict[str, dict[str, Any]]) -> Any:
    task = next((t for t in run.tasks if t.name == name), None)
    driver = next((t for t in run.tasks if t.name == f"{name}-driver"), None)
    if "FAILED" in (task and task.state, driver and driver.state):
        return "Failed"
    if records.get(name, {}).get("status") == "failed":
        return "Failed"
    if task and task.state == "SUCCEEDED":
        # KFP brings a stage back from its cache without a pod.
        return "Succeeded" if own else "Cached"
    if task and task.state in ("SKIPPED", "CANCELED"):
        return "Skipped"
    if any(succeeded(p) for p in own):
        return "Succeeded"
    begun = own or (task and task.state == "RUNNING") or (driver and driver.state != "SKIPPED")
    return "Running" if begun else "Pending"


def _error_of(name: str, run: PipelineRun, pods: list[Object], logs: dict[str, str]) -> str:
    for pod in reversed(pods):
        # Its termination message is a record, if there is one.
        if text := last_words(pod, logs.get(pod["metadata"]["name"], "")):
            return text
        if text := pod.get("status", {}).get("message"):
            return f"pod {pod['metadata']['name']}: {text}"
    errors = [t.error for t in run.tasks if t.name in (name, f"{name}-driver") and t.error]
    return errors[0] if errors else run.error


def seconds_between(start: str, end: str) -> float:
    return (parse_time(end) - parse_time(start)).total_seconds()
