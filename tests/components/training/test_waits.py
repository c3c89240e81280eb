"""Within an epoch nothing asks the device for a value: that would wait for all that it was told to do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from components.training import worker
from components.training.algorithms.build import build_learner, build_network
from components.training.batches import Shuffled
from components.training.figures import Figures, Look
from components.training.trainer import Trainer
from components.training.worker import learn
from contracts.job import Algorithm
from tests.components.training.every_learner import BATCH, DESCRIBED, LEARNERS, store

ASKING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::bincount", "aten::masked_select", "aten::_unique2",
    "aten::equal", "aten::is_nonzero", "aten::_linalg_check_errors",
}  # fmt: skip
"""Operators whose result, or the size of it, the host must have before it goes on."""


INDEXING = {"aten::index", "aten::index_put", "aten::index_put_"}


class Watch(TorchDispatchMode):
    """Lists the operators that would ask a device, as the values are on none here."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        by_mask = name in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
        unsized = name == "aten::repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in ASKING or by_mask or unsized:
            self.asked.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "algorithm"), LEARNERS, ids=str)
def test_neither_a_step_nor_a_look_asks_the_device(
    kind: str, algorithm: dict[str, dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "LOOK_STEPS", 2)
    monkeypatch.setattr(worker, "LOOK_ROWS", 0)
    data, actions = store(kind)
    made = Algorithm.model_validate(algorithm)
    learner = build_learner(made, build_network(made, DESCRIBED, actions))
    figures = Figures(tmp_path, learner, data.batch(torch.arange(50)), torch.zeros(50), actions)
    batches = data.batches(Shuffled(data.usable, BATCH, 0), 0, 8)
    steps = learn(Trainer(learner, 1e-3), batches, 0, [8], BATCH, figures, lambda *_, **__: None)
    with Watch() as watch:
        assert [next(steps) for _ in range(7)] == [0] * 7
    assert watch.asked == []
    assert list(steps) == [8]
    assert len((tmp_path / "losses.jsonl").read_text().splitlines()) == 4


def test_looks_that_are_long_on_their_way_are_written_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "LOOK_STEPS", 2)
    monkeypatch.setattr(worker, "LOOK_ROWS", 0)
    monkeypatch.setattr(Look, "is_here", lambda look: look.step == 4)
    (data, actions), made, checked = store("discrete"), Algorithm.model_validate({"dqn": {}}), []
    learner = build_learner(made, build_network(made, DESCRIBED, actions))
    figures = Figures(tmp_path, learner, data.batch(torch.arange(50)), torch.zeros(50), actions)
    batches = data.batches(Shuffled(data.usable, BATCH, 0), 0, 14)
    found = []
    for _ in learn(Trainer(learner, 1e-3), batches, 0, [7, 14], BATCH, figures, lambda *_, step: checked.append(step)):
        written = (tmp_path / "losses.jsonl").read_text().splitlines()
        found.append([json.loads(line)["step"] for line in written])
    assert found == [[]] * 6 + [[2, 4, 6, 7]] * 7 + [[2, 4, 6, 7, 8, 10, 12, 14]]
    assert checked == found[-1]


def test_where_training_can_go_on_from_all_looks_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "LOOK_STEPS", 2)
    monkeypatch.setattr(worker, "LOOK_ROWS", 0)
    monkeypatch.setattr(Look, "is_here", lambda _: False)
    (data, actions), made, due = store("discrete"), Algorithm.model_validate({"dqn": {}}), iter([False, True, False])
    learner = build_learner(made, build_network(made, DESCRIBED, actions))
    figures = Figures(tmp_path, learner, data.batch(torch.arange(50)), torch.zeros(50), actions)
    batches = data.batches(Shuffled(data.usable, BATCH, 0), 0, 7)
    steps = learn(Trainer(learner, 1e-3), batches, 0, [7], BATCH, figures, lambda *_, **__: None, lambda: next(due))
    assert [next(steps) for _ in range(4)] == [0, 0, 0, 4]
    assert len((tmp_path / "losses.jsonl").read_text().splitlines()) == 2
    assert list(steps) == [0, 0, 7]
