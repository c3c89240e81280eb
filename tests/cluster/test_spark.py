"""Spark's executors as pods: the driver in a pod of its own before a real Kubernetes.

Runs in a new namespace of the cluster of `KUBECONFIG`, with the image that `BLUEWHALE_TEST_IMAGE` names: one that has
Java and BlueWhale with all that it requires, that is entered as manifests/images/executor.sh says, and that the nodes
have or can pull.
"""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client, utils

IMAGE = os.environ.get("BLUEWHALE_TEST_IMAGE", "")
RBAC = Path(__file__).parents[2] / "manifests" / "base" / "pipeline-rbac.yaml"

pytestmark = [
    pytest.mark.skipif(not os.environ.get("KUBECONFIG"), reason="KUBECONFIG names no cluster"),
    pytest.mark.skipif(not IMAGE, reason="BLUEWHALE_TEST_IMAGE names no image to run Spark in"),
]

# Each partition tells where it was worked on.
STAGE = """
import socket
from components.spark import spark_session
with spark_session("test") as spark:
    hosts = spark.sparkContext.parallelize(range(40), 8).map(lambda _: socket.gethostname()).distinct().collect()
    print("total", spark.range(1000).groupBy().sum().collect()[0][0])
    print("hosts", *sorted(hosts), flush=True)
    {then}
"""


@pytest.fixture(scope="module")
def namespace(core: client.CoreV1Api, namespace: str) -> str:
    """With the rights of a pipeline's pods."""
    for document in yaml.safe_load_all(RBAC.read_text()):
        utils.create_from_dict(core.api_client, document, namespace=namespace)
    return namespace


def start_driver(core: client.CoreV1Api, namespace: str, name: str, then: str = "pass") -> None:
    environment = {
        "SPARK_MASTER": "k8s://https://kubernetes.default.svc",
        "SPARK_DRIVER_MEMORY": "512m",
        "BLUEWHALE_JOB": "test",
        "BLUEWHALE_NAMESPACE": namespace,
        "BLUEWHALE_SPARK_IMAGE": IMAGE,
        "BLUEWHALE_SPARK_EXECUTORS": "2",
        "BLUEWHALE_SPARK_EXECUTOR_CORES": "1",
        "BLUEWHALE_SPARK_EXECUTOR_MEMORY": "512m",
    }
    fields = {"POD_NAME": "metadata.name", "POD_IP": "status.podIP"}
    container: dict[str, Any] = {
        "name": "main",
        "image": IMAGE,
        "command": ["python", "-c", STAGE.format(then=then)],
        "env": [
            *({"name": key, "value": value} for key, value in environment.items()),
            *({"name": key, "valueFrom": {"fieldRef": {"fieldPath": path}}} for key, path in fields.items()),
        ],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    user = {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}}
    spec = {
        "restartPolicy": "Never", "serviceAccountName": "bluewhale-pipeline", "securityContext": user,
        "containers": [container],
    }  # fmt: skip
    core.create_namespaced_pod(namespace, {"metadata": {"name": name}, "spec": spec})


def executors(core: client.CoreV1Api, namespace: str) -> list[client.V1Pod]:
    found: list[client.V1Pod] = core.list_namespaced_pod(namespace, label_selector="bluewhale.io/role=executor").items
    return found


def said(core: client.CoreV1Api, namespace: str, name: str, word: str) -> list[str]:
    """What the driver prints after a word, once it does."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        phase = core.read_namespaced_pod(name, namespace).status.phase
        lines = core.read_namespaced_pod_log(name, namespace).splitlines() if phase != "Pending" else []
        for line in lines:
            if line.startswith(f"{word} "):
                return line.split()[1:]
        assert phase in ("Pending", "Running"), "\n".join(lines[-40:])
        time.sleep(1)
    raise AssertionError("\n".join(lines[-40:]))


def test_work_is_done_by_executors_which_end_with_the_session(core: client.CoreV1Api, namespace: str) -> None:
    start_driver(core, namespace, "driver")
    hosts = said(core, namespace, "driver", "hosts")
    assert said(core, namespace, "driver", "total") == [str(sum(range(1000)))]
    assert hosts
    assert "driver" not in hosts
    while core.read_namespaced_pod("driver", namespace).status.phase == "Running":
        time.sleep(1)
    assert core.read_namespaced_pod("driver", namespace).status.phase == "Succeeded"
    assert [pod for pod in executors(core, namespace) if pod.status.phase in ("Pending", "Running")] == []


def test_executors_go_with_a_driver_that_is_killed(core: client.CoreV1Api, namespace: str) -> None:
    start_driver(core, namespace, "killed", then="import time; time.sleep(600)")
    said(core, namespace, "killed", "hosts")
    running = executors(core, namespace)
    assert {pod.metadata.labels["bluewhale.io/job"] for pod in running} == {"test"}
    assert {owner.name for pod in running for owner in pod.metadata.owner_references} == {"killed"}
    core.delete_namespaced_pod("killed", namespace, grace_period_seconds=0)
    deadline = time.monotonic() + 90
    while executors(core, namespace):
        assert time.monotonic() < deadline
        time.sleep(1)
