"""How the workers share out the rows."""

import numpy as np
import pytest

from components.training.worker import permuted_batches

ROWS = np.arange(100, 160)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_all_workers_together_see_each_row_exactly_once_per_pass(workers: int) -> None:
    passes, batch = 3, 12
    shares = [permuted_batches(ROWS, batch, passes * len(ROWS) // batch, 5, r, workers) for r in range(workers)]
    assert all(share.shape == (15, batch // workers) for share in shares)
    together = np.concatenate(shares, axis=1).reshape(passes, len(ROWS))
    for one_pass in together:
        assert sorted(one_pass) == ROWS.tolist()


def test_passes_come_in_different_orders() -> None:
    first, second = permuted_batches(ROWS, 12, 10, 5, 0, 1).reshape(2, len(ROWS))
    assert first.tolist() != second.tolist()
    assert first.tolist() != ROWS.tolist()


@pytest.mark.parametrize("workers", [2, 4])
def test_a_global_batch_is_the_same_however_many_workers_share_it(workers: int) -> None:
    alone = permuted_batches(ROWS, 8, 20, 5, 0, 1)
    shared = np.concatenate([permuted_batches(ROWS, 8, 20, 5, r, workers) for r in range(workers)], axis=1)
    np.testing.assert_array_equal(shared, alone)


def test_a_pass_that_is_no_multiple_of_the_batch_goes_on_in_the_next() -> None:
    stream = permuted_batches(ROWS, 16, 15, 5, 0, 1).reshape(-1)
    assert len(stream) == 4 * len(ROWS)
    for one_pass in stream.reshape(4, -1):
        assert sorted(one_pass) == ROWS.tolist()


def test_the_order_depends_on_the_seed_alone() -> None:
    np.testing.assert_array_equal(permuted_batches(ROWS, 12, 7, 5, 0, 2), permuted_batches(ROWS, 12, 7, 5, 0, 2))
    assert (permuted_batches(ROWS, 12, 7, 5, 0, 2) != permuted_batches(ROWS, 12, 7, 6, 0, 2)).any()


def test_more_steps_do_not_change_the_first() -> None:
    np.testing.assert_array_equal(permuted_batches(ROWS, 12, 20, 5, 0, 1)[:7], permuted_batches(ROWS, 12, 7, 5, 0, 1))
