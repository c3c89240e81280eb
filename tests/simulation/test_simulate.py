"""The simulation as a stage: a log and its policy where the other pods find them."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from contracts.job import JobSpec, load_job
from contracts.stage import compact, read_record
from simulation.simulate import write_simulation

SPEC = load_job(Path(__file__).parents[2] / "manifests" / "examples" / "cartpole.yaml").spec


def small(**changes: object) -> JobSpec:
    assert SPEC.simulation is not None
    return SPEC.model_copy(update={"simulation": SPEC.simulation.model_copy(update={"episodes": 10} | changes)})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The directory, and in it a log and its policy's version directory."""
    root = tmp_path_factory.mktemp("simulated")
    return root, *write_simulation(small(), root / "out", root / "logs")


def test_the_log_and_its_policy_lie_on_the_shared_volume(made: tuple[Path, Path, Path]) -> None:
    root, log, policy = made
    assert log.is_relative_to(root / "logs")
    assert set(pq.read_table(log)["policy_version"].to_pylist()) == {
        json.loads((policy / "policy.json").read_text())["digest"]
    }
    assert (policy / "model.onnx").is_file()


def test_the_stage_tells_what_it_played(made: tuple[Path, Path, Path]) -> None:
    record = read_record(made[0] / "out")
    assert record["episodes"] == 10
    told = compact(record, made[0] / "out")
    assert told["stage"] == "simulation"
    assert told["message"].endswith("decisions of 10 episodes")


def test_played_again_the_log_stays_as_it_is_and_another_simulation_has_another(made: tuple[Path, Path, Path]) -> None:
    root, log, policy = made
    before = log.stat().st_ino
    assert write_simulation(small(), root / "out", root / "logs") == (log, policy)
    assert log.stat().st_ino == before
    other, _ = write_simulation(small(episodes=11), root / "out", root / "logs")
    assert other != log
    assert sorted(path.name for path in (root / "logs").iterdir()) == sorted(p.parents[1].name for p in (log, other))
