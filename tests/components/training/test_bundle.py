"""A policy bundle is read as it was written, or not at all."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from components.normalization.spec import FeatureNormalization, NormalizationSpec
from components.training.actions import Actions
from components.training.algorithms.build import build_learner, build_network
from components.training.algorithms.learner import Batch
from components.training.bundle import OPTIMIZER, WEIGHTS, read_bundle, write_bundle
from components.training.trainer import Trainer
from contracts.job import Algorithm, PolicyHead
from contracts.stage import StageError

FEATURES = [
    FeatureNormalization(name="speed", type="continuous", mean=2.0, stddev=3.0, how="by hand", evidence={}),
    FeatureNormalization(name="place", type="enum", values=[1.0, 2.0], how="by hand", evidence={}),
    FeatureNormalization(
        name="wait", type="box_cox", box_cox_lambda=0.3, box_cox_shift=0.1, how="by hand", evidence={}
    ),
    FeatureNormalization(name="price", type="quantile", quantiles=[0.0, 1.0, 5.0], how="by hand", evidence={}),
]
SPEC = NormalizationSpec(inputs=["speed", "place", "wait", "price", "unused"], features=FEATURES)


def algorithm(name: str = "dqn", **settings: Any) -> Algorithm:
    return Algorithm.model_validate({name: {"hiddenLayers": [16, 8]} | settings})


ALGORITHM = algorithm(learningRate=0.01)
EACH = [
    algorithm("dqn"),
    algorithm("dqn", dueling=False, double=False),
    algorithm("dqn", noisy=True),
    algorithm("c51", lowestReturn=0.0, highestReturn=9.0),
    algorithm("qrDqn"),
    algorithm("cql"),
    algorithm("bcq"),
    algorithm("behaviourCloning"),
]
ACTIONS = Actions(["left", "right", "stay"])


def network(seed: int = 0, algorithm: Algorithm = ALGORITHM) -> nn.Module:
    torch.manual_seed(seed)
    return build_network(algorithm, SPEC, ACTIONS)


def write(directory: Path, **changes: Any) -> str:
    given: dict[str, Any] = {
        "network": network(),
        "algorithm": ALGORITHM,
        "normalization": SPEC,
        "actions": ACTIONS,
        "head": PolicyHead(temperature=0.5),
        "provenance": {"seed": 1},
    }
    return write_bundle(directory, **(given | changes))


@pytest.mark.parametrize("made", EACH, ids=lambda made: made.name)
def test_a_bundle_is_read_as_it_was_written(tmp_path: Path, made: Algorithm) -> None:
    written = network(algorithm=made).eval()
    digest = write(tmp_path / "policy", network=written, algorithm=made)
    bundle = read_bundle(tmp_path / "policy")
    states = torch.tensor(np.random.default_rng(0).normal(1, 3, (100, 5)).astype(np.float32))
    states[::7, 2] = float("nan")
    torch.testing.assert_close(bundle.network(states), written(states), rtol=0, atol=0)
    assert bundle.digest == digest
    assert bundle.normalization == SPEC
    assert bundle.actions == ACTIONS
    assert bundle.head == PolicyHead(temperature=0.5)
    assert bundle.provenance == {"seed": 1}


def test_the_same_policy_has_the_same_digest_wherever_it_came_from(tmp_path: Path) -> None:
    first = write(tmp_path / "a", provenance={"seed": 1, "workers": 1})
    assert write(tmp_path / "b", provenance={"seed": 2, "epoch": 9}) == first


@pytest.mark.parametrize(
    "change",
    [
        {"network": network(seed=1)},
        {"actions": Actions(["left", "stay", "right"])},
        {"head": PolicyHead(temperature=0.6)},
        {"head": PolicyHead(policy="greedy")},
        {"algorithm": algorithm(learningRate=0.01, double=False)},
    ],
    ids=lambda c: next(iter(c)),
)
def test_another_policy_has_another_digest(tmp_path: Path, change: dict[str, Any]) -> None:
    assert write(tmp_path / "a") != write(tmp_path / "b", **change)


def test_a_policy_that_reads_other_features_has_another_digest(tmp_path: Path) -> None:
    renamed = [f.model_copy(update={"name": {"speed": "pace"}.get(f.name, f.name)}) for f in FEATURES]
    other = NormalizationSpec(inputs=["pace", "place", "wait", "price", "unused"], features=renamed)
    assert write(tmp_path / "a") != write(tmp_path / "b", normalization=other)


def test_tampered_weights_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "policy")
    path = tmp_path / "policy" / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StageError, match=r"not the weights and settings that the bundle was written with"):
        read_bundle(tmp_path / "policy")


@pytest.mark.parametrize("name", ["bundle.json", "normalization.json", WEIGHTS])
@pytest.mark.parametrize("torn", [True, False])
def test_a_bundle_of_which_a_file_is_torn_or_gone_is_refused(tmp_path: Path, name: str, torn: bool) -> None:
    write(tmp_path / "policy")
    path = tmp_path / "policy" / name
    if torn:
        path.write_bytes(path.read_bytes()[:20])
    else:
        path.unlink()
    with pytest.raises(StageError, match=r"train again|is missing"):
        read_bundle(tmp_path / "policy")


def test_a_bundle_of_another_version_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "policy")
    path = tmp_path / "policy" / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 1}))
    with pytest.raises(StageError, match=r"a bundle of version 1, 3 is wanted; train again"):
        read_bundle(tmp_path / "policy")


def test_a_bundle_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"no policy bundle here \(bundle\.json is missing\)"):
        read_bundle(tmp_path / "policy")


def test_a_bundle_is_never_written_over(tmp_path: Path) -> None:
    write(tmp_path / "policy")
    with pytest.raises(FileExistsError):
        write(tmp_path / "policy")


def test_the_optimizers_state_is_kept_by_parameter(tmp_path: Path) -> None:
    trained = network()
    trainer = Trainer(build_learner(ALGORITHM, trained), 0.01)
    state = trained.normalization(torch.rand(4, 5))
    trainer.step(
        Batch(
            state,
            torch.zeros(4, dtype=torch.int64),
            torch.ones((4, 3), dtype=torch.bool),
            torch.ones(4),
            state,
            torch.zeros(4, dtype=torch.int64),
            torch.ones((4, 3), dtype=torch.bool),
            torch.full((4,), 0.9),
        )
    )
    write(tmp_path / "policy", network=trained, optimizer=trainer.optimizer)
    kept = load_file(tmp_path / "policy" / OPTIMIZER)
    for index, (name, _) in enumerate(trained.named_parameters()):
        for key, value in trainer.optimizer.state_dict()["state"][index].items():
            torch.testing.assert_close(kept[f"{name}.{key}"], value)


def test_the_description_is_json_that_names_the_network(tmp_path: Path) -> None:
    digest = write(tmp_path / "policy")
    description = json.loads((tmp_path / "policy" / "bundle.json").read_text())
    assert description["digest"] == digest
    assert description["algorithm"]["dqn"]["hiddenLayers"] == [16, 8]
    assert description["actions"] == ACTIONS.names
