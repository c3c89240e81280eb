"""The canary's checks."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from contracts.job import Canary
from serving.analysis import (
    LiveReturns,
    candidate_calls,
    check_errors,
    check_latency,
    check_reward,
    confidence_radius,
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


def returns(stable: list[float], candidate: list[float]) -> LiveReturns:
    from pathlib import Path

    live = LiveReturns(Path("nowhere"), "reward")
    live.metrics_seen = {"reward"}
    live.arms["stable"].values, live.arms["candidate"].values = stable, candidate
    return live


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


def test_errors_are_counted_from_the_step_s_start():
    before = candidate_calls(asking(answered=100.0, failed=50.0))
    assert check_errors(asking(answered=300.0, failed=50.0), CANARY, before).verdict == "pass"
    check = check_errors(asking(answered=300.0, failed=55.0, late=1.0), CANARY, before)
    assert check.verdict == "fail"
    assert "6 of 206" in check.message
    assert check_errors(asking(answered=100.0, failed=50.0), CANARY, before).verdict == "inconclusive"
    assert check_errors(asking(answered=119.0, failed=50.0, late=1.0), CANARY, before).verdict == "inconclusive"
    assert check_errors(asking(answered=100.0, failed=52.0), CANARY, before).verdict == "fail"


def test_latency_passes_fails_or_has_not_been_seen():
    assert check_latency(lambda _: 12.0, CANARY).verdict == "pass"
    assert check_latency(lambda _: 1200.0, CANARY).verdict == "fail"
    assert check_latency(lambda _: None, CANARY).verdict == "inconclusive"


def test_a_silent_prometheus_is_an_error_and_never_a_pass():
    def ask(_: str) -> float:
        raise ServerError("no answer")

    assert check_errors(ask, CANARY, {}).verdict == "error"
    assert check_latency(ask, CANARY).verdict == "error"


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
    assert live.arms["stable"].values == [3.0]
    assert live.arms["candidate"].values == [7.0]
    assert live.mixed == 3


def test_reward_is_the_weighted_sum_of_what_is_reported(tmp_path):
    (tmp_path / "decisions.jsonl").write_text(decided("s", "stable"))
    (tmp_path / "outcomes.jsonl").write_text(
        json.dumps({"mdp_id": "s", "sequence_number": 0, "metrics": {"clicks": 3.0, "cost": 2.0}, "ended": True}) + "\n"
    )
    live = LiveReturns(tmp_path, "reward", {"clicks": 1.0, "cost": -0.5})
    live.read()
    assert live.arms["stable"].values == [2.0]


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
    assert live.arms["stable"].values == [5.0]
    assert live.arms["candidate"].values == []
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
    assert live.arms["stable"].values == [4.0]
