"""Contextual bandits learned from a log of random choices, where the best choice is known."""

from __future__ import annotations

import numpy as np
import torch

from components.training.actions import Actions
from components.training.algorithms.build import build_learner, build_network
from components.training.algorithms.learner import Batch
from components.training.network import Head
from components.training.trainer import Trainer
from contracts.job import Algorithm, PolicyHead
from simulation.standardized import standardized

FEATURES, ARMS, TRIED, BATCH, STEPS = 5, 8, 5_000, 250, 2000
SIZES = {"500 decisions": 500, "5,000": 5_000, "50,000": 50_000}
"""Of the log."""
BY_CHANCE = "by chance"
BANDITS: dict[str, tuple[dict[str, object], PolicyHead]] = {
    "LinUCB, greedy": ({"linUcb": {"alpha": 0.5}}, PolicyHead(policy="greedy")),
    "linear Thompson sampling": ({"linearThompson": {"deviation": 0.4}}, PolicyHead(policy="softmax")),
    "logistic, epsilon 0.05": ({"logisticBandit": {}}, PolicyHead(policy="epsilonGreedy", epsilon=0.05)),
}
"""Each with the head that it is to be served by."""


def chances(weights: np.ndarray, context: np.ndarray) -> np.ndarray:
    """Probability of a reward of 1: contexts [N, FEATURES] -> [N, ARMS]."""
    return np.asarray(1 / (1 + np.exp(-(context @ weights[:, :-1].T + weights[:, -1]))))


def regret(size: str, bandit: str, seed: int) -> float:
    """Rewards of 1,000 fresh decisions by which the policy falls short of the best, in expectation.

    Known are the probabilities of a reward, logistic in the context with standard normal weights.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    weights, n = rng.normal(size=(ARMS, FEATURES + 1)), SIZES[size]
    context = rng.normal(size=(n, FEATURES)).astype(np.float32)
    arm = rng.integers(ARMS, size=n)
    reward = (rng.random(n) < chances(weights, context)[np.arange(n), arm]).astype(np.float32)
    fresh = rng.normal(size=(TRIED, FEATURES)).astype(np.float32)
    worth = chances(weights, fresh)
    policy = np.full((TRIED, ARMS), 1 / ARMS)
    if bandit != BY_CHANCE:
        algorithm, head = BANDITS[bandit]
        policy = learned(Algorithm.model_validate(algorithm), head, context, arm, reward, fresh, rng)
    return float(1000 * (worth.max(1) - (policy * worth).sum(1)).mean())


def learned(
    algorithm: Algorithm,
    head: PolicyHead,
    context: np.ndarray,
    arm: np.ndarray,
    reward: np.ndarray,
    fresh: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """What the served policy would do in fresh contexts, [N, ARMS]."""
    spec = standardized([f"x{i}" for i in range(FEATURES)], context.mean(0), context.std(0))
    network = build_network(algorithm, spec, Actions([f"arm_{i}" for i in range(ARMS)]))
    learner = build_learner(algorithm, network)
    learner.expect(len(arm))
    trainer = Trainer(learner, algorithm.learning_rate)
    state = network.normalization(torch.from_numpy(context))
    action, gained, nothing = torch.from_numpy(arm), torch.from_numpy(reward), torch.zeros(len(arm))
    # One pass is all that a linear bandit needs.
    passes = max(1, STEPS * BATCH // len(arm)) if trainer.optimizer else 1
    for _ in range(passes):
        order = torch.from_numpy(rng.permutation(len(arm)))
        for start in range(0, len(arm), BATCH):
            rows = order[start : start + BATCH]
            one = [each[rows] for each in (state, action, gained, nothing)]
            trainer.step(Batch(one[0], one[1], None, one[2], one[0], one[1], None, one[3]))
    learner.settle()
    network.eval()
    with torch.no_grad():
        scores = network(torch.from_numpy(fresh))
        return np.asarray(Head(head)(scores, torch.ones_like(scores, dtype=torch.bool)).double().numpy())
