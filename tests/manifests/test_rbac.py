"""What each service account is granted, compared with what it asks of an API server: neither less nor more.

Every request is recorded: of the controllers through the lives of jobs, schedules and services, of kopf, of the rollout
and of the TorchX scheduler. What others ask for in their name, Spark, KFP and Argo, is listed with its reason.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import kopf
import kubernetes
import pytest
from torchx.components.dist import torchrun
from torchx.runner import Runner

from bluewhale_operator.backend import KfpBackend
from bluewhale_operator.cluster import Cluster
from bluewhale_operator.controller import Controller, Key
from bluewhale_operator.main import handlers, wait_for_kinds
from bluewhale_operator.outcome import API_VERSION
from components.rollout.request import ask
from components.training.kubernetes_scheduler import NAME, create_scheduler
from contracts.job import JobSpec
from tests.manifests.granted import Right, granted, used
from tests.manifests.rendering import OVERLAYS, of_kind, overlay, render
from tests.operator.bluewhale_operator.servers import Servers, servers
from tests.operator.bluewhale_operator.worlds import DIGEST, NOW, OTHER, SPEC, make_job, make_service, record

BLUEWHALE = "bluewhale.io"
MARK = "recorded"
"""In the User-Agent, of the requests that count: the tests make others."""

ONLY_CHECKED: Mapping[Right, str] = {
    Right("update", BLUEWHALE, "rltrainingjobs/finalizers"): "children hold up their owner's deletion: asked for by "
    "the admission plugin OwnerReferencesPermissionEnforcement, where it is on",
    Right("update", BLUEWHALE, "policyservices/finalizers"): "likewise",
}
SPARK = "Spark's driver in client mode: its executors, and the ConfigMap that they read their settings from"
KFP = "KFP's launcher reads its settings and the key to the object store, where a namespace has them"
ARGO = "Argo's executor reports a step's outcome"
IN_ITS_NAME: Mapping[Right, str] = {
    **{
        Right(verb, "", "pods"): SPARK
        for verb in ("get", "list", "watch", "create", "delete", "deletecollection")
    },
    Right("create", "", "configmaps"): SPARK,
    Right("deletecollection", "", "configmaps"): SPARK,
    Right("get", "", "configmaps", "kfp-launcher"): KFP,
    Right("get", "", "secrets", "mlpipeline-minio-artifact"): KFP,
    Right("create", "argoproj.io", "workflowtaskresults"): ARGO,
    Right("patch", "argoproj.io", "workflowtaskresults"): ARGO,
}  # fmt: skip


def role(name: str) -> set[Right]:
    return granted(of_kind(render("base"), "Role")[name])


def client_of(world: Servers) -> kubernetes.client.ApiClient:
    configuration = kubernetes.client.Configuration(host=world.url)
    configuration.retries = False
    client = kubernetes.client.ApiClient(configuration)
    client.user_agent = MARK
    return client


def recorded(world: Servers) -> set[Right]:
    return used(r for r in world.api.seen if MARK in r.headers.get("User-Agent", ""))


# -- the operator ----------------------------------------------------------------------------------------------------


class Life:
    """A controller before servers of its own; looks are the test's, and time moves by 5 s with each."""

    def __init__(self, world: Servers) -> None:
        monitors: Any = {"namespaced": True, "subresources": set(), "verbs": {"list", "get", "patch"}}
        world.api.resources["monitoring.coreos.com/v1/servicemonitors"] = monitors
        self.world, self.moment = world, NOW
        self.controller = Controller(
            Cluster(client_of(world)), KfpBackend(world.kfp_url), lambda *_: {"runtime_config": {}}, identity="a",
            now=lambda: self.moment,
        )  # fmt: skip

    def look(self, times: int = 3, name: str = "shop", kind: str = "RLTrainingJob", seconds: float = 5) -> None:
        for _ in range(times):
            self.controller.look(Key(kind, "team", name))
            self.moment += timedelta(seconds=seconds)

    def child(self, api_version: str, kind: str, role: str) -> None:
        """Something that a stage has started, and that is still at work."""
        meta = {
            "name": f"{role}-1",
            "namespace": "team",
            "labels": {"bluewhale.io/job": "shop", "bluewhale.io/role": role},
        }
        self.world.put({"apiVersion": api_version, "kind": kind, "metadata": meta, "status": {"phase": "Running"}})


def a_job_that_succeeds(life: Life) -> None:
    life.world.put(make_job(ttlSecondsAfterFinished=60))
    for _ in range(40):
        life.look(2)
        if life.world.runs:
            life.world.advance(rollout={"rollout": "created"})
        if life.world.get(API_VERSION, "RLTrainingJob", "shop") is None:
            return
    pytest.fail("the job has not ended and gone")


def a_job_whose_stage_dies_without_a_word(life: Life) -> None:
    life.world.put(make_job())
    life.look()
    life.child("v1", "Pod", "executor")
    life.child("batch/v1", "Job", "worker")
    life.look()
    life.world.fail("training", None)
    died = {"stage": "training", "status": "failed"}
    life.world.pod("run-1", "training", died, "shop")
    pod = life.world.get("v1", "Pod", "run-1-training")
    assert pod
    pod["status"]["containerStatuses"] = [{"name": "main", "image": "x", "state": {"terminated": {"exitCode": 1}}}]
    life.world.put(pod)
    life.look()
    assert life.world.get("batch/v1", "Job", "worker-1") is None


def a_schedule_with_a_history(life: Life) -> None:
    life.world.put(make_job(schedule={"cron": "0 * * * *", "failedRunsHistoryLimit": 0}))
    life.world.put(make_service(candidate=None, status={"stable": {"digest": OTHER, "version": "3"}}))
    life.look(1)
    life.moment += timedelta(hours=1)
    life.look(1)
    (child,) = life.world.job()["status"]["active"]
    life.look(3, child)
    life.world.fail("timeline", record("timeline", "failed", message="bad input", retryable=False), child)
    life.look(3, child)
    life.look(1)
    assert life.world.get(API_VERSION, "RLTrainingJob", child) is None


def a_service_with_a_canary(life: Life) -> None:
    life.world.put(make_service(candidate=DIGEST, autoscaling={"maxReplicas": 3}))
    labels = {"bluewhale.io/service": "shop", "bluewhale.io/role": "server"}
    meta = {"name": "shop-1", "namespace": "team", "labels": labels}
    life.world.put({"apiVersion": "v1", "kind": "Pod", "metadata": meta})
    life.look(2, kind="PolicyService")
    life.world.cluster().patch(API_VERSION, "PolicyService", "team", "shop", {"spec": {"autoscaling": None}})
    life.look(2, kind="PolicyService")
    assert life.world.get("autoscaling/v2", "HorizontalPodAutoscaler", "shop") is None


LIVES: tuple[Callable[[Life], None], ...] = (
    a_job_that_succeeds,
    a_job_whose_stage_dies_without_a_word,
    a_schedule_with_a_history,
    a_service_with_a_canary,
)


def asked_by_kopf() -> set[Right]:
    """The handlers over real HTTP, with nobody behind the queue."""

    class Idle(Controller):
        def start(self, threads: int = 0) -> None: ...

    with servers() as world:
        cluster = Cluster(client_of(world))
        wait_for_kinds(cluster)
        registry = handlers(Idle(cluster, KfpBackend(world.kfp_url), lambda *_: {}))

        @kopf.on.login(registry=registry)
        def login(**_: Any) -> kopf.ConnectionInfo:
            return kopf.ConnectionInfo(server=world.url)

        stop, ready = threading.Event(), threading.Event()
        flags = {"standalone": True, "namespaces": ["team"], "stop_flag": stop, "ready_flag": ready}
        thread = threading.Thread(target=kopf.run, kwargs={"registry": registry, **flags})
        thread.start()
        try:
            assert ready.wait(30)
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                found = used(world.api.seen)
                if sum(right.verb == "watch" for right in found) == 4:
                    break
                time.sleep(0.1)
            return found
        finally:
            stop.set()
            thread.join(30)


@pytest.fixture(scope="module")
def asked_by_the_operator() -> set[Right]:
    found = asked_by_kopf()
    for live in LIVES:
        with servers() as world:
            live(Life(world))
            found |= recorded(world)
    return found


def test_the_operator_is_granted_what_it_asks_for_and_no_more(asked_by_the_operator: set[Right]) -> None:
    granted = role("bluewhale-operator")
    assert not lines(asked_by_the_operator - granted), "asked for, and not granted"
    assert not lines(granted - asked_by_the_operator - set(ONLY_CHECKED)), "granted, and not asked for"


# -- the pipeline ----------------------------------------------------------------------------------------------------


def asked_by_the_rollout(world: Servers) -> set[Right]:
    spec, policy = JobSpec.model_validate(SPEC), {"version": 17, "features": ["x"], "actions": ["left", "right"]}
    for digest in (DIGEST, OTHER):
        ask(spec, "shop", "team", "shop", policy | {"digest": digest}, None, client_of(world))
    return recorded(world)


def asked_by_the_launcher(world: Servers) -> set[Right]:
    """Workers submitted twice, as by a stage that is tried again, followed, and ended."""
    scheduler = create_scheduler("test", client_of(world))
    app = torchrun("--epochs", "9", m="components.training.worker", j="1x1", image="trainer:1")
    runner = Runner("test", {NAME: lambda session_name, **_: scheduler})
    config = {"namespace": "team", "job_name": "train"}
    for _ in range(2):
        handle = runner.run(app, scheduler=NAME, cfg=config)
    runner.status(handle)
    meta = {"name": "train-0", "namespace": "team", "labels": {"batch.kubernetes.io/job-name": "train"}}
    meta["annotations"] = {"batch.kubernetes.io/job-completion-index": "0"}
    world.put({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "status": {"phase": "Running"}})
    list(runner.log_lines(handle, "worker", k=0, should_tail=False))
    runner.cancel(handle)
    return recorded(world)


def test_the_pipeline_is_granted_what_it_asks_for_and_no_more() -> None:
    asked = set(IN_ITS_NAME)
    for by in (asked_by_the_rollout, asked_by_the_launcher):
        with servers() as world:
            asked |= by(world)
    granted = role("bluewhale-pipeline")
    assert not lines(asked - granted), "asked for, and not granted"
    assert not lines(granted - asked), "granted, and not asked for"


# -- everybody -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OVERLAYS)
def test_no_role_of_a_service_account_is_clusterwide_or_has_a_star(name: str) -> None:
    objects = overlay(name)
    assert not of_kind(objects, "ClusterRoleBinding")
    for found in of_kind(objects, "Role", "ClusterRole").values():
        assert "*" not in json.dumps(found["rules"]), found["metadata"]["name"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_binding_is_of_a_role_and_an_account_that_are_there(name: str) -> None:
    objects = overlay(name)
    (namespace,) = {o["metadata"]["namespace"] for o in objects if o["kind"] == "Role"}
    for binding in of_kind(objects, "RoleBinding").values():
        assert binding["roleRef"]["name"] in of_kind(objects, "Role")
        for subject in binding["subjects"]:
            assert subject["namespace"] == namespace
            assert subject["name"] in of_kind(objects, "ServiceAccount")


def test_users_get_every_verb_on_both_kinds_and_viewers_only_read() -> None:
    roles = of_kind(render("base"), "ClusterRole")
    view, edit = (granted(roles[f"bluewhale-{name}"]) for name in ("view", "edit"))
    assert {right.verb for right in view} == {"get", "list", "watch"}
    assert {right.verb for right in edit} == {"create", "update", "patch", "delete", "deletecollection"}
    for rights in (view, edit):
        assert {right.resource for right in rights} == {"rltrainingjobs", "policyservices"}
    labels = roles["bluewhale-edit"]["metadata"]["labels"]
    assert "rbac.authorization.k8s.io/aggregate-to-view" not in labels


def lines(rights: set[Right]) -> list[str]:
    return sorted(map(str, rights))
