"""One training worker; torchrun starts as many as the job says. Rank 0 reports, logs and writes the bundles."""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from components.normalization.spec import NormalizationSpec
from components.training.bundle import build_network, read_bundle, write_bundle
from components.training.dqn import Batch, DQNTrainer
from components.training.network import QNetwork
from components.transitions import load_transitions
from contracts.job import JobSpec
from contracts.progress import report
from contracts.stage import StageError, code_version, digest_files

LOG_EVERY = 50
CHECKPOINT = "checkpoint.pt"


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


def start_from(directory: str, network: QNetwork, normalization: NormalizationSpec, actions: list[str]) -> str | None:
    """Give the network a bundle's weights and return that policy's digest; None, said aloud, where they do not fit."""
    try:
        bundle = read_bundle(directory)
        same = {
            "features": [(f.name, f.type) for f in bundle.normalization.features]
            == [(f.name, f.type) for f in normalization.features],
            "actions": bundle.actions == actions,
            "layers": [p.shape for p in bundle.network.parameters()] == [p.shape for p in network.parameters()],
        }
        for what, alike in same.items():
            if not alike:
                raise StageError(f"{directory}: its {what} are not this job's")
    except StageError as error:
        print(f"no warm start, training begins anew: {error}", file=sys.stderr, flush=True)
        return None
    # Buffers are left alone: they normalize, and are of this job's own data.
    with torch.no_grad():
        for ours, theirs in zip(network.parameters(), bundle.network.parameters(), strict=True):
            ours.copy_(theirs)
    print(f"warm start from policy {bundle.digest}", file=sys.stderr, flush=True)
    return bundle.digest


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
    usable = np.flatnonzero(~data.truncated)
    if len(usable) < spec.training.batch_size:
        raise StageError(
            f"training.batchSize {spec.training.batch_size}: only {len(usable)} transitions to learn from; "
            "lower it or log more"
        )
    state = torch.from_numpy(data.state)
    action = torch.from_numpy(data.action)
    reward = torch.from_numpy(data.reward(spec.reward.metric_weights))
    monte_carlo = torch.from_numpy(data.returns @ data.weight_vector(spec.reward.metric_weights))
    next_row = torch.from_numpy(data.next_row)
    possible = torch.from_numpy(data.possible)
    terminal = torch.from_numpy(data.terminal)
    discount = torch.from_numpy(data.discount(spec.reward))
    algorithm = spec.algorithm.dqn
    network = build_network(algorithm, normalization, len(spec.actions))
    started_from = start_from(warm_start, network, normalization, list(spec.actions)) if warm_start else None
    distributed = DistributedDataParallel(network, forward_sync_buffers=False)
    trainer = DQNTrainer(network, algorithm, distributed)
    per_epoch = spec.training.steps_per_epoch or len(usable) // spec.training.batch_size
    steps = per_epoch * spec.training.epochs
    batches = torch.from_numpy(
        permuted_batches(usable, spec.training.batch_size, steps, spec.seed, rank, workers).astype(np.int64)
    )
    distributed.register_comm_hook(batches.shape[1] / spec.training.batch_size, whole_batch_gradients)
    finished = _resume(trainer, output, rank, spec.training.epochs)
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
        rows = batches[step - 1]
        following = next_row[rows]
        batch = Batch(
            state=state[rows],
            action=action[rows],
            reward=reward[rows],
            next_state=state[following],
            next_possible=possible[following],
            terminal=terminal[rows],
            discount=discount[rows],
        )
        loss, q_mean = trainer.step(batch)
        recent.append(loss)
        if step % LOG_EVERY and step % per_epoch:
            continue
        if board and losses:
            td_loss = torch.stack(recent).mean().item()
            with torch.no_grad():
                q = network(state[probe])
            chosen = q.gather(1, action[probe].unsqueeze(1)).squeeze(1)
            mc_loss = (chosen - monte_carlo[probe]).abs().mean().item()
            epoch = (step - 1) // per_epoch + 1
            point = {"step": step, "epoch": epoch, "td_loss": td_loss, "mc_loss": mc_loss, "q_mean": q_mean.item()}
            losses.write(json.dumps(point) + "\n")
            for name in ("td_loss", "mc_loss", "q_mean"):
                board.add_scalar(name, point[name], step)
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
                    directory, network, algorithm, normalization, list(spec.actions), spec.export.temperature,
                    provenance | {"epoch": epoch}, trainer.optimizer if last else None,
                )  # fmt: skip
            _save(trainer, epoch, output)
    if board and losses:
        board.close()
        losses.close()


def _save(trainer: DQNTrainer, epoch: int, output: Path) -> None:
    """Keep what training needs to go on after an epoch."""
    state = {part: getattr(trainer, part).state_dict() for part in ("network", "target", "optimizer")}
    torch.save({"epoch": epoch} | state, output / f".{CHECKPOINT}")
    os.replace(output / f".{CHECKPOINT}", output / CHECKPOINT)


def _resume(trainer: DQNTrainer, output: Path, rank: int, epochs: int) -> int:
    """Take training up where other workers left it; returns how many epochs are finished."""
    path = output / CHECKPOINT
    state = torch.load(path, weights_only=True) if path.exists() else {"epoch": 0}
    finished: int = state["epoch"]
    for part in state.keys() - {"epoch"}:
        getattr(trainer, part).load_state_dict(state[part])
    # No worker may save before all have read.
    dist.barrier()
    if rank == 0:
        losses = output / "losses.jsonl"
        lines = losses.read_text().splitlines(keepends=True) if losses.exists() else []
        losses.write_text("".join(line for line in lines if _epoch(line) <= finished))
        broken_off = [d for d in (output / "epochs").glob("*") if int(d.name) > finished]
        for directory in broken_off + ([output / "policy"] if finished < epochs else []):
            shutil.rmtree(directory, ignore_errors=True)
    return finished


def _epoch(line: str) -> float:
    try:
        return float(json.loads(line)["epoch"])
    except ValueError:
        return float("inf")  # cut off while it was written


if __name__ == "__main__":
    main()
