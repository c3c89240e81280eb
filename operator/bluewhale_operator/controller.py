"""Carries out what the pure reconciles decide. Every write may be the last one before a crash, so their order matters:

finalizer, status, then actions that are safe to repeat, then events. A schedule alone acts first.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from bluewhale_operator import metrics, policy_service, training_job
from bluewhale_operator.backend import Backend, BackendError, PipelineRun
from bluewhale_operator.cluster import ApiError, Cluster
from bluewhale_operator.outcome import (
    API_VERSION,
    FIELD_MANAGER,
    JOB_LABEL,
    SERVICE_LABEL,
    Event,
    EventReason,
    Object,
    Outcome,
    Reference,
    parse_time,
    set_condition,
    timestamp,
)
from bluewhale_operator.pods import (
    cannot_be_pulled,
    has_ended,
    is_being_made,
    is_executor,
    is_pending,
    last_lines,
    record_of,
    stage_of,
)
from bluewhale_operator.queue import WorkQueue
from bluewhale_operator.schedule import SCHEDULE_LABEL, reconcile_schedule
from contracts.job import JobError
from contracts.status import JobStatus, PolicyServiceStatus, Reason
from serving.prometheus import query

LOG = logging.getLogger("bluewhale")
BACKEND_REST_SECONDS = 5.0
"""A backend that did not answer is not asked again for this long, whatever the number of jobs."""
LONGEST_BACKOFF = 60.0
LOG_LINES = 40
EVENT_SECONDS = 300.0
"""Kubelet repeats more often than this what still holds a pod up; an Event outlasts what it tells of."""
RUN_LABEL = "pipeline/runid"
"""KFP's, on the pods and the workflow of a run."""


class Key(NamedTuple):
    kind: str
    namespace: str
    name: str


class Controller:
    """Takes keys from the queue and reconciles them, in as many threads as `start` is told."""

    def __init__(
        self,
        cluster: Cluster,
        backend: Backend,
        build: Callable[[Object, str | None], Mapping[str, Any]],
        prometheus_url: str | None = None,
        identity: str | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`build` gives the body of a pipeline run for a job and the policy that it starts from."""
        self.cluster, self.backend, self.build = cluster, backend, build
        self.prometheus_url, self.now = prometheus_url, now
        self.identity = identity or f"{os.environ.get('POD_NAME', socket.gethostname())}-{uuid.uuid4().hex[:6]}"
        self.queue: WorkQueue[Key] = WorkQueue()
        self._failures: Counter[Key] = Counter()
        self._refused: dict[str, str] = {}
        self._backend_rests = (0.0, "")
        self._phases: dict[Key, str] = {}
        self._threads: list[threading.Thread] = []

    def start(self, threads: int = 8) -> None:
        for number in range(threads):
            thread = threading.Thread(target=self._work, name=f"reconcile-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        self.queue.close()
        for thread in self._threads:
            thread.join(timeout=30)

    def _work(self) -> None:
        while key := self.queue.take():
            metrics.QUEUE.set(len(self.queue))
            try:
                delay = self.look(key)
            finally:
                self.queue.done(key)
            if delay is not None:
                self.queue.add(key, delay)

    def look(self, key: Key) -> float | None:
        """Reconcile one object once; returns when to look again. Whatever goes wrong is told in the object's status."""
        extra = {"kind": key.kind, "namespace": key.namespace, "object": key.name}
        try:
            with metrics.RECONCILE_SECONDS.labels(key.kind).time():
                delay = self._reconcile(key)
            self._failures.pop(key, None)
            return delay
        except ApiError as error:
            if error.code == 409:
                metrics.CONFLICTS.labels(key.kind).inc()
                return 0.1
            LOG.warning("reconcile failed: %s", error, extra=extra)
            text = f"the API server refused: {error}" if error.code else str(error)
        except Exception as error:
            LOG.exception("reconcile failed", extra=extra)
            text = f"{type(error).__name__}: {error}"
        metrics.RECONCILE_ERRORS.labels(key.kind).inc()
        self._failures[key] += 1
        self._tell(key, text)
        return min(LONGEST_BACKOFF, 0.5 * 2 ** self._failures[key])

    # -- one look ----------------------------------------------------------------------------------------------------

    def _reconcile(self, key: Key) -> float | None:
        found = self.cluster.get(API_VERSION, key.kind, key.namespace, key.name)
        if found is None:
            self._count_phase(key, None)
            return None
        outcome = self._decide(key, found)
        if outcome is None:
            return None
        if key.kind == "RLTrainingJob" and not isinstance(outcome, training_job.JobOutcome):
            # A schedule's status says which time was dealt with last: the child comes before it, or might never come.
            self._act(found, outcome)
            changed = self._write(found, outcome)
        else:
            changed = self._write(found, outcome)
            self._act(found, outcome)
        for event in outcome.events:
            self._record(found, event)
        self._drop_finalizer(found, outcome)
        self._count_phase(key, getattr(outcome.status, "phase", None))
        # Written once more after a change: what was decided from the old status is decided anew from the new one.
        return 0.0 if changed and outcome.requeue is None and outcome.events else outcome.requeue

    def _decide(self, key: Key, found: Object) -> Outcome | None:
        if key.kind == "PolicyService":
            return policy_service.reconcile(found, self._observe_service(found), self.now())
        if found["spec"].get("schedule") and not found["metadata"].get("deletionTimestamp"):
            selector = f"{SCHEDULE_LABEL}={key.name}"
            children = self.cluster.list(API_VERSION, "RLTrainingJob", key.namespace, selector)
            return reconcile_schedule(found, children, self.now())
        return training_job.reconcile(found, self._observe_job(found), self.now(), self.identity)

    def _observe_job(self, job: Object) -> training_job.Observed:
        namespace, name = job["metadata"]["namespace"], job["metadata"]["name"]
        if training_job.at_rest(job):
            return training_job.Observed()
        status = JobStatus.model_validate(job.get("status") or {})
        run, error = self._observe_run(status, namespace)
        pods = self.cluster.list("v1", "Pod", namespace, f"{JOB_LABEL}={name}")
        pods.sort(key=lambda p: p["metadata"].get("creationTimestamp") or "")
        jobs = self.cluster.list("batch/v1", "Job", namespace, f"{JOB_LABEL}={name}")
        at_work = [
            Reference(o["apiVersion"], o["kind"], o["metadata"]["name"])
            for o in jobs + [p for p in pods if is_executor(p)]
            if not has_ended(o)
        ]
        mine = [p for p in pods if run and p["metadata"]["labels"].get(RUN_LABEL, run.id) == run.id]
        if run and not run.ended:
            # KFP's own pods, which have no label of the job's: the run stands still when one of them cannot start.
            known = {p["metadata"]["name"] for p in mine}
            all_of_run = self.cluster.list("v1", "Pod", namespace, f"{RUN_LABEL}={run.id}")
            mine += [p for p in all_of_run if is_pending(p) and p["metadata"]["name"] not in known]
        service = job["spec"].get("deploy", {}).get("service") or name
        return training_job.Observed(
            run=run,
            backend_error=error,
            submission_refused=self._refused.get(status.run.name, "") if status.run else "",
            pods=mine,
            logs={
                p["metadata"]["name"]: last_lines(self.cluster.log(namespace, p["metadata"]["name"], "main", LOG_LINES))
                for p in mine
                if stage_of(p)
                and p["status"].get("phase") == "Failed"
                and (record_of(p) or {}).get("status") != "failed"
            },
            messages=self._messages(namespace, jobs, mine, run) if run and not run.ended else [],
            at_work=at_work,
            service=self.cluster.get(API_VERSION, "PolicyService", namespace, service),
        )

    def _observe_run(self, status: JobStatus, namespace: str) -> tuple[PipelineRun | None, str]:
        since, error = self._backend_rests
        if time.monotonic() - since < BACKEND_REST_SECONDS and error:
            return None, error
        try:
            if status.run is None:
                # Nothing to ask for, yet a job that is about to be submitted wants to know whether it can be.
                if not training_job.finished(status):
                    self.backend.check()
                return None, ""
            if status.run.id:
                return self.backend.get(status.run.id), ""
            return self.backend.find(status.run.name, namespace), ""
        except BackendError as problem:
            self._backend_rests = time.monotonic(), str(problem)
            return None, str(problem)

    def _messages(self, namespace: str, jobs: list[Object], pods: list[Object], run: PipelineRun) -> list[str]:
        """Why children could not be made: what Argo's workflow and Events of training jobs and pods say."""
        found = []
        for workflow in self.cluster.list("argoproj.io/v1alpha1", "Workflow", namespace, f"{RUN_LABEL}={run.id}"):
            nodes = (workflow.get("status") or {}).get("nodes") or {}
            found += [
                n["message"] for n in nodes.values() if n.get("message") and n.get("phase") in ("Pending", "Error")
            ]
        idle = {
            job["metadata"]["name"]
            for job in jobs
            if not has_ended(job) and not (job.get("status") or {}).get("active")
        }
        found += [event["message"] for event in self._events(namespace, "FailedCreate", idle)]
        return found + self._told_of_pods(namespace, pods)

    def _told_of_pods(self, namespace: str, pods: list[Object]) -> list[str]:
        """What kubelet says of late, and in Events alone, of pods that cannot start."""
        found = []
        for held, reason in ((cannot_be_pulled, "FailedToRetrieveImagePullSecret"), (is_being_made, "FailedMount")):
            for event in self._events(namespace, reason, {pod["metadata"]["name"] for pod in filter(held, pods)}):
                if (self.now() - _last_seen(event)).total_seconds() < EVENT_SECONDS:
                    found.append(f"pod {event['involvedObject']['name']}: {event['message']}")
        return found

    def _events(self, namespace: str, reason: str, names: set[str]) -> list[Object]:
        """Events of a reason about objects of these names."""
        if not names:
            return []
        path = f"/api/v1/namespaces/{namespace}/events"
        events = self.cluster.request("GET", path, {"fieldSelector": f"reason={reason}"}).get("items", [])
        return [event for event in events if event["involvedObject"]["name"] in names]

    def _observe_service(self, service: Object) -> policy_service.Observed:
        namespace, name = service["metadata"]["namespace"], service["metadata"]["name"]
        selector = f"{SERVICE_LABEL}={name}"
        url = service["spec"].get("monitoring", {}).get("prometheusUrl") or self.prometheus_url
        pods = self.cluster.list("v1", "Pod", namespace, selector)
        return policy_service.Observed(
            deployments=self.cluster.list("apps/v1", "Deployment", namespace, selector),
            pods=pods,
            messages=self._told_of_pods(namespace, pods),
            ask=(lambda expression: query(url, expression)) if url else None,
            service_monitors=self._has_service_monitors(),
            autoscaled=self.cluster.get("autoscaling/v2", "HorizontalPodAutoscaler", namespace, name) is not None,
        )

    def _has_service_monitors(self) -> bool:
        try:
            self.cluster.request("GET", "/apis/monitoring.coreos.com/v1")
        except ApiError as error:
            if error.code == 404:
                return False
            raise
        return True

    # -- writes ------------------------------------------------------------------------------------------------------

    def _write(self, found: Object, outcome: Outcome) -> bool:
        """Finalizer first, then the status of the very version that was read; returns whether the status changed."""
        meta = found["metadata"]
        deleting = bool(meta.get("deletionTimestamp"))
        wanted = getattr(outcome, "finalizer", False)
        if wanted and not deleting and training_job.FINALIZER not in meta.get("finalizers", []):
            finalizers = [*meta.get("finalizers", []), training_job.FINALIZER]
            patch = {"metadata": {"resourceVersion": meta["resourceVersion"], "finalizers": finalizers}}
            written = self.cluster.patch(API_VERSION, found["kind"], meta["namespace"], meta["name"], patch)
            found["metadata"] = meta = written["metadata"]
        status = outcome.status.model_dump(by_alias=True, exclude_none=True, mode="json")
        if status == found.get("status"):
            return False
        self._measure(found, outcome.status)
        written = self.cluster.replace_status({**found, "status": status})
        found["metadata"], found["status"] = written["metadata"], status
        return True

    def _act(self, found: Object, outcome: Outcome) -> None:
        namespace = found["metadata"]["namespace"]
        for document in outcome.apply:
            self.cluster.apply(document)
        for reference in outcome.delete:
            self.cluster.delete(namespace, reference)
        if not isinstance(outcome, training_job.JobOutcome):
            return
        try:
            if outcome.terminate:
                self.backend.terminate(outcome.terminate)
                self._record(found, Event(EventReason.RUN_TERMINATED, f"pipeline run {outcome.terminate}"))
            if outcome.submit:
                self._submit(found, outcome.status)
        except BackendError as error:
            if not error.refused:
                self._backend_rests = time.monotonic(), str(error)
            outcome.requeue = BACKEND_REST_SECONDS

    def _submit(self, job: Object, status: JobStatus) -> None:
        assert status.run is not None
        namespace, name = job["metadata"]["namespace"], job["metadata"]["name"]
        try:
            spec = self.build(job, self._warm_start(job))
            self.backend.submit(status.run.name, namespace, spec)
        except JobError as error:
            self._refused[status.run.name] = str(error)
        except BackendError as error:
            if not error.refused:
                raise
            self._refused[status.run.name] = str(error)
        LOG.info(
            "submitted %s", status.run.name, extra={"kind": "RLTrainingJob", "namespace": namespace, "object": name}
        )

    def _warm_start(self, job: Object) -> str | None:
        """A scheduled run starts from the policy in service; the others from nothing."""
        if training_job.SCHEDULED_AT not in (job["metadata"].get("annotations") or {}):
            return None
        name = job["spec"].get("deploy", {}).get("service") or job["metadata"]["name"]
        service = self.cluster.get(API_VERSION, "PolicyService", job["metadata"]["namespace"], name)
        if service is None:
            return None
        stable = PolicyServiceStatus.model_validate(service.get("status") or {}).stable
        mount = service["spec"].get("storage", {}).get("mountPath", "/var/bluewhale")
        return f"{mount}/services/{name}/bundles/{stable.digest}" if stable else None

    def _drop_finalizer(self, found: Object, outcome: Outcome) -> None:
        meta = found["metadata"]
        present = meta.get("finalizers", [])
        if training_job.FINALIZER not in present or getattr(outcome, "finalizer", False):
            return
        finalizers = [f for f in present if f != training_job.FINALIZER]
        patch = {"metadata": {"resourceVersion": meta["resourceVersion"], "finalizers": finalizers or None}}
        try:
            self.cluster.patch(API_VERSION, found["kind"], meta["namespace"], meta["name"], patch)
        except ApiError as error:
            if error.code != 404:
                raise

    def _record(self, found: Object, event: Event) -> None:
        """An Event about the object; one that cannot be written is no reason to stop."""
        meta, now = found["metadata"], timestamp(self.now())
        LOG.info(
            "%s: %s", event.reason, event.message,
            extra={"kind": found["kind"], "namespace": meta["namespace"], "object": meta["name"]},
        )  # fmt: skip
        if event.reason == EventReason.STAGE_RETRIED:
            metrics.RETRIES.labels(event.message.split(" ")[0]).inc()
        involved = {k: meta[k] for k in ("namespace", "name", "uid", "resourceVersion") if k in meta}
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": f"{meta['name']}.", "namespace": meta["namespace"]},
            "involvedObject": {"apiVersion": found["apiVersion"], "kind": found["kind"], **involved},
            "reason": event.reason.value,
            "message": event.message[:1024],
            "type": event.type,
            "source": {"component": FIELD_MANAGER},
            "reportingComponent": f"{API_VERSION.split('/')[0]}/operator",
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        try:
            self.cluster.create(body)
        except ApiError as error:
            LOG.warning("event not recorded: %s", error)

    def _tell(self, key: Key, text: str) -> None:
        """A reconcile that failed says so in the status, so that nobody has to read the operator's log."""
        try:
            found = self.cluster.get(API_VERSION, key.kind, key.namespace, key.name)
            if found is None or found["metadata"].get("deletionTimestamp"):
                return
            model = JobStatus if key.kind == "RLTrainingJob" else PolicyServiceStatus
            status = model.model_validate(found.get("status") or {})
            generation = found["metadata"].get("generation", 1)
            if isinstance(status, JobStatus) and training_job.finished(status):
                return
            if set_condition(
                status.conditions, "Stalled", True, Reason.RECONCILE_FAILED, text, generation, self.now()
            ):  # fmt: skip
                self._record(found, Event(EventReason.RECONCILE_FAILED, text, "Warning"))
            status.reason = Reason.RECONCILE_FAILED
            body = status.model_dump(by_alias=True, exclude_none=True, mode="json")
            if body != found.get("status"):
                self.cluster.replace_status({**found, "status": body})
        except Exception as error:
            LOG.warning("status not written: %s", error)

    # -- figures -----------------------------------------------------------------------------------------------------

    def _measure(self, found: Object, status: Any) -> None:
        if not isinstance(status, JobStatus):
            return
        before = {s.name: s.state for s in JobStatus.model_validate(found.get("status") or {}).stages}
        for stage in status.stages:
            ended = stage.state in ("Succeeded", "Failed") and before.get(stage.name) != stage.state
            if ended and stage.start_time and stage.completion_time:
                seconds = training_job.seconds_between(stage.start_time, stage.completion_time)
                metrics.STAGE_SECONDS.labels(stage.name, stage.state).observe(seconds)

    def _count_phase(self, key: Key, phase: str | None) -> None:
        if key.kind != "RLTrainingJob":
            return
        old = self._phases.pop(key, None)
        if phase is not None:
            self._phases[key] = phase
        if old != phase:
            for name in {old, phase} - {None}:
                metrics.JOBS.labels(name).set(sum(p == name for p in self._phases.values()))


class JsonLines(logging.Formatter):
    """One JSON object a line, with the object that it is about."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {k: record.__dict__[k] for k in ("kind", "namespace", "object") if k in record.__dict__}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _last_seen(event: Object) -> datetime:
    seen = (event.get("series") or {}).get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime")
    return parse_time(seen or event["metadata"]["creationTimestamp"])
