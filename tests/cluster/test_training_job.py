"""Workers in pods: the TorchX scheduler and torchrun's elastic agents before a real Kubernetes.

Runs in a new namespace of the cluster of `KUBECONFIG`, with the image that `BLUEWHALE_TEST_IMAGE` names: one that has
BlueWhale and all that it requires, and that the nodes have or can pull.
"""

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kubernetes import client
from torchx.components.dist import torchrun
from torchx.runner import Runner, get_runner
from torchx.specs import AppDef, AppState, Resource

from components.training.launch import ELASTIC

IMAGE = os.environ.get("BLUEWHALE_TEST_IMAGE", "")
SCHEDULER = "kubernetes_indexed_job"

pytestmark = [
    pytest.mark.skipif(not os.environ.get("KUBECONFIG"), reason="KUBECONFIG names no cluster"),
    pytest.mark.skipif(not IMAGE, reason="BLUEWHALE_TEST_IMAGE names no image to run the workers in"),
]

WORKER = """
import os, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
print("workers", dist.get_world_size(), flush=True)
for _ in range(int(os.environ["STEPS"])):
    one = torch.ones(1)
    dist.all_reduce(one)
    assert int(one) == dist.get_world_size()
    time.sleep(0.1)
print("finished", flush=True)
"""


@pytest.fixture
def runner(core: client.CoreV1Api) -> Iterator[Runner]:
    with get_runner(client=core.api_client) as runner:
        yield runner


def app(workers: str, steps: int) -> AppDef:
    made = torchrun(script="/tmp/worker.py", image=IMAGE, j=f"{workers}x1")
    (role,) = made.roles
    role.args[1] = f'printf %s "$$WORKER" > /tmp/worker.py && exec {role.args[1]}'
    role.env |= ELASTIC | {"WORKER": WORKER, "STEPS": str(steps)}
    role.resource = Resource(cpu=0.25, gpu=0, memMB=1024)
    return made


def wait_until(what: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    return found


def log(runner: Runner, handle: str) -> list[str]:
    """What replica 0's worker has said."""
    return [line.split("]:")[-1].strip() for line in runner.log_lines(handle, "worker", k=0)]


def pods(core: client.CoreV1Api, namespace: str, job: str) -> list[client.V1Pod]:
    found = core.list_namespaced_pod(namespace, label_selector=f"batch.kubernetes.io/job-name={job}").items
    return sorted(found, key=lambda pod: pod.metadata.labels["batch.kubernetes.io/job-completion-index"])


def test_workers_outlive_one_of_them_and_take_its_replacement_in(
    core: client.CoreV1Api, namespace: str, runner: Runner
) -> None:
    handle = runner.run(app("1:2", steps=300), SCHEDULER, {"namespace": namespace, "job_name": "outlive"})
    wait_until(lambda: "workers 2" in log(runner, handle))
    survivor, victim = pods(core, namespace, "outlive")
    core.delete_namespaced_pod(victim.metadata.name, namespace, grace_period_seconds=0)
    wait_until(lambda: log(runner, handle).count("workers 2") == 2)
    assert pods(core, namespace, "outlive")[0].metadata.uid == survivor.metadata.uid
    status = runner.wait(handle, wait_interval=1)
    assert status is not None
    assert status.state == AppState.SUCCEEDED, status
    assert log(runner, handle)[-1] == "finished"


def test_workers_begin_again_where_the_one_that_hosts_the_rendezvous_died(
    core: client.CoreV1Api, namespace: str, runner: Runner
) -> None:
    handle = runner.run(app("2", steps=50), SCHEDULER, {"namespace": namespace, "job_name": "host"})
    wait_until(lambda: "workers 2" in log(runner, handle))
    host = pods(core, namespace, "host")[0]
    core.delete_namespaced_pod(host.metadata.name, namespace, grace_period_seconds=0)
    status = runner.wait(handle, wait_interval=1)
    assert status is not None
    assert status.state == AppState.SUCCEEDED, status


def test_a_worker_that_cannot_work_fails_the_job_with_its_words(namespace: str, runner: Runner) -> None:
    the_app = app("1", steps=1)
    the_app.roles[0].args[1] = "echo no such thing >&2; exit 7"
    cfg = {"namespace": namespace, "job_name": "fails", "backoff_limit_per_index": 1}
    status = runner.wait(runner.run(the_app, SCHEDULER, cfg), wait_interval=1)
    assert status is not None
    assert status.state == AppState.FAILED
    assert "replica 0 exited 7: Error: no such thing" in status.msg


@pytest.mark.parametrize("end", ["cancelled", "owner deleted"])
def test_nothing_is_left_of_workers_that_nobody_wants(
    core: client.CoreV1Api, namespace: str, runner: Runner, end: str
) -> None:
    metadata = client.V1ObjectMeta(generate_name="owner-")
    owner = core.create_namespaced_config_map(namespace, client.V1ConfigMap(metadata=metadata)).metadata
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": owner.name, "uid": owner.uid}
    cfg = {"namespace": namespace, "job_name": f"end-{end[:5]}", "owner": reference}
    handle = runner.run(app("2", steps=10_000), SCHEDULER, cfg)
    wait_until(lambda: runner.status(handle).state == AppState.RUNNING)
    if end == "cancelled":
        runner.cancel(handle)
    else:
        core.delete_namespaced_config_map(owner.name, namespace)
    wait_until(lambda: runner.status(handle) is None and not pods(core, namespace, cfg["job_name"]))
    names = [service.metadata.name for service in core.list_namespaced_service(namespace).items]
    assert cfg["job_name"] not in names
