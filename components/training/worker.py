"""One training worker; torchrun starts as many as the job says. Rank 0 reports, logs and writes the bundles."""

import argparse
import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from components.normalization.spec import NormalizationSpec
from components.training.batches import permuted_batches
from components.training.bundle import write_bundle
from components.training.checkpoint import load_checkpoint, save_checkpoint
from components.training.learners import build_learner, build_network
from components.training.store import build_store
from components.training.trainer import Trainer
from components.training.warm_start import start_from
from components.transitions import Transitions, load_transitions
from contracts.job import C51, BehaviourCloning, JobSpec, LearnerConfig, QLearning
from contracts.progress import report
from contracts.stage import StageError, code_version, digest_files

LOG_EVERY = 50
CHECKPOINTS = "checkpoints"
RUNAWAY = 3.0
"""Times what rewards can sum to: a value beyond it feeds on itself."""


def check_fits(data: Transitions, algorithm: LearnerConfig) -> None:
    """Raise `StageError` for a log that the algorithm cannot learn from."""
    taken = np.bincount(data.action, minlength=len(data.actions))
    if (taken > 0).sum() == 1:
        only = data.actions[int(taken.argmax())]
        raise StageError(
            f"actions: the log takes only {only!r} of {', '.join(data.actions)}: nothing tells what another would "
            "have brought; log some exploration"
        )
    if isinstance(algorithm, QLearning) and not (~data.truncated).any():
        raise StageError(
            "training: no transition is left, for what followed is not known of any; see data.lastStep and the "
            "timeline's report"
        )


def check_converges(score: float, loss: float, most: float, step: int) -> None:
    """Raise `StageError` when values have left all that the log's rewards could sum to, which `most` is.

    A network's first scores are of the size of 1 whatever the rewards' unit is, and are no sign of anything.
    """
    if math.isfinite(loss) and abs(score) <= RUNAWAY * max(most, 1.0):
        return
    raise StageError(
        f"training diverges: at step {step:,} the mean value of the logged actions is {score:.3g} and the loss "
        f"{loss:.3g}, while the log's rewards can sum to {most:.3g} at most. Values feed on themselves where the log "
        "has few of the actions that they make look best: lower learningRate or targetUpdateRate, keep double, or "
        "choose cql or bcq"
    )


def whole_batch_gradients(share: float, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """DDP hook: the gradient of the mean over the global batch, of which this worker has `share`.

    DDP's own mean over workers would let the rows of a smaller share count for more. DDP also reads the annotations,
    which must therefore not be strings.
    """
    summed = dist.all_reduce(bucket.buffer().mul_(share), async_op=True)
    assert summed is not None
    return summed.get_future().then(lambda done: done.value()[0])


@record
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", required=True, help="JSON of the job's sections")
    parser.add_argument("--features", required=True)
    parser.add_argument("--normalization", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--warm-start", default="", help="directory of the policy bundle to begin with")
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    try:
        run_worker(
            JobSpec.model_validate_json(Path(arguments.job).read_text()),
            Path(arguments.features),
            Path(arguments.normalization),
            Path(arguments.output),
            arguments.warm_start,
        )
    finally:
        dist.destroy_process_group()


def run_worker(spec: JobSpec, features: Path, normalization_dir: Path, output: Path, warm_start: str = "") -> None:
    """Train `spec.training.epochs` epochs and write `epochs/NN`, `policy`, `losses.jsonl` and `tensorboard`.

    Workers that are started again, as many or not, go on after the last epoch that was finished.
    """
    rank, workers = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(spec.seed)
    normalization = NormalizationSpec.read(normalization_dir / "spec.json")
    data, _ = load_transitions(features, spec).split(spec)
    algorithm = spec.algorithm
    check_fits(data, algorithm.config)
    # Fixed atoms bound the values themselves.
    bounded = not isinstance(algorithm.config, QLearning) or isinstance(algorithm.config, C51)
    most = math.inf if bounded else _most(data, spec)
    monte_carlo = torch.from_numpy(data.returns @ data.weight_vector(spec.reward.metric_weights))
    network = build_network(algorithm, normalization, len(spec.actions))
    looks_ahead = algorithm.config.steps if isinstance(algorithm.config, QLearning) else 1
    everything = isinstance(algorithm.config, BehaviourCloning)
    store = build_store(data, network.normalization, spec.reward, looks_ahead, everything)
    usable = store.usable
    if len(usable) < spec.training.batch_size:
        raise StageError(
            f"training.batchSize {spec.training.batch_size}: only {len(usable)} transitions to learn from; "
            "lower it or log more"
        )
    learner = build_learner(algorithm, network)
    learner.compute_in(spec.training.precision)
    trainer = Trainer(learner, algorithm.config.learning_rate)
    started_from = None
    if warm_start:
        started_from = start_from(warm_start, network, trainer.optimizer, normalization, list(spec.actions))
        learner.catch_up()
    finished = load_checkpoint(trainer, output / CHECKPOINTS)
    check_alike(trainer, finished)
    distributed = DistributedDataParallel(learner, forward_sync_buffers=False)
    trainer.call = distributed
    per_epoch = spec.training.steps_per_epoch or len(usable) // spec.training.batch_size
    steps = per_epoch * spec.training.epochs
    batches = torch.from_numpy(
        permuted_batches(usable, spec.training.batch_size, steps, spec.seed, rank, workers).astype(np.int64)
    )
    distributed.register_comm_hook(batches.shape[1] / spec.training.batch_size, whole_batch_gradients)
    _clear_up(output, rank, finished, spec.training.epochs)
    probe = torch.from_numpy(usable[np.linspace(0, len(usable) - 1, min(4096, len(usable))).astype(int)])
    provenance = {
        "seed": spec.seed,
        "code_version": code_version(),
        "data_digest": digest_files(features / "training"),
        "transitions": len(usable),
        "mdps": int(np.unique(data.mdp).size),
        "workers": workers,
        "metric_weights": spec.reward.metric_weights,
        "discount": spec.reward.discount,
        "discount_interval": spec.reward.discount_interval,
        "warm_start": started_from,
    }
    board = SummaryWriter(output / "tensorboard") if rank == 0 else None
    losses = (output / "losses.jsonl").open("a", buffering=1) if rank == 0 else None
    recent: list[torch.Tensor] = []
    for step in range(finished * per_epoch + 1, steps + 1):
        loss, q_mean = trainer.step(store.batch(batches[step - 1]))
        recent.append(loss)
        if step % LOG_EVERY and step % per_epoch:
            continue
        if board and losses:
            td_loss = torch.stack(recent).mean().item()
            check_converges(q_mean.item(), td_loss, most, step)
            network.eval()
            with torch.no_grad():
                q = learner.values(store.state[probe])
            network.train()
            chosen = q.gather(1, store.action[probe].unsqueeze(1)).squeeze(1)
            mc_loss = (chosen - monte_carlo[probe]).abs().mean().item()
            epoch = (step - 1) // per_epoch + 1
            gradients = [p.grad for p in learner.parameters() if p.grad is not None]
            figures = {
                "td_loss": td_loss,
                "mc_loss": mc_loss,
                "q_mean": q_mean.item(),
                "q_stddev": chosen.std().item(),
                "q_maximum": q.max().item(),
                "gradient_norm": torch.nn.utils.get_total_norm(gradients).item(),
            }
            losses.write(json.dumps({"step": step, "epoch": epoch} | figures) + "\n")
            for name, figure in figures.items():
                board.add_scalar(name, figure, step)
            if step % per_epoch == 0:
                frequencies = torch.bincount(q.argmax(1), minlength=len(spec.actions)) / len(probe)
                for name, frequency in zip(spec.actions, frequencies.tolist(), strict=True):
                    board.add_scalar(f"greedy_action/{name}", frequency, step)
            report(step, steps, f"epoch {epoch} td_loss {td_loss:.3f} mc_loss {mc_loss:.2f}")
        recent.clear()
        if step % per_epoch == 0 and rank == 0:
            epoch = step // per_epoch
            last = epoch == spec.training.epochs
            for directory in [output / "epochs" / f"{epoch:03d}"] + ([output / "policy"] if last else []):
                write_bundle(
                    directory, network, algorithm, normalization, list(spec.actions), spec.export,
                    provenance | {"epoch": epoch}, trainer.optimizer if last else None,
                )  # fmt: skip
            save_checkpoint(trainer, epoch, output / CHECKPOINTS)
    if board and losses:
        board.close()
        losses.close()


def _most(data: Transitions, spec: JobSpec) -> float:
    """The largest size that a sum of the log's discounted rewards could have, for an MDP without an end."""
    ahead = data.discount(spec.reward)[~(data.terminal | data.truncated)].max(initial=0.0)
    largest = float(np.abs(data.reward(spec.reward.metric_weights)).max())
    return largest / (1 - float(ahead)) if ahead < 1 else math.inf


def check_alike(trainer: Trainer, finished: int) -> None:
    """Raise `StageError` when workers begin with different weights or epochs: one has read what another has not.

    None goes on, and saves, before all have read.
    """
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in trainer.state().values())).hexdigest()
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (finished, digest))
    if len(set(found)) > 1:
        raise StageError(
            f"workers begin after epochs {', '.join(str(epoch) for epoch, _ in found)} with different weights: they do "
            "not see the same files; the volume must be shared and consistent"
        )


def _clear_up(output: Path, rank: int, finished: int, epochs: int) -> None:
    """Take away what came after the epochs that are finished."""
    if rank == 0:
        losses = output / "losses.jsonl"
        lines = losses.read_text().splitlines(keepends=True) if losses.exists() else []
        losses.write_text("".join(line for line in lines if _epoch(line) <= finished))
        broken_off = [d for d in (output / "epochs").glob("*") if int(d.name) > finished]
        for directory in broken_off + ([output / "policy"] if finished < epochs else []):
            shutil.rmtree(directory, ignore_errors=True)


def _epoch(line: str) -> float:
    try:
        return float(json.loads(line)["epoch"])
    except ValueError:
        return float("inf")  # cut off while it was written


if __name__ == "__main__":
    main()
