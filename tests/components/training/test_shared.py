"""What is drawn for a batch, and what it is on average, does not depend on how many workers share it."""

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


def test_rows_that_are_not_a_share_of_a_batch_have_their_own() -> None:
    shared.share(2, 4, 5)
    torch.manual_seed(1)
    found = shared.normal(7, 3, LIKE)
    torch.manual_seed(1)
    assert torch.equal(found, torch.randn(7, 3))
