"""Logs of CartPole-v1 are what they say, and what is learned from them."""

import numpy as np
import pytest

from simulation import offline
from simulation.offline import ALGORITHMS, LOGGED, LOGS, ROWS, cartpole, logged


@pytest.mark.parametrize(("name", "low", "high"), [("random", 20, 24), ("mixed", 33, 43), ("mediocre", 45, 55)])
def test_a_log_has_its_rows_and_its_return(name: str, low: float, high: float) -> None:
    played = logged(name, seed=3)
    assert len(played.action) == ROWS
    assert low < cartpole(name, LOGGED, 3) < high
    ends = np.append(np.diff(played.episode) != 0, True)
    # Every episode ends by falling, by the time limit or by the log's own end.
    assert (ends == (played.truncated | (played.metrics[:, 1] > 0))).all()
    assert played.truncated.sum() <= len(LOGS[name]) + (played.returns >= 500).sum()


def test_cql_learns_to_balance_from_a_mediocre_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "STEPS", 1_500)
    assert cartpole("mediocre", "3-step CQL", 3) >= 400
    assert cartpole("mediocre", LOGGED, 3) < 60


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_short_training_beats_who_logged(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "STEPS", 1_000)
    monkeypatch.setattr(offline, "EPISODES", 30)
    # A clone of chance is no better than chance.
    log = "mediocre" if algorithm == "behaviour cloning" else "random"
    assert cartpole(log, algorithm, 3) > 2 * cartpole(log, LOGGED, 3)


def test_the_same_seed_plays_the_same_log() -> None:
    first, again, other = (logged("mixed", seed).state for seed in (3, 3, 4))
    assert (first == again).all()
    assert (first[:1000] != other[:1000]).any()
