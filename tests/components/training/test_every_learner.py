"""What holds of each learner: it goes on exactly where it was, and any number of workers learn the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, multiprocessing

from components.training import shared
from components.training.checkpoint import load_checkpoint, save_checkpoint
from components.training.trainer import Trainer
from components.training.worker import leave_group, work_together
from tests.components.training.every_learner import BATCH, LEARNERS, shuffled, store, take_steps, trainer

STEPS = 8


def learned(made: Trainer) -> dict[str, Tensor]:
    return {name: value for name, value in made.state().items() if name.startswith("learner.")}


@pytest.mark.parametrize(("kind", "algorithm"), LEARNERS, ids=str)
def test_training_goes_on_from_any_step_as_if_it_had_not_stopped(
    kind: str, algorithm: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    data, actions = store(kind)
    whole = trainer(actions, algorithm)
    take_steps(whole, data, shuffled(data), 0, STEPS)
    begun = trainer(actions, algorithm)
    take_steps(begun, data, shuffled(data), 0, 5)
    save_checkpoint(begun, 5, tmp_path)
    resumed = trainer(actions, algorithm, seed=9)
    take_steps(resumed, data, shuffled(data), load_checkpoint(resumed, tmp_path), STEPS)
    wanted, found = whole.state(), resumed.state()
    assert wanted.keys() == found.keys()
    assert [name for name, value in wanted.items() if not torch.equal(value, found[name])] == []


def learn_all(rank: int, workers: int, directory: str) -> None:
    """What so many workers learn by each, in one file each."""
    dist.init_process_group("gloo", init_method=f"file://{directory}/meet{workers}", rank=rank, world_size=workers)
    for i, (kind, algorithm) in enumerate(LEARNERS):
        weights = learn(kind, algorithm, rank, workers)
        if rank == 0:
            save_file(weights, f"{directory}/{i}-{workers}")
    leave_group()


def learn(kind: str, algorithm: dict[str, dict[str, Any]], rank: int, workers: int) -> dict[str, Tensor]:
    data, actions = store(kind)
    made, mine = trainer(actions, algorithm), shuffled(data, rank, workers)
    shared.share(mine.first, mine.end, BATCH, lists=actions.described is not None)
    if workers > 1:
        work_together(made, mine.share / BATCH)
    take_steps(made, data, mine, 0, STEPS)
    return {name: value.clone() for name, value in learned(made).items()}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("together")
    for workers in (1, 2):
        # Daemons: what hangs would be waited for once more when the tests end.
        multiprocessing.spawn(learn_all, (workers, str(directory)), nprocs=workers, daemon=True)
    return directory


@pytest.mark.parametrize("which", range(len(LEARNERS)), ids=[str(case) for case in LEARNERS])
def test_two_workers_learn_what_one_does(which: int, together: Path) -> None:
    one, two = (load_file(together / f"{which}-{workers}") for workers in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5, msg=lambda said, name=name: f"{name}: {said}")
