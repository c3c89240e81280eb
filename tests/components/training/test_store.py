"""Transitions over several decisions, by hand."""

import numpy as np
import pytest
import torch

from components.training.network import Normalized
from components.training.store import Store, build_store, over_steps
from components.transitions import Transitions

# Two MDPs: one of four decisions that ends, one of three that breaks off.
REWARD = np.array([1.0, 2.0, 4.0, 8.0, 1.0, 2.0, 4.0], np.float32)
NEXT = np.array([1, 2, 3, 3, 5, 6, 6])
TERMINAL = np.array([0, 0, 0, 1, 0, 0, 0], bool)
TRUNCATED = np.array([0, 0, 0, 0, 0, 0, 1], bool)
HALF = np.full(7, 0.5, np.float32)


NOTHING_DONE = Normalized(torch.nn.Identity(), torch.nn.Identity())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("steps", "reward", "following", "terminal", "discount"),
    [
        (1, REWARD, NEXT, TERMINAL, HALF),
        # The last row is no transition; nothing is known of what came after it, so that the value at it stands in.
        (
            2,
            [2, 4, 8, 8, 2, 2, 4],
            [2, 3, 3, 3, 6, 6, 6],
            [0, 0, 1, 1, 0, 0, 0],
            [0.25, 0.25, 0.25, 0.5, 0.25, 0.5, 0.5],
        ),
        (
            9,
            [4, 6, 8, 8, 2, 2, 4],
            [3, 3, 3, 3, 6, 6, 6],
            [1, 1, 1, 1, 0, 0, 0],
            [0.0625, 0.125, 0.25, 0.5, 0.25, 0.5, 0.5],
        ),
    ],
)
def test_rewards_are_summed_to_the_end_or_to_where_the_log_breaks_off(
    steps: int, reward: list[float], following: list[int], terminal: list[int], discount: list[float]
) -> None:
    found = over_steps(REWARD, HALF, NEXT, TERMINAL, TRUNCATED, steps)
    for got, wanted in zip(found, (reward, following, terminal, discount), strict=True):
        np.testing.assert_allclose(got, wanted)


def test_a_batch_has_what_follows_each_row() -> None:
    possible = torch.tensor([[True, True]] * 6 + [[True, False]])
    parts = [torch.from_numpy(part) for part in (REWARD, NEXT, TERMINAL, HALF)]
    store = Store(torch.arange(7.0)[:, None], torch.arange(7), possible, *parts, np.flatnonzero(~TRUNCATED))
    batch = store.batch(torch.tensor([5, 0]))
    assert batch.state.tolist() == [[5.0], [0.0]]
    assert batch.next_state.tolist() == [[6.0], [1.0]]
    assert batch.next_action.tolist() == [6, 1]
    assert batch.next_possible.tolist() == [[True, False], [True, True]]
    assert batch.reward.tolist() == [2.0, 1.0]


def test_a_clone_learns_from_decisions_of_which_nothing_more_is_known() -> None:
    n = 3
    data = Transitions(
        ["x"], ["a", "b"], ["reward"], state=np.ones((n, 1), np.float32), action=np.array([0, 1, 0]),
        propensity=np.ones(n), possible=np.ones((n, 2), bool), metrics=np.ones((n, 1), np.float32),
        returns=np.ones((n, 1), np.float32), time_diff=np.ones(n), terminal=np.zeros(n, bool),
        truncated=np.array([False, True, True]), ordinal=np.ones(n, int), mdp=np.arange(n), mdp_ids=["", "", ""],
    )  # fmt: skip
    ones = np.ones(n, np.float32)
    usable = [build_store(data, NOTHING_DONE, ones, ones, everything=every).usable for every in (False, True)]
    assert [rows.tolist() for rows in usable] == [[0], [0, 1, 2]]
    assert build_store(data, NOTHING_DONE, ones, ones).possible is None


def test_a_discount_of_its_own_for_each_decision() -> None:
    discount = np.array([0.5, 0.1, 1, 1, 1, 1, 1], np.float32)
    reward, _, _, factor = over_steps(REWARD, discount, NEXT, TERMINAL, TRUNCATED, 3)
    assert reward[0] == pytest.approx(1 + 0.5 * 2 + 0.05 * 4)
    assert factor[0] == pytest.approx(0.05)
