"""What is drawn for a batch does not depend on how many workers share it."""

import pytest
import torch

from components.training import shared

LIKE = torch.empty(0)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_own", None)


def test_workers_draw_for_their_rows_what_one_would_again_and_again() -> None:
    torch.manual_seed(1)
    whole = [shared.normal(5, 3, LIKE) for _ in range(2)]
    for first, end in ((0, 2), (2, 5)):
        shared.share(first, end, 5)
        torch.manual_seed(1)
        for found in whole:
            assert torch.equal(shared.normal(end - first, 3, LIKE), found[first:end])


def test_workers_draw_other_numbers_for_lists_and_stay_in_step_however_long_those_are() -> None:
    drawn, next_ones = [], []
    for first, end, listed in ((0, 2, 7), (2, 5, 7), (2, 5, 3)):
        shared.share(first, end, 5, lists=True)
        torch.manual_seed(1)
        drawn.append(shared.normal(listed, 3, LIKE))
        next_ones.append(torch.randn(1))
    assert (drawn[0] != drawn[1]).all()
    assert next_ones[0] == next_ones[1] == next_ones[2]


def test_who_sees_all_rows_asks_nobody_for_the_mean() -> None:
    values = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    for rows in (3, 5):
        shared.share(0, rows, rows)
        assert shared.mean(values) == 3.0
        assert not shared.mean(values).requires_grad
