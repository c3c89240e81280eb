"""The client over real HTTP: what each verb writes, and what it does when others write at the same time."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import kmock
import pytest
import yaml

from bluewhale_operator import outcome, pods, policy_service, training_job
from contracts.job import JobError
from pipelines.client import ClientError, ClusterClient, NotApplicableError, NotFoundError, UnavailableError, cluster
from tests.operator.bluewhale_operator.servers import Servers
from tests.operator.bluewhale_operator.worlds import DIGEST, OTHER
from tests.pipelines.client.worlds import canary, condition, failed, rolling_out, training

EXAMPLE = Path(__file__).parents[3] / "manifests" / "examples" / "cartpole.yaml"
API = "bluewhale.io/v1alpha1"
TRIED = {"digest": DIGEST, "attempt": 0, "outcome": "RolledBack", "message": "reward failed"}


def service_of(world: Servers, name: str = "shop") -> dict[str, Any]:
    found = world.get(API, "PolicyService", name)
    assert found is not None
    return found


def annotations(found: dict[str, Any]) -> dict[str, str]:
    return found["metadata"].get("annotations") or {}


def test_the_controllers_listen_to_the_same_words() -> None:
    assert cluster.RETRY == training_job.RETRY_ANNOTATION
    assert (cluster.PROMOTE, cluster.ABORT) == (policy_service.PROMOTE_ANNOTATION, policy_service.ABORT_ANNOTATION)
    assert (cluster.JOB, cluster.STAGE, cluster.ROLE) == (outcome.JOB_LABEL, pods.STAGE_LABEL, pods.ROLE_LABEL)


def test_a_job_comes_typed_and_with_its_service(world: Servers, client: ClusterClient) -> None:
    world.put(training())
    assert client.get("shop").service is None
    world.put(rolling_out())
    world.put(canary())
    job = client.get("shop")
    assert job.status.rollout is not None
    assert job.status.rollout.weight == "25%"
    assert job.service is not None
    assert job.service.candidate is not None
    assert job.service.candidate.digest == DIGEST
    assert [found.name for found in client.jobs()] == ["shop"]


@pytest.mark.parametrize(("verb", "other"), [("promote", "abort"), ("abort", "promote")])
def test_the_last_order_counts(world: Servers, client: ClusterClient, verb: str, other: str) -> None:
    world.put(rolling_out())
    world.put(canary())
    getattr(client, other)("shop")
    getattr(client, verb)("shop")
    assert annotations(service_of(world)) == {f"bluewhale.io/{verb}": f"{DIGEST}-0"}


def test_an_order_for_the_next_attempt_is_another_word(world: Servers, client: ClusterClient) -> None:
    """The controller grants each value once."""
    world.put(rolling_out())
    service = canary(tried=TRIED)
    service["spec"]["candidate"]["attempt"] = 1
    world.put(service)
    client.abort("shop")
    assert annotations(service_of(world)) == {"bluewhale.io/abort": f"{DIGEST}-1"}


@pytest.mark.parametrize(
    "service",
    [
        canary(tried=TRIED),
        canary(stable={"digest": DIGEST, "version": "17"}),
        canary() | {"spec": canary()["spec"] | {"candidate": {"digest": OTHER, "version": "4", "job": "other"}}},
    ],
    ids=["decided", "promoted", "another job's"],
)
@pytest.mark.parametrize("verb", ["promote", "abort"])
def test_no_order_without_a_canary_of_the_job(
    world: Servers, client: ClusterClient, verb: str, service: dict[str, Any]
) -> None:
    world.put(rolling_out())
    world.put(service)
    with pytest.raises(NotApplicableError):
        getattr(client, verb)("shop")
    assert annotations(service_of(world)) == {}


def test_a_change_by_others_is_looked_at_before_an_order(
    world: Servers, client: ClusterClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The candidate is replaced between the look and the write: the order must not reach the new one."""
    world.put(rolling_out())
    world.put(canary())
    look, looks = client._get, []

    def get(plural: str, name: str) -> Any:
        found = look(plural, name)
        if plural == cluster.SERVICES and not looks:
            looks.append(name)
            world.cluster().patch(
                API, "PolicyService", "team", "shop", {"spec": {"candidate": {"digest": OTHER, "job": "other"}}}
            )
        return found

    monkeypatch.setattr(client, "_get", get)
    with pytest.raises(NotApplicableError, match="tries the policy of job other now"):
        client.promote("shop")
    assert annotations(service_of(world)) == {}


def test_pause_holds_the_canary_and_resume_lets_it_go(world: Servers, client: ClusterClient) -> None:
    world.put(rolling_out())
    world.put(canary())
    assert client.pause("shop").kind == "PolicyService"
    assert service_of(world)["spec"]["paused"] is True
    assert client.resume("shop").kind == "PolicyService"
    assert service_of(world)["spec"]["paused"] is False
    assert "suspend" not in world.job()["spec"]


def test_pause_before_the_rollout_suspends_the_job(world: Servers, client: ClusterClient) -> None:
    world.put(training())
    assert client.pause("shop").kind == "RLTrainingJob"
    assert world.job()["spec"]["suspend"] is True
    client.resume("shop")
    assert world.job()["spec"]["suspend"] is False
    with pytest.raises(NotApplicableError, match="is not paused"):
        client.resume("shop")
    world.put(failed("Failed", "StageFailed", "no"))
    with pytest.raises(NotApplicableError, match="has ended"):
        client.pause("shop")


def test_a_service_of_another_name(world: Servers, client: ClusterClient) -> None:
    job = rolling_out(rollout={"service": "front", "weight": "10%"})
    job["spec"]["deploy"] = {"service": "front"}
    world.put(job)
    service = canary()
    service["metadata"]["name"] = "front"
    world.put(service)
    assert client.promote("shop").name == "front"
    assert client.get("shop").service is not None


def test_retry_starts_a_failed_job_again(world: Servers, client: ClusterClient) -> None:
    world.put(failed("Failed", "StageFailed", "training: out of memory"))
    client.retry("shop")
    first = annotations(world.job())["bluewhale.io/retry"]
    client.retry("shop")
    assert first != annotations(world.job())["bluewhale.io/retry"]


def test_retry_after_a_rollback_raises_the_attempt(world: Servers, client: ClusterClient) -> None:
    world.put(failed("RolledBack", "RolledBack", "reward failed"))
    world.put(canary(tried=TRIED, candidate=None))
    assert "attempt 1 of policy abababababab" in client.retry("shop").message
    assert service_of(world)["spec"]["candidate"] == {"digest": DIGEST, "version": "17", "attempt": 1, "job": "shop"}
    assert "bluewhale.io/retry" in annotations(world.job())


def test_retry_leaves_the_candidate_of_another_job_alone(world: Servers, client: ClusterClient) -> None:
    world.put(failed("RolledBack", "RolledBack", "reward failed"))
    service = canary()
    service["spec"]["candidate"] = {"digest": OTHER, "version": "4", "attempt": 0, "job": "other"}
    world.put(service)
    client.retry("shop")
    assert service_of(world)["spec"]["candidate"]["attempt"] == 0
    assert "bluewhale.io/retry" in annotations(world.job())


def test_retry_after_the_gate_says_what_will_come(world: Servers, client: ClusterClient) -> None:
    stopped = [condition("Evaluated", "False", "StoppedByGate")]
    world.put(failed("StoppedByGate", "StoppedByGate", "too low", conditions=stopped))
    assert "the gate will say the same" in client.retry("shop").message


def test_watch_tells_each_change_until_the_end(world: Servers, client: ClusterClient) -> None:
    world.put(training())
    seen: list[str] = []
    looking = threading.Event()

    def watch() -> None:
        for job in client.watch("shop"):
            seen.append(job.status.phase)
            looking.set()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    assert looking.wait(10)
    for job in (rolling_out(), failed("RolledBack", "RolledBack", "reward failed")):
        looking.clear()
        world.put(job)
        assert looking.wait(10)
    thread.join(10)
    assert (seen[0], seen[-1]) == ("Running", "RolledBack")
    assert not thread.is_alive()


def test_watch_bears_a_server_that_is_away_for_a_moment(
    world: Servers, client: ClusterClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.put(training())
    monkeypatch.setattr(cluster.time, "sleep", lambda _: setattr(world.api, "down", False))
    jobs = client.watch("shop")
    assert next(jobs).status.phase == "Running"
    monkeypatch.setattr(client, "_events", lambda name: iter([None]))
    world.put(failed("Failed", "StageFailed", "no"))
    world.api.down = True
    assert [job.status.phase for job in jobs] == ["Failed"]
    world.api.down = True
    with pytest.raises(UnavailableError):
        next(client.watch("shop"))


def pod(name: str, created: str, labels: dict[str, str], *containers: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name, "namespace": "team", "creationTimestamp": created, "labels": {cluster.JOB: "shop", **labels},
        },
        "spec": {"containers": [{"name": container} for container in containers]},
    }  # fmt: skip


def test_logs_are_those_of_the_newest_pod_and_its_main_container(world: Servers, client: ClusterClient) -> None:
    world.put(training())
    at = {cluster.STAGE: "training"}
    world.put(pod("old", "2026-05-04T12:00:00Z", at, "main"))
    world.put(pod("new", "2026-05-04T12:01:00Z", at, "launcher", "main"))
    logged = {"container": "main"}
    path = "/api/v1/namespaces/team/pods/new/log"
    world.api[kmock.path(path), kmock.params(logged)] << b"epoch 1\nepoch 2 \xe2\x9c\x93\n\nend"
    assert list(client.logs("shop", "training")) == ["epoch 1", "epoch 2 ✓", "", "end"]
    assert next(client.logs("shop", "training", follow=True)) == "epoch 1"


def test_logs_of_one_worker(world: Servers, client: ClusterClient) -> None:
    world.put(training())
    for index in ("0", "1"):
        labels = {cluster.ROLE: "worker", cluster.INDEX: index}
        world.put(pod(f"worker-{index}", "2026-05-04T12:00:00Z", labels, "trainer"))
    world.api["/api/v1/namespaces/team/pods/worker-1/log"] << b"rank 1\n"
    assert list(client.logs("shop", "training", worker=1)) == ["rank 1"]
    with pytest.raises(NotFoundError, match="worker 2"):
        list(client.logs("shop", "training", worker=2))


def test_submit_checks_and_starts_a_job_and_delete_removes_it(
    world: Servers, client: ClusterClient, tmp_path: Path
) -> None:
    assert client.submit(EXAMPLE).status.phase == "Pending"
    assert world.job("cartpole")["spec"] == yaml.safe_load(EXAMPLE.read_text())["spec"]
    with pytest.raises(ClientError, match="is in namespace team already"):
        client.submit(EXAMPLE)
    client.delete("cartpole")
    assert client.jobs() == []
    with pytest.raises(NotFoundError):
        client.delete("cartpole")
    wrong = tmp_path / "job.yaml"
    wrong.write_text(EXAMPLE.read_text().replace("epochs: 9", "epochs: many"))
    with pytest.raises(JobError, match=r"spec\.training\.epochs"):
        client.submit(wrong)


def test_what_the_api_server_refuses_is_told_by_field(world: Servers, client: ClusterClient) -> None:
    causes = [{"field": "spec.schedule", "message": "Invalid value: names of its runs would be too long"}]
    world.api[kmock.method.POST] << kmock.Response(status=422, payload={"message": "no", "details": {"causes": causes}})
    with pytest.raises(JobError, match=r"spec\.schedule: Invalid value"):
        client.submit(EXAMPLE)
