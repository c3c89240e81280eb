"""A trained policy as a version in a model repository: its ONNX graph, checked, and what describes it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from components.columns import load_transitions
from components.export.onnx_policy import check_onnx, export_onnx, served
from components.export.repository import DESCRIPTION, MODEL, check_alike, read_policies, version_of, write_config
from components.training.actions import Actions
from components.training.bundle import read_bundle
from components.transitions import Lists
from contracts.job import JobSpec, PolicyHead
from contracts.progress import report
from contracts.stage import read_record, stage

CHECKED_ROWS = 10_000


def export_policy(spec: JobSpec, features: str | Path, training: str | Path, output: str | Path) -> None:
    """Write `model_repository/` with the last epoch's policy; raises `StageError` when ONNX and torch disagree."""
    read_record(training)
    with stage("export", output) as (directory, facts):
        bundle = read_bundle(Path(training) / "policy")
        data = load_transitions(features, spec, lambda _, lengths: np.cumsum(lengths) - lengths < CHECKED_ROWS)
        report(0, 1, "ONNX")
        facts |= write_version(
            directory / "model_repository",
            bundle.network,
            bundle.head,
            features=bundle.normalization.inputs,
            actions=bundle.actions,
            digest=bundle.digest,
            states=data.state[:CHECKED_ROWS],
            items=data.possible.described if isinstance(data.possible, Lists) else None,
            backend=spec.export.backend,
        )
        report(1, 1, f"largest difference {facts['largest_difference']:.1g}")


def write_version(
    repository: Path,
    network: nn.Module,
    head: PolicyHead,
    *,
    features: list[str],
    actions: Actions,
    digest: str,
    states: np.ndarray,
    items: np.ndarray | None = None,
    backend: str = "python",
) -> dict[str, Any]:
    """Add a policy to the repository, check its ONNX graph on `states`, extremes and `items`; returns what was written.

    `states` float32 [N, F]; `items` float32 [I, G], of described actions.
    """
    version = version_of(digest)
    policy = {"features": features, "action_space": actions.space, **actions.as_json()}
    check_alike(repository, [*read_policies(repository).values(), policy])
    # Written beside its place and moved there whole: a version directory never changes.
    place = repository / MODEL / str(version)
    if place.exists():
        raise FileExistsError(f"{place}: this policy is in the repository already, and a version never changes")
    directory = place.with_name(f".{version}")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    path = directory / "model.onnx"
    made = served(network, head, actions.space)
    export_onnx(made, policy, path)
    width = len(features)
    extremes = np.array([[np.nan] * width, [0.0] * width, [1e30] * width, [-1e30] * width], np.float32)
    difference = check_onnx(made, policy, path, np.concatenate([states, extremes]), 0, items)
    if backend == "python":
        shutil.copy(Path(__file__).with_name("triton_model.py"), directory / "model.py")
    description = {
        "digest": digest,
        "version": version,
        **policy,
        "head": head.decisive,
        "onnx_digest": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    (directory / DESCRIPTION).write_text(json.dumps(description, indent=2))
    directory.rename(place)
    write_config(repository, backend)
    return description | {"largest_difference": difference}
