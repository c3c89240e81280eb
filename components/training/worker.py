"""One training worker; torchrun starts as many as the job says. Rank 0 reports, logs and writes the bundles."""

import argparse
import contextlib
import ctypes
import functools
import gc
import hashlib
import itertools
import math
import os
import shutil
import sys
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel

from components.columns import open_columns
from components.normalization.spec import NormalizationSpec
from components.training import shared
from components.training.actions import find_actions
from components.training.algorithms.actor_critic import TD3Learner
from components.training.algorithms.build import build_learner, build_network
from components.training.algorithms.learner import Batch
from components.training.batches import Shuffled
from components.training.bundle import write_bundle
from components.training.checkpoint import load_checkpoint, save_checkpoint
from components.training.figures import Figures, Look, forget_after
from components.training.store import build_store, local_workers
from components.training.trainer import Trainer, missing_to_compile
from components.training.warm_start import IncompatibleError, start_from
from components.transitions import Lists, Transitions
from contracts.job import (
    C51,
    CQL,
    SAC,
    ActorCritic,
    Algorithm,
    BehaviourCloning,
    JobSpec,
    QLearning,
    SlateQ,
)
from contracts.stage import StageError, code_version

LOOK_STEPS, LOOK_ROWS = 50, 102_400
"""A look at how it goes comes after so many steps and rows, whichever is later: it costs as much as to learn from five
hundred rows."""
CHECKPOINTS, REFUSED = "checkpoints", "refused.txt"
CPU = torch.device("cpu")
LOOKING_AHEAD = QLearning | ActorCritic | SlateQ
"""What needs to know what followed a decision."""
PROBE, PROBE_PAIRS = 1024, 50_000
RUNAWAY = 3.0
"""Times what rewards can sum to: a value beyond it feeds on itself."""
RISING, RISEN = 10, 1000.0
"""Where nothing says what rewards can sum to: looks at each of which the loss was larger, and how many times in all."""


def rewards_to_learn_from(data: Transitions, spec: JobSpec) -> np.ndarray:
    """float32 [N]: the weighted metrics, clipped and scaled as the job says."""
    rewards = data.reward(spec.reward.metric_weights)
    if clip := spec.training.reward_clip:
        rewards = rewards.clip(clip.low, clip.high)
    return (rewards * spec.training.reward_scale).astype(np.float32)


def valued_by(spec: JobSpec) -> dict[str, Any]:
    """What values are of, by its names in a bundle's provenance."""
    clip = spec.training.reward_clip
    return {
        "metric_weights": spec.reward.metric_weights,
        "discount": spec.reward.discount,
        "discount_interval": spec.reward.discount_interval,
        "reward_clip": [clip.low, clip.high] if clip else None,
        "reward_scale": spec.training.reward_scale,
        **({"slate_choice": spec.slate.choice} if spec.slate else {}),
    }


def check_converges(score: float, spread: float, losses: list[float], most: float, step: int, advice: str) -> None:
    """Raise `StageError` when values have left all that the log's rewards could sum to, which `most` is.

    Of the values of logged actions `score` is the mean and `spread` the standard deviation: they may run both ways. A
    network's first scores are of the size of 1 whatever the rewards' unit is, and are no sign of anything. Where `most`
    is not known, the loss of each look tells, the last of `losses` being this one's: it may rise, but not without end.
    """
    loss, last = losses[-1], losses[-RISING - 1 :]
    rises = len(last) > RISING and all(a < b for a, b in itertools.pairwise(last)) and loss > RISEN * max(last[0], 1e-3)
    size = max(abs(score), spread)
    if math.isfinite(loss) and size <= RUNAWAY * max(most, 1.0) and not (rises and math.isinf(most)):
        return
    known = f", while the log's rewards can sum to {most:.3g} at most" if math.isfinite(most) else ""
    raise StageError(
        f"training diverges: at step {step:,} the values of the logged actions are {score:.3g} on average, with a "
        f"deviation of {spread:.3g}, and the loss is {loss:.3g}{known}. {advice}"
    )


def average_gradients(share: float, gradients: list[Tensor]) -> list[Tensor]:
    """Of the mean over the whole batch, of which this worker has `share`."""
    whole = torch.cat([gradient.flatten() for gradient in gradients]).mul_(share)
    dist.all_reduce(whole)
    parts = torch.split(whole, [gradient.numel() for gradient in gradients])
    return [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]


def work_together(trainer: Trainer, share: float, compiled: bool = False) -> None:
    """Let the trainer step by the whole batch's gradients, of which this worker has `share`."""
    if compiled:
        trainer.average = functools.partial(average_gradients, share)
    elif trainer.optimizer:
        # An actor that moves every few steps has no gradient in the others.
        delayed = isinstance(trainer.learner, TD3Learner)
        distributed = DistributedDataParallel(
            trainer.learner, forward_sync_buffers=False, find_unused_parameters=delayed
        )
        trainer.call = distributed
        # DDP takes the mean over workers, by which the rows of a smaller share would count for more. A hook would do
        # that, too, but Gloo's threads would then wait for Python's lock, which who ends the group may hold.
        trainer.counts = torch.tensor(share * dist.get_world_size(), device=next(trainer.learner.parameters()).device)


def leave_group() -> None:
    """End what `init_process_group` began."""
    # DDP refers to itself, and to the group: ended when that is found by chance, the group would wait for its threads
    # with Python's lock held.
    gc.collect()
    dist.destroy_process_group()


@record
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", required=True, help="JSON of the job's sections")
    parser.add_argument("--columns", required=True, help="directory of the training data, laid out")
    parser.add_argument("--normalization", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--warm-start", default="", help="directory of the policy bundle to begin with")
    arguments = parser.parse_args()
    spec = JobSpec.model_validate_json(Path(arguments.job).read_text())
    output = Path(arguments.output)
    refused = output / REFUSED
    # A worker that is lost is started again, and so is one that has refused: it would refuse again.
    if refused.exists():
        raise StageError(refused.read_text())
    device = device_of_worker() if spec.training.resources.gpus else CPU
    # NCCL wants a GPU for each worker.
    own = device.type == "cuda" and local_workers() <= torch.cuda.device_count()
    dist.init_process_group("nccl" if own else "gloo")
    # Not ended where a worker fails: the others' part in that would be waited for.
    places = (Path(arguments.columns), Path(arguments.normalization), output)
    try:
        run_worker(spec, *places, arguments.warm_start, device)
    except OtherFilesError:
        raise
    except StageError as error:
        refused.write_text(str(error))
        raise
    leave_group()


def device_of_worker() -> torch.device:
    """A GPU, where this machine has some, its own if they suffice."""
    # What cuBLAS needs to give the same numbers again.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if not torch.cuda.is_available():
        return CPU
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def be_deterministic(wanted: bool = True) -> None:
    """The same numbers from the same seed, by operators that give them."""
    torch.use_deterministic_algorithms(wanted)
    # Else all new memory is filled, to show who reads what was never written; that is 5 % of a small step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def peak(precision: str, size: int = 512, turns: int = 5) -> float:
    """Floating-point operations a second of this CPU in products of square matrices, the fastest of some turns."""
    a, b = torch.ones(2, size, size).to(getattr(torch, precision))
    best = 0.0
    for _ in range(turns):
        started = time.perf_counter()
        a @ b
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def keep_memory() -> None:
    """Let glibc keep what a step has freed: given back, it comes again page by page, for 1 to 5 % of a small step."""
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    # Not every libc has it.
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 256 << 20)


def run_worker(
    spec: JobSpec,
    columns: Path,
    normalization_dir: Path,
    output: Path,
    warm_start: str = "",
    device: torch.device = CPU,
) -> None:
    """Train `spec.training.epochs` epochs and write `epochs/NN`, `policy`, `losses.jsonl` and `tensorboard`.

    Workers that are started again, as many or not, go on after the step of the last checkpoint.
    """
    rank, workers = dist.get_rank(), dist.get_world_size()
    keep_memory()
    be_deterministic()
    torch.manual_seed(spec.seed)
    warnings: list[str] = []

    def warn(text: str) -> None:
        warnings.append(text)
        print(text, file=sys.stderr, flush=True)

    if spec.training.resources.gpus and device == CPU:
        warn(
            f"training.resources.gpus {spec.training.resources.gpus}: torch finds no GPU, and training takes the CPU; "
            "in a cluster, build the training image with the torch that CUDA needs"
        )
    # CPUs may lack instructions for it, or have ones that are slower than float32's.
    if spec.training.precision == "bfloat16" and device == CPU and (gain := peak("bfloat16") / peak("float32")) < 1:
        warn(
            f"training.precision: this CPU multiplies in bfloat16 {gain:.2g} times as fast as in float32, and steps "
            "take longer: leave it out"
        )
    if spec.training.compile and (missing := missing_to_compile()):
        raise StageError(f"training.compile: there is no {missing}: install it, or leave training.compile out")
    normalization = NormalizationSpec.read(normalization_dir / "spec.json")
    data, digest = open_columns(columns)
    algorithm = spec.algorithm
    rewards = rewards_to_learn_from(data, spec)
    actions = find_actions(data, spec, normalization_dir, warn)
    # Fixed atoms bound the values themselves; soft values hold entropy, too.
    bounded = isinstance(algorithm.config, BehaviourCloning | C51 | SAC)
    discounts = data.discount(spec.reward)
    # CQL lifts the values of logged actions, by up to alpha at each decision (Kumar et al. 2020, equation 3, solved for
    # a table).
    moved = algorithm.config.alpha if isinstance(algorithm.config, CQL) else 0.0
    most = math.inf if bounded else _most(data, discounts, rewards, moved)
    network = build_network(algorithm, normalization, actions).to(device)
    looks_ahead = algorithm.config.steps if isinstance(algorithm.config, QLearning) else 1
    everything = not isinstance(algorithm.config, LOOKING_AHEAD)
    store = build_store(data, network, rewards, discounts, looks_ahead, everything)
    usable = store.usable
    if len(usable) < spec.training.batch_size:
        raise StageError(
            f"training.batchSize {spec.training.batch_size}: only {len(usable)} transitions to learn from; "
            "lower it or log more"
        )
    learner = build_learner(algorithm, network).to(device)
    learner.compute_in(spec.training.precision)
    learner.expect(len(usable))
    trainer = Trainer(learner, algorithm.learning_rate, spec.training.compile)
    started_from = None
    if warm_start and trainer.optimizer:
        try:
            given = network, trainer.optimizer, normalization, actions, algorithm, valued_by(spec)
            started_from = start_from(warm_start, *given)
            learner.catch_up()
        except IncompatibleError:
            raise
        except StageError as error:
            warn(f"no warm start, training begins anew: {error}")
    elif warm_start:
        warn("no warm start: what counts each decision of this log begins anew")
    done = load_checkpoint(trainer, output / CHECKPOINTS)
    check_alike(trainer, done, device)
    shuffled = Shuffled(usable, spec.training.batch_size, spec.seed, rank, workers)
    steps, epochs = spec.training.steps_per_epoch, spec.training.epochs
    ends = [steps * epoch for epoch in range(1, epochs + 1)] if steps else shuffled.ends(epochs)
    epoch = bisect_right(ends, done)
    shared.share(shuffled.first, shuffled.end, spec.training.batch_size, lists=actions.described is not None)
    if workers > 1:
        work_together(trainer, shuffled.share / spec.training.batch_size, spec.training.compile)
    if rank == 0:
        _clear_up(output, done, epoch, epochs)
    probe = probe_rows(usable, data)
    provenance = {
        "seed": spec.seed,
        "code_version": code_version(),
        "data_digest": digest,
        "transitions": len(usable),
        "mdps": int(np.unique(data.mdp).size),
        "workers": workers,
        **valued_by(spec),
        "warm_start": started_from,
        "warnings": warnings,
    }
    with torch.no_grad():
        probed = store.batch(torch.from_numpy(probe))
    figures = None
    if rank == 0:
        if isinstance(algorithm.config, BehaviourCloning):
            # Its scores are no values.
            monte_carlo = np.full(len(probe), np.nan, np.float32)
        elif isinstance(algorithm.config, LOOKING_AHEAD):
            monte_carlo = data.returns(probe, rewards, discounts)
        else:
            monte_carlo = rewards[probe]
        figures = Figures(output, learner, probed, torch.from_numpy(monte_carlo).to(device), actions, first=done + 1)
    check = functools.partial(check_converges, most=most, advice=_remedy(algorithm))
    batches = store.batches(shuffled, done, ends[-1])
    kept = time.monotonic()

    def due() -> bool:
        return rank == 0 and time.monotonic() - kept >= spec.training.checkpoint_seconds

    for step in filter(None, learn(trainer, batches, done, ends, spec.training.batch_size, figures, check, due)):
        ended = step == ends[epoch]
        epoch += ended
        if rank:
            continue
        learner.settle()
        last = epoch == epochs
        for directory in [output / "epochs" / f"{epoch:03d}"] * ended + [output / "policy"] * last:
            write_bundle(
                directory, network, algorithm, normalization, actions, spec.export,
                provenance | {"epoch": epoch}, trainer.optimizer if last else None,
            )  # fmt: skip
        if figures:
            figures.board.flush()
        save_checkpoint(trainer, step, output / CHECKPOINTS)
        kept = time.monotonic()
    if figures:
        figures.close()


def learn(
    trainer: Trainer,
    batches: Iterator[Batch],
    done: int,
    ends: Sequence[int],
    batch_size: int,
    figures: Figures | None,
    check: Callable[..., None],
    due: Callable[[], bool] = lambda: False,
) -> Iterator[int]:
    """Take a step with each batch, and look at the figures now and then.

    Yields the step where training can go on from it, else 0: with the epochs' last steps, which `ends` are, and with a
    look after which it is `due`. `batch_size` is that of all workers together. `check` is told of each look, as
    `check_converges` is. Otherwise a look is taken when it has come, so that nothing waits for the device.
    """
    every = max(LOOK_STEPS, LOOK_ROWS // batch_size)
    recent: list[Tensor] = []
    losses: list[float] = []
    looks: deque[Look] = deque()
    epoch = bisect_right(ends, done)
    for step, batch in enumerate(batches, done + 1):
        watched, scores = trainer.step(batch)
        recent.append(watched)
        ended = step == ends[epoch]
        looked = ended or step % every == 0
        # Only with a look: the next one is then of the same steps after whichever of them training goes on.
        pause = ended or (looked and due())
        if looked:
            if figures:
                means = {"td_loss": torch.stack(recent).mean(), "reward": batch.reward.mean(), "q_mean": scores.mean()}
                looks.append(figures.look(step, epoch + 1, ended, means))
            recent.clear()
        while figures and looks and (pause or looks[0].is_here()):
            look = looks.popleft()
            seen = look.read()
            # A part of the loss that has run away may be none of what is watched.
            losses.append(seen["td_loss"] + 0 * seen["gradient_norm"])
            check(seen["q_mean"], seen["q_stddev"], losses, step=look.step)
            figures.write(look, ends[-1])
        epoch += ended
        yield step * pause


def probe_rows(usable: np.ndarray, data: Transitions) -> np.ndarray:
    """Rows from all over the log to look at, fewer where they have long lists to score."""
    pairs = 1.0
    if isinstance(data.possible, Lists):
        lengths = np.diff(data.possible.offsets)
        # What slates are found among is as wide as the longest list.
        pairs = lengths.mean() if data.chosen is None else lengths.max()
    size = min(PROBE, max(1, int(PROBE_PAIRS / pairs)), len(usable))
    return usable[np.linspace(0, len(usable) - 1, size).astype(int)]


def _remedy(algorithm: Algorithm) -> str:
    """What there is to know, and what helps."""
    if not isinstance(algorithm.config, LOOKING_AHEAD):
        return "Lower learningRate"
    others = {
        "cql": "raise alpha",
        "bcq": "choose cql",
        "iql": "choose td3Bc",
        "td3Bc": "lower alpha",
        "slateQ": "set nextSlate: logged",
    }
    learner = "choose iql or td3Bc" if isinstance(algorithm.config, ActorCritic) else "choose cql or bcq"
    return (
        "Values feed on themselves where the log has few of the actions that they make look best: lower learningRate "
        f"or targetUpdateRate, or {others.get(algorithm.name, learner)}"
    )


def _most(data: Transitions, discounts: np.ndarray, rewards: np.ndarray, moved: float = 0.0) -> float:
    """The largest size that a sum of the log's discounted rewards, each `moved` so far, could have, for an MDP without
    an end."""
    ahead = discounts[~(data.terminal | data.truncated)].max(initial=0.0)
    largest = float(np.abs(rewards).max()) + moved
    return largest / (1 - float(ahead)) if ahead < 1 else math.inf


class OtherFilesError(StageError):
    """Workers have read different files, which those that are started again need not."""


def check_alike(trainer: Trainer, done: int, device: torch.device) -> None:
    """Raise `OtherFilesError` when workers begin with different weights or steps: one has read what another has not.

    None goes on, and saves, before all have read.
    """
    # In the order of names: a file that is read gives its tensors in any.
    values = (value.cpu().numpy().tobytes() for _, value in sorted(trainer.state().items()))
    mine = torch.tensor([done, *hashlib.sha256(b"".join(values)).digest()], device=device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    if any(not torch.equal(one, mine) for one in found):
        raise OtherFilesError(
            f"workers begin after steps {', '.join(str(int(one[0])) for one in found)} with different weights: they "
            "do not see the same files; the volume must be shared and consistent"
        )


def _clear_up(output: Path, done: int, finished: int, epochs: int) -> None:
    """Take away what came after the steps that are done, and the epochs that are finished."""
    forget_after(output, done)
    # A checkpoint that was passed over must not be taken for the newest one later; drafts are those of a kill.
    beyond = [d for d in (output / CHECKPOINTS).glob("*") if d.name.startswith(".") or int(d.name) > done]
    broken_off = [d for d in (output / "epochs").glob("*") if int(d.name) > finished]
    for directory in beyond + broken_off + ([output / "policy"] if finished < epochs else []):
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
