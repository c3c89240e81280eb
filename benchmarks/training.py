"""How many transitions a second double DQN learns from: ours, by hand, and in other libraries.

    export PYTHONPATH=.
    python benchmarks/training.py --features 4 300 --batch 256 1024 4096 --repeats 20
    python benchmarks/training.py --against d3rlpy tianshou torchrl --python .venv-bench/bin/python

All have two hidden layers of 256 and Adam on the same rows. Ours is what a training worker does: it samples its batches
by a permutation, from memory or from files that are mapped, looks at its figures and writes them to a file and to
TensorBoard now and then, and keeps a checkpoint after each 400,000 transitions; the step by hand, the shortest eager
one in float32, has its batches ready. They take short turns, and many: what else the machine does then falls on all
alike. Printed are the median of transitions a second, the ratio to the step by hand of the same turn (median and
quartiles), and the share of what a multiplication of large matrices reaches here in the same precision.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from components.normalization.graph import NormalizationGraph
from components.normalization.spec import FeatureNormalization, NormalizationSpec
from components.training.actions import Actions
from components.training.algorithms.build import build_learner, build_network
from components.training.batches import Shuffled
from components.training.checkpoint import save_checkpoint
from components.training.figures import Figures
from components.training.store import Store
from components.training.trainer import Trainer
from components.training.worker import (
    PROBE,
    be_deterministic,
    check_converges,
    keep_memory,
    learn,
    peak,
)
from contracts.job import DQN, Algorithm

ROWS, HIDDEN, SECONDS, EPOCH = 100_000, 256, 0.5, 400_000
WAYS = {
    precision + (", compiled" if compiled else ""): (precision, compiled)
    for precision, compiled in itertools.product(("float32", "bfloat16"), (False, True))
}
EMULATED = 0.2
"""Times as fast as float32: what is slower has no instructions, and would take the time that the others need."""
Step = Callable[[], object]


def write_data(features: int, directory: Path) -> None:
    """Rows of episodes of about 50 decisions, as `benchmarks/training_others.py` reads them."""
    rng = np.random.default_rng(0)
    np.save(directory / "state.npy", rng.normal(size=(ROWS, features)).astype(np.float32))
    np.save(directory / "action.npy", rng.integers(2, size=ROWS))
    np.save(directory / "reward.npy", rng.normal(size=ROWS).astype(np.float32))
    np.save(directory / "terminal.npy", rng.random(ROWS) < 0.02)


def store(directory: Path) -> Store:
    state, action, reward, ends = (
        torch.from_numpy(np.load(directory / f"{name}.npy")) for name in ("state", "action", "reward", "terminal")
    )
    rows = torch.arange(ROWS)
    following = torch.where(ends, rows, (rows + 1).clamp(max=ROWS - 1))
    return Store(state, action, None, reward, following, torch.where(ends, 0.0, 0.99), np.arange(ROWS))


def on_disk(data: Store, features: int, directory: Path) -> Store:
    """The same, its states mapped and normalized as they are needed."""
    mapped = torch.from_numpy(np.load(directory / "state.npy", mmap_mode="c"))
    return replace(data, state=mapped, graph=NormalizationGraph(normalization(features)))


def normalization(features: int) -> NormalizationSpec:
    columns = [
        FeatureNormalization(name=f"f{i}", type="continuous", mean=0.0, stddev=1.0, how="by hand", evidence={})
        for i in range(features)
    ]
    return NormalizationSpec(inputs=[column.name for column in columns], features=columns)


def ours(data: Store, features: int, batch: int, precision: str, compiled: bool, directory: Path) -> Step:
    """Double DQN on two actions in a training worker's loop, a step at a time."""
    algorithm = Algorithm(dqn=DQN(hiddenLayers=[HIDDEN, HIDDEN], dueling=False))
    actions = Actions(["first", "second"])
    return worker(data, algorithm, normalization(features), actions, batch, directory, precision, compiled)


def worker(
    data: Store, algorithm: Algorithm, states: NormalizationSpec, actions: Actions, batch: int, directory: Path,
    precision: str = "float32", compiled: bool = False,
) -> Step:  # fmt: skip
    """A training worker's loop, a step at a time."""
    torch.manual_seed(0)
    network = build_network(algorithm, states, actions)
    learner = build_learner(algorithm, network)
    learner.compute_in(precision)
    trainer = Trainer(learner, algorithm.learning_rate, compiled)
    probe = torch.arange(PROBE)
    directory.mkdir()
    figures = Figures(directory, learner, data.batch(probe), torch.zeros(PROBE), actions)
    endless = 1 << 40
    batches = data.batches(Shuffled(data.usable, batch, 0), 0, endless)
    ends = range(EPOCH // batch, endless + 1, EPOCH // batch)
    check = functools.partial(check_converges, most=math.inf, advice="")
    steps = learn(trainer, batches, 0, ends, batch, figures, check)

    def step() -> None:
        be_deterministic()
        if done := next(steps):
            save_checkpoint(trainer, done, directory / "checkpoints")

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
        be_deterministic(False)
        nonlocal at
        b = batches[at % len(batches)]
        at += 1
        with torch.no_grad():
            best = q(b.next_state).argmax(1, keepdim=True)
            wanted = b.reward + b.discount * slow(b.next_state).gather(1, best).squeeze(1)
        loss = nn.functional.smooth_l1_loss(q(b.state).gather(1, b.action.unsqueeze(1)).squeeze(1), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(*pairs, 0.005)

    return step


def rate(step: Step, batch: int) -> float:
    """Transitions a second in a turn, after what another one left in the caches."""
    for _ in range(2):
        step()
    started, done = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < SECONDS:
        step()
        done += batch
    return done / passed


def work(features: int) -> int:
    """Floating-point operations for a transition: three forward passes, and a backward one without the input's part."""
    weights = features * HIDDEN + HIDDEN * HIDDEN + HIDDEN * 2
    return 2 * (weights * 5 - features * HIDDEN)


@contextmanager
def other(library: str, python: str, directory: Path, batch: int) -> Iterator[Callable[[], float]]:
    """A process that measures another library whenever it is asked, and waits meanwhile."""
    command = [python, "benchmarks/training_others.py", library, str(directory), "--batch", str(batch)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        words, lines = process.stdin, process.stdout
        assert words is not None
        assert lines is not None

        def ask() -> float:
            words.write("\n")
            words.flush()
            return next(float(line.split()[1]) for line in lines if line.startswith("rate "))

        if not any(line.startswith("ready") for line in lines):
            raise SystemExit(f"{library} ended before it began: see above")
        yield ask
        words.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, nargs="+", default=[4, 300])
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--repeats", type=int, default=20, help="turns of each")
    parser.add_argument("--against", nargs="*", default=[], help="d3rlpy, tianshou, torchrl")
    parser.add_argument("--python", default="python", help="of the environment that has them")
    arguments = parser.parse_args()
    keep_memory()
    fastest = {precision: peak(precision, 2048, 10) for precision in dict.fromkeys(how[0] for how in WAYS.values())}
    peaks = ", ".join(f"{value / 1e9:.0f} GFLOP/s in {precision}" for precision, value in fastest.items())
    print(f"{torch.get_num_threads()} threads, {peaks}")
    ways = {way: how for way, how in WAYS.items() if fastest[how[0]] > EMULATED * fastest["float32"]}
    for features, batch in itertools.product(arguments.features, arguments.batch):
        # Of one function torch holds no more than some compiled.
        torch.compiler.reset()
        with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
            write_data(features, directory := Path(name))
            data = store(directory)
            steps = {"by hand": by_hand(data, features, batch)}
            steps |= {way: ours(data, features, batch, *how, directory / way) for way, how in ways.items()}
            mapped = on_disk(data, features, directory)
            steps["on disk"] = ours(mapped, features, batch, "float32", False, directory / "on disk")
            measures = {name: functools.partial(rate, step, batch) for name, step in steps.items()} | {
                library: stack.enter_context(other(library, arguments.python, directory, batch))
                for library in arguments.against
            }
            for measure in measures.values():
                measure()
            turns = [{name: measure() for name, measure in measures.items()} for _ in range(arguments.repeats)]
        print(f"  {features} features, batch {batch:,}")
        for name in measures:
            own = fastest[WAYS[name][0] if name in WAYS else "float32"]
            found, ratios = [turn[name] for turn in turns], [turn[name] / turn["by hand"] for turn in turns]
            (low, ratio, high), median = np.quantile(ratios, (0.25, 0.5, 0.75)), statistics.median(found)
            print(
                f"    {name:18} {median:10,.0f} a second, {ratio:.2f} [{low:.2f}, {high:.2f}] times, "
                f"{median * work(features) / own:.0%} of its precision's peak",
                flush=True,
            )


if __name__ == "__main__":
    main()
