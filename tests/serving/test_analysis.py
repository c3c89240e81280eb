"""The canary's checks."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from contracts.job import Canary
from serving.analysis import (
    ArmReturns,
    LiveReturns,
    MeasuredReturns,
    check_all,
    check_errors,
    check_latency,
    check_loaded,
    check_reward,
    confidence_radius,
    read_returns,
)
from serving.processes import ServerError

CANARY = Canary.model_validate({"metric": "reward", "minimumMdps": 30})


def ever_outside(samples: np.ndarray, mean: float, significance: float) -> float:
    """Share of streams [S, 1000] whose interval ever leaves out the mean, looked at after every sample from 30 on."""
    counts = np.arange(1, samples.shape[1] + 1)
    means = np.cumsum(samples, axis=1) / counts
    variances = (np.cumsum(samples**2, axis=1) - counts * means**2) / np.maximum(1, counts - 1)
    widths = np.array([confidence_radius(int(n), 1.0, significance, 30) for n in counts])
    outside = np.abs(means - mean) > widths * np.sqrt(variances)
    return float(outside[:, 29:].any(axis=1).mean())


def test_the_interval_holds_at_every_look_at_once():
    samples = np.random.default_rng(1).normal(10.0, 3.0, size=(1000, 1000))
    assert ever_outside(samples, 10.0, 0.05) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)


def test_skewed_returns_err_more_often_but_not_twice_as_often():
    """The guarantee is asymptotic: with exponential returns and looks from 30 samples on, about 8 % err, not 5 %."""
    samples = np.random.default_rng(1).exponential(size=(1000, 1000))
    assert ever_outside(samples, 1.0, 0.05) <= 0.10


def test_a_fixed_sample_interval_would_not_hold():
    rng = np.random.default_rng(2)
    samples = rng.normal(size=(600, 1000))
    counts = np.arange(1, 1001)
    means = np.cumsum(samples, axis=1) / counts
    ever = (np.abs(means) > 1.96 / np.sqrt(counts))[:, 29:].any(axis=1).mean()
    assert ever > 0.2


def test_the_interval_narrows_with_samples():
    radii = [confidence_radius(n, 2.0, 0.05, 30) for n in (10, 30, 100, 1000)]
    assert radii == sorted(radii, reverse=True)


def figures(totals: list[float]) -> ArmReturns:
    made = ArmReturns()
    for total in totals:
        made.add(total)
    return made


def returns(stable: list[float], candidate: list[float]) -> MeasuredReturns:
    return MeasuredReturns({"stable": figures(stable), "candidate": figures(candidate)}, 0, {"reward"})


def spread(mean: float, count: int) -> list[float]:
    return list(np.random.default_rng(3).normal(mean, 5.0, count))


@pytest.mark.parametrize(
    ("stable", "candidate", "verdict"),
    [
        (spread(30, 200), spread(60, 40), "pass"),
        (spread(30, 200), spread(9, 40), "fail"),
        (spread(30, 200), spread(30.5, 40), "inconclusive"),
        (spread(30, 200), spread(60, 29), "inconclusive"),
        (spread(30, 29), spread(60, 40), "inconclusive"),
        ([], [], "inconclusive"),
        ([0.0] * 200, [0.0] * 40, "inconclusive"),
        (spread(30, 200), [500.0] * 40, "pass"),
    ],
)
def test_reward_is_judged_only_on_enough_evidence(stable, candidate, verdict):
    assert check_reward(returns(stable, candidate), CANARY, len(candidate)).verdict == verdict


def test_earlier_candidates_do_not_count_for_a_new_step():
    assert check_reward(returns(spread(30, 200), spread(60, 40)), CANARY, 3).verdict == "inconclusive"


def test_a_metric_that_nobody_reports_cannot_be_measured():
    live = returns(spread(30, 40), spread(30, 40))
    live.metrics_seen = {"clicks"}
    check = check_reward(live, CANARY, 40)
    assert check.verdict == "error"
    assert "clicks" in check.message
    live.metrics_seen = set()
    assert check_reward(live, CANARY, 40).verdict == "error"


def asking(**calls: float | None):
    def ask(expression: str) -> float | None:
        return next((value for result, value in calls.items() if f'result="{result}"' in expression), None)

    return ask


@pytest.mark.parametrize(
    ("calls", "verdict"),
    [
        ({"answered": 200.0}, "pass"),
        ({"answered": 200.0, "failed": 5.0, "late": 1.0}, "fail"),
        ({}, "inconclusive"),
        ({"answered": 19.0, "late": 1.0}, "inconclusive"),
        ({"failed": 2.0}, "fail"),
    ],
)
def test_bad_calls_of_a_step_are_counted(calls, verdict):
    assert check_errors(asking(**calls), CANARY, 10.0).verdict == verdict


def test_the_calls_of_a_step_are_those_since_it_began():
    asked = []
    check_errors(lambda expression: asked.append(expression) or 0.0, CANARY, 12.5, 'policy_service="a/b"')
    assert all("[12500ms]" in expression and 'policy_service="a/b"' in expression for expression in asked)


def test_latency_passes_fails_or_has_not_been_seen():
    assert check_latency(lambda _: 12.0, CANARY).verdict == "pass"
    assert check_latency(lambda _: 1200.0, CANARY).verdict == "fail"
    assert check_latency(lambda _: None, CANARY).verdict == "inconclusive"


def test_a_silent_prometheus_is_an_error_and_never_a_pass():
    def ask(_: str) -> float:
        raise ServerError("no answer")

    assert check_errors(ask, CANARY, 10.0).verdict == "error"
    assert check_latency(ask, CANARY).verdict == "error"
    assert check_loaded(ask, "r1", 1).verdict == "error"
    checks = check_all(ServerError("no answer"), CANARY, 0, ask, 10.0)
    assert [check.verdict for check in checks] == ["error"] * 3


@pytest.mark.parametrize(
    ("loaded", "given_up", "replicas", "verdict"),
    [(2, 0, 2, "pass"), (3, 0, 2, "pass"), (1, 0, 2, "inconclusive"), (0, 0, 0, "inconclusive"), (1, 1, 2, "fail")],
)
def test_a_candidate_is_loaded_once_every_replica_says_so(loaded, given_up, replicas, verdict):
    check = check_loaded(lambda expression: loaded if expression.endswith("1)") else given_up, "r1", replicas)
    assert check.verdict == verdict


def test_without_an_analyst_the_returns_are_unknown_and_not_zero():
    with pytest.raises(ServerError, match="scrape the analyst"):
        read_returns(lambda _: None, "reward", "r1")


def test_returns_are_read_from_what_the_analyst_exports():
    held = {
        "unreadable": 0.0, "return_sum": 5.0, "squared": 8.0, "arm_mdps": 3.0, "mixed": 1.0, "reported": 6.0,
    }  # fmt: skip
    found = read_returns(lambda e: next(v for k, v in held.items() if k in e), "reward", "r1", 'policy_service="a/b"')
    assert found.arms["candidate"] == ArmReturns(3, 5.0, 8.0)
    assert (found.mixed, found.metrics_seen) == (1, {"reward"})


def decided(mdp: str, arm: str, fallback: bool = False, policy: str = "p") -> str:
    return json.dumps({"mdp_id": mdp, "arm": arm, "fallback": fallback, "policy_version": policy}) + "\n"


def outcome(mdp: str, reward: float, ended: bool = True, step: int = 0) -> str:
    row = {"mdp_id": mdp, "sequence_number": step, "metrics": {"reward": reward}, "ended": ended}
    return json.dumps(row) + "\n"


def test_an_mdp_that_two_arms_answered_measures_neither(tmp_path):
    (tmp_path / "decisions.jsonl").write_text(
        decided("s", "stable") * 2
        + decided("c", "candidate")
        + decided("moved", "stable")
        + decided("moved", "candidate")
        + decided("helped", "stable", fallback=True)
        + decided("open", "stable")
    )
    (tmp_path / "outcomes.jsonl").write_text(
        outcome("s", 9.0, ended=False) + outcome("s", 1.0, ended=False) + outcome("s", 2.0, step=1)
        + outcome("c", 7.0) + outcome("moved", 9.0)
        + outcome("helped", 9.0) + outcome("open", 9.0, ended=False) + outcome("never-decided", 9.0)
    )  # fmt: skip
    live = LiveReturns(tmp_path, "reward")
    live.read()
    assert live.arms["stable"] == figures([3.0])
    assert live.arms["candidate"] == figures([7.0])
    assert live.mixed == 3


def test_reward_is_the_weighted_sum_of_what_is_reported(tmp_path):
    (tmp_path / "decisions.jsonl").write_text(decided("s", "stable"))
    (tmp_path / "outcomes.jsonl").write_text(
        json.dumps({"mdp_id": "s", "sequence_number": 0, "metrics": {"clicks": 3.0, "cost": 2.0}, "ended": True}) + "\n"
    )
    live = LiveReturns(tmp_path, "reward", {"clicks": 1.0, "cost": -0.5})
    live.read()
    assert live.arms["stable"] == figures([2.0])


def test_what_an_earlier_rollout_saw_is_not_counted_again(tmp_path):
    (tmp_path / "decisions.jsonl").write_text(decided("s", "stable"))
    (tmp_path / "outcomes.jsonl").write_text(outcome("s", 4.0))
    with (tmp_path / "decisions.jsonl").open("a") as stream:
        stream.write(decided("under-way", "stable"))
    live = LiveReturns(tmp_path, "reward", skip_existing=True)
    with (tmp_path / "decisions.jsonl").open("a") as stream:
        stream.write(decided("under-way", "candidate") + decided("new", "stable"))
    with (tmp_path / "outcomes.jsonl").open("a") as stream:
        stream.write(outcome("under-way", 8.0) + outcome("new", 5.0))
    live.read()
    assert live.arms["stable"] == figures([5.0])
    assert live.arms["candidate"] == figures([])
    assert live.mixed == 1


def test_a_torn_last_line_is_read_when_it_is_whole(tmp_path):
    line = decided("s", "stable")
    (tmp_path / "decisions.jsonl").write_text(line[:20])
    live = LiveReturns(tmp_path, "reward")
    live.read()
    (tmp_path / "decisions.jsonl").write_text(line)
    (tmp_path / "outcomes.jsonl").write_text(outcome("s", 4.0))
    live.read()
    live.read()
    assert live.arms["stable"] == figures([4.0])
