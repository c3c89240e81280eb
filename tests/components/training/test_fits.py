"""A log that the algorithm cannot learn from is refused, with the reason and the remedy."""

import numpy as np
import pytest

from components.training.fits import check_fits
from components.transitions import Transitions
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


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (transitions([1, 1, 1]), "takes only 'right' of left, right.*log some exploration"),
        (transitions([0, 1], truncated=True), "no transition is left.*data.lastStep"),
    ],
)
def test_a_log_that_cannot_be_learned_from_is_refused(data: Transitions, said: str) -> None:
    with pytest.raises(StageError, match=said):
        check_fits(data, SPEC, np.zeros(len(data), np.float32))


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
