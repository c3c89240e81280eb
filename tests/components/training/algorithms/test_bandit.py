"""Contextual bandits: what is learned is what can be computed by hand, and how sure it is, too."""

import numpy as np
import pytest
import torch
from torch import nn

from components.normalization.spec import FeatureNormalization, NormalizationSpec
from components.training.actions import Actions
from components.training.algorithms.bandit import LinearBandit, LinearRewards, ThompsonSampling
from components.training.algorithms.build import build_learner, build_network
from components.training.algorithms.learner import Batch, Learner
from components.training.batches import Shuffled
from components.training.trainer import Trainer
from contracts.job import Algorithm

N, FEATURES, ARMS = 600, 3, 4
COLUMNS = [
    FeatureNormalization(name=f"x{i}", type="continuous", mean=0.0, stddev=1.0, how="by hand", evidence={})
    for i in range(FEATURES)
]
SPEC = NormalizationSpec(inputs=[c.name for c in COLUMNS], features=COLUMNS)


def log(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Contexts, arms and rewards of a linear bandit with noise."""
    rng = np.random.default_rng(seed)
    x, arm = rng.normal(size=(N, FEATURES)).astype(np.float32), rng.integers(ARMS, size=N)
    weights = np.random.default_rng(99).normal(size=(ARMS, FEATURES + 1))
    expected = (np.c_[x, np.ones(N)] * weights[arm]).sum(1)
    return x, arm, (expected + rng.normal(scale=0.3, size=N)).astype(np.float32)


def batch(x: np.ndarray, arm: np.ndarray, reward: np.ndarray) -> Batch:
    state, action, nothing = torch.from_numpy(x), torch.from_numpy(arm), torch.zeros(len(x))
    return Batch(state, action, None, torch.from_numpy(reward), state, action, None, nothing)


def learned(algorithm: dict[str, object], passes: int = 1, rows: int = N) -> tuple[nn.Module, Learner]:
    made = Algorithm.model_validate(algorithm)
    policy = build_network(made, SPEC, Actions([f"arm {i}" for i in range(ARMS)]))
    learner = build_learner(made, policy)
    learner.expect(rows)
    trainer = Trainer(learner, made.learning_rate)
    x, arm, reward = log()
    for _ in range(passes):
        for part in np.array_split(np.arange(N), 5):
            trainer.step(batch(x[part], arm[part], reward[part]))
    learner.settle()
    return policy.eval(), learner


def by_hand(regularization: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Weights [arms, F + 1] and covariances of ridge regression."""
    x, arm, reward = log()
    known = np.c_[x, np.ones(N)].astype(np.float64)
    covariance = np.stack(
        [
            np.linalg.inv(regularization * np.eye(FEATURES + 1) + known[arm == a].T @ known[arm == a])
            for a in range(ARMS)
        ]
    )
    return np.stack([covariance[a] @ known[arm == a].T @ reward[arm == a] for a in range(ARMS)]), covariance


@pytest.mark.parametrize("passes", [1, 3])
def test_linucb_adds_deviations_to_what_ridge_regression_expects(passes: int) -> None:
    policy, _ = learned({"linUcb": {"alpha": 1.5, "regularization": 2.0}}, passes)
    theta, covariance = by_hand()
    x = np.random.default_rng(1).normal(size=(50, FEATURES)).astype(np.float32)
    known = np.c_[x, np.ones(50)]
    wanted = known @ theta.T + 1.5 * np.sqrt(np.einsum("bi,aij,bj->ba", known, covariance, known))
    np.testing.assert_allclose(policy(torch.from_numpy(x)), wanted, rtol=1e-4, atol=1e-4)


def test_thompson_sampling_takes_an_action_as_often_as_it_is_best_in_a_draw() -> None:
    policy, _ = learned({"linearThompson": {"deviation": 4.0, "regularization": 2.0}})
    theta, covariance = by_hand()
    rng = np.random.default_rng(2)
    x = rng.normal(scale=0.3, size=(5, FEATURES)).astype(np.float32)
    probabilities = torch.softmax(policy(torch.from_numpy(x)), 1).numpy()
    for row, known in enumerate(np.c_[x, np.ones(5)]):
        # An arm's expected reward in this context is Gaussian, and independent of the others'.
        deviation = 4.0 * np.sqrt(np.einsum("i,aij,j->a", known, covariance, known))
        drawn = rng.normal(known @ theta.T, deviation, (100_000, ARMS)).argmax(1)
        np.testing.assert_allclose(probabilities[row], np.bincount(drawn, minlength=ARMS) / 100_000, atol=0.01)


def test_an_arm_that_was_hardly_tried_is_tried_as_often_as_it_may_be_the_best() -> None:
    mean, deviation = torch.tensor([[0.3, 0.0, 0.0]]), torch.tensor([[0.01, 0.01, 1.0]])

    class Given(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return mean

        def deviation(self, x: torch.Tensor) -> torch.Tensor:
            return deviation

    found = ThompsonSampling(Given(), 1.0)(torch.zeros(1, 1)).exp()  # type: ignore[arg-type]
    drawn = np.random.default_rng(0).normal(mean, deviation, (200_000, 3)).argmax(1)
    np.testing.assert_allclose(found[0], np.bincount(drawn, minlength=3) / 200_000, atol=0.01)


def test_thompson_sampling_over_equal_arms_is_even() -> None:
    found = ThompsonSampling(LinearRewards(2, 3, 1.0), 1.0)(torch.tensor([[0.5, -1.0]]))
    np.testing.assert_allclose(found.exp(), [[1 / 3] * 3], atol=1e-5)


def test_what_was_seen_in_part_counts_for_that_part() -> None:
    _, whole = learned({"linUcb": {}})
    _, more = learned({"linUcb": {}}, rows=10 * N)
    assert isinstance(whole, LinearBandit)
    assert isinstance(more, LinearBandit)
    torch.testing.assert_close(more.network.rewards.theta, whole.network.rewards.theta)


def test_a_batch_that_goes_over_into_the_next_pass_counts_no_decision_twice() -> None:
    made = Algorithm.model_validate({"linUcb": {"regularization": 2.0}})
    learner = build_learner(made, build_network(made, SPEC, Actions([f"arm {i}" for i in range(ARMS)])))
    learner.expect(N)
    shuffled, (x, arm, reward) = Shuffled(np.arange(N), 7 * N // 12, 0), log()
    for step in range(shuffled.ends(1)[0]):
        rows = shuffled.at(step)[0]
        learner(batch(x[rows], arm[rows], reward[rows]))
    learner.settle()
    assert isinstance(learner, LinearBandit)
    np.testing.assert_allclose(learner.network.rewards.theta, by_hand()[0], rtol=1e-4, atol=1e-5)


def test_the_logistic_bandit_learns_probabilities() -> None:
    made = Algorithm.model_validate({"logisticBandit": {"learningRate": 0.05}})
    torch.manual_seed(0)
    policy = build_network(made, SPEC, Actions(["a", "b"]))
    trainer = Trainer(build_learner(made, policy), made.learning_rate)
    rng = np.random.default_rng(0)
    weights = np.array([[1.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
    for _ in range(800):
        x, arm = rng.normal(size=(256, FEATURES)).astype(np.float32), rng.integers(2, size=256)
        chance = 1 / (1 + np.exp(-(x * weights[arm]).sum(1)))
        trainer.step(batch(x, arm, (rng.random(256) < chance).astype(np.float32)))
    x = rng.normal(size=(100, FEATURES)).astype(np.float32)
    found = torch.sigmoid(policy(torch.from_numpy(x))).detach().numpy()
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-(x @ weights.T))), atol=0.08)
