"""What each algorithm learns from logs of CartPole-v1, whose truth is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from components.training.actions import Actions
from components.training.algorithms.build import build_learner, build_network
from components.training.batches import Shuffled
from components.training.network import Normalized
from components.training.store import Store, over_steps
from components.training.trainer import Trainer
from contracts.job import Algorithm, BehaviourPolicy, QLearning
from simulation.cartpole import ACTIONS, FEATURES, Episodes, Policy, play
from simulation.policies import behaviour_policy
from simulation.standardized import standardized

ROWS, STEPS, BATCH, DISCOUNT = 50_000, 5_000, 256, 0.99
EPISODES = 100
"""Fresh ones, that a learned policy is tried on."""
FRESH = 1_000_000

LOGGED = "the log itself"


def _steering(strength: float, exploration: float) -> BehaviourPolicy:
    towards = {"cart_position": 0.6, "cart_velocity": 0.6, "pole_angle": 3.0, "pole_velocity": 1.0}
    weights = {name: strength * weight for name, weight in towards.items()}
    return BehaviourPolicy(weights=weights, exploration=exploration)


LOGS = {
    "random": [(1.0, _steering(0.0, 1.0))],
    "mixed": [(0.5, _steering(0.0, 1.0)), (0.5, _steering(3.0, 0.1))],
    "mediocre": [(1.0, _steering(1.5, 0.1))],
}
"""Shares of the rows, and who logged them: mean returns of about 22, 38 and 50."""

NETWORK: dict[str, Any] = {"hiddenLayers": [256, 256]}
PLAIN = NETWORK | {"dueling": False}
FAR = {"steps": 3, "targetUpdateRate": 0.02}
"""Values reach further in as many steps, where nothing makes them run away."""
FARTHER = FAR | {"steps": 10}
REDUCED = ", bfloat16"
ALGORITHMS: dict[str, dict[str, Any]] = {
    "behaviour cloning": {"behaviourCloning": NETWORK},
    "DQN": {"dqn": PLAIN | {"double": False}},
    "double DQN": {"dqn": PLAIN},
    "dueling double DQN": {"dqn": NETWORK},
    "3-step double DQN": {"dqn": PLAIN | {"steps": 3}},
    "10-step double DQN": {"dqn": PLAIN | FARTHER},
    "noisy double DQN": {"dqn": PLAIN | {"noisy": True}},
    "C51": {"c51": PLAIN | {"atoms": 21, "lowestReturn": 0.0, "highestReturn": 100.0}},
    "QR-DQN": {"qrDqn": PLAIN | {"quantiles": 11}},
    "BCQ": {"bcq": PLAIN},
    "10-step BCQ": {"bcq": PLAIN | FARTHER},
    "CQL": {"cql": PLAIN},
    "3-step CQL": {"cql": PLAIN | FAR},
    "3-step CQL" + REDUCED: {"cql": PLAIN | FAR},
}


def logged(name: str, seed: int) -> Episodes:
    """`ROWS` decisions of CartPole-v1 by the policies of a log, the last episode of each cut off."""
    parts: list[Episodes] = []
    for i, (share, behaviour) in enumerate(LOGS[name]):
        rows = int(ROWS * share)
        act = behaviour_policy(behaviour)
        length = play(act, 50, seed + 2 * FRESH).returns.mean()
        played = play(act, math.ceil(1.3 * rows / length) + 10, seed * len(LOGS) + i)
        if len(played.action) < rows:
            raise ValueError(f"{name}: {len(played.action)} decisions played, {rows} wanted")
        kept = {column: value[:rows] for column, value in vars(played).items()}
        kept["truncated"] = kept["truncated"].copy()
        kept["truncated"][-1] |= kept["metrics"][-1, 1] == 0
        kept["episode"] = kept["episode"] + (parts[-1].episode[-1] + 1 if parts else 0)
        parts.append(Episodes(**kept))
    return Episodes(*(np.concatenate([getattr(part, column) for part in parts]) for column in vars(parts[0])))


def store_of(played: Episodes, normalization: nn.Module, steps: int) -> Store:
    n = len(played.action)
    fell, rows = played.metrics[:, 1] > 0, np.arange(n)
    next_row = np.where(fell | played.truncated, rows, np.minimum(rows + 1, n - 1))
    rewards, discounts = played.metrics[:, 0].astype(np.float32), np.full(n, DISCOUNT, np.float32)
    over = over_steps(rewards, discounts, next_row, fell, played.truncated, steps)
    action, reward, following, discount = map(torch.from_numpy, (played.action, *over))
    with torch.no_grad():
        state = normalization(torch.from_numpy(played.state))
    return Store(state, action, None, reward, following, discount, np.flatnonzero(~played.truncated))


def learn(algorithm: Algorithm, network: Normalized, store: Store, seed: int, precision: str) -> None:
    """Take `STEPS` optimizer steps."""
    learner = build_learner(algorithm, network)
    learner.compute_in(precision)
    trainer = Trainer(learner, algorithm.learning_rate)
    shuffled = Shuffled(store.usable, BATCH, seed)
    for batch in store.batches(shuffled, 0, STEPS):
        trainer.step(batch)
    network.eval()


def greedy(network: nn.Module) -> Policy:
    def act(state: np.ndarray, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            return network(torch.from_numpy(state)).argmax(1).numpy(), np.ones(len(state))

    return act


def cartpole(log: str, algorithm: str, seed: int) -> float:
    """Mean greedy return of what is learned from a log of CartPole-v1, or of the whole episodes of the log itself."""
    torch.set_num_threads(1)
    played = logged(log, seed)
    if algorithm == LOGGED:
        cut = np.isin(np.arange(len(played.returns)), played.episode[played.truncated])
        return float(played.returns[~cut].mean())
    made = Algorithm.model_validate(ALGORITHMS[algorithm])
    torch.manual_seed(seed)
    network = build_network(
        made, standardized(FEATURES, played.state.mean(0), played.state.std(0)), Actions(list(ACTIONS))
    )
    store = store_of(played, network.normalization, made.config.steps if isinstance(made.config, QLearning) else 1)
    learn(made, network, store, seed, "bfloat16" if algorithm.endswith(REDUCED) else "float32")
    return float(play(greedy(network), EPISODES, seed + FRESH).returns.mean())
