"""A TorchX scheduler for plain Kubernetes: an app runs as an Indexed Job whose pods find one another by a Service.

The pod of index k is replica k, and its replacement is replica k again. The headless Service gives replica 0 the
address that a c10d rendezvous needs. Who submits must be allowed to create, get, list and delete jobs, to create, get
and delete services, to list pods and events, and to get pods/log.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import yaml
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from torchx.schedulers.api import DescribeAppResponse, ListAppResponse, Scheduler, Stream, StructuredOpts
from torchx.schedulers.ids import make_unique
from torchx.settings import ENV_TORCHX_INTERNAL_SESSION_ID
from torchx.specs import (
    AppDef,
    AppDryRunInfo,
    AppState,
    CfgVal,
    ReplicaStatus,
    Role,
    RoleStatus,
    VolumeMount,
    macros,
    runopts,
)
from torchx.util.strings import normalize_str
from urllib3 import Retry
from urllib3.exceptions import HTTPError

Object = dict[str, Any]  # a Kubernetes object, or a part of one, as in its manifest

NAME = "kubernetes_indexed_job"
APP, ROLE = "torchx.pytorch.org/app-name", "torchx.pytorch.org/role-name"
SPEC_HASH = "bluewhale.io/spec-hash"
QUEUE = "kueue.x-k8s.io/queue-name"
JOB_NAME, INDEX = "batch.kubernetes.io/job-name", "batch.kubernetes.io/job-completion-index"
INDEX_VARIABLE, HEAD_VARIABLE = "JOB_COMPLETION_INDEX", "TORCHX_RANK0_HOST"
# Replica 0 hosts the rendezvous, which it must know before its own name is in the DNS.
ENTRYPOINT = f'if [ "${INDEX_VARIABLE}" = 0 ]; then export {HEAD_VARIABLE}=localhost; fi; exec "$@"'
PHASES = {"Running": AppState.RUNNING, "Succeeded": AppState.SUCCEEDED, "Failed": AppState.FAILED}
REQUEST_TIMEOUT = 30.0  # seconds
QUIET = 60.0  # seconds without a line after which a log is asked for again: the connection may be dead
SKEW = 60  # seconds that the nodes' clocks may be off
POLL = 1.0  # seconds between looks for a replica's pod
# Some minutes without an API server must not cost hours of training.
PATIENCE = Retry(
    12, backoff_factor=0.5, backoff_max=30, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False
)


@dataclass
class Opts(StructuredOpts):  # type: ignore[misc]
    """Where and how the pods run; every name is one of Kubernetes."""

    namespace: str = "default"
    """Namespace of the Job."""

    job_name: str | None = None
    """Name of the Job and its Service; the same app submitted again under it is the same Job. Random if unset."""

    owner: dict[str, str] | None = None
    """apiVersion, kind, name and uid of the object in the same namespace that owns the Job and its Service."""

    backoff_limit_per_index: int = 3
    """How often each replica is replaced after a failure, or the role's max_retries if more; evictions do not count."""

    ttl_seconds_after_finished: int | None = 86_400
    """Delete the Job this long after its end."""

    active_deadline_seconds: int | None = None
    """Fail the Job when it has run for longer."""

    labels: dict[str, str] | None = None
    """Of the Service, the Job and its pods; with Kueue's queue name the Job waits, suspended, to be admitted."""

    annotations: dict[str, str] | None = None
    """Of the Service, the Job and its pods."""

    image_pull_policy: str | None = None
    """Always, IfNotPresent or Never."""

    image_pull_secrets: list[str] | None = None
    """Names of secrets to pull the image with."""

    service_account: str | None = None
    """Service account of the pods, which get no token of it."""

    run_as_user: int | None = None
    """User and group of the pods, so that whoever follows them may read what they write; by default the image's."""

    priority_class: str | None = None
    """Priority class of the pods."""

    node_selector: dict[str, str] | None = None
    """Labels of the nodes that may run the pods."""

    tolerations: list[str] | None = None
    """Taints that the pods tolerate, each a toleration as JSON."""

    volumes: list[str] | None = None
    """Claims that the pods mount, each as JSON: claimName and mountPath, and if wanted subPath and readOnly."""


@dataclass
class IndexedJob:
    """What is submitted; prints as the YAML that `kubectl apply` takes."""

    job: Object
    service: Object

    def __str__(self) -> str:
        plain = json.loads(json.dumps([self.service, self.job]))  # YAML would write a shared part as a reference
        return yaml.safe_dump_all(plain, sort_keys=False)


def render(app: AppDef, opts: Opts) -> IndexedJob:
    """The Job and Service of an app of one role; raises `ValueError` on what cannot run so."""
    if len(app.roles) != 1:
        raise ValueError(f"app {app.name}: {NAME} runs apps of one role, this one has {len(app.roles)}")
    name = opts.job_name or make_unique(normalize_str(app.name)[:40])
    maximum = app.roles[0].num_replicas
    minimum = app.roles[0].min_replicas or maximum
    if not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(f"{name}-{maximum - 1}") > 63:
        raise ValueError(
            f"job_name {name!r}: must be lower-case letters, digits and '-', begin with a letter, and leave room for "
            f"'-{maximum - 1}' in 63 characters"
        )
    if not 1 <= minimum <= maximum:
        raise ValueError(f"app {app.name}: min_replicas {minimum} must be between 1 and the {maximum} replicas")

    head = f"{name}-0.{name}"
    index = "\0"  # no text of the app holds it: it stands for the index while the app's own text is escaped
    role = macros.Values("", f"{opts.namespace}:{name}", index, HEAD_VARIABLE).apply(app.roles[0])
    role.env.pop(ENV_TORCHX_INTERNAL_SESSION_ID, None)  # differs between submitters, which would make it another spec

    def literal(text: str) -> str:
        """`$$` and `$(` are Kubernetes' own."""
        return re.sub(r"\$(?=[$(])", "$$", text).replace(index, f"$({INDEX_VARIABLE})")

    volumes, mounts = _volumes(role, opts)
    labels = {APP: _label(app.name), ROLE: _label(role.name), **(opts.labels or {})}
    container = {
        "name": _label(role.name),
        "image": role.image,
        "command": ["sh", "-c", ENTRYPOINT, "sh", *map(literal, (role.entrypoint, *role.args))],
        "env": [
            {"name": INDEX_VARIABLE, "valueFrom": {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX}']"}}},
            {"name": HEAD_VARIABLE, "value": head},
            *({"name": variable, "value": literal(value)} for variable, value in role.env.items()),
        ],
        "resources": _resources(role),
        "volumeMounts": mounts,
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        **_given(
            imagePullPolicy=opts.image_pull_policy,
            ports=[{"name": port, "containerPort": number} for port, number in role.port_map.items()],
        ),
    }
    user = _given(runAsUser=opts.run_as_user, runAsGroup=opts.run_as_user)
    pod = {
        "restartPolicy": "Never",
        "subdomain": name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {"runAsNonRoot": True, **user, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
        "volumes": volumes,
        **_given(
            serviceAccountName=opts.service_account,
            priorityClassName=opts.priority_class,
            nodeSelector=opts.node_selector,
            tolerations=_parsed("tolerations", opts.tolerations),
            imagePullSecrets=[{"name": secret} for secret in opts.image_pull_secrets or []],
        ),
    }
    job = {
        "completionMode": "Indexed",
        "completions": maximum,
        "parallelism": maximum,
        "backoffLimitPerIndex": max(opts.backoff_limit_per_index, role.max_retries),
        "maxFailedIndexes": maximum - minimum,
        "podFailurePolicy": {
            "rules": [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]
        },
        "template": {"metadata": _given(labels=labels, annotations=opts.annotations), "spec": pod},
        **_given(
            suspend=QUEUE in labels or None,
            ttlSecondsAfterFinished=opts.ttl_seconds_after_finished,
            activeDeadlineSeconds=opts.active_deadline_seconds,
            # A replica that was given up, or that comes when the others are done, does not undo their success.
            successPolicy={"rules": [{"succeededIndexes": "0"}]} if minimum < maximum else None,
        ),
    }
    service = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {JOB_NAME: name}}

    def manifest(api: str, kind: str, spec: Object) -> Object:
        digest = hashlib.sha256(json.dumps([labels, opts.annotations, spec], sort_keys=True).encode()).hexdigest()
        metadata = {
            "name": name,
            "namespace": opts.namespace,
            "labels": labels,
            "annotations": {**(opts.annotations or {}), SPEC_HASH: digest[:16]},
            **_given(ownerReferences=[_owner(opts.owner)] if opts.owner else None),
        }
        return {"apiVersion": api, "kind": kind, "metadata": metadata, "spec": spec}

    return IndexedJob(manifest("batch/v1", "Job", job), manifest("v1", "Service", service))


def _given(**fields: Any) -> Object:
    return {name: value for name, value in fields.items() if value not in (None, [], {})}


def _label(text: str) -> str:
    return normalize_str(text)[:63].rstrip("-")


def _owner(reference: Mapping[str, str]) -> Object:
    if missing := {"apiVersion", "kind", "name", "uid"} - set(reference):
        raise ValueError(f"owner: lacks {', '.join(sorted(missing))}")
    return dict(reference)


def _parsed(option: str, texts: list[str] | None, *keys: str) -> list[Object]:
    try:
        found = [json.loads(text) for text in texts or []]
    except ValueError as error:
        raise ValueError(f"{option}: {texts} must each be JSON: {error}") from None
    for value in found:
        if not isinstance(value, dict) or set(keys) - set(value):
            raise ValueError(f"{option}: {value!r} must be an object" + (f" with {', '.join(keys)}" if keys else ""))
    return found


def _volumes(role: Role, opts: Opts) -> tuple[list[Object], list[Object]]:
    """A writable /tmp, shared memory that is not Docker's 64 MB, and the claims."""
    if any(not isinstance(mount, VolumeMount) for mount in role.mounts):
        raise ValueError(f"role {role.name}: mounts of the host are not allowed, only claims (type=volume)")
    claims = _parsed("volumes", opts.volumes, "claimName", "mountPath")
    claims += [{"claimName": m.src, "mountPath": m.dst_path, "readOnly": m.read_only} for m in role.mounts]
    names = {claim: f"claim-{k}" for k, claim in enumerate(dict.fromkeys(mount["claimName"] for mount in claims))}
    volumes = [{"name": "tmp", "emptyDir": {}}, {"name": "shm", "emptyDir": {"medium": "Memory"}}]
    volumes += [{"name": name, "persistentVolumeClaim": {"claimName": claim}} for claim, name in names.items()]
    mounts = [{"name": "tmp", "mountPath": "/tmp"}, {"name": "shm", "mountPath": "/dev/shm"}]
    for mount in claims:
        options = {option: mount[option] for option in ("subPath", "readOnly") if mount.get(option)}
        mounts.append({"name": names[mount["claimName"]], "mountPath": mount["mountPath"], **options})
    return volumes, mounts


def _resources(role: Role) -> Object:
    resource = role.resource
    asked = {"cpu": f"{round(resource.cpu * 1000)}m"} if resource.cpu > 0 else {}
    asked |= {"memory": f"{resource.memMB}Mi"} if resource.memMB > 0 else {}
    asked |= {"nvidia.com/gpu": str(resource.gpu)} if resource.gpu > 0 else {}
    asked |= {device: str(count) for device, count in resource.devices.items()}
    return {"requests": asked, "limits": asked.copy()}


def state_of(job: Object, pods: Iterable[Object], events: Iterable[Object]) -> tuple[AppState, str]:
    """The app's state, and in words why it failed or what its pods wait for; `events` are the Job's own."""
    status, pods = job.get("status", {}), [*pods]
    conditions = {c["type"]: c for c in status.get("conditions") or [] if c["status"] == "True"}
    if "Complete" in conditions:
        return AppState.SUCCEEDED, ""
    if failure := conditions.get("Failed"):
        deaths = sorted(filter(None, map(_death, pods)))
        return AppState.FAILED, "\n".join([_words(failure), *(death for _, death in deaths[-1:])])
    if job["metadata"].get("deletionTimestamp"):
        return AppState.RUNNING, "is being deleted"
    if job["spec"].get("suspend"):
        queue = job["metadata"].get("labels", {}).get(QUEUE)
        return AppState.PENDING, f"suspended until the queue {queue} admits it" if queue else "suspended"
    phases = {pod["status"].get("phase", "Pending") for pod in pods} - {"Failed"}
    running = phases - {"Pending"} or (not pods and status.get("active"))
    obstacles = [words for pod in pods for words in _obstacles(pod)]
    obstacles += [_words(event) for event in sorted(events, key=lambda e: e.get("lastTimestamp") or "")][-1:]
    return AppState.RUNNING if running else AppState.PENDING, "; ".join(dict.fromkeys(obstacles))


def _words(thing: Object) -> str:
    return ": ".join(filter(None, (thing.get("reason"), thing.get("message", "").strip())))


def _obstacles(pod: Object) -> Iterator[str]:
    """Why the pod has not started: no node for it, its image cannot be pulled, ..."""
    status = pod["status"]
    if status.get("phase") != "Pending":
        return
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            yield _words(condition)
    for container in status.get("containerStatuses") or []:
        waiting = container["state"].get("waiting")
        if waiting and waiting.get("reason") not in ("ContainerCreating", "PodInitializing"):
            yield _words(waiting)


def _death(pod: Object) -> tuple[str, str] | None:
    """When a failed pod ended, and how."""
    if pod["status"].get("phase") != "Failed":
        return None
    for container in pod["status"].get("containerStatuses") or []:
        if end := container["state"].get("terminated"):
            return end.get("finishedAt") or "", f"replica {_index(pod)} exited {end['exitCode']}: {_words(end)}"
    return "", f"replica {_index(pod)}: {_words(pod['status'])}"


def _index(pod: Object) -> int:
    return int(pod["metadata"]["annotations"][INDEX])


class KubernetesIndexedJobScheduler(Scheduler[Opts]):  # type: ignore[misc]
    """Submits Indexed Jobs, tells their state, follows their logs. An app's id is `namespace:job`."""

    def __init__(self, session_name: str, api: client.ApiClient | None = None) -> None:
        super().__init__(NAME, session_name)
        self._given_api = api

    @cached_property
    def _api(self) -> client.ApiClient:
        if self._given_api is not None:
            return self._given_api
        configuration = client.Configuration()
        try:
            config.load_incluster_config(client_configuration=configuration)
        except config.ConfigException:
            config.load_kube_config(client_configuration=configuration)
        configuration.retries = PATIENCE
        return client.ApiClient(configuration)

    @cached_property
    def _batch(self) -> client.BatchV1Api:
        return client.BatchV1Api(self._api)

    @cached_property
    def _core(self) -> client.CoreV1Api:
        return client.CoreV1Api(self._api)

    def _run_opts(self) -> runopts:
        return Opts.as_runopts()

    def _submit_dryrun(self, app: AppDef, cfg: Opts) -> AppDryRunInfo[IndexedJob, Opts]:
        return AppDryRunInfo(render(app, cfg), str)

    def schedule(self, dryrun_info: AppDryRunInfo[IndexedJob, Opts]) -> str:
        """Create the Job and its Service, as far as they do not exist.

        Raises `ValueError` when the name is taken by something else, `RuntimeError` while what had it is being deleted.
        """
        job, service = dryrun_info.request.job, dryrun_info.request.service
        # The Job first, for it to own the Service. A pod takes longer to start than the Service to be made.
        job = _ensure(self._batch.create_namespaced_job, self._batch.read_namespaced_job, job)
        if "ownerReferences" not in service["metadata"]:
            owner = {"apiVersion": "batch/v1", "kind": "Job"} | {key: job["metadata"][key] for key in ("name", "uid")}
            service = {**service, "metadata": {**service["metadata"], "ownerReferences": [owner]}}
        _ensure(self._core.create_namespaced_service, self._core.read_namespaced_service, service)
        return f"{job['metadata']['namespace']}:{job['metadata']['name']}"

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        namespace, name = app_id.split(":")
        if (job := self._job(app_id)) is None:
            return None
        pods, events, replicas = self._pods(app_id), [], job["spec"]["completions"]
        if sum(pod["status"].get("phase") != "Failed" for pod in pods) < replicas:
            uid = job["metadata"]["uid"]
            selector = f"involvedObject.uid={uid},reason=FailedCreate"
            events = _call(self._core.list_namespaced_event, namespace, field_selector=selector)["items"]
        state, message = state_of(job, pods, events)
        container = job["spec"]["template"]["spec"]["containers"][0]
        role = container["name"]
        newest = {_index(pod): PHASES.get(pod["status"].get("phase"), AppState.PENDING) for pod in pods}
        statuses = [ReplicaStatus(k, newest[k], role, f"{name}-{k}.{name}") for k in sorted(newest)]
        return DescribeAppResponse(
            app_id,
            state,
            job.get("status", {}).get("failed") or 0,
            message,
            roles=[Role(role, container["image"], num_replicas=replicas)],
            roles_statuses=[RoleStatus(role, statuses)],
        )

    def log_iter(
        self,
        app_id: str,
        role_name: str,
        k: int = 0,
        regex: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        should_tail: bool = False,
        streams: Stream | None = None,
    ) -> Iterator[str]:
        """Lines of replica k, also of the pods that it was replaced by; with `should_tail` until the app ends."""
        if streams not in (None, Stream.COMBINED):
            raise ValueError(f"{NAME}: Kubernetes keeps stdout and stderr as one log, there is no {streams}")
        read: dict[str, str] = {}  # by pod, the time of the last line seen
        finished: set[str] = set()
        while True:
            last_look = not should_tail or self._ended(app_id)
            for pod in self._pods(app_id):
                uid, phase = pod["metadata"]["uid"], pod["status"].get("phase", "Pending")
                if _index(pod) != k or phase == "Pending" or uid in finished:
                    continue
                try:
                    for stamp, line in self._lines(pod, read.get(uid), since, should_tail):
                        if until and datetime.fromisoformat(stamp) > until.astimezone(UTC):
                            return
                        read[uid] = stamp
                        if not regex or re.search(regex, line):
                            yield line
                except HTTPError:
                    if not should_tail:
                        raise
                    last_look = False  # the connection was lost: go on from the last line
                else:
                    if phase != "Running":
                        finished.add(uid)
            if last_look:
                return
            time.sleep(POLL)

    def _lines(self, pod: Object, after: str | None, since: datetime | None, follow: bool) -> Iterator[tuple[str, str]]:
        """Times and lines of a pod's log that come after a time; nothing when it never began or is gone."""
        begin = datetime.fromisoformat(after) if after else since and since.astimezone(UTC)
        window = {"since_seconds": SKEW + max(0, int((datetime.now(UTC) - begin).total_seconds()))} if begin else {}
        metadata, options = pod["metadata"], {"follow": follow, "timestamps": True, "_preload_content": False}
        try:
            response = self._core.read_namespaced_pod_log(
                metadata["name"], metadata["namespace"], **options, **window, _request_timeout=(REQUEST_TIMEOUT, QUIET)
            )
        except ApiException as error:
            if error.status in (400, 404):
                return
            raise
        with response:
            for row in response:
                stamp, _, line = row.decode(errors="replace").partition(" ")
                if not stamp[:4].isdigit():
                    continue  # a kubelet's own words, such as that the log is gone
                if stamp > after if after else not begin or datetime.fromisoformat(stamp) >= begin:
                    yield stamp, line

    def list(self, cfg: Mapping[str, CfgVal] | None = None) -> Sequence[ListAppResponse]:
        namespace = Opts.from_cfg(cfg or {}).namespace
        jobs = _call(self._batch.list_namespaced_job, namespace, label_selector=APP)["items"]
        return [
            ListAppResponse(f"{namespace}:{j['metadata']['name']}", state_of(j, [], [])[0], name=j["metadata"]["name"])
            for j in jobs
        ]

    def _cancel_existing(self, app_id: str) -> None:
        """Delete the Job, its pods and its Service; the Job is gone once its pods are."""
        namespace, name = app_id.split(":")
        for delete in (self._batch.delete_namespaced_job, self._core.delete_namespaced_service):
            try:
                _call(delete, name, namespace, propagation_policy="Foreground")
            except ApiException as error:
                if error.status != 404:
                    raise

    def _job(self, app_id: str) -> Object | None:
        namespace, name = app_id.split(":")
        try:
            return _call(self._batch.read_namespaced_job, name, namespace)
        except ApiException as error:
            if error.status == 404:
                return None
            raise

    def _ended(self, app_id: str) -> bool:
        job = self._job(app_id)
        return job is None or state_of(job, [], [])[0] in (AppState.SUCCEEDED, AppState.FAILED)

    def _pods(self, app_id: str) -> Sequence[Object]:
        """The app's pods, the oldest first."""
        namespace, name = app_id.split(":")
        pods = _call(self._core.list_namespaced_pod, namespace, label_selector=f"{JOB_NAME}={name}")["items"]
        return sorted(pods, key=lambda pod: pod["metadata"]["creationTimestamp"])


def _call(method: Callable[..., Any], *args: str, **options: Any) -> Object:
    return json.loads(method(*args, **options, _preload_content=False, _request_timeout=REQUEST_TIMEOUT).data)


def _ensure(create: Callable[..., Any], read: Callable[..., Any], body: Object) -> Object:
    """Create the object, or return the one that was made of the same specification for the same owner."""
    metadata = body["metadata"]
    what = f"{body['kind']} {metadata['namespace']}/{metadata['name']}"
    try:
        return _call(create, metadata["namespace"], body=body)
    except ApiException as error:
        if error.status != 409:
            raise
    found = _call(read, metadata["name"], metadata["namespace"])
    if found["metadata"].get("deletionTimestamp"):
        raise RuntimeError(f"{what} is being deleted: submit again once it is gone")
    if found["metadata"].get("annotations", {}).get(SPEC_HASH) != metadata["annotations"][SPEC_HASH]:
        raise ValueError(f"{what} exists with another specification: delete it, or choose another job_name")
    if _owners(found) != _owners(body):
        raise ValueError(f"{what} exists and belongs to another owner: delete it, or choose another job_name")
    return found


def _owners(body: Object) -> Sequence[str]:
    return [owner["uid"] for owner in body["metadata"].get("ownerReferences", [])]


def create_scheduler(
    session_name: str, client: client.ApiClient | None = None, **kwargs: Any
) -> KubernetesIndexedJobScheduler:
    """What TorchX calls; without a client, the cluster that this runs in is used, or else the kubeconfig's."""
    return KubernetesIndexedJobScheduler(session_name, client)
