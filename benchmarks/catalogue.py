"""How many decisions a second a double DQN learns from whose actions are items of a catalogue of millions.

    export PYTHONPATH=.
    python benchmarks/catalogue.py --items 2000000 --features 16 --longest 200

Each decision lists some of the items, from two to one less than `longest`, and lists lie end to end: their lengths cost
nothing but their items. The loop is a training worker's, as in `benchmarks/training.py`. Printed are the median over
turns of transitions a second, its least and most, the pairs of a state and an item that are scored for them, which are
the next state's list in two networks, and the most memory.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.training import normalization, rate, worker
from components.training.actions import Actions
from components.training.store import Offers, Store
from components.training.worker import keep_memory
from contracts.job import DQN, Algorithm

ROWS, STATE, HIDDEN, BATCH = 100_000, 16, 64, 256


def store(items: int, features: int, longest: int) -> Store:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, longest, ROWS)
    offsets = np.concatenate([[0], lengths.cumsum()])
    listed = torch.from_numpy(rng.integers(items, size=offsets[-1]))
    offers = Offers(torch.from_numpy(_normal(rng, items, features)), listed, torch.from_numpy(offsets))
    ends = rng.random(ROWS) < 0.02
    rows = np.arange(ROWS)
    following = np.where(ends, rows, np.minimum(rows + 1, ROWS - 1))
    return Store(
        state=torch.from_numpy(_normal(rng, ROWS, STATE)),
        action=torch.from_numpy(rng.integers(lengths)),
        possible=offers,
        reward=torch.from_numpy(rng.standard_normal(ROWS, dtype=np.float32)),
        next_row=torch.from_numpy(following),
        discount=torch.from_numpy(np.where(ends, np.float32(0), np.float32(0.99))),
        usable=rows,
    )


def _normal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return rng.standard_normal((rows, columns), dtype=np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=2_000_000)
    parser.add_argument("--features", type=int, default=16, help="of an item")
    parser.add_argument("--longest", type=int, default=200, help="list, which none reaches")
    parser.add_argument("--repeats", type=int, default=20, help="turns")
    arguments = parser.parse_args()
    keep_memory()
    data = store(arguments.items, arguments.features, arguments.longest)
    actions = Actions([], described=normalization(arguments.features))
    algorithm = Algorithm(dqn=DQN(hiddenLayers=[HIDDEN, HIDDEN], dueling=False))
    with tempfile.TemporaryDirectory() as name:
        step = worker(data, algorithm, normalization(STATE), actions, BATCH, Path(name) / "ours")
        rate(step, BATCH)
        rates = sorted(rate(step, BATCH) for _ in range(arguments.repeats))
    median, listed = statistics.median(rates), (arguments.longest + 1) / 2
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{arguments.items:,} items of {arguments.features} features, {listed:g} listed on average: {median:,.0f} "
        f"[{rates[0]:,.0f}, {rates[-1]:,.0f}] transitions a second, {2 * median * listed:,.0f} pairs, {most:.2f} GiB"
    )


if __name__ == "__main__":
    main()
