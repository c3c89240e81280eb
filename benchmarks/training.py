"""How many transitions a second double DQN learns from, next to a hand-written eager torch step over sampled batches.

    export PYTHONPATH=.
    python benchmarks/training.py --features 4 300 --batch 256 1024 4096 --repeats 3

Both have two hidden layers of 256 and Adam on the same rows, by hand in float32. Ours samples its batches from the
store by a permutation; the hand-written step has them ready. They take turns. Printed are transitions a second, the
ratio of the same turn (median and range), and the share of the float32 peak that a multiplication of large matrices
reaches here.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from components.normalization.spec import FeatureNormalization, NormalizationSpec
from components.training.actions import Actions
from components.training.algorithms.build import build_learner, build_network
from components.training.batches import Shuffled
from components.training.store import Store
from components.training.trainer import Trainer
from contracts.job import DQN, Algorithm

ROWS, HIDDEN, SECONDS, LOOK_EVERY = 100_000, 256, 3.0, 50
PRECISIONS = ("float32", "bfloat16")
Step = Callable[[], object]


def store(features: int) -> Store:
    generator = torch.Generator().manual_seed(0)
    ends = torch.rand(ROWS, generator=generator) < 0.02
    rows = torch.arange(ROWS)
    return Store(
        state=torch.randn(ROWS, features, generator=generator),
        action=torch.randint(2, (ROWS,), generator=generator),
        possible=None,
        reward=torch.randn(ROWS, generator=generator),
        next_row=torch.where(ends, rows, (rows + 1).clamp(max=ROWS - 1)),
        terminal=ends,
        discount=torch.full((ROWS,), 0.99),
        usable=np.arange(ROWS),
    )


def ours(data: Store, features: int, batch: int, precision: str) -> Step:
    """Sampling, the step, and a loss that is read now and then, as a training worker does."""
    columns = [
        FeatureNormalization(name=f"f{i}", type="continuous", mean=0.0, stddev=1.0, how="by hand", evidence={})
        for i in range(features)
    ]
    spec = NormalizationSpec(inputs=[column.name for column in columns], features=columns)
    algorithm = Algorithm(dqn=DQN(hiddenLayers=[HIDDEN, HIDDEN], dueling=False))
    torch.manual_seed(0)
    network = build_network(algorithm, spec, Actions(["first", "second"]))
    learner = build_learner(algorithm, network)
    learner.compute_in(precision)
    trainer = Trainer(learner, algorithm.learning_rate)
    shuffled, steps = Shuffled(data.usable, batch, 0), itertools.count()
    losses: list[Tensor] = []

    def step() -> None:
        losses.append(trainer.step(data.batch(torch.from_numpy(shuffled.at(next(steps)))))[0])
        if len(losses) == LOOK_EVERY:
            torch.stack(losses).mean().item()
            losses.clear()

    return step


def by_hand(data: Store, features: int, batch: int) -> Step:
    """The shortest eager step that does the same, on batches that are sampled already."""
    torch.manual_seed(0)

    def network() -> nn.Sequential:
        layers = (features, HIDDEN, HIDDEN)
        parts = [part for a, b in itertools.pairwise(layers) for part in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*parts, nn.Linear(HIDDEN, 2))

    q, slow = network(), network().requires_grad_(False)
    optimizer = torch.optim.Adam(q.parameters(), fused=True)
    pairs = list(slow.parameters()), list(q.parameters())
    rows = torch.from_numpy(np.random.default_rng(0).integers(ROWS, size=(64, batch)))
    batches = [data.batch(each) for each in rows]
    at = 0

    def step() -> None:
        nonlocal at
        b = batches[at % len(batches)]
        at += 1
        with torch.no_grad():
            best = q(b.next_state).argmax(1, keepdim=True)
            wanted = b.reward + b.discount * ~b.terminal * slow(b.next_state).gather(1, best).squeeze(1)
        loss = nn.functional.smooth_l1_loss(q(b.state).gather(1, b.action.unsqueeze(1)).squeeze(1), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(*pairs, 0.005)

    return step


def rate(step: Step, batch: int) -> float:
    """Transitions a second over some seconds, after a warm-up."""
    for _ in range(20):
        step()
    started, done = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < SECONDS:
        step()
        done += batch
    return done / passed


def peak() -> float:
    """Floating-point operations a second of a large multiplication."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = 0.0
    for _ in range(10):
        started = time.perf_counter()
        a @ b
        best = max(best, 2 * 2048**3 / (time.perf_counter() - started))
    return best


def work(features: int) -> int:
    """Floating-point operations for a transition: three forward passes, and a backward pass of twice one."""
    weights = features * HIDDEN + HIDDEN * HIDDEN + HIDDEN * 2
    return 2 * weights * 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, nargs="+", default=[4, 300])
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    fastest = peak()
    print(f"{torch.get_num_threads()} threads, {fastest / 1e9:.0f} GFLOP/s")
    for features in arguments.features:
        data = store(features)
        for batch in arguments.batch:
            pairs = []
            for _ in range(arguments.repeats):
                steps = [ours(data, features, batch, precision) for precision in PRECISIONS]
                pairs.append([rate(step, batch) for step in (by_hand(data, features, batch), *steps)])
            hand = statistics.median(each[0] for each in pairs)
            print(f"  {features} features, batch {batch:,}: by hand {hand:,.0f} a second")
            for i, precision in enumerate(PRECISIONS, 1):
                mine, ratios = statistics.median(each[i] for each in pairs), [each[i] / each[0] for each in pairs]
                print(
                    f"    {precision:8} {mine:10,.0f} a second, {statistics.median(ratios):.2f} "
                    f"[{min(ratios):.2f}, {max(ratios):.2f}] times, {mine * work(features) / fastest:.0%} of the peak",
                    flush=True,
                )


if __name__ == "__main__":
    main()
