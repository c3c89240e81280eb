"""The hash that says which MDP goes where."""

import numpy as np
import pytest
from scipy import stats

from contracts.hashing import unit_interval

KEYS = range(20_000)
PINNED = 0.6810545261069615
PINNED_WITH_STEP = 0.6233848222499222


@pytest.mark.parametrize("salt", ["holdout-0", "canary", ""])
def test_values_are_uniform_over_keys(salt: str) -> None:
    values = np.array([unit_interval(salt, f"mdp-{k}") for k in KEYS])
    assert values.min() >= 0
    assert values.max() < 1
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert stats.chisquare(np.histogram(values, 64, (0, 1))[0]).pvalue > 1e-3


def test_values_under_two_salts_are_independent() -> None:
    first, second = (np.array([unit_interval(salt, k) for k in KEYS]) for salt in ("holdout-1", "holdout-2"))
    table = np.histogram2d(first, second, 8, [(0, 1), (0, 1)])[0]
    assert stats.chi2_contingency(table).pvalue > 1e-3
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(len(first))


def test_values_of_consecutive_steps_are_independent() -> None:
    values = np.array([unit_interval("policy", "mdp", k) for k in KEYS])
    table = np.histogram2d(values[:-1:2], values[1::2], 8, [(0, 1), (0, 1)])[0]
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_a_value_never_changes() -> None:
    assert unit_interval("holdout-7", "mdp-1") == unit_interval("holdout-7", "mdp-1") == PINNED
    assert unit_interval("holdout-7", "mdp", 1) == PINNED_WITH_STEP


def test_parts_of_a_key_do_not_run_together() -> None:
    assert unit_interval("s", "ab", "c") != unit_interval("s", "a", "bc") != unit_interval("sa", "b", "c")
