"""The gridworld's true values, and that short training comes near them."""

import numpy as np
import pytest

from simulation.bandits import BY_CHANCE
from simulation.gridworld import (
    ARRIVALS,
    BY_RANDOM,
    CELLS,
    DISCOUNT,
    LEFT,
    LOSS,
    MOVES,
    PIT,
    POSSIBLE,
    PRIZE,
    ROWS,
    TRUTH,
    gridworld,
    logged,
    values_of,
)


def test_every_move_leads_somewhere_and_the_grid_has_edges() -> None:
    np.testing.assert_allclose(ARRIVALS.sum(2), 1)
    assert (POSSIBLE.sum(1) == 4).sum() == 9
    assert POSSIBLE[0].tolist() == [True, False, True, False]


def test_values_solve_their_equation() -> None:
    for policy in (None, BY_RANDOM):
        q = values_of(policy)
        value = np.where(POSSIBLE, q, -np.inf).max(1) if policy is None else (policy * q).sum(1)
        value[[PRIZE, PIT]] = 0
        brought = ARRIVALS[:, :, PRIZE] - ARRIVALS[:, :, PIT]
        np.testing.assert_allclose(q, brought + DISCOUNT * ARRIVALS @ value, atol=1e-12)


def test_beside_the_prize_its_chance_is_what_a_move_is_worth() -> None:
    right = MOVES.tolist().index([0, 1])
    q = values_of()
    # Slipping leads up a cell or, off the grid, nowhere.
    slipped = 0.05 * DISCOUNT * (q[PRIZE - 6][POSSIBLE[PRIZE - 6]].max() + q[PRIZE - 1][POSSIBLE[PRIZE - 1]].max())
    assert q[PRIZE - 1, right] == pytest.approx(0.9 + slipped)
    assert (values_of() >= values_of(BY_RANDOM) - 1e-12)[LEFT].all()


def test_a_log_takes_possible_moves_and_ends_where_it_must() -> None:
    data, lists = logged(0), logged(0, described=True)
    cells = data.state[:, 0].astype(int)
    assert len(data) >= ROWS
    assert POSSIBLE[cells, data.action].all()
    assert not np.isin(cells, [PRIZE, PIT]).any()
    np.testing.assert_array_equal(data.metrics[:, 0] != 0, data.terminal)
    np.testing.assert_array_equal(lists.possible.taken(lists.action), data.action)
    assert len(np.unique(cells)) == CELLS - 2


@pytest.mark.parametrize(
    ("algorithm", "far"),
    [
        ("DQN", 5.0),
        ("double DQN", 5.0),
        ("dueling double DQN", 5.0),
        ("noisy double DQN", 5.0),
        ("SARSA", 5.0),
        ("C51", 5.0),
        ("QR-DQN", 9.0),
        ("BCQ", 5.0),
        ("CQL, alpha 0.01", 9.0),
        ("DQN, moves described", 6.0),
        ("double DQN, moves described", 6.0),
        ("dueling double DQN, moves described", 6.0),
        ("noisy double DQN, moves described", 6.0),
        ("SARSA, moves described", 6.0),
        ("C51, moves described", 5.0),
        ("QR-DQN, moves described", 9.0),
        ("BCQ, moves described", 6.0),
        ("CQL, alpha 0.01, moves described", 9.0),
    ],
)
def test_learned_values_are_near_the_true_ones(algorithm: str, far: float) -> None:
    assert gridworld(TRUTH, algorithm, 0) < far
    assert gridworld(TRUTH, BY_CHANCE, 0) > 50


@pytest.mark.parametrize(("algorithm", "most"), [("double DQN", 1), ("2-step double DQN", 3)])
def test_acting_on_them_loses_next_to_nothing(algorithm: str, most: float) -> None:
    assert gridworld(LOSS, algorithm, 0) < most
    assert gridworld(LOSS, BY_CHANCE, 0) > 50
