"""What is asked of the PolicyService, over real HTTP to an emulated API server."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import kmock
import pytest
from kmock import KubernetesEmulator, Server
from kubernetes import client

from components.rollout.request import place, request_rollout
from contracts.job import JobSpec
from contracts.policy_service import PolicyServiceSpec
from contracts.stage import StageError, read_record

POLICY, BEHAVIOUR, OTHER = "a" * 64, "b" * 64, "c" * 64
SERVICES = "bluewhale.io/v1alpha1/policyservices"
PATH = "/apis/bluewhale.io/v1alpha1/namespaces/rl/policyservices"


def evaluated(verdict: str) -> dict[str, Any]:
    return {"stage": "evaluation", "message": f"gate {verdict}: because", "cpe": {"verdict": verdict}}


@pytest.fixture
def server() -> Iterator[KubernetesEmulator]:
    loop, stack, handler = asyncio.new_event_loop(), AsyncExitStack(), KubernetesEmulator()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def serve() -> None:
        await stack.enter_async_context(handler)
        await stack.enter_async_context(Server(handler))
        handler.resources[SERVICES] = {}

    try:
        asyncio.run_coroutine_threadsafe(serve(), loop).result()
        yield handler
    finally:
        asyncio.run_coroutine_threadsafe(stack.aclose(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def version(directory: Path, digest: str, number: int) -> Path:
    """A version directory as the export stage writes it."""
    path = directory / "arm" / str(number)
    path.mkdir(parents=True)
    description = {"digest": digest, "version": number, "features": ["x"], "actions": ["left", "right"]}
    (path / "policy.json").write_text(json.dumps(description))
    (path / "model.onnx").write_text(digest)
    return path


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    version(tmp_path / "exported" / "model_repository", POLICY, 17)
    version(tmp_path / "simulated", BEHAVIOUR, 3)
    (tmp_path / "trained" / "policy").mkdir(parents=True)
    (tmp_path / "trained" / "policy" / "bundle.json").write_text("{}")
    return tmp_path


Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(server: KubernetesEmulator, volume: Path) -> Ask:
    """Request a rollout of POLICY; returns the stage's record."""
    configuration = client.Configuration(host=str(server.url).rstrip("/"))
    configuration.retries = False
    api = client.ApiClient(configuration)

    def call(verdict: str = "pass", behaviour: bool = False, **spec: Any) -> dict[str, Any]:
        job = JobSpec.model_validate(
            {"actions": ["left", "right"], "storage": {"mountPath": str(volume / "volume")}} | spec
        )
        first = str(volume / "simulated" / "arm" / "3") if behaviour else ""
        where = (volume / "exported", volume / "trained", first, volume / "out")
        request_rollout(job, "shop", "rl", evaluated(verdict), *where, api=api)
        return read_record(volume / "out")

    return call


def service(server: KubernetesEmulator, name: str = "shop") -> dict[str, Any]:
    return dict(server.objects[SERVICES, "rl", name].raw)


def put(server: KubernetesEmulator, status: dict[str, Any] | None = None, **spec: Any) -> None:
    server.objects[SERVICES, "rl", "shop"] = {
        "metadata": {"name": "shop", "namespace": "rl", "resourceVersion": "5"},
        "spec": {
            "features": ["x"], "actions": ["left", "right"], "stable": {"digest": OTHER, "version": "9"}, **spec,
        },
        "status": status or {},
    }  # fmt: skip


def writes(server: KubernetesEmulator) -> list[str]:
    return [request.method.value for request in server if request.method.value != "GET"]


@pytest.mark.parametrize("verdict", ["fail", "inconclusive"])
def test_nothing_is_asked_for_when_the_gate_fails(
    ask: Ask, server: KubernetesEmulator, volume: Path, verdict: str
) -> None:
    record = ask(verdict)
    assert (record["rollout"], record["service"]) == ("skipped", "shop")
    assert record["reason"] == f"not asked for: gate {verdict}: because"
    assert len(server) == 0
    assert not (volume / "volume").exists()


def test_a_policy_over_numbers_is_exported_and_no_service_is_asked_for(ask: Ask, server: KubernetesEmulator) -> None:
    record = ask(actions=[], actionSpace="continuous")
    assert record["rollout"] == "exported"
    assert record["reason"] == "no canary: it is for discrete actions, and these are continuous"
    assert len(server) == 0


@pytest.mark.parametrize("verdict", ["pass", "disabled"])
def test_the_first_policy_of_all_is_served_at_once(ask: Ask, server: KubernetesEmulator, verdict: str) -> None:
    assert ask(verdict)["rollout"] == "created"
    made = service(server)
    assert (made["apiVersion"], made["kind"]) == ("bluewhale.io/v1alpha1", "PolicyService")
    assert made["spec"]["stable"] == {"digest": POLICY, "version": "17"}
    assert "candidate" not in made["spec"]


def test_a_known_behaviour_policy_serves_first_and_the_policy_is_its_candidate(
    ask: Ask, server: KubernetesEmulator, volume: Path
) -> None:
    record = ask(
        behaviour=True,
        reward={"metricWeights": {"clicks": 2.0}},
        deploy={"service": "front", "canary": {"weights": [0.5, 1.0]}},
        images={"pullPolicy": "Always", "pullSecrets": ["registry"]},
    )
    assert (record["rollout"], record["policy_digest"], record["policy_version"]) == ("requested", POLICY, "17")
    spec = service(server, "front")["spec"]
    assert spec["stable"] == {"digest": BEHAVIOUR, "version": "3"}
    assert spec["candidate"] == {"digest": POLICY, "version": "17", "attempt": 0, "job": "shop"}
    assert spec["canary"] == {"weights": [0.5, 1.0]}
    assert spec["metricWeights"] == {"clicks": 2.0}
    assert (spec["imagePullPolicy"], spec["imagePullSecrets"]) == ("Always", ["registry"])
    assert PolicyServiceSpec.model_validate(spec)
    root = volume / "volume" / "services" / "front"
    assert sorted(p.name for p in (root / "model_repository" / "arm").iterdir()) == ["17", "3"]
    assert (root / "bundles" / POLICY / "bundle.json").exists(), "the next run may begin with it"


def test_a_service_that_exists_is_given_a_candidate_and_nothing_else(ask: Ask, server: KubernetesEmulator) -> None:
    put(server, canary={"weights": [1.0]}, candidate={"digest": OTHER, "version": "9", "attempt": 3})
    assert ask()["rollout"] == "requested"
    (patch,) = [r for r in server if r.method.value == "PATCH"]
    assert patch.headers["Content-Type"] == "application/merge-patch+json"
    assert patch.data == {
        "metadata": {"resourceVersion": "5"},
        "spec": {"candidate": {"digest": POLICY, "version": "17", "attempt": 0, "job": "shop"}},
    }


@pytest.mark.parametrize(
    "state",
    [
        {"candidate": {"digest": POLICY, "version": "17", "attempt": 2}},
        {"status": {"stable": {"digest": POLICY, "version": "17"}}},
    ],
)
def test_asking_again_changes_nothing(ask: Ask, server: KubernetesEmulator, state: dict[str, Any]) -> None:
    put(server, **state)
    assert ask()["rollout"] == "requested"
    assert writes(server) == []


def test_made_by_another_in_the_meantime_it_is_patched(ask: Ask, server: KubernetesEmulator) -> None:
    def made_meanwhile(_: kmock.Request) -> kmock.Response:
        put(server, candidate={"digest": POLICY, "version": "17", "attempt": 0})
        return kmock.Response(status=409, payload={"message": "exists"})

    server[f"post {PATH}"] << made_meanwhile
    assert ask()["rollout"] == "requested"
    assert writes(server) == ["POST"]


def test_always_changed_by_others_it_may_pass_when_tried_again(ask: Ask, server: KubernetesEmulator) -> None:
    put(server)
    server[f"get {PATH}/shop"] << kmock.Response(payload=service(server))
    server[kmock.method.PATCH] << kmock.Response(status=409, payload={"message": "modified"})
    with pytest.raises(RuntimeError, match="changed by others at each of 5 attempts") as raised:
        ask()
    assert not isinstance(raised.value, StageError)


@pytest.mark.parametrize(
    ("status", "hint"),
    [(403, "let the pipeline's service account get, create and patch"), (422, "must fit the service")],
)
def test_what_a_person_can_mend_is_said(ask: Ask, server: KubernetesEmulator, status: int, hint: str) -> None:
    server[f"post {PATH}"] << kmock.Response(status=status, payload={"message": "no way"})
    with pytest.raises(StageError, match=f"PolicyService rl/shop: no way; .*{hint}"):
        ask()


def test_an_api_server_that_is_away_may_come_back(ask: Ask, server: KubernetesEmulator) -> None:
    server[f"get {PATH}/shop"] << kmock.Response(status=503, payload={"message": "away"})
    with pytest.raises(client.ApiException):
        ask()


def test_a_policy_that_does_not_fit_the_service_is_refused(ask: Ask, server: KubernetesEmulator) -> None:
    put(server, actions=["up", "down"])
    with pytest.raises(StageError, match=r"its actions are \['up', 'down'\].*another deploy.service is needed"):
        ask()
    assert writes(server) == []


def test_two_policies_of_one_version_are_kept_apart(ask: Ask, volume: Path) -> None:
    version(volume / "volume" / "services" / "shop" / "model_repository", OTHER, 17)
    with pytest.raises(StageError, match=f"policy {OTHER[:12]} has this version already"):
        ask()


def test_a_directory_is_placed_whole_and_only_once(volume: Path) -> None:
    source, target = volume / "trained", volume / "there" / "bundle"
    place(source, target)
    (target / "mark").touch()
    place(source, target)
    assert (target / "mark").exists()
    assert [p.name for p in target.parent.iterdir()] == ["bundle"]
