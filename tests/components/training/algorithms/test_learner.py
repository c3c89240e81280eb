"""Scores over lists of actions, whatever their lengths, are what they are over a table of all actions."""

import numpy as np
import pytest
import torch

from components.training.algorithms import learner
from components.training.algorithms.learner import Listed
from components.training.network import Head
from contracts.job import PolicyHead

B, A = 40, 7


@pytest.fixture(params=range(3))
def tables(request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores [B, A], possible [B, A], and the action taken [B]; some scores are equal."""
    rng = np.random.default_rng(request.param)
    possible = rng.random((B, A)) < rng.random((B, 1))
    taken = rng.integers(A, size=B)
    possible[np.arange(B), taken] = True
    scores = torch.from_numpy(rng.integers(-3, 4, (B, A)) * rng.choice([1.0, 30.0], (B, 1)))
    return scores, torch.from_numpy(possible), torch.from_numpy(taken)


def as_lists(scores: torch.Tensor, possible: torch.Tensor) -> tuple[torch.Tensor, Listed]:
    row, _ = possible.nonzero(as_tuple=True)
    return scores[possible], Listed(torch.zeros(len(row), 1), row, B, A)


def place(possible: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """Of an action of each decision among all that are listed."""
    number = possible.flatten().cumsum(0).view_as(possible) - 1
    return number.gather(1, action[:, None]).squeeze(1)


def test_lists_say_what_tables_say(tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    scores, possible, taken = tables
    listed_scores, listed = as_lists(scores, possible)
    torch.testing.assert_close(learner.highest(listed_scores, listed), learner.highest(scores, possible))
    torch.testing.assert_close(learner.logsumexp(listed_scores, listed), learner.logsumexp(scores, possible))
    assert torch.equal(learner.best(listed_scores, listed), place(possible, learner.best(scores, possible)))
    at = place(possible, taken)
    assert torch.equal(learner.taken(listed_scores, at, listed), learner.taken(scores, taken, possible))
    torch.testing.assert_close(
        learner.negative_log_likelihood(listed_scores, at, listed),
        learner.negative_log_likelihood(scores, taken, possible),
    )


def test_each_list_counts_alike_in_a_mean(tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    scores, possible, _ = tables
    each = torch.stack([row[mask].mean() for row, mask in zip(scores, possible, strict=True)])
    torch.testing.assert_close(learner.mean(*as_lists(scores, possible)), each.mean())


@pytest.mark.parametrize("head", [{}, {"temperature": 3.0}, {"policy": "greedy"}, {"policy": "epsilonGreedy"}], ids=str)
def test_a_head_over_lists_is_one_over_tables(
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor], head: dict[str, object]
) -> None:
    scores, possible, _ = tables
    made = Head(PolicyHead.model_validate(head))
    listed_scores, listed = as_lists(scores, possible)
    torch.testing.assert_close(made.over_lists(listed_scores, listed.row, B), made(scores, possible)[possible])


def test_a_decision_that_lists_nothing_has_no_part_in_the_others() -> None:
    listed = Listed(torch.zeros(2, 1), torch.tensor([0, 2]), 3, 1)
    scores = torch.tensor([1.0, 5.0])
    assert learner.best(scores, listed).tolist() == [0, 0, 1]
    assert learner.highest(scores, listed)[[0, 2]].tolist() == [1.0, 5.0]
