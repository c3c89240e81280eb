"""The operator before a real API server, with a pipeline backend that the tests move on by hand.

Runs against the cluster of `KUBECONFIG`, which must have the CRDs of this tree (test_crd.py applies them).
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import kopf
import pytest
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from bluewhale_operator import training_job
from bluewhale_operator.backend import KfpBackend
from bluewhale_operator.cluster import Cluster
from bluewhale_operator.controller import Controller
from bluewhale_operator.main import handlers
from bluewhale_operator.outcome import API_VERSION, Reference
from tests.operator.bluewhale_operator.servers import Servers, servers
from tests.operator.bluewhale_operator.worlds import SPEC

pytestmark = pytest.mark.skipif(not os.environ.get("KUBECONFIG"), reason="KUBECONFIG names no cluster")


@pytest.fixture
def cluster() -> Cluster:
    return Cluster(config.new_client_from_config(os.environ["KUBECONFIG"]))


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    core = client.CoreV1Api(cluster.client)
    generated = client.V1ObjectMeta(generate_name="bluewhale-operator-")
    name = core.create_namespace(client.V1Namespace(metadata=generated)).metadata.name
    yield name
    # The operator has ended, and nobody else would let go of jobs that still have a run.
    jobs, where = client.CustomObjectsApi(cluster.client), (*API_VERSION.split("/"), name, "rltrainingjobs")
    for job in jobs.list_namespaced_custom_object(*where)["items"]:
        with suppress(ApiException):  # where its deletion has begun, it may be gone
            jobs.patch_namespaced_custom_object(*where, job["metadata"]["name"], {"metadata": {"finalizers": None}})
    with suppress(ApiException):  # a test may have deleted it
        core.delete_namespace(name)


@pytest.fixture
def world() -> Iterator[Servers]:
    with servers() as found:
        yield found


@contextmanager
def operator(cluster: Cluster, namespace: str, kfp_url: str) -> Iterator[Controller]:
    """The whole operator in a thread, watching one namespace."""
    controller = Controller(cluster, KfpBackend(kfp_url), lambda job, warm_start: {"pipeline_spec": {}})
    stop, ready = threading.Event(), threading.Event()
    flags = {"standalone": True, "namespaces": [namespace], "stop_flag": stop, "ready_flag": ready}
    thread = threading.Thread(target=kopf.run, kwargs={"registry": handlers(controller), **flags})
    thread.start()
    try:
        assert ready.wait(30)
        yield controller
    finally:
        stop.set()
        thread.join(30)


def make(cluster: Cluster, namespace: str, name: str = "shop", **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": namespace}
    return cluster.create(
        {"apiVersion": API_VERSION, "kind": "RLTrainingJob", "metadata": metadata, "spec": {**SPEC, **spec}}
    )


def read(cluster: Cluster, namespace: str, name: str = "shop") -> dict[str, Any]:
    return cluster.get(API_VERSION, "RLTrainingJob", namespace, name) or {}


def wait(what: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.2)
    pytest.fail(f"did not come within {seconds:.0f} s")


def condition(job: dict[str, Any], type: str) -> dict[str, Any]:
    return next((c for c in job.get("status", {}).get("conditions", []) if c["type"] == type), {})


def test_a_job_waits_for_a_backend_and_then_runs(cluster: Cluster, namespace: str, world: Servers) -> None:
    world.kfp_down = True
    make(cluster, namespace)
    with operator(cluster, namespace, world.kfp_url):
        waits = wait(lambda: condition(read(cluster, namespace), "PipelineBackendAvailable"))
        assert (waits["status"], waits["reason"]) == ("False", "Unreachable")
        world.kfp_down = False
        wait(lambda: read(cluster, namespace)["status"].get("run", {}).get("id"))
        assert len(world.runs) == 1


def test_what_the_operator_writes_is_what_the_server_keeps(cluster: Cluster, namespace: str, world: Servers) -> None:
    """A field that the schema lacks would be dropped in silence, and written again at every look."""
    make(cluster, namespace)
    with operator(cluster, namespace, world.kfp_url) as controller:
        wait(lambda: world.runs)
        written: list[Any] = []
        original = controller.cluster.replace_status

        def spy(document: dict[str, Any]) -> Any:
            kept = original(document)
            written.append((document["status"], kept["status"]))
            return kept

        controller.cluster.replace_status = spy  # type: ignore[method-assign]
        world.fail("training", None)
        run = next(iter(world.runs.values()))
        run["error"] = {"message": "node lost"}
        wait(lambda: read(cluster, namespace)["status"].get("reason") == "Retrying")
        time.sleep(3)
    assert all(given == kept for given, kept in written)
    assert len(written) < 5


def test_columns_show_phase_stage_and_reason(cluster: Cluster, namespace: str, world: Servers) -> None:
    make(cluster, namespace, actions=["a", "b"], suspend=True)
    with operator(cluster, namespace, world.kfp_url):
        wait(lambda: read(cluster, namespace).get("status", {}).get("phase") == "Suspended")
    table = subprocess.run(
        ["kubectl", "get", "rltrainingjobs", "-n", namespace, "-o", "wide"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert table[0].split() == [
        "NAME", "PHASE", "STAGE", "WORKERS", "CPE", "WEIGHT", "AGE", "ATTEMPTS", "POLICY", "REASON",
    ]  # fmt: skip
    assert "Suspended" in table[1]


def test_an_image_that_cannot_be_pulled_is_told_within_a_minute(
    cluster: Cluster, namespace: str, world: Servers
) -> None:
    make(cluster, namespace)
    with operator(cluster, namespace, world.kfp_url):
        wait(lambda: read(cluster, namespace).get("status", {}).get("run", {}).get("id"))
        cluster.create(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": "timeline",
                    "namespace": namespace,
                    "labels": {"bluewhale.io/job": "shop", "bluewhale.io/stage": "timeline"},
                },
                "spec": {"containers": [{"name": "main", "image": "registry.invalid/none:1"}]},
            }
        )
        stalled = wait(lambda: condition(read(cluster, namespace), "Stalled"))
    assert stalled["reason"] == "ImagePullFailed"
    assert "registry.invalid/none:1" in stalled["message"]


def test_deleting_a_job_ends_its_run(cluster: Cluster, namespace: str, world: Servers) -> None:
    make(cluster, namespace)
    with operator(cluster, namespace, world.kfp_url):
        wait(lambda: read(cluster, namespace).get("status", {}).get("run", {}).get("id"))
        cluster.delete(namespace, Reference(API_VERSION, "RLTrainingJob", "shop"))
        wait(lambda: not read(cluster, namespace))
    assert [r["state"] for r in world.runs.values()] == ["CANCELED"]


def test_deleting_a_namespace_does_not_hang_on_a_backend_that_is_gone(
    cluster: Cluster, namespace: str, world: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_job, "CLEANUP_SECONDS", 5.0)
    core = client.CoreV1Api(cluster.client)
    make(cluster, namespace)
    with operator(cluster, namespace, world.kfp_url):
        wait(lambda: read(cluster, namespace).get("status", {}).get("run", {}).get("id"))
        world.kfp_down = True
        core.delete_namespace(namespace)
        wait(lambda: not [n for n in core.list_namespace().items if n.metadata.name == namespace], 90)


def test_children_of_a_schedule_go_with_it(cluster: Cluster, namespace: str, world: Servers) -> None:
    make(cluster, namespace, schedule={"cron": "* * * * *"})
    with operator(cluster, namespace, world.kfp_url):
        jobs = wait(lambda: cluster.list(API_VERSION, "RLTrainingJob", namespace)[1:], 75)
        assert jobs[0]["metadata"]["ownerReferences"][0]["name"] == "shop"
        cluster.delete(namespace, Reference(API_VERSION, "RLTrainingJob", "shop"))
        wait(lambda: not cluster.list(API_VERSION, "RLTrainingJob", namespace))
