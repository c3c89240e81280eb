"""CartPole-v1 seen as a product: its features, actions and metrics, and episodes played by a policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gymnasium
import numpy as np

FEATURES = ("cart_position", "cart_velocity", "pole_angle", "pole_velocity")
ACTIONS = ("left", "right")
METRICS = ("balanced", "fell", "tilt_degrees", "drift")

Policy = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(state float32 [B, 4], uniform float32 [B]) -> (action int64 [B], its probability float64 [B])."""


@dataclass(frozen=True)
class Episodes:
    """Decisions of whole episodes, sorted by episode and step; all arrays have one row per decision."""

    episode: np.ndarray  # int64
    step: np.ndarray  # int64, from 0
    state: np.ndarray  # float32 [N, 4]
    action: np.ndarray  # int64
    probability: np.ndarray  # float64
    metrics: np.ndarray  # float64 [N, 4], as METRICS
    truncated: np.ndarray  # bool: the episode was cut off by the time limit after this step

    @property
    def returns(self) -> np.ndarray:
        """Undiscounted sum of `balanced` per episode, which is its length."""
        return np.bincount(self.episode)


def metrics_of(state: np.ndarray, terminated: bool) -> dict[str, float]:
    """What a decision brought: one more step balanced, whether the pole fell, and how far pole and cart are off."""
    return {
        "balanced": 1.0,
        "fell": float(terminated),
        "tilt_degrees": float(np.degrees(abs(state[2]))),
        "drift": float(abs(state[0])),
    }


def play(policy: Policy, episodes: int, seed: int) -> Episodes:
    """Play each of `episodes` seeded episodes to its end, all side by side."""
    environment = gymnasium.make_vec("CartPole-v1", num_envs=episodes, vectorization_mode="vector_entry_point")
    state, _ = environment.reset(seed=seed)
    rng = np.random.default_rng(seed)
    running = np.ones(episodes, bool)
    columns: list[list[np.ndarray]] = [[] for _ in range(7)]
    step = 0
    while running.any():
        action, probability = policy(state, rng.random(episodes, np.float32))
        following, _, terminated, truncated, _ = environment.step(action)
        metrics = np.stack(
            [
                np.ones(episodes),
                terminated.astype(float),
                np.degrees(np.abs(following[:, 2].astype(float))),
                np.abs(following[:, 0].astype(float)),
            ],
            axis=1,
        )
        number = np.arange(episodes)
        values = (number, np.full(episodes, step), state, action, probability, metrics, truncated & ~terminated)
        for column, value in zip(columns, values, strict=True):
            column.append(value[running])
        running &= ~(terminated | truncated)
        state = following
        step += 1
    environment.close()
    episode = np.concatenate(columns[0])
    order = np.argsort(episode, kind="stable")
    return Episodes(*(np.concatenate(column)[order] for column in columns))
