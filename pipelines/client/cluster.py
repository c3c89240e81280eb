"""A job's verbs over a cluster: what is wished is written into the objects, and their controllers do it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kubernetes
import urllib3
import yaml
from kubernetes.client import ApiClient, CoreV1Api, CustomObjectsApi
from kubernetes.client.exceptions import ApiException

from contracts.job import API_VERSION, JobError, load_job
from contracts.policy_service import Candidate
from contracts.status import Condition, JobStatus, PolicyServiceStatus, Reason
from pipelines.client.protocol import (
    Asked,
    Client,
    ClientError,
    Job,
    NotApplicableError,
    NotFoundError,
    UnavailableError,
    unknown,
)

GROUP, VERSION = API_VERSION.split("/")
JOBS, SERVICES = "rltrainingjobs", "policyservices"
KINDS = {JOBS: "RLTrainingJob", SERVICES: "PolicyService"}
RETRY, PROMOTE, ABORT = (f"{GROUP}/{verb}" for verb in ("retry", "promote", "abort"))
JOB, STAGE, ROLE = (f"{GROUP}/{label}" for label in ("job", "stage", "role"))
INDEX = "batch.kubernetes.io/job-completion-index"

TIMEOUT_SECONDS = 20
WATCH_SECONDS = 300
ATTEMPTS = 5
"""Of a change that somebody else's came before."""
PATIENCE_SECONDS = 60.0
"""A watch bears that the API server is away for so long."""

Object = dict[str, Any]


class ClusterClient(Client):
    """Jobs of one namespace.

    The cluster is the one of the kubeconfig's context, or the one that this pod is in; the namespace is the context's,
    or the pod's. Raises `UnavailableError` when there is neither.
    """

    def __init__(
        self,
        namespace: str | None = None,
        context: str | None = None,
        kubeconfig: str | None = None,
        api: ApiClient | None = None,
    ) -> None:
        here = "default"
        if api is None:
            api, here = _connect(context, kubeconfig)
        self.api, self.namespace = api, namespace or here
        self._objects, self._core = CustomObjectsApi(api), CoreV1Api(api)

    # -- looking -----------------------------------------------------------------------------------------------------

    def jobs(self) -> list[Job]:
        return [_typed(item) for item in self._list(JOBS)]

    def get(self, name: str) -> Job:
        job = _typed(self._job(name))
        if job.status.rollout is None:
            return job
        service = self._get(SERVICES, job.status.rollout.service)
        return job.model_copy(update={"service": _service_status(service) if service else None})

    def watch(self, name: str) -> Iterator[Job]:
        last, away_since = None, None
        while True:
            try:
                # An event only says that it is time to look: a look sees the service too, and misses nothing.
                for _ in self._events(name):
                    job = self.get(name)
                    away_since = None
                    if job != last:
                        yield job
                    if job.ended:
                        return
                    last = job
            except UnavailableError:
                away_since = away_since or time.monotonic()
                if last is None or time.monotonic() - away_since > PATIENCE_SECONDS:
                    raise
                time.sleep(1)

    def _events(self, name: str) -> Iterator[object]:
        yield None
        with self._explained("watch", JOBS):
            yield from kubernetes.watch.Watch().stream(
                self._objects.list_namespaced_custom_object, GROUP, VERSION, self.namespace, JOBS,
                field_selector=f"metadata.name={name}", timeout_seconds=WATCH_SECONDS,
                _request_timeout=WATCH_SECONDS + TIMEOUT_SECONDS,
            )  # fmt: skip

    def logs(self, name: str, stage: str, follow: bool = False, worker: int | None = None) -> Iterator[str]:
        job = _typed(self._job(name))
        pod = self._pod(job, stage, worker)
        containers = [container.name for container in pod.spec.containers]
        with self._explained("get", "pods/log"):
            response = self._core.read_namespaced_pod_log(
                pod.metadata.name, self.namespace, container="main" if "main" in containers else containers[0],
                follow=follow, _preload_content=False, _request_timeout=(TIMEOUT_SECONDS, None),
            )  # fmt: skip
            with response:
                for line in response:
                    yield line.decode(errors="replace").rstrip("\n")

    def _pod(self, job: Job, stage: str, worker: int | None) -> Any:
        status = next((s for s in job.status.stages if s.name == stage), None)
        if status is None:
            raise unknown("stage", stage, [s.name for s in job.status.stages], f"job {job.name}")
        labels = {JOB: job.name, **({STAGE: stage} if worker is None else {ROLE: "worker", INDEX: str(worker)})}
        with self._explained("list", "pods"):
            pods = self._core.list_namespaced_pod(
                self.namespace, label_selector=",".join(f"{k}={v}" for k, v in labels.items()),
                _request_timeout=TIMEOUT_SECONDS,
            ).items  # fmt: skip
        if pods:
            return max(pods, key=lambda pod: (pod.metadata.name == status.pod, pod.metadata.creation_timestamp))
        what = f"stage {stage} of job {job.name}" + (f", worker {worker}" if worker is not None else "")
        if status.state == "Pending":
            raise NotFoundError(
                f"{what}: has not started yet; `kubectl bluewhale get {job.name} -w` shows when it does"
            )
        if status.state == "Cached":
            raise NotFoundError(f"{what}: came from the cache of an earlier run, so nothing was logged")
        run = f" of run {job.status.run.id}" if job.status.run and job.status.run.id else ""
        raise NotFoundError(f"{what}: its pod is gone; look among the archived logs{run} in Kubeflow Pipelines")

    # -- asking ------------------------------------------------------------------------------------------------------

    def promote(self, name: str) -> Asked:
        return self._order(name, "promote", {ABORT: None}, PROMOTE)

    def abort(self, name: str) -> Asked:
        return self._order(name, "abort", {PROMOTE: None}, ABORT)

    def _order(self, name: str, verb: str, withdrawn: dict[str, None], annotation: str) -> Asked:
        job = self._job(name)
        said = ""

        def patch(service: Object | None) -> Object:
            nonlocal said
            candidate = _canary(job, service)
            if service is None or candidate is None:
                raise NotApplicableError(f"{verb}: {_no_canary(job, service)}")
            weight = _service_status(service).weight
            said = f"asked to {verb} policy {candidate.digest[:12]} (version {candidate.version}), now at {weight}"
            # An order is granted once: the same policy's next attempt needs another word.
            return {"metadata": {"annotations": {annotation: f"{candidate.digest}-{candidate.attempt}", **withdrawn}}}

        service = self._change(SERVICES, _service_name(job), patch)
        return Asked(kind="PolicyService", name=service["metadata"]["name"], message=said)

    def pause(self, name: str) -> Asked:
        job = self._job(name)
        typed = _typed(job)
        if typed.ended:
            raise NotApplicableError(f"pause: job {name} has ended ({typed.status.phase}): there is nothing to hold")
        service = self._get(SERVICES, _service_name(job))
        if service and (typed.status.phase == "RollingOut" or _canary(job, service)):
            weight = _service_status(service).weight
            return self._set(SERVICES, _service_name(job), {"paused": True}, f"its canary is held at {weight}")
        return self._set(JOBS, name, {"suspend": True}, "suspended: its run is ended, and what is finished is kept")

    def resume(self, name: str) -> Asked:
        job = self._job(name)
        service = self._get(SERVICES, _service_name(job))
        if service and service["spec"].get("paused") and _canary(job, service):
            return self._set(SERVICES, _service_name(job), {"paused": False}, "its canary goes on")
        if job["spec"].get("suspend"):
            return self._set(JOBS, name, {"suspend": False}, "goes on from the stages that are finished")
        raise NotApplicableError(f"resume: job {name} is not paused ({_typed(job).status.phase})")

    def retry(self, name: str) -> Asked:
        job = self._job(name)
        status = _typed(job).status
        if not _is(status, "Failed", "True"):
            why = f"is {status.phase}: only a job that has failed can be tried again"
            raise NotApplicableError(f"retry: job {name} {why}" + (_message(status, "Accepted") or ""))
        said = "tried again from its failed stage"
        rolled_out = _condition(status, "RolledOut")
        if rolled_out and rolled_out.reason in (Reason.ROLLED_BACK, Reason.ABORTED):
            said = self._raise_attempt(job, status) or said
        elif _condition(status, "Evaluated") and _is(status, "Evaluated", "False"):
            said += "; the gate will say the same of the same estimate: a new job with other data or settings may pass"
        token = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._change(JOBS, name, lambda _: {"metadata": {"annotations": {RETRY: token}}})
        return Asked(kind="RLTrainingJob", name=name, message=said)

    def _raise_attempt(self, job: Object, status: JobStatus) -> str:
        """Without it the service holds to what it found; it goes first, so that the job meets it when it asks again."""
        said = ""

        def patch(service: Object | None) -> Object | None:
            nonlocal said
            wished = ((service or {}).get("spec") or {}).get("candidate") or {}
            if service is None or wished.get("digest") != status.candidate:
                return None  # the job's rollout stage asks anew
            tried = _service_status(service).tried
            last = max(wished.get("attempt", 0), tried.attempt if tried and tried.digest == status.candidate else 0)
            said = f"tried again: attempt {last + 1} of policy {wished['digest'][:12]}"
            return {"spec": {"candidate": {"attempt": last + 1}}}

        self._change(SERVICES, _service_name(job), patch)
        return said

    def submit(self, file: str | Path) -> Job:
        name = load_job(file).metadata.name
        document = yaml.safe_load(Path(file).read_text())
        namespace = document["metadata"].get("namespace") or self.namespace
        try:
            with self._explained("create", JOBS, passed=(409, 422)):
                made = self._objects.create_namespaced_custom_object(
                    GROUP, VERSION, namespace, JOBS, document, _request_timeout=TIMEOUT_SECONDS
                )
        except ApiException as error:
            if error.status == 422:
                raise JobError(f"{file}: {_said(error)}") from None
            text = f"job {name} is in namespace {namespace} already; delete it, or name this one otherwise"
            raise ClientError(text) from None
        return _typed(made)

    def delete(self, name: str) -> None:
        self._job(name)
        with self._explained("delete", JOBS):
            self._objects.delete_namespaced_custom_object(
                GROUP, VERSION, self.namespace, JOBS, name, propagation_policy="Background",
                _request_timeout=TIMEOUT_SECONDS,
            )  # fmt: skip

    # -- requests ----------------------------------------------------------------------------------------------------

    def _list(self, plural: str) -> list[Object]:
        with self._explained("list", plural):
            found: list[Object] = self._objects.list_namespaced_custom_object(
                GROUP, VERSION, self.namespace, plural, _request_timeout=TIMEOUT_SECONDS
            )["items"]
        return found

    def _get(self, plural: str, name: str) -> Object | None:
        try:
            with self._explained("get", plural, passed=(404,)):
                found: Object = self._objects.get_namespaced_custom_object(
                    GROUP, VERSION, self.namespace, plural, name, _request_timeout=TIMEOUT_SECONDS
                )
        except ApiException:
            return None
        return found

    def _job(self, name: str) -> Object:
        found = self._get(JOBS, name)
        if found is None:
            names = [job["metadata"]["name"] for job in self._list(JOBS)]
            raise unknown("job", name, names, f"namespace {self.namespace}")
        return found

    def _set(self, plural: str, name: str, spec: Object, message: str) -> Asked:
        self._change(plural, name, lambda _: {"spec": spec})
        return Asked(kind=KINDS[plural], name=name, message=message)

    def _change(self, plural: str, name: str, patch: Callable[[Object | None], Object | None]) -> Object:
        """Patch the very version that was looked at; when somebody else was faster, look again."""
        for _ in range(ATTEMPTS):
            found = self._get(plural, name)
            body = patch(found)
            if found is None or body is None:
                return found or {}
            body.setdefault("metadata", {})["resourceVersion"] = found["metadata"]["resourceVersion"]
            try:
                with self._explained("patch", plural, passed=(409,)):
                    changed: Object = self._objects.patch_namespaced_custom_object(
                        GROUP, VERSION, self.namespace, plural, name, body, _request_timeout=TIMEOUT_SECONDS
                    )
                return changed
            except ApiException:
                continue
        raise ClientError(f"{KINDS[plural]} {name}: changed by others at each of {ATTEMPTS} attempts; try again")

    @contextmanager
    def _explained(self, verb: str, resource: str, passed: tuple[int, ...] = ()) -> Iterator[None]:
        """Turn what goes wrong into words; the statuses to be passed on are the caller's to explain."""
        host = self.api.configuration.host
        try:
            yield
        except ApiException as error:
            if error.status in passed:
                raise
            if error.status == 401:
                text = f"the API server {host} does not know who asks: log in again, or choose another --context"
                raise UnavailableError(text) from None
            if error.status == 403:
                role = "view" if verb in ("get", "list", "watch") else "edit"
                raise UnavailableError(
                    f"not allowed to {verb} {resource} in namespace {self.namespace}: {_said(error)}; "
                    f"the cluster role {role} holds it"
                ) from None
            if error.status == 404 and resource in KINDS:
                raise UnavailableError(
                    f"the cluster {host} does not know {KINDS[resource]} of {API_VERSION}: "
                    "install BlueWhale there (kubectl apply -k manifests/crd), or choose another --context"
                ) from None
            if not error.status or error.status in (410, 429) or error.status >= 500:
                raise UnavailableError(f"the API server {host} cannot serve this now: {_said(error)}") from None
            raise ClientError(f"{verb} {resource}: {_said(error)}") from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise UnavailableError(
                f"the API server {host} cannot be reached: {reason}; is the cluster up, and --context the right one?"
            ) from None


def _connect(context: str | None, kubeconfig: str | None) -> tuple[ApiClient, str]:
    """The API and the namespace to look in."""
    configuration = kubernetes.client.Configuration()
    namespace: str | None = None
    try:
        kubernetes.config.load_kube_config(kubeconfig, context, configuration)
        contexts, active = kubernetes.config.list_kube_config_contexts(kubeconfig)
        chosen = next(c for c in contexts if c["name"] == (context or active["name"]))
        namespace = chosen["context"].get("namespace")
    except (kubernetes.config.ConfigException, FileNotFoundError, TypeError, yaml.YAMLError) as error:
        try:
            if context or kubeconfig:
                raise kubernetes.config.ConfigException
            kubernetes.config.load_incluster_config(configuration)
            namespace = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace").read_text().strip()
        except (kubernetes.config.ConfigException, OSError):
            text = " ".join(str(error).split())
            raise UnavailableError(
                f"no cluster to talk to: {text}; name one by --kubeconfig and --context, or by $KUBECONFIG"
            ) from None
    configuration.retries = urllib3.Retry(total=0)
    return ApiClient(configuration), namespace or "default"


def _typed(job: Object) -> Job:
    meta = job["metadata"]
    status = JobStatus.model_validate(job.get("status") or {})
    return Job(name=meta["name"], place=meta["namespace"], created=meta.get("creationTimestamp"), status=status)


def _service_status(service: Object) -> PolicyServiceStatus:
    return PolicyServiceStatus.model_validate(service.get("status") or {})


def _service_name(job: Object) -> str:
    name: str = (job["spec"].get("deploy") or {}).get("service") or job["metadata"]["name"]
    return name


def _canary(job: Object, service: Object | None) -> Candidate | None:
    """The job's own candidate, as long as its service has not decided on it."""
    wished = ((service or {}).get("spec") or {}).get("candidate")
    if service is None or not wished:
        return None
    candidate, seen = Candidate.model_validate(wished), _service_status(service)
    own = candidate.job == job["metadata"]["name"] or candidate.digest == (job.get("status") or {}).get("candidate")
    tried = seen.tried and (seen.tried.digest, seen.tried.attempt) == (candidate.digest, candidate.attempt)
    promoted = seen.stable and seen.stable.digest == candidate.digest
    return candidate if own and not tried and not promoted else None


def _no_canary(job: Object, service: Object | None) -> str:
    name, status = job["metadata"]["name"], _typed(job).status
    at = f"{status.phase}{f', stage {status.stage}' if status.stage else ''}"
    wished = ((service or {}).get("spec") or {}).get("candidate") or {}
    if wished and wished.get("job") not in (None, name) and status.phase == "RollingOut":
        return f"PolicyService {_service_name(job)} tries the policy of job {wished['job']} now: name that one"
    if _typed(job).ended:
        return f"no canary of job {name} is under way: the job has ended ({status.phase})"
    return (
        f"no canary of job {name} is under way ({at}); it begins when the gate lets the policy pass. "
        f"`kubectl bluewhale pause {name}` stops the job before that"
    )


def _condition(status: JobStatus, type: str) -> Condition | None:
    return next((c for c in status.conditions if c.type == type), None)


def _is(status: JobStatus, type: str, value: str) -> bool:
    condition = _condition(status, type)
    return condition is not None and condition.status == value


def _message(status: JobStatus, type: str) -> str:
    """What an untrue condition says."""
    condition = _condition(status, type)
    return f" ({condition.message})" if condition and condition.status == "False" and condition.message else ""


def _said(error: ApiException) -> str:
    """The API server's own words: each field at fault on its line, where it names fields."""
    try:
        status = json.loads(error.body or "")
        causes = (status.get("details") or {}).get("causes") or []
        lines = [f"\n  {cause.get('field', '')}: {cause.get('message', '')}" for cause in causes]
        return "".join(lines) or str(status["message"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{error.status} {error.reason}"
