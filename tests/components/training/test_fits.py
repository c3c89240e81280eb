"""A log that the algorithm cannot learn from is refused, with the reason and the remedy."""

import dataclasses

import numpy as np
import pytest

from components.training.fits import check_fits
from components.transitions import Lists, Transitions
from contracts.job import JobSpec
from contracts.stage import StageError

SPEC = JobSpec.model_validate({"actions": ["left", "right"]})


def transitions(actions: list[int], truncated: bool = False) -> Transitions:
    n = len(actions)
    zeros = {name: np.zeros((n, 1), np.float32) for name in ("state", "metrics")}
    return Transitions(
        ["x"], ["left", "right"], ["reward"], action=np.array(actions), propensity=np.ones(n),
        possible=np.ones((n, 2), bool), time_diff=np.ones(n), terminal=np.zeros(n, bool),
        truncated=np.full(n, truncated), ordinal=np.ones(n, int), mdp=np.arange(n), mdp_ids=[""] * n, **zeros,
    )  # fmt: skip


def without_choice(listed: bool = False) -> Transitions:
    """Each decision could take but the action that it took; with names, or `listed` by their features."""
    data = transitions([0, 1, 1])
    if not listed:
        return dataclasses.replace(data, possible=np.eye(2, dtype=bool)[data.action])
    items = Lists(["price"], np.array([[1.0], [2.0]], np.float32), np.arange(4), data.action, np.ones(3, bool))
    return dataclasses.replace(data, action=np.zeros(3, int), possible=items)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (transitions([1, 1, 1]), "takes only 'right' of left, right.*log some exploration"),
        (without_choice(), "nothing to choose; log all that was possible"),
        (without_choice(listed=True), "nothing to choose; log all that was possible"),
        (transitions([0, 1], truncated=True), "no transition is left.*data.lastStep"),
    ],
)
def test_a_log_that_cannot_be_learned_from_is_refused(data: Transitions, said: str) -> None:
    with pytest.raises(StageError, match=said):
        check_fits(data, SPEC, np.zeros(len(data), np.float32))


@pytest.mark.parametrize("listed", [2, 3])
def test_slates_of_all_that_was_listed_were_no_choice(listed: int) -> None:
    spec = JobSpec.model_validate(
        {
            "actionSpace": "slate", "slate": {"size": 2, "choice": "reward"}, "algorithm": {"slateQ": {}},
            "evaluation": {"gate": {"metric": "reward", "estimator": "sequential_direct_method"}},
            "reward": {"metricWeights": {"reward": 1.0}},
        }
    )  # fmt: skip
    items = Lists(
        ["price"], np.arange(6, dtype=np.float32).reshape(6, 1), np.arange(0, 3 * listed + 1, listed),
        np.arange(3 * listed) % 6, np.ones(3, bool),
    )  # fmt: skip
    action = np.array([[0, 1], [1, 0], [0, 1]])
    data = dataclasses.replace(transitions([0, 1, 1]), action=action, possible=items)
    if listed == 3:
        check_fits(data, spec, np.zeros(3, np.float32))
        return
    with pytest.raises(StageError, match="lists more items than it showed"):
        check_fits(data, spec, np.zeros(3, np.float32))


@pytest.mark.parametrize(
    ("algorithm", "policy", "warned"),
    [("linUcb", "softmax", True), ("linUcb", "greedy", False), ("linearThompson", "softmax", False)],
)
def test_a_head_that_would_take_all_actions_about_alike_is_warned_of(algorithm: str, policy: str, warned: bool) -> None:
    job = {"actions": ["left", "right"], "algorithm": {algorithm: {}}, "export": {"policy": policy}}
    warnings = check_fits(transitions([0, 1]), JobSpec.model_validate(job), np.zeros(2, np.float32))
    assert ["export.policy softmax" in warning for warning in warnings] == [True] * warned


@pytest.mark.parametrize("low", [-0.5, 0.0])
def test_a_logistic_bandit_wants_rewards_that_are_probabilities(low: float) -> None:
    spec = JobSpec.model_validate({"actions": ["left", "right"], "algorithm": {"logisticBandit": {}}})
    rewards = np.array([low, 1.0], np.float32)
    if low >= 0:
        check_fits(transitions([0, 1], truncated=True), spec, rewards)  # what follows does not count
    else:
        with pytest.raises(StageError, match=r"between -0\.5 and 1, and must be in \[0, 1\]: set training\.rewardClip"):
            check_fits(transitions([0, 1]), spec, rewards)


@pytest.mark.parametrize(("outside", "share"), [(0, ""), (1, ""), (4, "2%")])
def test_atoms_must_reach_as_far_as_returns_but_for_outliers(outside: int, share: str) -> None:
    atoms = {"c51": {"lowestReturn": 0.0, "highestReturn": 10.0}}
    spec = JobSpec.model_validate({"actions": ["left", "right"], "algorithm": atoms})
    data = transitions([0, 1] * 100)
    data.terminal[:] = True
    rewards = np.full(200, 9.0, np.float32)
    rewards[:outside] = 500.0
    if not share:
        check_fits(data, spec, rewards)
        return
    with pytest.raises(StageError, match=rf"c51: .* between 9 and 500, {share} .* lowestReturn 0 and highestReturn 10"):
        check_fits(data, spec, rewards)
