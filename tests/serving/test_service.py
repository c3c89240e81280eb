"""The policy service: a real Triton with two policies, watched by a real Prometheus."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tritonclient.grpc as grpc

from components.export.repository import read_policies
from components.timeline.build import build_timeline
from contracts.decision_log import SCHEMA
from contracts.hashing import unit_interval
from contracts.job import BehaviourPolicy, Canary, JobSpec
from contracts.stage import RECORD
from serving.client import PolicyClient, ServiceError
from serving.processes import ServerError
from serving.prometheus import query
from serving.service import ENDPOINTS, Endpoints, read_endpoints, serve
from serving.state import read_state, write_state
from simulation.cartpole import ACTIONS, FEATURES
from simulation.policies import behaviour_digest, export_behaviour

STABLE = BehaviourPolicy(weights={"pole_angle": 4.0}, exploration=0.2)
CANDIDATE = BehaviourPolicy(weights={"pole_angle": -4.0}, exploration=0.1)
STATE = dict.fromkeys(FEATURES, 0.1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("service")
    export_behaviour(STABLE, directory / "stable")
    export_behaviour(CANDIDATE, directory / "candidate")
    return directory


@pytest.fixture(scope="module")
def endpoints(directory):
    canary = Canary.model_validate({"deadlineMs": 30_000.0})
    with serve(directory / "run", directory / "stable", directory / "candidate", canary, "salt") as endpoints:
        yield endpoints
    assert not (directory / "run" / ENDPOINTS).exists()
    assert not list(Path("/dev/shm").glob(f"bluewhale_{os.getpid()}_*")), "Triton's shared memory is cleaned up"
    with pytest.raises(ServerError, match="no service runs here"):
        read_endpoints(directory / "run")


@pytest.fixture
def client(endpoints):
    with PolicyClient(endpoints.grpc, timeout_seconds=60) as client:
        yield client


@pytest.fixture
def state(endpoints):
    """Change the rollout's state; the old one is put back."""
    path = Path(endpoints.state_file)
    before = read_state(path)
    yield lambda **changes: write_state(path, before | changes)
    write_state(path, before)


def logged(endpoints: Endpoints, mdp_id: str) -> list[dict]:
    lines = (Path(endpoints.decision_log) / "decisions.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["mdp_id"] == mdp_id]


def probability_of_right(policy: BehaviourPolicy, pole_angle: float) -> float:
    import math

    logistic = 1 / (1 + math.exp(-policy.weights["pole_angle"] * pole_angle))
    return policy.exploration / 2 + (1 - policy.exploration) * logistic


def test_a_decision_carries_its_exact_propensity_and_is_logged_with_it(client, endpoints):
    decision = client.decide("exact", 3, STATE)
    right = probability_of_right(STABLE, 0.1)
    expected = right if decision.action == "right" else 1 - right
    assert decision.action_probability == pytest.approx(expected, abs=1e-6)
    assert decision.policy_version == behaviour_digest(STABLE)
    assert (decision.arm, decision.fallback) == ("stable", False)
    (row,) = logged(endpoints, "exact")
    assert set(SCHEMA.names) - {"truncated"} <= set(row)
    assert row["action"] == decision.action == ACTIONS[decision.action_index]
    assert row["state_features"] == pytest.approx(STATE)
    assert row["action_probability"] == pytest.approx(expected, abs=1e-6)


def test_the_same_request_gets_the_same_answer(client):
    first = [client.decide(f"same-{i}", i, STATE) for i in range(50)]
    assert first == [client.decide(f"same-{i}", i, STATE) for i in range(50)]
    assert {d.action for d in first} == set(ACTIONS)


def test_actions_follow_their_propensities(client):
    actions = [client.decide("frequencies", i, {"pole_angle": 0.3}).action for i in range(600)]
    right = probability_of_right(STABLE, 0.3)
    assert actions.count("right") / 600 == pytest.approx(right, abs=4 * (right * (1 - right) / 600) ** 0.5)


def test_an_mdp_stays_with_its_arm_and_only_moves_to_the_candidate(client, state):
    mdps = [f"sticky-{i}" for i in range(200)]
    candidates: list[set[str]] = []
    for weight in (0.0, 0.3, 0.7, 1.0):
        state(weight=weight)
        arms = {m: client.decide(m, 0, STATE).arm for m in mdps}
        assert arms == {m: client.decide(m, 1, STATE).arm for m in mdps}
        candidates.append({m for m, arm in arms.items() if arm == "candidate"})
        assert candidates[-1] == {m for m in mdps if unit_interval("salt", m) < weight}
    assert candidates[0] < candidates[1] < candidates[2] < candidates[3]


def test_an_impossible_action_is_never_taken(client, endpoints):
    decisions = [client.decide("masked", i, STATE, possible_actions=["left"]) for i in range(50)]
    assert {d.action for d in decisions} == {"left"}
    assert {d.action_probability for d in decisions} == {1.0}
    assert logged(endpoints, "masked")[0]["possible_actions"] == ["left"]


def test_a_missing_feature_stays_missing_in_the_log(client, endpoints):
    client.decide("missing", 0, {"pole_angle": 0.2})
    (row,) = logged(endpoints, "missing")
    assert list(row["state_features"]) == ["pole_angle"]


def test_bad_requests_are_refused_with_the_reason_and_hurt_nobody(client, endpoints):
    with pytest.raises(ServiceError, match="feature 'speed': not an input"):
        client.decide("bad", 0, {"speed": 1.0})
    with pytest.raises(ServiceError, match="state feature pole_angle: infinite"):
        client.decide("bad", 0, {"pole_angle": float("inf")})
    with pytest.raises(ServiceError, match="no action is possible"):
        client.decide("bad", 0, STATE, possible_actions=[])
    with pytest.raises(ServiceError, match="action 'jump'"):
        client.decide("bad", 0, STATE, possible_actions=["jump"])
    with pytest.raises(ServiceError, match="mdp_id: empty"):
        client.decide("", 0, STATE)
    with pytest.raises(ServiceError, match="outcome: ValueError a metric is not finite"):
        client.report("bad", [{"reward": float("nan")}])
    assert logged(endpoints, "bad") == []
    assert client.decide("good", 0, STATE).arm == "stable"


def test_when_the_candidate_cannot_answer_stable_does(client, endpoints, state):
    before = query(endpoints.prometheus, 'bluewhale_decisions_total{arm="candidate",result="failed"}') or 0.0
    state(weight=1.0, candidate={"version": 999, "digest": "absent"})
    decision = client.decide("no-candidate", 0, STATE)
    assert (decision.arm, decision.fallback) == ("stable", True)
    assert decision.policy_version == behaviour_digest(STABLE)
    assert logged(endpoints, "no-candidate")[0]["fallback"]
    deadline = time.monotonic() + 15
    counted = before
    while counted == before and time.monotonic() < deadline:
        time.sleep(0.5)
        counted = query(endpoints.prometheus, 'bluewhale_decisions_total{arm="candidate",result="failed"}') or 0.0
    assert counted == before + 1


def test_when_the_candidate_is_late_stable_answers(client, state):
    state(weight=1.0, deadline_ms=0.0)
    answers = [client.decide(f"late-{i}", 0, STATE) for i in range(20)]
    assert any(a.fallback for a in answers)
    assert all(a.arm == "stable" for a in answers if a.fallback)


def test_the_served_log_is_a_decision_log_with_its_outcomes(client, endpoints, directory):
    for i in range(30):
        for step in range(3):
            client.decide(f"loop-{i}", step, STATE)
        client.report(f"loop-{i}", [{"reward": 1.0}, {"reward": 2.0}, {"reward": 4.0}], ended=True, truncated=i == 0)
    log = Path(endpoints.decision_log)
    # Requests of other tests asked some steps twice: a second copy of a step is no new decision.
    spec = JobSpec.model_validate(
        {"actions": list(ACTIONS), "data": {"lastStep": "column", "maxQuarantineFraction": 1.0}}
    )
    build_timeline(spec, str(log / "decisions.jsonl"), str(log / "outcomes.jsonl"), directory / "timeline")
    record = json.loads((directory / "timeline" / RECORD).read_text())
    assert record["rows_in"] == len((log / "decisions.jsonl").read_text().splitlines())
    assert set(record["reasons"]) <= {"duplicate_step"}
    rows = pq.read_table(directory / "timeline" / "transitions").to_pylist()
    loops = [row for row in rows if row["mdp_id"].startswith("loop-")]
    assert len(loops) == 90
    last = {row["mdp_id"]: row for row in loops if row["sequence_number"] == 2}
    assert all(dict(row["metrics"]) == {"reward": 4.0} for row in last.values())
    assert [mdp for mdp, row in last.items() if row["truncated"]] == ["loop-0"]
    assert sum(row["terminal"] for row in loops) == 29


def test_triton_counts_each_arm_s_version(endpoints):
    with grpc.InferenceServerClient(endpoints.grpc) as triton:
        statistics = triton.get_inference_statistics("arm", as_json=True)["model_stats"]
    assert len({s["version"] for s in statistics}) == 2


def test_a_broken_policy_does_not_come_up_and_triton_says_why(directory, tmp_path):
    export_behaviour(CANDIDATE, tmp_path / "broken")
    (version,) = read_policies(tmp_path / "broken")
    (tmp_path / "broken" / "arm" / str(version) / "model.onnx").write_bytes(b"not a graph")
    with (
        pytest.raises(ServerError, match=r"(?s)Triton ended.*(Protobuf|onnx|ONNX)"),
        serve(tmp_path / "run", directory / "stable", tmp_path / "broken", Canary(), "salt"),
    ):
        pass
