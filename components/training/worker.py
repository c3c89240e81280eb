"""One training worker; torchrun starts as many as the job says. Rank 0 reports, logs and writes the bundles."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from components.normalization.spec import NormalizationSpec
from components.training.bundle import build_network, write_bundle
from components.training.dqn import Batch, DQNTrainer
from components.transitions import load_transitions
from contracts.job import JobSpec
from contracts.progress import report
from contracts.stage import StageError, code_version, digest_files

LOG_EVERY = 50


def permuted_batches(rows: np.ndarray, batch_size: int, steps: int, seed: int, rank: int, workers: int) -> np.ndarray:
    """This worker's share of every global batch, int64 [steps, batch_size / workers].

    All workers draw the same seeded permutations of the rows, one after another, and cut each global batch alike: in
    a pass no row is seen twice and none is left out.
    """
    generator = np.random.default_rng(seed)
    passes = -(-steps * batch_size // len(rows))
    stream = np.concatenate([generator.permutation(rows) for _ in range(passes)])[: steps * batch_size]
    share = batch_size // workers
    return stream.reshape(steps, batch_size)[:, rank * share : (rank + 1) * share]


@record
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", required=True, help="JSON of the job's sections")
    parser.add_argument("--features", required=True)
    parser.add_argument("--normalization", required=True)
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    try:
        run_worker(
            JobSpec.model_validate_json(Path(arguments.job).read_text()),
            Path(arguments.features),
            Path(arguments.normalization),
            Path(arguments.output),
        )
    finally:
        dist.destroy_process_group()


def run_worker(spec: JobSpec, features: Path, normalization_dir: Path, output: Path) -> None:
    """Train `spec.training.epochs` epochs and write `epochs/NN`, `policy`, `losses.jsonl` and `tensorboard`."""
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
    algorithm = spec.algorithm.dqn
    network = build_network(algorithm, normalization, len(spec.actions))
    distributed = DistributedDataParallel(network, forward_sync_buffers=False)
    trainer = DQNTrainer(network, algorithm, spec.reward.discount, distributed)
    per_epoch = spec.training.steps_per_epoch or len(usable) // spec.training.batch_size
    steps = per_epoch * spec.training.epochs
    batches = torch.from_numpy(
        permuted_batches(usable, spec.training.batch_size, steps, spec.seed, rank, workers).astype(np.int64)
    )
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
    }
    board = SummaryWriter(output / "tensorboard") if rank == 0 else None
    losses = (output / "losses.jsonl").open("w", buffering=1) if rank == 0 else None
    recent: list[torch.Tensor] = []
    for step in range(1, steps + 1):
        rows = batches[step - 1]
        following = next_row[rows]
        loss, q_mean = trainer.step(
            Batch(state[rows], action[rows], reward[rows], state[following], possible[following], terminal[rows])
        )
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
    if board and losses:
        board.close()
        losses.close()


if __name__ == "__main__":
    main()
