"""What a run on one machine finds of the attempts before it."""

import shutil
from pathlib import Path

import pytest

from components.normalization.spec import FeatureNormalization, NormalizationSpec
from components.training.actions import Actions
from components.training.algorithms.build import build_network
from components.training.bundle import read_bundle, write_bundle
from contracts.job import Algorithm, PolicyHead, load_job
from contracts.stage import StageError
from pipelines.local import Run, _alternatives, broken_off_trainings, kept_policy

EXAMPLE = Path(__file__).parents[2] / "manifests/examples/cartpole.yaml"


def attempt(root: Path, day: int, finished: bool = False) -> str:
    directory = root / f"shop-2026-01-{day:02}-10-00-00-000000" / "training"
    (directory / "policy").mkdir(parents=True)
    if finished:
        (directory / "executor_output.json").touch()
    return str(directory)


def test_trainings_that_did_not_end_are_those_since_the_last_that_did(tmp_path: Path) -> None:
    assert broken_off_trainings(tmp_path) == []
    attempt(tmp_path, 1)
    attempt(tmp_path, 2, finished=True)
    assert broken_off_trainings(tmp_path) == []
    third, fourth = attempt(tmp_path, 3), attempt(tmp_path, 4)
    (tmp_path / "shop-2026-01-05-10-00-00-000000" / "features").mkdir(parents=True)  # killed before it trained
    assert broken_off_trainings(tmp_path) == [fourth, third]


def test_a_pattern_may_name_several_as_it_may_to_spark() -> None:
    assert _alternatives("logs/*.parquet") == ["logs/*.parquet"]
    assert _alternatives("l/{a,b}/{1,2}.csv") == ["l/a/1.csv", "l/a/2.csv", "l/b/1.csv", "l/b/2.csv"]


def test_a_policy_to_begin_with_outlives_the_training_that_it_came_from(tmp_path: Path) -> None:
    run, trained = Run(load_job(EXAMPLE), tmp_path / "run"), tmp_path / "run" / "training" / "policy"
    assert kept_policy(run, "") == ""
    with pytest.raises(StageError, match="no policy bundle here"):
        kept_policy(run, str(trained))
    algorithm, actions = Algorithm.model_validate({"dqn": {"hiddenLayers": [2]}}), Actions(["left", "right"])
    x = FeatureNormalization(name="x", type="binary", how="by hand", evidence={})
    normalization = NormalizationSpec(inputs=["x"], features=[x])
    network = build_network(algorithm, normalization, actions)
    write_bundle(trained, network, algorithm, normalization, actions, PolicyHead(), {})
    digest = read_bundle(trained).digest
    kept = kept_policy(run, str(trained))
    assert kept_policy(run, str(trained)) == kept  # the same path, so that what was trained with it is found again
    shutil.rmtree(tmp_path / "run" / "training")
    assert read_bundle(kept).digest == digest
    assert kept_policy(run, kept) == kept
