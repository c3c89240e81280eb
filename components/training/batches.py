"""Which rows each step learns from."""

from __future__ import annotations

import numpy as np


class Shuffled:
    """This worker's share of every global batch.

    All workers draw the same seeded permutations of the rows, one for each pass, and cut each global batch alike: in
    a pass no row is seen twice and none is left out. One pass at a time is in memory, and any step can be the first.
    """

    def __init__(self, rows: np.ndarray, batch_size: int, seed: int, rank: int = 0, workers: int = 1) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.first, self.end = (batch_size * r // workers for r in (rank, rank + 1))
        self._passes: dict[int, np.ndarray] = {}

    def at(self, step: int) -> np.ndarray:
        """Rows of step 0, 1, ...: int64 [about batch_size / workers]."""
        start = step * self.batch_size
        here, stop, n = start + self.first, start + self.end, len(self.rows)
        parts = [
            self._pass(p)[max(here - p * n, 0) : stop - p * n] for p in range(here // n, max(stop - 1, here) // n + 1)
        ]
        return np.concatenate(parts)

    def _pass(self, number: int) -> np.ndarray:
        if number not in self._passes:
            # The one before may still be needed by a batch that lies over both.
            self._passes = {k: v for k, v in self._passes.items() if k == number - 1}
            self._passes[number] = np.random.default_rng([self.seed, number]).permutation(self.rows)
        return self._passes[number]
