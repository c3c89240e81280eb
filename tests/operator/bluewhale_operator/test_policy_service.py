"""What a service's state, and what is seen of its pods and in Prometheus, lead to."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from bluewhale_operator.outcome import Object, Outcome, Reference, get_condition
from bluewhale_operator.policy_service import LOOK_SECONDS, Observed, reconcile
from serving.processes import ServerError
from serving.rollout import ERRORS_TOLERATED, LEASE_SECONDS
from tests.operator.bluewhale_operator.test_training_job import Life as JobLife
from tests.operator.bluewhale_operator.worlds import DIGEST, OTHER, later, make_service, unschedulable_pod, waiting_pod

CANARY = {"weights": [0.1, 0.5], "minimumMdps": 20, "stepTimeoutSeconds": 120}
THIRD = "ef" * 32


class Prometheus:
    """What Prometheus would say of a candidate."""

    def __init__(self, replicas: int = 1) -> None:
        self.loaded, self.given_up = replicas, 0
        self.stable = {"arm_mdps": 500.0, "return_sum": 30.0, "squared": 2000.0}
        self.candidate = {"arm_mdps": 0.0, "return_sum": 60.0, "squared": 400.0}
        self.failed, self.silent, self.analyst = 0.0, False, True
        self.asked: list[str] = []

    def __call__(self, expression: str) -> float | None:
        self.asked.append(expression)
        if self.silent:
            raise ServerError("connection refused")
        if "unreadable" in expression:
            return 0.0 if self.analyst else None
        if "candidate_loaded" in expression:
            return self.loaded if expression.endswith("== 1)") else self.given_up
        if "quantile" in expression:
            return 3.0
        if "result=" in expression:
            return {"answered": 400.0, "failed": self.failed}.get(expression.split('result="')[1].split('"')[0], 0.0)
        figures = self.candidate if "candidate" in expression else self.stable
        return next((v for k, v in sorted(figures.items(), reverse=True) if k in expression), 500.0)


class Life:
    """A service whose status is kept from look to look, as the API server would."""

    def __init__(self, ready: int = 1, **spec: Any) -> None:
        self.service = make_service(**{"candidate": None, "canary": CANARY, **spec})
        self.prometheus: Prometheus | None = Prometheus()
        self.ready, self.moment = ready, 0.0
        self.events: list[str] = []
        self.state: dict[str, Any] = {}

    def look(self, after: float = LOOK_SECONDS, **seen: Any) -> Outcome:
        self.moment += after
        given = {"deployments": [self.deployment()], "pods": self.pods(), "ask": self.prometheus, **seen}
        outcome = reconcile(copy.deepcopy(self.service), Observed(**given), later(self.moment))
        self.service["status"] = outcome.status.model_dump(by_alias=True, exclude_none=True, mode="json")
        self.events += [event.reason.value for event in outcome.events]
        self.state = next((json.loads(o["data"]["state.json"]) for o in outcome.apply if o["kind"] == "ConfigMap"), {})
        return outcome

    def deployment(self, **status: Any) -> Object:
        labels = {"bluewhale.io/service": "shop", "bluewhale.io/role": "server"}
        return {"metadata": {"name": "shop", "labels": labels}, "status": {"readyReplicas": self.ready, **status}}

    def pods(self) -> list[Object]:
        conditions = [{"type": "Ready", "status": "True"}]
        return [server_pod(f"shop-{n}", {"phase": "Running", "conditions": conditions}) for n in range(self.ready)]

    def ask_for(self, digest: str | None, attempt: int = 0) -> None:
        self.service["spec"].pop("candidate", None)
        if digest:
            self.service["spec"]["candidate"] = {"digest": digest, "version": "17", "attempt": attempt, "job": "shop"}

    def annotate(self, **words: str) -> None:
        self.service["metadata"]["annotations"] = {f"bluewhale.io/{k}": v for k, v in words.items()}

    def to_first_step(self) -> None:
        self.look()
        self.ask_for(DIGEST)
        self.look()
        self.look()
        assert self.status["weight"] == "10%"

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.service["status"]
        return found

    def condition(self, type: str) -> tuple[str, str, str]:
        found = next(c for c in self.status["conditions"] if c["type"] == type)
        return found["status"], found["reason"], found["message"]


def server_pod(name: str, status: dict[str, Any], **meta: Any) -> Object:
    labels = {"bluewhale.io/service": "shop", "bluewhale.io/role": "server"}
    return {
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "team", "uid": name, "labels": labels, **meta},
        "status": status,
    }


def as_server(pod: Object) -> Object:
    return server_pod(pod["metadata"]["name"], pod["status"])


# -- serving -------------------------------------------------------------------------------------------------------


def test_the_first_policy_is_adopted_without_a_canary() -> None:
    life = Life()
    life.look()
    assert life.status["stable"] == {"digest": OTHER, "version": "3"}
    assert life.condition("RolledOut")[:2] == ("True", "Adopted")
    assert life.condition("Ready")[:2] == ("True", "ModelsReady")
    assert (life.status["phase"], life.status["replicas"]) == ("Serving", "1/1")
    assert life.status["endpoint"] == "shop.team.svc:8001"
    assert life.state["stable"] == {"version": 3, "digest": OTHER}
    assert (life.state["candidate"], life.state["weight"]) == (None, 0.0)
    assert "weight_until" not in life.state


def test_a_service_without_ready_pods_is_pending_and_looked_at_again() -> None:
    life = Life(ready=0)
    outcome = life.look(deployments=[], pods=[])
    assert life.condition("Ready")[:2] == ("False", "ModelsNotReady")
    assert (life.status["phase"], outcome.requeue) == ("Pending", LOOK_SECONDS)


def test_the_words_of_a_container_that_ended_are_told() -> None:
    life = Life(ready=0)
    ended = {"exitCode": 1, "reason": "Error", "message": "serving.pod: ServerError: no such version\n"}
    pod = server_pod("shop-0", {"phase": "Running", "containerStatuses": [{"lastState": {"terminated": ended}}]})
    life.look(pods=[pod])
    assert "pod shop-0: Error, exit code 1: serving.pod: ServerError: no such version" in life.condition("Ready")[2]


@pytest.mark.parametrize(
    ("pod", "reason"),
    [
        (waiting_pod("x", "ImagePullBackOff", "no such image"), "ImagePullFailed"),
        (unschedulable_pod("x", "0/3 nodes are available: insufficient cpu"), "Unschedulable"),
        (waiting_pod("x", "CreateContainerConfigError", 'secret "none" not found'), "MissingDependency"),
    ],
)
def test_a_pod_that_cannot_start_stalls_the_service_until_it_can(pod: Object, reason: str) -> None:
    life = Life(ready=0)
    life.look(pods=[as_server(pod)])
    assert life.condition("Stalled")[:2] == ("True", reason)
    assert (life.status["phase"], life.status["reason"]) == ("Pending", reason)
    assert life.events == ["Stalled"]
    life.ready = 1
    life.look()
    assert life.condition("Stalled")[:2] == ("False", "Moving")
    assert life.status["phase"] == "Serving"


def test_a_quota_that_lets_no_pod_be_made_is_told() -> None:
    life = Life(ready=1, replicas=2)
    failure = {"type": "ReplicaFailure", "status": "True", "message": "pods is forbidden: exceeded quota: small"}
    life.look(deployments=[life.deployment(conditions=[failure])])
    assert life.condition("Stalled")[:2] == ("True", "QuotaExceeded")
    assert (life.status["phase"], life.status["replicas"]) == ("Degraded", "1/2")


def test_an_invalid_spec_is_told_and_leaves_what_serves() -> None:
    life = Life()
    life.look()
    life.service["spec"]["canary"] = {"weights": [0.5, 0.1]}
    outcome = life.look()
    assert life.condition("Accepted")[:2] == ("False", "InvalidSpec")
    assert "must rise" in life.condition("Accepted")[2]
    assert (outcome.apply, outcome.delete) == ([], [])
    assert (life.status["phase"], life.status["reason"]) == ("Degraded", "InvalidSpec")
    life.look()
    assert life.events.count("InvalidSpec") == 1


def test_a_service_that_is_deleted_is_left_to_the_garbage_collector() -> None:
    life = Life()
    life.service["metadata"]["deletionTimestamp"] = "2026-05-04T12:00:00Z"
    outcome = life.look()
    assert (outcome.apply, outcome.delete, outcome.requeue) == ([], [], None)


def test_replicas_are_set_unless_they_follow_the_load() -> None:
    life = Life(replicas=2)

    def deployed(outcome: Outcome) -> dict[str, Any]:
        return {o["kind"]: o for o in reversed(outcome.apply)}

    outcome = life.look()
    assert deployed(outcome)["Deployment"]["spec"]["replicas"] == 2
    assert outcome.delete == []
    assert life.look(autoscaled=True).delete == [Reference("autoscaling/v2", "HorizontalPodAutoscaler", "shop")]
    life.service["spec"] |= {"replicas": 3, "autoscaling": {"maxReplicas": 9}}
    outcome = life.look(autoscaled=True)
    assert "replicas" not in deployed(outcome)["Deployment"]["spec"]
    scaler = deployed(outcome)["HorizontalPodAutoscaler"]["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"], outcome.delete) == (3, 9, [])
    scaled = life.deployment() | {"spec": {"replicas": 5}}
    life.look(deployments=[scaled])
    assert life.status["replicas"] == "1/5"


@pytest.mark.parametrize(
    ("owners", "kept"), [(["bluewhale-operator"], 4), (["kube-controller-manager"], None), ([], None)]
)
def test_replicas_are_kept_until_the_autoscaler_has_written_them(owners: list[str], kept: int | None) -> None:
    life = Life(replicas=4, autoscaling={"maxReplicas": 9})
    deployment = life.deployment() | {"spec": {"replicas": 4}}
    deployment["metadata"]["managedFields"] = [
        {"manager": owner, "fieldsV1": {"f:spec": {"f:replicas": {}}}} for owner in owners
    ] + [{"manager": "kube-controller-manager", "fieldsV1": {"f:status": {}}}]
    outcome = life.look(deployments=[deployment])
    made = next(o for o in outcome.apply if o["kind"] == "Deployment")
    assert made["spec"].get("replicas") == kept


# -- the canary ----------------------------------------------------------------------------------------------------


def test_a_better_candidate_goes_through_every_weight_and_is_promoted() -> None:
    life = Life()
    assert life.prometheus
    life.look()
    life.ask_for(DIGEST)
    life.look()
    assert (life.status["phase"], life.status["weight"]) == ("Canary", "0%")
    assert life.state["candidate"] == {"version": 17, "digest": DIGEST}
    salt = life.status["salt"]
    life.look()
    assert (life.status["weight"], life.state["weight"]) == ("10%", 0.1)
    assert life.state["weight_until"] >= later(life.moment).timestamp() + LEASE_SECONDS
    life.prometheus.candidate["arm_mdps"] = 30.0
    life.look()
    assert (life.status["weight"], life.status["step"]) == ("50%", 1)
    life.prometheus.candidate["arm_mdps"] = 45.0
    life.look()
    assert life.status["weight"] == "50%", "15 MDPs in this step are too few"
    life.prometheus.candidate["arm_mdps"] = 50.0
    life.look()
    assert life.status["stable"] == {"digest": DIGEST, "version": "17"}
    assert "candidate" not in life.status
    assert life.condition("RolledOut")[:2] == ("True", "Promoted")
    assert (life.status["tried"]["outcome"], life.status["phase"]) == ("Promoted", "Serving")
    assert (life.state["stable"]["digest"], life.state["candidate"]) == (DIGEST, None)
    assert life.events == ["RolloutStarted", "WeightRaised", "WeightRaised", "Promoted"]
    assert all('policy_service="team/shop"' in expression for expression in life.prometheus.asked)
    # What the service began with is not looked at again, and the next candidate is drawn anew.
    life.ask_for(THIRD)
    life.look()
    assert life.status["salt"] != salt
    assert life.status["verdicts"] == []


def test_a_harmful_candidate_loses_its_traffic_and_is_not_tried_again_until_its_attempt_is_raised() -> None:
    life = Life()
    life.to_first_step()
    assert life.prometheus
    life.prometheus.candidate = {"arm_mdps": 40.0, "return_sum": 9.0, "squared": 400.0}
    life.look()
    assert life.condition("RolledOut")[:2] == ("False", "RolledBack")
    assert "at weight 10% the check of reward failed" in life.status["tried"]["message"]
    assert (life.state["candidate"], life.status["weight"], life.status["stable"]["digest"]) == (None, "0%", OTHER)
    for _ in range(3):
        life.look()
    assert "candidate" not in life.status
    life.ask_for(DIGEST, attempt=1)
    life.look()
    assert (life.status["candidate"]["digest"], life.status["attempt"]) == (DIGEST, 1)
    assert life.condition("RolledOut")[:2] == ("Unknown", "InProgress")


def test_a_candidate_waits_for_a_service_that_is_not_up() -> None:
    life = Life(ready=0)
    life.ask_for(DIGEST)
    life.look()
    life.look(after=3600)
    assert "candidate" not in life.status
    life.ready = 1
    life.look()
    assert life.status["candidate"]["digest"] == DIGEST


def test_a_candidate_that_a_replica_cannot_load_never_gets_traffic() -> None:
    life = Life(ready=2, replicas=2)
    life.look()
    life.ask_for(DIGEST)
    life.look()
    assert life.prometheus
    life.look()
    assert (life.status["weight"], life.status["verdicts"][-1]["checks"][0]["verdict"]) == ("0%", "inconclusive")
    life.prometheus.given_up = 1
    life.look()
    assert life.condition("RolledOut")[:2] == ("False", "RolledBack")
    assert "1 of 2 replicas cannot load it" in life.status["tried"]["message"]


def test_a_replica_that_is_going_need_not_load_the_candidate() -> None:
    life = Life(ready=2, replicas=2)
    life.look()
    life.ask_for(DIGEST)
    life.look()
    stays, goes = life.pods()
    goes["metadata"]["deletionTimestamp"] = "2026-05-04T12:00:00Z"
    life.look(pods=[stays, goes])
    assert life.status["weight"] == "10%"


def test_no_traffic_never_promotes() -> None:
    life = Life()
    life.to_first_step()
    for _ in range(40):
        life.look()
    assert life.condition("RolledOut")[:2] == ("False", "RolledBack")
    assert "did not pass in time" in life.status["tried"]["message"]
    assert len(life.status["verdicts"]) == 10


@pytest.mark.parametrize(
    ("broken", "said"),
    [("silent", "connection refused"), ("no analyst", "scrape the analyst"), ("none", "spec.monitoring.prometheusUrl")],
)
@pytest.mark.parametrize("loading", [True, False])
def test_what_cannot_be_measured_is_rolled_back_after_some_looks(broken: str, said: str, loading: bool) -> None:
    life = Life()
    if loading:
        life.look()
        life.ask_for(DIGEST)
        life.look()
    else:
        life.to_first_step()
    begun = life.status["weight"]
    assert life.prometheus
    life.prometheus.silent, life.prometheus.analyst = broken == "silent", broken != "no analyst"
    life.prometheus = None if broken == "none" else life.prometheus
    for _ in range(ERRORS_TOLERATED - 1):
        life.look()
    assert life.status["weight"] == begun
    life.look()
    assert life.condition("RolledOut")[:2] == ("False", "RolledBack")
    assert "cannot be measured" in life.status["tried"]["message"]
    assert said in life.status["tried"]["message"]


def test_looks_that_follow_at_once_count_for_nothing() -> None:
    life = Life()
    life.to_first_step()
    life.look()
    before = copy.deepcopy(life.status)
    state = life.state
    for _ in range(3):
        life.look(after=1)
    assert (life.status, life.state) == (before, state)


def test_a_pause_holds_the_weight_and_its_step_begins_anew() -> None:
    life = Life()
    life.to_first_step()
    life.service["spec"]["paused"] = True
    for _ in range(60):
        life.look()
    assert (life.status["phase"], life.status["weight"], life.state["weight"]) == ("Paused", "10%", 0.1)
    assert life.state["weight_until"] > later(life.moment).timestamp()
    assert life.condition("RolledOut")[:2] == ("Unknown", "Paused")
    life.service["spec"]["paused"] = False
    life.look()
    assert life.condition("RolledOut")[:2] == ("Unknown", "InProgress")
    assert life.events[-2:] == ["Paused", "Resumed"]


def test_a_candidate_is_promoted_or_aborted_by_hand_once_for_each_word() -> None:
    life = Life()
    life.look()
    # Said before there was a candidate: not for the one that comes later.
    life.annotate(abort="now")
    life.look()
    life.ask_for(DIGEST)
    life.look()
    life.look()
    assert life.status["weight"] == "10%"
    life.annotate(abort=DIGEST)
    life.look()
    assert life.condition("RolledOut")[:2] == ("False", "Aborted")
    assert life.events[-1] == "Aborted"
    life.ask_for(DIGEST, attempt=1)
    life.look()
    life.look()
    assert life.status["weight"] == "10%", "the same word does not abort the next attempt"
    life.annotate(abort=DIGEST, promote="really")
    life.look()
    assert life.condition("RolledOut")[:2] == ("True", "Promoted")
    assert life.status["stable"]["digest"] == DIGEST


def test_a_candidate_that_is_not_loaded_is_not_promoted_by_hand() -> None:
    life = Life()
    life.look()
    life.ask_for(DIGEST)
    assert life.prometheus
    life.prometheus.loaded = 0
    life.annotate(promote="now")
    life.look()
    life.look()
    assert life.status["stable"]["digest"] == OTHER
    life.prometheus.loaded = 1
    life.look()
    life.look()
    assert life.status["stable"]["digest"] == DIGEST


def test_an_abort_holds_for_a_candidate_that_still_waits_for_its_service() -> None:
    life = Life(ready=0)
    life.look()
    life.ask_for(DIGEST)
    life.annotate(abort="now")
    life.look()
    life.ready = 1
    life.look()
    assert life.condition("RolledOut")[:2] == ("False", "Aborted")


def test_weights_may_be_changed_on_the_way() -> None:
    life = Life()
    life.to_first_step()
    life.service["spec"]["canary"] = CANARY | {"weights": [0.2]}
    life.look()
    assert (life.status["weight"], life.state["weight"]) == ("20%", 0.2)


def test_another_candidate_takes_the_place_of_the_one_under_way() -> None:
    life = Life()
    life.to_first_step()
    salt = life.status["salt"]
    life.ask_for(THIRD)
    life.look()
    assert (life.status["tried"]["digest"], life.status["tried"]["outcome"]) == (DIGEST, "Superseded")
    assert (life.status["candidate"]["digest"], life.status["weight"]) == (THIRD, "0%")
    assert life.status["salt"] != salt


def test_a_candidate_that_is_taken_away_is_aborted() -> None:
    life = Life()
    life.to_first_step()
    life.ask_for(None)
    life.look()
    assert life.condition("RolledOut")[:2] == ("False", "Aborted")
    assert life.state["candidate"] is None


def test_a_candidate_that_serves_already_changes_nothing() -> None:
    life = Life()
    life.look()
    life.ask_for(OTHER)
    life.look()
    assert life.events == []
    assert get_condition(life.look().status.conditions, "RolledOut").reason == "Adopted"  # type: ignore[attr-defined, union-attr]


def promoted(life: Life) -> None:
    assert life.prometheus
    for mdps in (30.0, 60.0):
        life.prometheus.candidate["arm_mdps"] = mdps
        life.look()


def rolled_back(life: Life) -> None:
    assert life.prometheus
    life.prometheus.failed = 400.0
    life.look()


def aborted(life: Life) -> None:
    life.annotate(abort="now")
    life.look()


def superseded(life: Life) -> None:
    life.ask_for(THIRD)
    life.look()


def paused(life: Life) -> None:
    life.service["spec"]["paused"] = True
    life.look()


@pytest.mark.parametrize(
    ("happens", "phase", "reason", "weight"),
    [
        (promoted, "Succeeded", "Promoted", "100%"),
        (rolled_back, "RolledBack", "RolledBack", "0%"),
        (aborted, "Failed", "Aborted", "0%"),
        (superseded, "Failed", "Superseded", "0%"),
        (paused, "RollingOut", "Paused", "10%"),
        (lambda life: life.look(), "RollingOut", "InProgress", "10%"),
    ],
)
def test_the_job_that_asked_hears_what_became_of_its_policy(
    happens: Callable[[Life], Any], phase: str, reason: str, weight: str
) -> None:
    life, job = Life(), JobLife()
    job.begin()
    life.to_first_step()
    happens(life)
    job.finish_run(seen_service=life.service)
    assert (job.status["phase"], job.status["reason"]) == (phase, reason)
    assert job.status["rollout"]["weight"] == weight
