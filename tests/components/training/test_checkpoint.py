"""A checkpoint brings back all that training needs, or is passed over for the one before."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from components.training.algorithms.learner import Batch
from components.training.algorithms.values import DQNLearner
from components.training.checkpoint import DESCRIPTION, load_checkpoint, save_checkpoint
from components.training.network import QNetwork
from components.training.trainer import Trainer
from contracts.job import DQN


def trainer(seed: int = 0, width: int = 8) -> Trainer:
    """Of a noisy network, so that what comes next depends on random numbers too."""
    torch.manual_seed(seed)
    return Trainer(DQNLearner(QNetwork(3, 2, [width], noisy=True), DQN()), 0.01)


def learn(made: Trainer, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        state, following = (torch.randn(16, 3, generator=generator) for _ in range(2))
        action = torch.randint(2, (16,), generator=generator)
        ones = torch.ones(16)
        made.step(Batch(state, action, None, ones, following, action, None, 0.9 * ones))


def same(one: Trainer, other: Trainer) -> bool:
    a, b = one.state(), other.state()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    made = trainer()
    learn(made, 5)
    save_checkpoint(made, 1, tmp_path)
    learn(made, 5)
    again = trainer(seed=9)
    assert load_checkpoint(again, tmp_path) == 1
    learn(again, 5)
    assert same(made, again)


def test_without_one_training_begins(tmp_path: Path) -> None:
    made, untouched = trainer(), trainer()
    assert load_checkpoint(made, tmp_path / "none") == 0
    assert same(made, untouched)


@pytest.fixture
def three(tmp_path: Path) -> tuple[Path, list[Trainer]]:
    """Checkpoints after three steps, and what they were of."""
    made = []
    for step in (1, 2, 3):
        made.append(trainer(seed=step))
        learn(made[-1], step)
        save_checkpoint(made[-1], step, tmp_path)
    return tmp_path, made


def test_the_last_two_are_kept(three: tuple[Path, list[Trainer]]) -> None:
    assert sorted(path.name for path in three[0].iterdir()) == ["000000000002", "000000000003"]


def weights(directory: Path) -> Path:
    (path,) = directory.glob("*.safetensors")
    return path


def torn(directory: Path) -> None:
    weights(directory).write_bytes(weights(directory).read_bytes()[:100])


def flipped(directory: Path) -> None:
    content = bytearray(weights(directory).read_bytes())
    content[-1] ^= 1
    weights(directory).write_bytes(content)


def without_weights(directory: Path) -> None:
    weights(directory).unlink()


def without_description(directory: Path) -> None:
    (directory / DESCRIPTION).unlink()


def with_half_a_description(directory: Path) -> None:
    (directory / DESCRIPTION).write_text('{"step": 3, "dig')


def with_another_step(directory: Path) -> None:
    path = directory / DESCRIPTION
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 7}))


def with_another_kind_of_description(directory: Path) -> None:
    (directory / DESCRIPTION).write_text("[]")


HARM = [
    torn,
    flipped,
    without_weights,
    without_description,
    with_half_a_description,
    with_another_step,
    with_another_kind_of_description,
]


@pytest.mark.parametrize("harm", HARM)
def test_one_that_is_not_what_was_written_is_passed_over(
    three: tuple[Path, list[Trainer]], capsys: pytest.CaptureFixture[str], harm: object
) -> None:
    directory, made = three
    harm(directory / "000000000003")  # type: ignore[operator]
    again = trainer(seed=9)
    assert load_checkpoint(again, directory) == 2
    assert "000000000003: this checkpoint is passed over" in capsys.readouterr().err
    # The random numbers that came after the second were drawn from its own state.
    state = made[1].state()
    assert all(torch.equal(value, state[name]) for name, value in again.state().items() if name != "random")


def test_nothing_in_one_is_pickled_and_nothing_is_warned_of(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    made = trainer()
    save_checkpoint(made, 1, tmp_path)
    assert load_checkpoint(made, tmp_path) == 1
    place = tmp_path / "000000000001"
    assert {path.suffix for path in place.iterdir()} == {".json", ".safetensors"}
    assert load_file(weights(place)).keys() == made.state().keys()
    assert not recwarn.list


def test_a_full_disk_is_told_of_and_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    save_checkpoint(trainer(), 1, tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        save_checkpoint(trainer(), 2, tmp_path)
    assert load_checkpoint(trainer(), tmp_path) == 1


def test_a_draft_that_a_kill_left_is_no_checkpoint(three: tuple[Path, list[Trainer]]) -> None:
    directory, _ = three
    (directory / "000000000003").rename(directory / ".000000000004")
    assert load_checkpoint(trainer(), directory) == 2
    save_checkpoint(trainer(), 4, directory)
    assert load_checkpoint(trainer(), directory) == 4


def test_that_of_another_network_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(trainer(), 1, tmp_path)
    made = trainer(width=9)
    before = made.state()
    assert load_checkpoint(made, tmp_path) == 0
    assert "it is of another network" in capsys.readouterr().err
    assert all(torch.equal(value, before[name]) for name, value in made.state().items())
