"""Policies as versions of a Triton model repository, one immutable directory each."""

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from components.export import policy as module
from components.export.onnx_policy import ServedPolicy
from components.export.policy import write_version
from components.export.repository import read_policies, version_of, write_config
from components.training.actions import Actions
from components.training.network import LogisticPolicy
from contracts.job import PolicyHead
from contracts.stage import StageError

FIRST, SECOND = "0000001" + "a" * 57, "fffffff" + "b" * 57
STATES = np.random.default_rng(0).normal(size=(200, 2)).astype(np.float32)


def write(repository: Path, digest: str, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "features": ["x", "y"], "actions": Actions(["left", "right"]), "states": STATES, "backend": "python"
    }  # fmt: skip
    given |= changes
    weights = [0.5] * len(given["features"])
    return write_version(repository, LogisticPolicy(weights, 0.1), PolicyHead(), digest=digest, **given)


def config(repository: Path) -> str:
    return (repository / "arm" / "config.pbtxt").read_text()


def dims(text: str) -> dict[str, tuple[str, int]]:
    """Type and width of every input and output of a configuration."""
    found = re.findall(r'name: "(\w+)" data_type: (\w+) dims: \[ (\d+) \]', text)
    return {name: (type_, int(width)) for name, type_, width in found}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    for digest in (FIRST, SECOND):
        write(root, digest)
    return root


def test_a_version_is_a_positive_integer_of_the_policys_digest() -> None:
    assert version_of("0" * 64) == 1
    assert version_of(FIRST) == 2
    assert version_of(SECOND) == 2**28


def test_every_policy_has_a_version_directory(repository: Path) -> None:
    versions = sorted(p.name for p in (repository / "arm").iterdir() if p.is_dir())
    assert versions == sorted(["2", str(2**28)])
    for version in versions:
        files = sorted(p.name for p in (repository / "arm" / version).iterdir())
        assert files == ["model.onnx", "model.py", "policy.json"]


def test_a_policy_is_described(repository: Path) -> None:
    policies = read_policies(repository)
    assert sorted(policies) == [2, 2**28]
    graph = (repository / "arm" / "2" / "model.onnx").read_bytes()
    assert policies[2] == {
        "digest": FIRST,
        "version": 2,
        "features": ["x", "y"],
        "action_space": "discrete",
        "actions": ["left", "right"],
        "head": {"policy": "softmax", "temperature": 1.0},
        "onnx_digest": hashlib.sha256(graph).hexdigest(),
    }


def test_the_python_backends_configuration_serves_every_version(repository: Path) -> None:
    text = config(repository)
    assert 'name: "arm"' in text
    assert 'backend: "python"' in text
    assert "max_batch_size: 64" in text
    assert f"versions: [ 2, {2**28} ]" in text
    assert "intra_op_thread_count" not in text
    assert dims(text) == {
        "state": ("TYPE_FP32", 2),
        "uniform": ("TYPE_FP32", 1),
        "possible": ("TYPE_BOOL", 2),
        "q_values": ("TYPE_FP32", 2),
        "greedy_action": ("TYPE_INT64", 1),
        "propensities": ("TYPE_FP32", 2),
        "sampled_action": ("TYPE_INT64", 1),
    }


def test_the_configuration_names_the_graphs_own_inputs_and_outputs(repository: Path) -> None:
    session = onnxruntime.InferenceSession(str(repository / "arm" / "2" / "model.onnx"))
    names = [t.name for t in [*session.get_inputs(), *session.get_outputs()]]
    assert sorted(names) == sorted(dims(config(repository)))


def test_the_onnxruntime_backend_needs_no_python_model(tmp_path: Path) -> None:
    write(tmp_path, FIRST, backend="onnxruntime")
    assert sorted(p.name for p in (tmp_path / "arm" / "2").iterdir()) == ["model.onnx", "policy.json"]
    text = config(tmp_path)
    assert 'backend: "onnxruntime"' in text
    assert 'key: "intra_op_thread_count" value { string_value: "1" }' in text


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout alone: no graph is made or checked."""

    def export(made: torch.nn.Module, policy: dict[str, Any], path: Path) -> None:
        path.write_text("graph")

    monkeypatch.setattr(module, "export_onnx", export)
    monkeypatch.setattr(module, "check_onnx", lambda *_, **__: 0.0)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "changes", [{"features": ["x", "z"]}, {"features": ["y", "x"]}, {"actions": Actions(["right", "left"])}]
)
def test_policies_of_different_features_or_actions_cannot_share_a_repository(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    write(tmp_path, FIRST)
    with pytest.raises(StageError, match="in features or actions"):
        write(tmp_path, SECOND, **changes)


@pytest.mark.usefixtures("quick")
def test_a_refused_policy_leaves_the_repository_as_it_was(tmp_path: Path) -> None:
    write(tmp_path, FIRST)
    before = config(tmp_path)
    with pytest.raises(StageError):
        write(tmp_path, SECOND, features=["x", "z"])
    assert list(read_policies(tmp_path)) == [2]
    assert config(tmp_path) == before
    write_config(tmp_path)


@pytest.mark.usefixtures("quick")
def test_a_version_is_never_written_over(tmp_path: Path) -> None:
    write(tmp_path, FIRST)
    with pytest.raises(FileExistsError):
        write(tmp_path, FIRST)


@pytest.mark.usefixtures("quick")
def test_the_configuration_follows_the_versions_that_are_there(tmp_path: Path) -> None:
    write(tmp_path, SECOND)
    assert f"versions: [ {2**28} ]" in config(tmp_path)
    write(tmp_path, FIRST)
    for file in (tmp_path / "arm" / str(2**28)).iterdir():
        file.unlink()
    write_config(tmp_path)
    assert "versions: [ 2 ]" in config(tmp_path)


@pytest.mark.usefixtures("quick")
def test_widths_are_those_of_the_policy(tmp_path: Path) -> None:
    write(
        tmp_path,
        FIRST,
        features=["x", "y", "z"],
        actions=Actions(["a", "b", "c", "d"]),
        states=np.zeros((1, 3), np.float32),
    )
    found = dims(config(tmp_path))
    assert found["state"] == ("TYPE_FP32", 3)
    assert found["possible"] == ("TYPE_BOOL", 4)
    assert found["q_values"] == found["propensities"] == ("TYPE_FP32", 4)


def test_states_on_which_the_graph_fails_are_found_before_the_policy_is_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(made: torch.nn.Module, *rest: Any) -> None:
        real(ServedPolicy(LogisticPolicy([0.5, -0.5], 0.1), PolicyHead()), *rest)

    real = module.export_onnx
    monkeypatch.setattr(module, "export_onnx", other)
    with pytest.raises(StageError, match="differs from torch"):
        write(tmp_path, FIRST)
    assert read_policies(tmp_path) == {}
    assert not (tmp_path / "arm" / "config.pbtxt").exists()
