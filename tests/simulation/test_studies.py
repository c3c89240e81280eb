"""The results tables: their intervals, their cells, and what they are filled with."""

import pytest

from simulation.bandits import regret
from simulation.studies import STUDIES, Result, reproduce, table


def test_an_interval_is_students_over_seeds() -> None:
    result = Result("random", "DQN", [1.0, 2.0, 3.0])
    # t(0.975, 2) = 4.3027, standard error 1 / sqrt(3)
    assert result.interval == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-3)


def test_the_table_leaves_empty_what_does_not_go_together() -> None:
    results = [Result("CartPole-v1", "DQN", [1.0, 3.0]), Result("Pendulum-v1", "SAC", [4.0, 4.0])]
    lines = table(results).splitlines()
    assert lines[0] == "| | CartPole-v1 | Pendulum-v1 |"
    assert lines[2:] == ["| DQN | 2 [-11, 15] |  |", "| SAC |  | 4 [4, 4] |"]


def test_a_study_is_filled_where_it_is_asked_to_be() -> None:
    results = reproduce("bandits", ["by chance", "500 decisions", "LinUCB, greedy"], range(2))
    assert [(r.column, r.row, len(r.values)) for r in results] == [
        ("500 decisions", "by chance", 2),
        ("500 decisions", "LinUCB, greedy", 2),
    ]
    assert results[1].mean < results[0].mean / 3


def test_every_study_has_a_baseline_in_every_column() -> None:
    for study in STUDIES.values():
        assert all(study.fits(column, study.rows[0]) for column in study.columns)
    online = STUDIES["online"]
    assert not online.fits("Pendulum-v1", "double DQN")
    assert not online.fits("CartPole-v1", "SAC")
    assert online.fits("LunarLander-v3", "double DQN")
    assert not online.fits("LunarLander-v3", "QR-DQN")


@pytest.mark.parametrize(
    ("bandit", "most"), [("LinUCB, greedy", 30), ("linear Thompson sampling", 60), ("logistic, epsilon 0.05", 45)]
)
def test_a_bandits_regret_falls_with_what_was_logged(bandit: str, most: float) -> None:
    chance, few, many = (
        regret("500 decisions", "by chance", 0),
        *(regret(s, bandit, 0) for s in ("500 decisions", "5,000")),
    )
    assert many < few < chance
    assert many < most
