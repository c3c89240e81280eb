"""The policy bundle: all that is needed to use, check or carry on a policy, in files that cannot run code."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from components.normalization.spec import NormalizationSpec
from components.training.actions import Actions
from components.training.algorithms.build import build_network
from components.training.network import Normalized
from contracts.job import Algorithm, PolicyHead
from contracts.stage import StageError

WEIGHTS, DESCRIPTION, NORMALIZATION, ACTION_NORMALIZATION, OPTIMIZER = (
    "weights.safetensors", "bundle.json", "normalization.json", "action_normalization.json", "optimizer.safetensors",
)  # fmt: skip
VERSION = 3


@dataclass(frozen=True)
class Bundle:
    network: Normalized  # as `build_network` describes it
    normalization: NormalizationSpec
    actions: Actions
    algorithm: Algorithm
    head: PolicyHead
    provenance: dict[str, Any]
    digest: str


def write_bundle(
    directory: Path,
    network: nn.Module,
    algorithm: Algorithm,
    normalization: NormalizationSpec,
    actions: Actions,
    head: PolicyHead,
    provenance: dict[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
) -> str:
    """Write a bundle to a new directory; returns the policy's digest: of its weights, network and actions."""
    directory.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, directory / WEIGHTS)
    normalization.write(directory / NORMALIZATION)
    if actions.described:
        actions.described.write(directory / ACTION_NORMALIZATION)
    if optimizer:
        names = [name for name, _ in network.named_parameters()]
        state = optimizer.state_dict()["state"]
        save_file({f"{names[i]}.{k}": v for i, s in state.items() for k, v in s.items()}, directory / OPTIMIZER)
    description: dict[str, Any] = {
        "version": VERSION,
        "algorithm": {algorithm.name: algorithm.config.model_dump(by_alias=True)},
        **actions.as_json(),
        "head": head.decisive,
    }
    digest = _policy_digest(directory, description)
    description |= {"digest": digest, "weights_digest": weights_digest(directory), "provenance": provenance}
    (directory / DESCRIPTION).write_text(json.dumps(description, indent=2))
    return digest


def _policy_digest(directory: Path, description: dict[str, Any]) -> str:
    """SHA-256 over all that decides what the policy does: weights, normalization, network, actions, head."""
    digest = hashlib.sha256((directory / WEIGHTS).read_bytes())
    inputs = NormalizationSpec.read(directory / NORMALIZATION).inputs
    named = ("version", "algorithm", "actions", "bounds", "action_features", "slate", "head")
    decisive = {name: description[name] for name in named if name in description}
    digest.update(json.dumps(decisive | {"inputs": inputs}, sort_keys=True).encode())
    return digest.hexdigest()


def weights_digest(directory: Path) -> str:
    """SHA-256 of the weights alone."""
    return hashlib.sha256((directory / WEIGHTS).read_bytes()).hexdigest()


def read_bundle(directory: str | Path) -> Bundle:
    """Load a bundle; raises `StageError` when it is missing or not as it was written."""
    directory = Path(directory)
    if not (directory / DESCRIPTION).is_file():
        raise StageError(f"{directory}: no policy bundle here ({DESCRIPTION} is missing)")
    try:
        return _read(directory)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StageError(f"{directory}: not a whole policy bundle; train again: {error}") from None


def _read(directory: Path) -> Bundle:
    description = json.loads((directory / DESCRIPTION).read_text())
    if description.get("version") != VERSION:
        raise StageError(
            f"{directory}: a bundle of version {description.get('version')}, {VERSION} is wanted; train again"
        )
    if _policy_digest(directory, description) != description["digest"]:
        raise StageError(f"{directory}: not the weights and settings that the bundle was written with; train again")
    normalization = NormalizationSpec.read(directory / NORMALIZATION)
    algorithm = Algorithm.model_validate(description["algorithm"])
    described = NormalizationSpec.read(directory / ACTION_NORMALIZATION) if "action_features" in description else None
    bounds = [(low, high) for low, high in description["bounds"]] if "bounds" in description else None
    actions = Actions(description["actions"], bounds, described, description.get("slate"))
    network = build_network(algorithm, normalization, actions)
    try:
        network.load_state_dict(load_file(directory / WEIGHTS))
    except RuntimeError as error:
        raise StageError(f"{directory}: a network of another version of BlueWhale; train again: {error}") from None
    return Bundle(
        network.eval(),
        normalization,
        actions,
        algorithm,
        PolicyHead.model_validate(description["head"]),
        description["provenance"],
        description["digest"],
    )
