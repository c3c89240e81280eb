"""What algorithms over numbers learn from logs of Pendulum-v1."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from components.training.actions import Actions
from components.training.algorithms.build import build_learner, build_network
from components.training.batches import Shuffled
from components.training.store import Store
from components.training.trainer import Trainer
from contracts.job import Algorithm
from simulation.offline import FRESH, LOGGED
from simulation.online import APART, EPISODES, greedy_returns, make
from simulation.standardized import standardized

ENVIRONMENT, LENGTH, TORQUE = "Pendulum-v1", 200, 2.0
ROWS, STEPS, BATCH, DISCOUNT = 50_000, 5_000, 256, 0.98
LOGS = {"random": 0.0, "mediocre": 0.5}
"""How much of its torque who logged takes from a controller; the rest is chance."""
FAST: dict[str, Any] = {"hiddenLayers": [128, 128], "learningRate": 1e-3, "targetUpdateRate": 0.01}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "DDPG": {"ddpg": FAST},
    "TD3": {"td3": FAST},
    "SAC": {"sac": FAST},
    "TD3+BC": {"td3Bc": FAST},
    "IQL": {"iql": FAST},
}


def controlled(state: np.ndarray) -> np.ndarray:
    """Torque [N, 1] for states [N, 3]: swings up by adding energy, and holds the pendulum where it is near the top."""
    cosine, sine, speed = state.T
    angle = np.arctan2(sine, cosine)
    # Per unit of inertia, 0 at rest at the top.
    energy = speed**2 / 2 + 15 * (cosine - 1)
    hold = -(20 * angle + 4 * speed)
    swing = np.where(np.abs(speed) < 0.1, TORQUE, -np.sign(speed) * np.sign(energy) * TORQUE)
    return np.clip(np.where(cosine > 0.9, hold, swing), -TORQUE, TORQUE)[:, None]


def logged(log: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States [E, LENGTH + 1, 3], torques [E, LENGTH, 1] and rewards [E, LENGTH] of episodes played side by side."""
    episodes = ROWS // LENGTH
    played, rng = make(ENVIRONMENT, episodes), np.random.default_rng(seed)
    state, _ = played.reset(seed=seed * APART)
    states, torques, rewards = [state], [], []
    for _ in range(LENGTH):
        noise = rng.uniform(-TORQUE, TORQUE, (episodes, 1))
        torque = LOGS[log] * controlled(state) + (1 - LOGS[log]) * noise
        state, reward, _, _, _ = played.step(torque.astype(np.float32))
        states.append(state)
        torques.append(torque)
        rewards.append(reward)
    played.close()
    return _side_by_side(states), _side_by_side(torques), _side_by_side(rewards)


def _side_by_side(steps: list[np.ndarray]) -> np.ndarray:
    """[E, steps, ...] of what E episodes had in each step."""
    return np.stack(steps, 1).astype(np.float32)


def pendulum(log: str, algorithm: str, seed: int) -> float:
    """Mean greedy return of what is learned from a log, or of the log itself."""
    torch.set_num_threads(1)
    states, torques, rewards = logged(log, seed)
    if algorithm == LOGGED:
        return float(rewards.sum(1).mean())
    made = Algorithm.model_validate(ALGORITHMS[algorithm])
    flat = states.reshape(-1, 3)
    spec = standardized(["cosine", "sine", "speed"], flat.mean(0), flat.std(0))
    torch.manual_seed(seed)
    network = build_network(made, spec, Actions(["torque"], bounds=[(-TORQUE, TORQUE)]))
    # The state after an episode's last decision is a row of its own, from which nothing is learned.
    rows = np.arange(len(flat)).reshape(len(states), LENGTH + 1)
    with_last = [np.concatenate([each, np.zeros_like(each[:, :1])], 1) for each in (torques / TORQUE, rewards)]
    unit, reward = (torch.from_numpy(each.reshape(len(flat), *each.shape[2:])) for each in with_last)
    with torch.no_grad():
        state = network.normalization(torch.from_numpy(flat))
    following = torch.from_numpy(np.minimum(rows.ravel() + 1, len(flat) - 1))
    store = Store(state, unit, None, reward, following, torch.full((len(flat),), DISCOUNT), rows[:, :-1].ravel())
    trainer = Trainer(build_learner(made, network), made.learning_rate)
    for batch in store.batches(Shuffled(store.usable, BATCH, seed), 0, STEPS):
        trainer.step(batch)
    return float(np.mean(greedy_returns(ENVIRONMENT, network, EPISODES, seed + FRESH)))
