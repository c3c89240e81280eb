"""What is submitted for an app, and what Kubernetes' answers mean; over real HTTP to an emulated API server."""

import asyncio
import json
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
import yaml
from kmock import KubernetesEmulator, Request, Response, Server, action
from kubernetes import client
from torchx.components.dist import torchrun
from torchx.runner import Runner, get_runner
from torchx.specs import AppDef, AppState, BindMount, Resource, Role, VolumeMount, macros

from components.training import kubernetes_scheduler
from components.training.kubernetes_scheduler import IndexedJob, KubernetesIndexedJobScheduler, Opts, render, state_of

OWNER = {"apiVersion": "bluewhale.io/v1alpha1", "kind": "RLTrainingJob", "name": "cartpole", "uid": "u-1"}
CFG = {"namespace": "rl", "job_name": "train"}


def app(j: str = "1:3x1", **options: Any) -> AppDef:
    return torchrun("--epochs", "9", m="components.training.worker", j=j, image="trainer:1", **options)


def rendered(the_app: AppDef | None = None, **options: Any) -> IndexedJob:
    return render(the_app or app(), Opts(**(CFG | options)))


def pod_of(indexed: IndexedJob) -> dict[str, Any]:
    return indexed.job["spec"]["template"]["spec"]


def container_of(indexed: IndexedJob) -> dict[str, Any]:
    (container,) = pod_of(indexed)["containers"]
    return container


class TestTheJob:
    def test_has_one_index_per_replica(self) -> None:
        spec = rendered(app("3x1")).job["spec"]
        assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 3, 3)

    @pytest.mark.parametrize(
        ("j", "may_fail", "success"),
        [
            ("3x1", 0, None),
            ("1:3x1", 2, {"rules": [{"succeededIndexes": "0"}]}),
            ("2:3x1", 1, {"rules": [{"succeededIndexes": "0"}]}),
            ("1x2", 0, None),
        ],
    )
    def test_goes_on_with_as_few_replicas_as_the_app_can(self, j: str, may_fail: int, success: Any) -> None:
        spec = rendered(app(j)).job["spec"]
        assert spec["maxFailedIndexes"] == may_fail
        assert spec.get("successPolicy") == success

    def test_replaces_a_failed_pod_and_does_not_count_an_evicted_one(self) -> None:
        spec = rendered(app(max_retries=1)).job["spec"]
        assert pod_of(rendered())["restartPolicy"] == "Never"
        assert spec["backoffLimitPerIndex"] == 3
        assert rendered(app(max_retries=7)).job["spec"]["backoffLimitPerIndex"] == 7
        (rule,) = spec["podFailurePolicy"]["rules"]
        assert rule == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}

    def test_ends_and_is_cleared_away_when_it_is_told_to(self) -> None:
        assert "activeDeadlineSeconds" not in rendered().job["spec"]
        spec = rendered(active_deadline_seconds=60, ttl_seconds_after_finished=0).job["spec"]
        assert (spec["activeDeadlineSeconds"], spec["ttlSecondsAfterFinished"]) == (60, 0)

    def test_carries_the_labels_and_so_do_its_pods(self) -> None:
        indexed = rendered(labels={"team": "rl"}, annotations={"note": "x"})
        for metadata in (indexed.job["metadata"], indexed.job["spec"]["template"]["metadata"]):
            assert metadata["labels"]["team"] == "rl"
            assert metadata["annotations"]["note"] == "x"

    def test_waits_for_kueue_when_it_has_a_queue(self) -> None:
        assert "suspend" not in rendered().job["spec"]
        assert rendered(labels={"kueue.x-k8s.io/queue-name": "gpus"}).job["spec"]["suspend"] is True


class TestTheService:
    def test_names_the_pods_of_the_job_before_they_are_ready(self) -> None:
        indexed = rendered()
        assert indexed.service["spec"] == {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"batch.kubernetes.io/job-name": "train"},
        }
        assert pod_of(indexed)["subdomain"] == indexed.service["metadata"]["name"] == "train"


class TestThePod:
    def test_passes_the_restricted_pod_security_standard(self) -> None:
        indexed = rendered(volumes=['{"claimName": "data", "mountPath": "/data"}'])
        pod, container = pod_of(indexed), container_of(indexed)
        assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert pod["automountServiceAccountToken"] is False
        assert {kind for volume in pod["volumes"] for kind in volume} == {"name", "emptyDir", "persistentVolumeClaim"}

    def test_can_write_to_tmp_and_share_memory(self) -> None:
        indexed = rendered()
        assert pod_of(indexed)["volumes"] == [
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ]
        assert [mount["mountPath"] for mount in container_of(indexed)["volumeMounts"]] == ["/tmp", "/dev/shm"]

    def test_mounts_claims_each_once_however_many_of_their_directories(self) -> None:
        the_app = app()
        the_app.roles[0].mounts = [VolumeMount("models", "/models", read_only=True)]
        indexed = rendered(
            the_app,
            volumes=[
                '{"claimName": "data", "mountPath": "/a", "subPath": "a"}',
                '{"claimName": "data", "mountPath": "/b", "subPath": ""}',
            ],
        )
        assert pod_of(indexed)["volumes"][2:] == [
            {"name": "claim-0", "persistentVolumeClaim": {"claimName": "data"}},
            {"name": "claim-1", "persistentVolumeClaim": {"claimName": "models"}},
        ]
        assert container_of(indexed)["volumeMounts"][2:] == [
            {"name": "claim-0", "mountPath": "/a", "subPath": "a"},
            {"name": "claim-0", "mountPath": "/b"},
            {"name": "claim-1", "mountPath": "/models", "readOnly": True},
        ]

    def test_gets_what_the_role_asks_for_and_no_more(self) -> None:
        resources = container_of(rendered(app(cpu=2, memMB=4096, gpu=1)))["resources"]
        assert resources["requests"] == {"cpu": "2000m", "memory": "4096Mi", "nvidia.com/gpu": "1"}
        assert resources["limits"] == resources["requests"]

    def test_goes_where_it_is_told_to(self) -> None:
        indexed = rendered(
            service_account="trainer",
            priority_class="high",
            node_selector={"gpu": "h200"},
            tolerations=['{"key": "gpu", "operator": "Exists"}'],
            image_pull_secrets=["registry"],
            image_pull_policy="Always",
        )
        pod = pod_of(indexed)
        assert (pod["serviceAccountName"], pod["priorityClassName"]) == ("trainer", "high")
        assert (pod["nodeSelector"], pod["imagePullSecrets"]) == ({"gpu": "h200"}, [{"name": "registry"}])
        assert pod["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
        assert container_of(indexed)["imagePullPolicy"] == "Always"


def started(indexed: IndexedJob, index: int) -> list[str]:
    """Run the container's command as a kubelet would for the pod of this index; returns the lines it prints."""
    variables = {"JOB_COMPLETION_INDEX": str(index)}

    def expanded(text: str) -> str:
        return re.sub(r"\$(?:(\$)|\((\w+)\))", lambda m: "$" if m[1] else variables.get(m[2], f"$({m[2]})"), text)

    for variable in container_of(indexed)["env"][1:]:
        variables[variable["name"]] = expanded(variable["value"])
    command = [expanded(word) for word in container_of(indexed)["command"]]
    return subprocess.run(command, env=variables, check=True, text=True, capture_output=True).stdout.splitlines()


class TestTheReplica:
    """Commands and variables pass through TorchX, Kubernetes and the shell, and each has its own use of `$`."""

    WORDS = ("it's $$(date)", "${HOME} $$$$(x)")
    ECHO = AppDef(
        "echo",
        roles=[
            Role(
                "echo",
                "image",
                entrypoint="sh",
                args=["-c", 'for word; do echo "$$word"; done', "sh", f"{macros.app_id} {macros.replica_id}", *WORDS],
                env={"REPLICA": f"replica {macros.replica_id} of $$(date)"},
                num_replicas=2,
            )
        ],
    )

    def test_knows_its_index(self) -> None:
        assert [started(rendered(self.ECHO), k)[0] for k in (0, 1)] == ["rl:train 0", "rl:train 1"]

    def test_gets_its_arguments_as_they_were_written(self) -> None:
        assert started(rendered(self.ECHO), 1)[1:] == ["it's $(date)", "${HOME} $$(x)"]

    def test_gets_its_variables_as_they_were_written(self) -> None:
        the_app = AppDef("env", roles=[Role("env", "image", entrypoint="env", env=self.ECHO.roles[0].env)])
        assert "REPLICA=replica 0 of $(date)" in started(rendered(the_app), 0)

    @pytest.mark.parametrize(("index", "endpoint"), [(0, "localhost:29500"), (1, "train-0.train:29500")])
    def test_finds_the_rendezvous_on_replica_0(self, index: int, endpoint: str) -> None:
        the_app = app()
        the_app.roles[0].args[1] = the_app.roles[0].args[1].replace("torchrun", "echo", 1)
        (line,) = started(rendered(the_app), index)
        assert f"--rdzv_endpoint {endpoint} --rdzv_id rl:train --nnodes 1:3 --nproc_per_node 1" in line
        assert line.endswith("-m components.training.worker --epochs 9")


class TestTheOwner:
    def test_owns_both(self) -> None:
        indexed = rendered(owner=OWNER)
        for each in (indexed.job, indexed.service):
            assert each["metadata"]["ownerReferences"] == [OWNER]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"job_name": "Train_1"}, "job_name 'Train_1'"),
        ({"job_name": "t" * 62}, "'-2' in 63 characters"),
        ({"owner": {"kind": "Job", "name": "x"}}, "owner: lacks apiVersion, uid"),
        ({"tolerations": ["gpu"]}, "tolerations: .* must each be JSON"),
        ({"volumes": ['{"claimName": "data"}']}, "volumes: .* must be an object with claimName, mountPath"),
    ],
)
def test_says_which_option_is_wrong(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rendered(**options)


def test_refuses_an_app_that_it_cannot_run() -> None:
    with pytest.raises(ValueError, match="min_replicas 4 must be between 1 and the 3 replicas"):
        rendered(app("4:3x1"))
    the_app = app()
    with pytest.raises(ValueError, match="apps of one role, this one has 2"):
        rendered(AppDef("two", roles=the_app.roles * 2))
    the_app.roles[0].mounts = [BindMount("/etc", "/etc")]
    with pytest.raises(ValueError, match="mounts of the host are not allowed"):
        rendered(the_app)


def test_the_same_app_is_the_same_specification_whoever_submits_it() -> None:
    def hashes(the_app: AppDef, **options: Any) -> list[str]:
        indexed = rendered(the_app, **options)
        return [each["metadata"]["annotations"]["bluewhale.io/spec-hash"] for each in (indexed.job, indexed.service)]

    first, second = app(), app()
    first.roles[0].env["TORCHX_INTERNAL_SESSION_ID"] = "one"
    second.roles[0].env["TORCHX_INTERNAL_SESSION_ID"] = "two"
    assert hashes(first) == hashes(second) == hashes(first, owner=OWNER)
    assert hashes(first)[0] != hashes(app("1:2x1"))[0]


def job(status: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    return {"metadata": {"labels": {}}, "spec": spec, "status": status or {}}


def ended(kind: str, **words: str) -> dict[str, Any]:
    return job({"conditions": [{"type": kind, "status": "True", **words}]})


def pod(phase: str, index: int = 0, **status: Any) -> dict[str, Any]:
    annotations = {"batch.kubernetes.io/job-completion-index": str(index)}
    return {"metadata": {"annotations": annotations}, "status": {"phase": phase, **status}}


def waiting(reason: str, message: str = "") -> dict[str, Any]:
    return {"containerStatuses": [{"state": {"waiting": {"reason": reason, "message": message}}}]}


def terminated(code: int, reason: str, message: str, at: str = "") -> dict[str, Any]:
    state = {"terminated": {"exitCode": code, "reason": reason, "message": message, "finishedAt": at}}
    return {"containerStatuses": [{"state": state}]}


UNSCHEDULABLE = {
    "conditions": [
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available"}
    ]
}
QUEUED = {"metadata": {"labels": {"kueue.x-k8s.io/queue-name": "gpus"}}, "spec": {"suspend": True}}


@pytest.mark.parametrize(
    ("the_job", "pods", "state", "message"),
    [
        (ended("Complete"), [], AppState.SUCCEEDED, ""),
        (
            ended("Failed", reason="DeadlineExceeded", message="Job was active longer than specified deadline"),
            [],
            AppState.FAILED,
            "DeadlineExceeded: Job was active longer than specified deadline",
        ),
        (
            ended("Failed", reason="FailedIndexes", message="Job has failed indexes"),
            [
                pod("Failed", 0, **terminated(1, "Error", "first", "2026-01-01T00:00:00Z")),
                pod("Failed", 1, **terminated(137, "OOMKilled", "last words\n", "2026-01-01T00:00:09Z")),
            ],
            AppState.FAILED,
            "FailedIndexes: Job has failed indexes\nreplica 1 exited 137: OOMKilled: last words",
        ),
        (
            ended("Failed", reason="FailedIndexes"),
            [pod("Failed", 2, reason="Evicted", message="low on memory")],
            AppState.FAILED,
            "FailedIndexes\nreplica 2: Evicted: low on memory",
        ),
        (job(), [], AppState.PENDING, ""),
        (job(suspend=True), [], AppState.PENDING, "suspended"),
        (QUEUED, [], AppState.PENDING, "suspended until the queue gpus admits it"),
        (job({"active": 2}), [], AppState.RUNNING, ""),
        (job({"active": 2}), [pod("Running"), pod("Pending", 1)], AppState.RUNNING, ""),
        (job({"active": 2}), [pod("Pending", **waiting("ContainerCreating"))], AppState.PENDING, ""),
        (job({"active": 1}), [pod("Failed"), pod("Pending")], AppState.PENDING, ""),
        (job({"active": 0}), [pod("Succeeded"), pod("Succeeded", 1)], AppState.RUNNING, ""),
        *(
            (job({"active": 1}), [pod("Pending", **waiting(reason, "why"))], AppState.PENDING, f"{reason}: why")
            for reason in ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "CreateContainerConfigError")
        ),
        (
            job({"active": 3}),
            [pod("Running"), pod("Pending", 1, **UNSCHEDULABLE), pod("Pending", 2, **UNSCHEDULABLE)],
            AppState.RUNNING,
            "Unschedulable: 0/3 nodes are available",
        ),
    ],
)
def test_the_state_is_what_the_job_and_its_pods_say(
    the_job: dict[str, Any], pods: list[dict[str, Any]], state: AppState, message: str
) -> None:
    assert state_of(the_job, pods, []) == (state, message)


def test_a_deleted_job_runs_until_it_is_gone() -> None:
    the_job = job({"active": 1})
    the_job["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert state_of(the_job, [pod("Running")], []) == (AppState.RUNNING, "is being deleted")


def test_the_newest_event_says_why_pods_cannot_be_made() -> None:
    events = [
        {"reason": "FailedCreate", "message": f"exceeded quota: {k}", "lastTimestamp": f"2026-01-01T00:00:0{k}Z"}
        for k in (2, 1)
    ]
    assert state_of(job(), [], events) == (AppState.PENDING, "FailedCreate: exceeded quota: 2")


class ApiServer(KubernetesEmulator):
    """Gives every object the uid and the moment of its creation, as a real one does."""

    async def _handle(self, request: Request) -> Any:
        if request.action == action.CREATE:
            request.data["metadata"] |= {"uid": str(uuid4()), "creationTimestamp": "2026-01-01T00:00:00Z"}
        return await super()._handle(request)


@pytest.fixture
def server() -> Iterator[ApiServer]:
    loop, stack, handler = asyncio.new_event_loop(), AsyncExitStack(), ApiServer()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def serve() -> None:
        await stack.enter_async_context(handler)
        await stack.enter_async_context(Server(handler))
        for resource in ("batch/v1/jobs", "v1/services", "v1/pods", "v1/events"):
            handler.resources[resource] = {}

    try:
        asyncio.run_coroutine_threadsafe(serve(), loop).result()
        yield handler
    finally:
        asyncio.run_coroutine_threadsafe(stack.aclose(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def api(server: ApiServer) -> client.ApiClient:
    return client.ApiClient(client.Configuration(host=str(server.url).rstrip("/")))


@pytest.fixture
def scheduler(api: client.ApiClient, monkeypatch: pytest.MonkeyPatch) -> KubernetesIndexedJobScheduler:
    monkeypatch.setattr(kubernetes_scheduler, "POLL", 0.01)
    return kubernetes_scheduler.create_scheduler("test", client=api)


def submit(scheduler: KubernetesIndexedJobScheduler, the_app: AppDef | None = None, **options: Any) -> str:
    return scheduler.submit(the_app or app(), CFG | options)


def place(server: ApiServer, name: str, phase: str, index: int = 0, **status: Any) -> None:
    """Put a pod of the Job there, as the Job's controller and a kubelet would."""
    the_pod = pod(phase, index, **status)
    made = f"2026-01-01T00:00:{len(server.objects):02}Z"
    the_pod["metadata"] |= {"name": name, "namespace": "rl", "uid": name, "creationTimestamp": made}
    server.objects["v1/pods", "rl", name] = the_pod


def finish(server: ApiServer, kind: str = "Complete") -> None:
    status = {"conditions": [{"type": kind, "status": "True"}]}
    server.objects["batch/v1/jobs", "rl", "train"].patch({"status": status})


class TestSubmitting:
    def test_creates_the_job_and_its_service(self, server: ApiServer, scheduler: KubernetesIndexedJobScheduler) -> None:
        assert submit(scheduler) == "rl:train"
        the_job, service = server.objects["batch/v1/jobs", "rl", "train"], server.objects["v1/services", "rl", "train"]
        assert the_job["spec"]["completionMode"] == "Indexed"
        (owner,) = service["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["uid"]) == ("Job", the_job["metadata"]["uid"])

    def test_leaves_both_to_the_owner_that_is_given(
        self, server: ApiServer, scheduler: KubernetesIndexedJobScheduler
    ) -> None:
        submit(scheduler, owner=OWNER)
        for resource in ("batch/v1/jobs", "v1/services"):
            (owner,) = server.objects[resource, "rl", "train"]["metadata"]["ownerReferences"]
            assert owner["uid"] == "u-1"

    def test_again_is_the_same_job(self, server: ApiServer, scheduler: KubernetesIndexedJobScheduler) -> None:
        assert submit(scheduler) == submit(scheduler) == "rl:train"
        assert len(server.objects) == 2

    def test_again_makes_what_is_missing(self, server: ApiServer, scheduler: KubernetesIndexedJobScheduler) -> None:
        submit(scheduler)
        del server.objects["v1/services", "rl", "train"]
        submit(scheduler)
        assert not server.objects["v1/services", "rl", "train"].deleted

    def test_another_app_under_the_name_is_refused(self, scheduler: KubernetesIndexedJobScheduler) -> None:
        submit(scheduler)
        with pytest.raises(ValueError, match="Job rl/train exists with another specification: delete it, or choose"):
            submit(scheduler, app("2x1"))

    def test_another_owner_s_app_is_refused(self, scheduler: KubernetesIndexedJobScheduler) -> None:
        submit(scheduler, owner=OWNER)
        with pytest.raises(ValueError, match="Job rl/train exists and belongs to another owner"):
            submit(scheduler, owner=OWNER | {"uid": "u-2"})

    def test_waits_for_no_deletion(self, server: ApiServer, scheduler: KubernetesIndexedJobScheduler) -> None:
        submit(scheduler)
        deleted = {"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": ["foregroundDeletion"]}}
        server.objects["batch/v1/jobs", "rl", "train"].patch(deleted)
        with pytest.raises(RuntimeError, match="Job rl/train is being deleted: submit again once it is gone"):
            submit(scheduler)

    def test_without_a_name_makes_another_job_each_time(self, scheduler: KubernetesIndexedJobScheduler) -> None:
        first, second = (submit(scheduler, job_name=None) for _ in range(2))
        assert first != second
        assert first.startswith("rl:worker-")


class TestDescribing:
    def test_tells_the_state_of_the_app_and_its_replicas(
        self, server: ApiServer, scheduler: KubernetesIndexedJobScheduler
    ) -> None:
        app_id = submit(scheduler)
        place(server, "train-0-a", "Failed")
        place(server, "train-0-b", "Running")
        place(server, "train-1-a", "Pending", 1, **waiting("ErrImagePull", "no such image"))
        found = scheduler.describe(app_id)
        assert found is not None
        assert (found.state, found.msg) == (AppState.RUNNING, "ErrImagePull: no such image")
        assert (found.roles[0].name, found.roles[0].num_replicas) == ("worker", 3)
        assert [(r.id, r.state, r.hostname) for r in found.roles_statuses[0].replicas] == [
            (0, AppState.RUNNING, "train-0.train"),
            (1, AppState.PENDING, "train-1.train"),
        ]

    def test_tells_why_there_are_no_pods(self, server: ApiServer, scheduler: KubernetesIndexedJobScheduler) -> None:
        app_id = submit(scheduler)
        server.objects["v1/events", "rl", "train.1"] = {"reason": "FailedCreate", "message": "exceeded quota: gpus"}
        found = scheduler.describe(app_id)
        assert found is not None
        assert (found.state, found.msg) == (AppState.PENDING, "FailedCreate: exceeded quota: gpus")
        uid = server.objects["batch/v1/jobs", "rl", "train"]["metadata"]["uid"]
        (asked,) = server["get /api/v1/namespaces/rl/events"]
        assert asked.params["fieldSelector"] == f"involvedObject.uid={uid},reason=FailedCreate"

    def test_outlasts_an_api_server_that_is_away_for_a_while(
        self, server: ApiServer, scheduler: KubernetesIndexedJobScheduler, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        app_id = submit(scheduler)
        url = str(server.url).rstrip("/")
        monkeypatch.setattr(
            kubernetes_scheduler.config,
            "load_incluster_config",
            lambda client_configuration: setattr(client_configuration, "host", url),
        )
        monkeypatch.setattr(kubernetes_scheduler, "PATIENCE", kubernetes_scheduler.PATIENCE.new(backoff_factor=0.01))
        statuses = iter([503, 503, 200])
        job = dict(server.objects["batch/v1/jobs", "rl", "train"].raw)

        def answer(_: Request) -> Response:
            return Response(status=next(statuses), payload=job)

        server["get /apis/batch/v1/namespaces/rl/jobs/train"] << answer
        assert kubernetes_scheduler.create_scheduler("test").exists(app_id)
        assert next(statuses, None) is None

    def test_knows_no_app_that_is_not_there(self, scheduler: KubernetesIndexedJobScheduler) -> None:
        assert scheduler.describe("rl:train") is None

    def test_lists_the_apps_of_a_namespace(self, server: ApiServer, scheduler: KubernetesIndexedJobScheduler) -> None:
        submit(scheduler)
        finish(server)
        (found,) = scheduler.list({"namespace": "rl"})
        assert (found.app_id, found.state) == ("rl:train", AppState.SUCCEEDED)


class TestCancelling:
    def test_deletes_the_job_with_its_pods_and_the_service(
        self, server: ApiServer, scheduler: KubernetesIndexedJobScheduler
    ) -> None:
        app_id = submit(scheduler)
        scheduler.cancel(app_id)
        assert scheduler.describe(app_id) is None
        assert [request.params for request in server[action.DELETE]] == [{"propagationPolicy": "Foreground"}] * 2

    def test_again_does_nothing(self, scheduler: KubernetesIndexedJobScheduler) -> None:
        scheduler.cancel("rl:train")
        scheduler.delete("rl:train")

    def test_does_not_mind_that_the_service_is_gone(
        self, server: ApiServer, scheduler: KubernetesIndexedJobScheduler
    ) -> None:
        app_id = submit(scheduler)
        del server.objects["v1/services", "rl", "train"]
        scheduler.cancel(app_id)
        assert not scheduler.exists(app_id)


def log(*lines: str, second: int = 0) -> bytes:
    return "".join(f"2026-01-01T00:00:{second + k:02}.000000000Z {line}\n" for k, line in enumerate(lines)).encode()


class TestLogs:
    A, B = "get /api/v1/namespaces/rl/pods/train-0-a/log", "get /api/v1/namespaces/rl/pods/train-0-b/log"

    def test_are_of_the_replica_that_is_asked_for(
        self, server: ApiServer, scheduler: KubernetesIndexedJobScheduler
    ) -> None:
        app_id = submit(scheduler)
        place(server, "train-0-a", "Succeeded")
        place(server, "train-1-a", "Succeeded", 1)
        server[self.A] << log("epoch 1", "epoch 2", "done")
        assert list(scheduler.log_iter(app_id, "worker")) == ["epoch 1\n", "epoch 2\n", "done\n"]
        assert list(scheduler.log_iter(app_id, "worker", regex="epoch")) == ["epoch 1\n", "epoch 2\n"]

    def test_can_be_cut_to_a_span_of_time(self, server: ApiServer, scheduler: KubernetesIndexedJobScheduler) -> None:
        app_id = submit(scheduler)
        place(server, "train-0-a", "Succeeded")
        server[self.A] << log("epoch 1", "epoch 2", "epoch 3")
        since, until = (datetime(2026, 1, 1, 0, 0, 1, k, UTC) for k in (0, 1))
        assert list(scheduler.log_iter(app_id, "worker", since=since, until=until)) == ["epoch 2\n"]

    def test_are_followed_through_a_pod_s_start_its_death_and_its_replacement(
        self, server: ApiServer, scheduler: KubernetesIndexedJobScheduler, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        app_id = submit(scheduler)
        place(server, "train-0-a", "Pending")
        meanwhile = iter([lambda: place(server, "train-0-a", "Running")])
        monkeypatch.setattr(kubernetes_scheduler.time, "sleep", lambda _: next(meanwhile, lambda: None)())

        def die(_: Request) -> bytes:
            place(server, "train-0-a", "Failed")
            place(server, "train-0-b", "Succeeded")
            finish(server)
            return log("epoch 1", "epoch 2")

        server[self.A] << die
        server[self.B] << log("epoch 2 again", second=9)
        lines = list(scheduler.log_iter(app_id, "worker", should_tail=True))
        assert lines == ["epoch 1\n", "epoch 2\n", "epoch 2 again\n"]

    def test_go_on_from_the_last_line_when_the_connection_is_lost(
        self, server: ApiServer, scheduler: KubernetesIndexedJobScheduler, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kubernetes_scheduler, "QUIET", 0.1)
        app_id = submit(scheduler)
        place(server, "train-0-a", "Succeeded")
        finish(server)
        answers = iter([(log("epoch 1"), lambda: asyncio.sleep(1)), log("epoch 1", "epoch 2")])
        server[self.A] << (lambda _: next(answers))
        assert list(scheduler.log_iter(app_id, "worker", should_tail=True)) == ["epoch 1\n", "epoch 2\n"]
        first, second = server[self.A]
        assert "sinceSeconds" not in first.params
        assert int(second.params["sinceSeconds"]) > 0

    def test_are_without_a_kubelet_s_excuses(self, server: ApiServer, scheduler: KubernetesIndexedJobScheduler) -> None:
        app_id = submit(scheduler)
        place(server, "train-0-a", "Failed")
        server[self.A] << b"unable to retrieve container logs for containerd://c5341a32"
        assert list(scheduler.log_iter(app_id, "worker")) == []

    def test_end_when_the_app_is_gone(self, scheduler: KubernetesIndexedJobScheduler) -> None:
        assert list(scheduler.log_iter("rl:train", "worker", should_tail=True)) == []


class TestThroughTorchX:
    """TorchX finds the scheduler by the package's entry point."""

    @pytest.fixture
    def runner(self, api: client.ApiClient) -> Iterator[Runner]:
        with get_runner(client=api) as runner:
            yield runner

    def test_a_dry_run_prints_what_kubectl_would_apply(self, runner: Runner) -> None:
        info = runner.dryrun(app(cpu=1), "kubernetes_indexed_job", CFG)
        service, the_job = yaml.safe_load_all(str(info))
        assert (service, the_job) == (info.request.service, info.request.job)
        assert {"name": "TORCHX_JOB_ID", "value": "kubernetes_indexed_job://torchx/rl:train"} in container_of(
            info.request
        )["env"]

    def test_options_are_typed(self, runner: Runner) -> None:
        cfg = runner.cfg_from_str(
            "kubernetes_indexed_job", "job_name=train,backoff_limit_per_index=2,node_selector=gpu:h200"
        )
        assert cfg == {"job_name": "train", "backoff_limit_per_index": 2, "node_selector": {"gpu": "h200"}}
        with pytest.raises(Exception, match="must be of type: int"):
            runner.dryrun(app(), "kubernetes_indexed_job", {"backoff_limit_per_index": "two"})

    def test_an_app_is_run_to_its_end(self, runner: Runner, server: ApiServer) -> None:
        handle = runner.run(app(), "kubernetes_indexed_job", CFG)
        assert handle == "kubernetes_indexed_job://torchx/rl:train"
        finish(server, "Failed")
        status = runner.wait(handle, wait_interval=0.01)
        assert status is not None
        assert status.state == AppState.FAILED

    def test_a_role_needs_resources(self, runner: Runner) -> None:
        the_app = AppDef("bare", roles=[Role("bare", "image", entrypoint="true")])
        with pytest.raises(ValueError, match="No resource for role"):
            runner.dryrun(the_app, "kubernetes_indexed_job", CFG)
        the_app.roles[0].resource = Resource(cpu=1, gpu=0, memMB=64)
        assert json.loads(json.dumps(runner.dryrun(the_app, "kubernetes_indexed_job", CFG).request.job))
