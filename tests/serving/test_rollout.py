"""The canary's course, against a service that is played: it obeys the state file and writes the logs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from contracts.hashing import unit_interval
from contracts.job import Canary
from serving import rollout
from serving.processes import ServerError
from serving.state import read_state, write_state

STABLE, CANDIDATE = {"version": 1, "digest": "s"}, {"version": 2, "digest": "c"}
CANARY = Canary.model_validate(
    {"metric": "reward", "minimumMdps": 20, "weights": [0.2, 0.6, 1.0], "stepTimeoutSeconds": 60}
)


class PlayedService:
    """Each second, ten MDPs are answered by the arm that the state file gives them, and end."""

    def __init__(self, directory: Path, candidate_mean: float, mdps_per_second: int = 10) -> None:
        self.directory, self.candidate_mean, self.mdps_per_second = directory, candidate_mean, mdps_per_second
        self.now, self.mdps, self.answered = 0.0, 0, 0
        self.weights: list[float] = []
        self.failing = self.unreachable = self.interrupted = False
        self.rng = np.random.default_rng(5)
        write_state(directory / "state.json", {"stable": STABLE, "candidate": CANDIDATE, "weight": 0.0, "salt": "x"})

    def sleep(self, seconds: float) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.now += seconds
        state = read_state(self.directory / "state.json")
        self.weights.append(state["weight"])
        for _ in range(self.mdps_per_second):
            mdp = f"m{self.mdps}"
            self.mdps += 1
            arm = "candidate" if unit_interval("x", mdp) < state["weight"] else "stable"
            self.answered += arm == "candidate"
            mean = self.candidate_mean if arm == "candidate" else 30.0
            self.append("decisions", {"mdp_id": mdp, "arm": arm, "fallback": False})
            reward = float(self.rng.normal(mean, 3.0))
            self.append("outcomes", {"mdp_id": mdp, "sequence_number": 0, "metrics": {"reward": reward}, "ended": True})

    def append(self, name: str, row: dict) -> None:
        with (self.directory / f"{name}.jsonl").open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    def query(self, _: str, expression: str) -> float | None:
        if self.unreachable:
            raise ServerError("connection refused")
        if "quantile" in expression:
            return 2.0
        if "answered" in expression:
            return float(self.answered)
        return float(self.answered) if self.failing and "failed" in expression else 0.0


@pytest.fixture
def run(tmp_path, monkeypatch):
    def run(service: PlayedService) -> dict:
        monkeypatch.setattr(rollout, "query", service.query)
        return rollout.roll_out(
            CANARY,
            tmp_path / "state.json",
            tmp_path,
            "http://prometheus",
            clock=lambda: service.now,
            sleep=service.sleep,
        )

    return run


def test_a_better_candidate_is_promoted_through_every_weight(run, tmp_path):
    service = PlayedService(tmp_path, candidate_mean=60.0)
    outcome = run(service)
    assert outcome["verdict"] == "promoted"
    assert [step["outcome"] for step in outcome["steps"]] == ["passed"] * 3
    assert service.weights == sorted(service.weights)
    state = read_state(tmp_path / "state.json")
    assert state["stable"] == CANDIDATE
    assert state["candidate"] is None


def test_a_harmful_candidate_is_rolled_back_at_the_first_weight(run, tmp_path):
    service = PlayedService(tmp_path, candidate_mean=9.0)
    outcome = run(service)
    assert outcome["verdict"] == "rolled_back"
    assert len(outcome["steps"]) == 1
    assert "the check of reward failed" in outcome["reason"]
    state = read_state(tmp_path / "state.json")
    assert (state["stable"], state["candidate"], state["weight"]) == (STABLE, None, 0.0)


def test_no_traffic_never_promotes(run, tmp_path):
    outcome = run(PlayedService(tmp_path, candidate_mean=60.0, mdps_per_second=0))
    assert outcome["verdict"] == "rolled_back"
    assert "did not pass in time" in outcome["reason"]


def test_a_candidate_that_fails_its_calls_is_rolled_back(run, tmp_path):
    service = PlayedService(tmp_path, candidate_mean=60.0)
    service.failing = True
    outcome = run(service)
    assert outcome["verdict"] == "rolled_back"
    assert "the check of errors failed" in outcome["reason"]


def test_what_cannot_be_measured_is_rolled_back_after_some_looks(run, tmp_path):
    service = PlayedService(tmp_path, candidate_mean=60.0)
    service.unreachable = True
    outcome = run(service)
    assert outcome["verdict"] == "rolled_back"
    assert "cannot be measured" in outcome["reason"]
    assert len(outcome["steps"][0]["looks"]) == rollout.ERRORS_TOLERATED


def test_an_interrupted_rollout_gives_the_candidate_no_traffic_and_can_be_tried_again(run, tmp_path):
    service = PlayedService(tmp_path, candidate_mean=60.0)
    service.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        run(service)
    state = read_state(tmp_path / "state.json")
    assert (state["stable"], state["candidate"], state["weight"]) == (STABLE, CANDIDATE, 0.0)
    service.interrupted = False
    assert run(service)["verdict"] == "promoted"


def test_a_rollout_without_a_candidate_is_refused(run, tmp_path):
    service = PlayedService(tmp_path, candidate_mean=60.0)
    run(service)
    with pytest.raises(ServerError, match="the service has no candidate"):
        run(service)


def test_a_weight_step_only_ever_moves_mdps_from_stable_to_candidate():
    mdps = [f"user-{i}" for i in range(2000)]
    arms = [{m for m in mdps if unit_interval("salt", m) < weight} for weight in CANARY.weights]
    assert arms[0] < arms[1] < arms[2]
    assert len(arms[0]) / len(mdps) == pytest.approx(0.2, abs=0.03)
    assert arms[2] == set(mdps)
