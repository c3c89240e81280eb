"""Logs of Pendulum-v1, and that an algorithm for logs does better than who logged."""

import numpy as np
import pytest

from simulation import pendulum as pendulum_log
from simulation.offline import LOGGED
from simulation.pendulum import LENGTH, ROWS, TORQUE, controlled, logged, pendulum


def test_a_log_is_whole_episodes_of_torques_within_bounds() -> None:
    states, torques, rewards = logged("mediocre", 0)
    assert states.shape == (ROWS // LENGTH, LENGTH + 1, 3)
    assert np.abs(torques).max() <= TORQUE
    # What Gymnasium defines as the cost of a state and a torque.
    angle = np.arctan2(states[:, :-1, 1], states[:, :-1, 0])
    cost = angle**2 + 0.1 * states[:, :-1, 2] ** 2 + 0.001 * torques[:, :, 0] ** 2
    np.testing.assert_allclose(rewards, -cost, atol=1e-3)


def test_a_seed_names_a_log() -> None:
    np.testing.assert_array_equal(logged("random", 3)[1], logged("random", 3)[1])
    assert (logged("random", 3)[1] != logged("random", 4)[1]).any()


def test_the_controller_is_better_than_chance_and_holds_the_top() -> None:
    assert pendulum("random", LOGGED, 0) < -1000 < -500 < pendulum("mediocre", LOGGED, 0)
    assert controlled(np.array([[1.0, 0.0, 0.0]])).item() == 0.0
    leaning = controlled(np.array([[np.cos(0.1), np.sin(0.1), 0.0]])).item()
    assert leaning == pytest.approx(-TORQUE)


# By how much is a matter of luck, that of the machine's rounding too: what is asked lies nearly three deviations, or
# more, under what is earned on average.


def test_td3_bc_does_better_than_who_logged() -> None:
    learned, logs = (np.mean([pendulum("mediocre", who, seed) for seed in (0, 1)]) for who in ("TD3+BC", LOGGED))
    assert learned > logs + 40


@pytest.mark.parametrize(("algorithm", "steps"), [("DDPG", 2_000), ("TD3", 2_000), ("SAC", 2_000), ("IQL", 5_000)])
def test_a_training_on_all_there_is_to_do_halves_what_chance_costs(
    algorithm: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pendulum_log, "STEPS", steps)
    assert pendulum("random", algorithm, 0) > pendulum("random", LOGGED, 0) / 2
