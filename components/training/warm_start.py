"""Training that begins with the policy of the day before."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from components.normalization.graph import NormalizationGraph
from components.normalization.spec import NormalizationSpec, label
from components.training.actions import Actions
from components.training.bundle import OPTIMIZER, Bundle, read_bundle
from components.training.network import Normalized, QNetwork
from contracts.job import C51, Algorithm, BehaviourCloning
from contracts.stage import StageError
from contracts.transitions import ACTION_PREFIX, STATE_PREFIX


class IncompatibleError(StageError):
    """Features or actions are no longer those of the policy."""

    def __init__(self, why: str, remedy: str = "Keep what the policy had") -> None:
        super().__init__(
            f"no warm start: {why}. {remedy}, or run the job once without a warm start, so that later runs begin with "
            "what it learns"
        )


def check_compatible(directory: str, normalization: NormalizationSpec, actions: Actions) -> None:
    """Raise `IncompatibleError` where `start_from` would, whatever the algorithm's settings."""
    try:
        _places(read_bundle(directory), normalization, actions, directory)
    except IncompatibleError:
        raise
    except StageError:
        return  # training begins anew, and says why


def start_from(
    directory: str,
    network: Normalized,
    optimizer: torch.optim.Optimizer,
    normalization: NormalizationSpec,
    actions: Actions,
    algorithm: Algorithm,
    valued_by: dict[str, Any],
) -> str:
    """Give the network a bundle's weights and the optimizer its state; returns that policy's digest.

    Features of the state or of items, and values of an enum, that are new since then begin without a weight, so that
    the policy is the same at first, but for features' scales, which follow the log. Changes nothing where the bundle
    does not fit, and raises `IncompatibleError` where actions are others or a feature is gone or of another type,
    `StageError` where it cannot be read, where an enum has lost a value, where algorithm or layers are others, or where
    values are of other rewards or another discount than those that the job's are `valued_by`.
    """
    bundle = read_bundle(directory)
    taken = _places(bundle, normalization, actions, directory)
    if _shapes(bundle.network) != _shapes(network):
        raise StageError(f"{directory}: its layers are not this job's")
    if (was := _meaning(bundle.algorithm)) != (now := _meaning(algorithm)):
        raise StageError(f"{directory}: its scores are {was}, and this job's are {now}")
    if not isinstance(algorithm.config, BehaviourCloning):
        # Values many times too large would be taken for such as feed on themselves.
        for name, ours in valued_by.items():
            if (theirs := bundle.provenance.get(name, ours)) != ours:
                raise StageError(f"{directory}: its values are of {name} {theirs}, and this job's of {ours}")
    known = dict(bundle.network.named_parameters())
    moments = _read_moments(Path(directory) / OPTIMIZER)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(_moved(known[name], parameter, taken, name in _by_input(network)))
    _take_moments(moments, network, optimizer, taken)
    added = _inputs(normalization, actions) - len(taken)
    more = f", {added} of its inputs new" if added else ""
    print(f"warm start from policy {bundle.digest}{more}", file=sys.stderr, flush=True)
    return bundle.digest


def _meaning(algorithm: Algorithm) -> str:
    """What a network's outputs are, where their shapes do not tell."""
    config = algorithm.config
    if isinstance(config, C51):
        return f"values from {config.lowest_return:g} to {config.highest_return:g}"
    return "log-probabilities" if isinstance(config, BehaviourCloning) else "values"


def _places(bundle: Bundle, normalization: NormalizationSpec, actions: Actions, directory: str) -> list[int]:
    """Where each input of the bundle's network is among the job's: of the state, then of an action."""
    if bundle.actions.names != actions.names or (bundle.actions.described is None) != (actions.described is None):
        raise IncompatibleError(
            f"{directory}: its actions are {', '.join(bundle.actions.names) or 'items'}, "
            f"this job's are {', '.join(actions.names) or 'items'}"
        )
    if bundle.actions.slate != actions.slate:
        theirs, ours = (f"slates of {n}" if n else "single items" for n in (bundle.actions.slate, actions.slate))
        raise IncompatibleError(f"{directory}: its actions are {theirs}, this job's are {ours}")
    if bundle.actions.bounds != actions.bounds:
        was, now = (dict(zip(each.names, each.bounds or (), strict=False)) for each in (bundle.actions, actions))
        raise IncompatibleError(
            f"{directory}: its actions have the bounds {was}, this job's {now}",
            "Set actionBounds, so that they do not change with the log, to what the policy had",
        )
    places = _columns(bundle.normalization, normalization, STATE_PREFIX, directory)
    of_state = NormalizationGraph(normalization).outputs
    if bundle.actions.described and actions.described:
        columns = _columns(bundle.actions.described, actions.described, ACTION_PREFIX, directory)
        places += [of_state + place for place in columns]
    elif actions.bounds:
        places += range(of_state, _inputs(normalization, actions))
    return places


def _columns(theirs: NormalizationSpec, ours: NormalizationSpec, prefix: str, directory: str) -> list[int]:
    """Where each column of the bundle's normalized features is among ours."""
    types = {f.name: f.type for f in ours.features}
    for feature in theirs.features:
        if types.get(feature.name) != feature.type:
            name, now = label(prefix, feature.name), "is gone"
            if feature.name in types:
                now = f"is {types[feature.name]} now; normalization.overrides.{name} can keep its type"
            raise IncompatibleError(f"{directory}: its features are not this job's: {name} ({feature.type}) {now}")
    columns = NormalizationGraph(theirs).output_columns
    places = {column: place for place, column in enumerate(NormalizationGraph(ours).output_columns)}
    if gone := [column for column in columns if column not in places]:
        raise StageError(f"{directory}: its features are not this job's: {gone[0][0]} has no {gone[0][1]} any more")
    return [places[column] for column in columns]


def _inputs(normalization: NormalizationSpec, actions: Actions) -> int:
    """Of a network that is given an action beside the state."""
    of_action = NormalizationGraph(actions.described).outputs if actions.described else len(actions.bounds or ())
    return NormalizationGraph(normalization).outputs + of_action


def _by_input(network: nn.Module) -> set[str]:
    """Names of the weights that there is one of for each input."""
    first = set()
    for prefix, module in network.named_modules():
        if isinstance(module, QNetwork):
            layer = "body.0" if len(module.body) else "advantage"
            first |= {
                f"{prefix}.{layer}.{name}" for name, p in module.get_submodule(layer).named_parameters() if p.dim() == 2
            }
    return first


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    """Of the weights by name, inputs left aside."""
    first = _by_input(network)
    return {name: p.shape[:1] if name in first else p.shape for name, p in network.named_parameters()}


def _moved(theirs: Tensor, ours: Tensor, places: list[int], by_input: bool) -> Tensor:
    """Weights of the bundle's network, or what the optimizer knows of them, where this network has them."""
    if not by_input:
        return theirs
    moved = torch.zeros_like(ours)
    # A network that is given no action has the first of them.
    moved[:, places[: theirs.shape[1]]] = theirs.to(ours.device)
    return moved


def _read_moments(path: Path) -> dict[str, Tensor]:
    """What the optimizer knew of each weight, by name; nothing where the bundle does not tell."""
    try:
        return load_file(path) if path.is_file() else {}
    except SafetensorError as error:
        raise StageError(f"{path}: cannot be read: {error}") from None


def _take_moments(
    known: dict[str, Tensor], network: Normalized, optimizer: torch.optim.Optimizer, places: list[int]
) -> None:
    moments: dict[int, dict[str, Tensor]] = {}
    first = _by_input(network)
    for i, (name, parameter) in enumerate(network.named_parameters()):
        moments[i] = {
            moment: value if value.dim() == 0 else _moved(value, parameter, places, name in first)
            for moment in ("step", "exp_avg", "exp_avg_sq")
            if (value := known.get(f"{name}.{moment}")) is not None
        }
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
