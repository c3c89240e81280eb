"""Which rows each step learns from."""

from __future__ import annotations

import math

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

    @property
    def share(self) -> int:
        """Rows of a batch that are this worker's."""
        return self.end - self.first

    def ends(self, epochs: int) -> list[int]:
        """The steps with which each row has been seen once, twice and so on; the last may see first ones of the next
        pass, too."""
        return [math.ceil(len(self.rows) * epoch / self.batch_size) for epoch in range(1, epochs + 1)]

    def at(self, step: int, steps: int = 1) -> np.ndarray:
        """Rows of so many steps, of which the first is step 0, 1, ...: int64 [steps, share]."""
        start, stop, n = step * self.batch_size, (step + steps) * self.batch_size, len(self.rows)
        parts = [self._pass(p)[max(start - p * n, 0) : stop - p * n] for p in range(start // n, (stop - 1) // n + 1)]
        return np.concatenate(parts).reshape(steps, self.batch_size)[:, self.first : self.end]

    def _pass(self, number: int) -> np.ndarray:
        if number not in self._passes:
            # The one before may still be needed by a batch that lies over both.
            self._passes = {k: v for k, v in self._passes.items() if k == number - 1}
            self._passes[number] = np.random.default_rng([self.seed, number]).permutation(self.rows)
        return self._passes[number]
