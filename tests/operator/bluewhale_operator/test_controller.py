"""The controller over real HTTP: the life of a job, and everything that can come between."""

from __future__ import annotations

import copy
import resource
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest

from bluewhale_operator.backend import KfpBackend
from bluewhale_operator.cluster import Cluster
from bluewhale_operator.controller import EVENT_SECONDS, Controller, Key
from bluewhale_operator.outcome import timestamp
from bluewhale_operator.training_job import FINALIZER, STAGES
from tests.operator.bluewhale_operator.servers import Servers, servers
from tests.operator.bluewhale_operator.worlds import DIGEST, NOW, OTHER, make_job, make_service, record, waiting_pod

SHOP = Key("RLTrainingJob", "team", "shop")


@pytest.fixture
def world() -> Iterator[Servers]:
    with servers() as found:
        yield found


class Clock:
    """Time that the test moves on."""

    def __init__(self) -> None:
        self.moment = NOW

    def __call__(self) -> datetime:
        return self.moment

    def forward(self, seconds: float) -> None:
        self.moment += timedelta(seconds=seconds)


class KilledError(BaseException):
    """The operator's process dies here."""


class MortalCluster(Cluster):
    """Dies after a number of writes, its own and those of its backend."""

    def __init__(self, cluster: Cluster, lives: float) -> None:
        super().__init__(cluster.client)
        self.lives, self.writes = lives, 0

    def request(self, method: str, *args: Any, **kwargs: Any) -> Any:
        found = super().request(method, *args, **kwargs)
        if method != "GET":
            self.wrote()
        return found

    def wrote(self) -> None:
        self.writes += 1
        if self.writes >= self.lives:
            raise KilledError


class MortalBackend(KfpBackend):
    def __init__(self, url: str, cluster: MortalCluster) -> None:
        super().__init__(url)
        self.cluster = cluster

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        found = super()._call(method, *args, **kwargs)
        if method != "GET":
            self.cluster.wrote()
        return found


def build(job: dict[str, Any], warm_start: str | None) -> dict[str, Any]:
    return {"pipeline_spec": {}, "runtime_config": {"parameters": {"warm_start": warm_start or ""}}}


def make_controller(world: Servers, clock: Clock, lives: float = float("inf"), identity: str = "a") -> Controller:
    cluster = MortalCluster(world.cluster(), lives)
    found = Controller(cluster, MortalBackend(world.kfp_url, cluster), build, identity=identity, now=clock)
    return found


def live(world: Servers, controller: Controller, clock: Clock, looks: int = 60, **facts: Any) -> None:
    """Look at the job again and again while its run goes on, until it is finished."""
    for number in range(looks):
        controller.look(SHOP)
        if number % 2 and world.runs:
            world.advance(**facts)
        clock.forward(5)
        found = world.get("bluewhale.io/v1alpha1", "RLTrainingJob", "shop")
        if found is None or (found.get("status", {}).get("completionTime") and FINALIZER not in finalizers(found)):
            return
    pytest.fail(f"the job did not end: {world.job().get('status')}")


def finalizers(document: dict[str, Any]) -> list[str]:
    return document["metadata"].get("finalizers") or []


def end_state(world: Servers) -> dict[str, Any]:
    """A finished job without its times and the numbers of its attempts."""
    status = copy.deepcopy(world.job()["status"])
    for name in ("startTime", "completionTime", "run", "attempts"):
        status.pop(name, None)
    for stage in status["stages"]:
        for name in ("startTime", "completionTime", "pod"):
            stage.pop(name, None)
    for found in status["conditions"]:
        found.pop("lastTransitionTime")
    return status


CREATED = {"rollout": {"rollout": "created"}}


def test_a_job_lives_from_apply_to_adoption(world: Servers) -> None:
    world.put(make_job())
    live(world, make_controller(world, Clock()), Clock(), **CREATED)
    status = world.job()["status"]
    assert (status["phase"], status["reason"]) == ("Succeeded", "Adopted")
    assert [s["state"] for s in status["stages"]] == ["Succeeded"] * len(STAGES)
    assert [s["attempts"] for s in status["stages"]] == [1] * len(STAGES)
    assert status["policy"] == DIGEST[:12]
    assert len(world.runs) == 1
    assert finalizers(world.job()) == []
    assert world.events()[0] == "RunSubmitted"
    assert world.events()[-1] == "JobCompleted"


@pytest.mark.parametrize("label", ["bluewhale.io/job", "pipeline/runid"])
def test_what_kubelet_tells_of_a_pod_in_events_alone_reaches_the_condition(world: Servers, label: str) -> None:
    """A volume that cannot be mounted; in a stage's pod, or in one of the backend's own."""
    world.put(make_job())
    clock = Clock()
    controller = make_controller(world, clock)
    for _ in range(4):
        controller.look(SHOP)
    pod = waiting_pod("timeline", "ContainerCreating")
    pod["metadata"]["labels"] = {label: {"bluewhale.io/job": "shop"}.get(label) or world.job()["status"]["run"]["id"]}
    world.put(pod)
    event = {
        "apiVersion": "v1", "kind": "Event", "metadata": {"name": "told", "namespace": "team"}, "reason": "FailedMount",
        "involvedObject": {"kind": "Pod", "name": pod["metadata"]["name"]},
        "message": 'MountVolume.SetUp failed for volume "key": secret "key" not found',
    }  # fmt: skip
    world.put(event | {"lastTimestamp": timestamp(clock() - timedelta(seconds=EVENT_SECONDS + 1))})
    controller.look(SHOP)
    assert "Stalled" not in [c["type"] for c in world.job()["status"]["conditions"]], "long ago, and over"
    world.put(event | {"lastTimestamp": timestamp(clock())})
    controller.look(SHOP)
    [stalled] = [c for c in world.job()["status"]["conditions"] if c["type"] == "Stalled"]
    assert (stalled["status"], stalled["reason"]) == ("True", "MissingDependency")
    assert 'secret "key" not found' in stalled["message"]


def test_the_operator_may_die_after_any_write(world: Servers) -> None:
    """Killed after the k-th write for every k, and started again: the same end, and nothing done twice."""
    clock = Clock()
    world.put(make_job())
    whole = make_controller(world, clock)
    live(world, whole, clock, **CREATED)
    assert isinstance(whole.cluster, MortalCluster)
    expected, writes = end_state(world), whole.cluster.writes
    assert writes > 20
    for lives in range(1, writes + 1):
        with servers() as again:
            clock = Clock()
            again.put(make_job())
            with pytest.raises(KilledError):
                live(again, make_controller(again, clock, lives), clock, **CREATED)
            live(again, make_controller(again, clock, identity="b"), clock, **CREATED)
            assert end_state(again) == expected, f"killed after write {lives}"
            assert len(again.runs) == 1, f"killed after write {lives}"


def test_two_operators_by_mistake_submit_one_run(world: Servers) -> None:
    world.put(make_job())
    controllers = [make_controller(world, Clock(), identity=name) for name in "ab"]
    for controller in controllers:
        controller.queue.add(SHOP)
        controller.start(threads=4)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and "completionTime" not in world.job().get("status", {}):
        if world.runs:
            world.advance(**CREATED)
        for controller in controllers:
            controller.queue.add(SHOP)
        time.sleep(0.1)
    for controller in controllers:
        controller.stop()
    assert world.job()["status"]["phase"] == "Succeeded"
    assert len(world.runs) == 1


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_may_fail(world: Servers, stage: str) -> None:
    clock = Clock()
    world.put(make_job())
    controller = make_controller(world, clock)
    for _ in range(3):
        controller.look(SHOP)
    world.fail(stage, record(stage, "failed", message="bad input", retryable=False))
    for _ in range(3):
        controller.look(SHOP)
    status = world.job()["status"]
    assert (status["phase"], status["reason"], status["stage"]) == ("Failed", "StageFailed", stage)
    assert finalizers(world.job()) == []


def test_a_failure_that_may_pass_is_tried_again_as_a_new_run(world: Servers) -> None:
    clock = Clock()
    world.put(make_job())
    controller = make_controller(world, clock)
    for _ in range(3):
        controller.look(SHOP)
    world.fail("training", record("training", "failed", message="node lost", retryable=True))
    controller.look(SHOP)
    assert world.job()["status"]["reason"] == "Retrying"
    clock.forward(11)
    live(world, controller, clock, **CREATED)
    assert len(world.runs) == 2
    assert world.job()["status"]["phase"] == "Succeeded"
    assert next(s for s in world.job()["status"]["stages"] if s["name"] == "training")["attempts"] == 2


def test_an_image_that_cannot_be_pulled_reaches_the_condition(world: Servers) -> None:
    clock = Clock()
    world.put(make_job())
    controller = make_controller(world, clock)
    for _ in range(3):
        controller.look(SHOP)
    world.put(waiting_pod("timeline", "ImagePullBackOff", "manifest unknown"))
    controller.look(SHOP)
    found = {c["type"]: c for c in world.job()["status"]["conditions"]}
    assert (found["Stalled"]["status"], found["Stalled"]["reason"]) == ("True", "ImagePullFailed")
    assert "manifest unknown" in found["Stalled"]["message"]


def test_a_conflict_is_looked_at_again(world: Servers) -> None:
    world.put(make_job())
    controller = make_controller(world, Clock())
    original = controller._decide

    def meddle(key: Key, found: Any) -> Any:
        outcome = original(key, found)
        world.cluster().patch(
            "bluewhale.io/v1alpha1", "RLTrainingJob", "team", "shop", {"metadata": {"annotations": {"touched": "1"}}}
        )
        return outcome

    controller._decide = meddle  # type: ignore[method-assign]
    assert controller.look(SHOP) == pytest.approx(0.1)
    assert "status" not in world.job()
    controller._decide = original  # type: ignore[method-assign]
    controller.look(SHOP)
    assert world.job()["status"]["run"]["claimedBy"] == "a"


def test_a_backend_that_comes_late_is_waited_for(world: Servers) -> None:
    world.put(make_job())
    world.kfp_down = True
    clock = Clock()
    controller = make_controller(world, clock)
    controller.look(SHOP)
    status = world.job()["status"]
    assert (status["phase"], status["reason"]) == ("Pending", "Unreachable")
    world.kfp_down = False
    controller._backend_rests = (0.0, "")
    live(world, controller, clock, **CREATED)
    assert world.job()["status"]["phase"] == "Succeeded"


def test_what_the_backend_refuses_reaches_the_condition(world: Servers) -> None:
    world.put(make_job())
    world.kfp_refuses = "unknown field in the pipeline spec"
    controller = make_controller(world, Clock())
    for _ in range(4):
        controller.look(SHOP)
    found = {c["type"]: c for c in world.job()["status"]["conditions"]}
    assert "unknown field in the pipeline spec" in found["Failed"]["message"]


def test_an_api_server_that_is_away_for_minutes_is_waited_for(world: Servers) -> None:
    world.put(make_job())
    clock = Clock()
    controller = make_controller(world, clock)
    controller.look(SHOP)
    world.api.down = True
    delays = [controller.look(SHOP) for _ in range(8)]
    assert delays == sorted(delays)  # later each time
    assert delays[-1] is not None
    assert delays[-1] <= 60
    world.api.down = False
    live(world, controller, clock, **CREATED)
    assert world.job()["status"]["phase"] == "Succeeded"


def test_a_reconcile_that_fails_tells_it_in_the_status(world: Servers) -> None:
    world.put(make_job())
    controller = make_controller(world, Clock())
    original = controller._observe_job
    controller._observe_job = lambda job: 1 / 0  # type: ignore[assignment, return-value]
    controller.look(SHOP)
    found = {c["type"]: c for c in world.job()["status"]["conditions"]}
    assert (found["Stalled"]["reason"], world.job()["status"]["reason"]) == ("ReconcileFailed", "ReconcileFailed")
    assert "ZeroDivisionError" in found["Stalled"]["message"]
    controller._observe_job = original  # type: ignore[method-assign]
    live(world, controller, Clock(), **CREATED)
    assert world.job()["status"]["phase"] == "Succeeded"


def test_a_status_of_another_version_costs_no_thread(world: Servers) -> None:
    world.put(make_job())
    world.put(make_job() | {"status": {"phase": "Unheard-of"}})
    controller = make_controller(world, Clock())
    assert controller.look(SHOP) is not None


def test_a_child_is_made_even_if_the_operator_dies_over_it(world: Servers) -> None:
    clock = Clock()
    world.put(make_job(schedule={"cron": "0 13 * * *"}))
    make_controller(world, clock).look(SHOP)
    clock.forward(3601)
    with pytest.raises(KilledError):
        make_controller(world, clock, lives=1).look(SHOP)
    make_controller(world, clock).look(SHOP)
    assert len(world.cluster().list("bluewhale.io/v1alpha1", "RLTrainingJob", "team")) == 2


def test_the_canary_of_the_service_is_followed_to_its_end(world: Servers) -> None:
    clock = Clock()
    world.put(make_job())
    world.put(make_service())
    controller = make_controller(world, clock)
    for number in range(30):
        controller.look(SHOP)
        if number % 2 and world.runs:
            world.advance()
        clock.forward(5)
    assert world.job()["status"]["phase"] == "RollingOut"
    tried = {"digest": DIGEST, "attempt": 0, "outcome": "RolledBack", "message": "reward is lower"}
    world.put(make_service(status={"stable": {"digest": OTHER, "version": "3"}, "tried": tried}))
    controller.look(SHOP)
    status = world.job()["status"]
    assert (status["phase"], status["reason"]) == ("RolledBack", "RolledBack")


@pytest.mark.parametrize("stage", range(len(STAGES)))
def test_a_job_deleted_in_any_stage_ends_its_run_and_goes(world: Servers, stage: int) -> None:
    clock = Clock()
    world.put(make_job())
    controller = make_controller(world, clock)
    for _ in range(3):
        controller.look(SHOP)
    for _ in range(stage + 1):
        world.advance()
        controller.look(SHOP)
    world.cluster().request("DELETE", "/apis/bluewhale.io/v1alpha1/namespaces/team/rltrainingjobs/shop")
    for _ in range(3):
        controller.look(SHOP)
    assert world.get("bluewhale.io/v1alpha1", "RLTrainingJob", "shop") is None
    assert world.runs["run-1"]["state"] == "CANCELED"


def test_a_finished_job_is_not_run_again_when_its_children_are_deleted(world: Servers) -> None:
    clock = Clock()
    world.put(make_job())
    controller = make_controller(world, clock)
    live(world, controller, clock, **CREATED)
    before = world.job()
    world.runs.clear()
    for pod in world.cluster().list("v1", "Pod", "team"):
        world.cluster().request("DELETE", f"/api/v1/namespaces/team/pods/{pod['metadata']['name']}")
    clock.forward(86_400)
    for _ in range(3):
        make_controller(world, clock, identity="later").look(SHOP)
    assert world.job() == before
    assert world.runs == {}


def test_a_schedule_makes_each_child_once_and_starts_it_from_the_policy_in_service(world: Servers) -> None:
    clock = Clock()
    world.put(make_job(schedule={"cron": "0 13 * * *"}))
    stable = {"stable": {"digest": OTHER, "version": "3"}}
    world.put(make_service(candidate=None, status=stable))
    controller = make_controller(world, clock)
    controller.look(SHOP)
    assert world.job()["status"]["phase"] == "Scheduled"
    clock.forward(3601)
    for _ in range(3):
        controller.look(SHOP)
    children = [
        j
        for j in world.cluster().list("bluewhale.io/v1alpha1", "RLTrainingJob", "team")
        if j["metadata"]["name"] != "shop"
    ]
    assert len(children) == 1
    child = Key("RLTrainingJob", "team", children[0]["metadata"]["name"])
    for _ in range(3):
        controller.look(child)
    parameters = world.runs["run-1"]["body"]["runtime_config"]["parameters"]
    assert parameters["warm_start"] == f"/var/bluewhale/services/shop/bundles/{OTHER}"


def test_five_hundred_jobs_at_once_are_all_submitted(world: Servers, record_property: Any) -> None:
    cluster = world.cluster()
    names = [f"job-{number}" for number in range(500)]
    for name in names:
        cluster.create(make_job(name))
    controller = make_controller(world, Clock())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    for name in names:
        controller.queue.add(Key("RLTrainingJob", "team", name))
    controller.start(threads=8)
    while len(world.runs) < len(names) and time.monotonic() - started < 240:
        time.sleep(0.1)
    seconds = time.monotonic() - started
    controller.stop()
    assert len(world.runs) == len(names)
    assert len({r["display_name"] for r in world.runs.values()}) == len(names)
    record_property("seconds_to_last_run", round(seconds, 1))
    record_property("memory_mb", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)


def test_watching_with_kopf_brings_a_job_to_its_end(world: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole operator: kopf watches, the handlers fill the queue, the controller works."""
    import kopf

    from bluewhale_operator.main import handlers

    controller = make_controller(world, Clock())
    registry = handlers(controller)

    @kopf.on.login(registry=registry)
    def login(**_: Any) -> kopf.ConnectionInfo:
        return kopf.ConnectionInfo(server=world.url)

    stop, ready = threading.Event(), threading.Event()
    thread = threading.Thread(
        target=kopf.run,
        kwargs={
            "registry": registry,
            "standalone": True,
            "namespaces": ["team"],
            "stop_flag": stop,
            "ready_flag": ready,
        },
    )
    thread.start()
    try:
        assert ready.wait(20)
        world.put(make_job())
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and "completionTime" not in world.job().get("status", {}):
            if world.runs:
                world.advance(**CREATED)
            time.sleep(0.3)
        assert world.job()["status"]["phase"] == "Succeeded"
    finally:
        stop.set()
        thread.join(30)
