"""Which rows each step learns from."""

from __future__ import annotations

import numpy as np


def permuted_batches(rows: np.ndarray, batch_size: int, steps: int, seed: int, rank: int, workers: int) -> np.ndarray:
    """This worker's share of every global batch, int64 [steps, about batch_size / workers].

    All workers draw the same seeded permutations of the rows, one after another, and cut each global batch alike: in
    a pass no row is seen twice and none is left out.
    """
    generator = np.random.default_rng(seed)
    passes = -(-steps * batch_size // len(rows))
    stream = np.concatenate([generator.permutation(rows) for _ in range(passes)])[: steps * batch_size]
    first, end = (batch_size * r // workers for r in (rank, rank + 1))
    return stream.reshape(steps, batch_size)[:, first:end]
