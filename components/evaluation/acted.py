"""What a policy would do at logged decisions, in the form that the estimators take, for every kind of action."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from components.evaluation.choices import ChoiceModel
from components.training.algorithms.actor_critic import Actor, ActorCriticNetwork
from components.training.algorithms.learner import Listed
from components.training.algorithms.slate import SlateHead, SlateNetwork, gains, judge_lists
from components.training.bundle import Bundle
from components.training.network import Head, NormalizedPairs
from components.training.store import normalized
from components.transitions import Lists, Transitions

PAIRS = 1_000_000
"""Pairs of state and action that are scored at a time."""
DRAWS = 4
"""Slates that are drawn of each decision, where a policy draws: means over decisions are what they are for."""


@dataclass(frozen=True)
class Plan:
    """Of N decisions the actions that a policy may take, end to end, each with G normalized features.

    Of slates it is what people may choose from them, an item or nothing, that values are of.
    """

    features: Tensor  # float32 [T, G]
    offsets: np.ndarray  # int64 [N + 1]
    probability: Tensor  # float32 [T]

    def at(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the rows [B]: which of them each action belongs to, its features, its probability."""
        starts = torch.from_numpy(self.offsets)[rows]
        lengths = torch.from_numpy(np.diff(self.offsets))[rows]
        row = torch.repeat_interleave(torch.arange(len(rows)), lengths)
        begins = lengths.cumsum(0) - lengths
        places = (starts - begins)[row] + torch.arange(len(row))
        return row, self.features[places], self.probability[places]


def propensities(bundle: Bundle, data: Transitions) -> np.ndarray:
    """The served policy's probability of each discrete action, float64 [N, A]: 0 of those not possible."""
    with torch.no_grad():
        scores = bundle.network(torch.from_numpy(data.state)).double()
        return np.asarray(Head(bundle.head)(scores, torch.from_numpy(data.possible)).numpy())


def logged_features(bundle: Bundle, data: Transitions) -> Tensor:
    """Normalized features of the logged actions, or of what was chosen from the logged slates, float32 [N, G]."""
    if data.chosen is not None:
        choices = with_nothing(logged_items(bundle, data))
        return choices[torch.arange(len(data)), torch.from_numpy(data.chosen)]
    if isinstance(data.possible, Lists):
        return logged_items(bundle, data)
    return _actor(bundle).as_unit(torch.from_numpy(data.action))


def logged_items(bundle: Bundle, data: Transitions) -> Tensor:
    """Normalized features of the described actions that were taken, float32 [N, G], of slates [N, k, G]."""
    lists = data.possible
    assert isinstance(lists, Lists)
    return _described(bundle, lists.described)[torch.from_numpy(lists.taken(data.action))]


def with_nothing(items: Tensor) -> Tensor:
    """float32 [N, k, G] -> [N, k + 1, G + 1]: the items and, last, nothing, which the last feature is 1 of."""
    nothing = torch.zeros(len(items), items.shape[1] + 1, items.shape[2] + 1)
    nothing[:, :-1, :-1] = items
    nothing[:, -1, -1] = 1
    return nothing


def logged_plan(bundle: Bundle, data: Transitions, choices: ChoiceModel | None) -> Plan:
    """What was done, in a form as if it were planned."""
    if choices is None:
        return Plan(logged_features(bundle, data), np.arange(len(data) + 1), torch.ones(len(data)))
    states = normalized(bundle.network.normalization, data.state)
    return _chosen_from(states, logged_items(bundle, data).unsqueeze(1), torch.ones(1), choices)


def plan(bundle: Bundle, data: Transitions, choices: ChoiceModel | None = None) -> Plan:
    """What the policy would do where actions have no names; of slates `choices` says what people would."""
    if choices is not None:
        return _plan_slates(bundle, data, choices)
    with torch.no_grad():
        if not isinstance(data.possible, Lists):
            states = torch.from_numpy(data.state)
            unit = _actor(bundle).as_unit(bundle.network(states))
            return Plan(unit, np.arange(len(data) + 1), torch.ones(len(data)))
        lists, network = data.possible, bundle.network
        assert isinstance(network, NormalizedPairs)
        features = _described(bundle, lists.described)[torch.from_numpy(lists.items)]
        states = normalized(network.normalization, data.state)
        row = np.repeat(np.arange(len(data)), np.diff(lists.offsets))
        rows = torch.from_numpy(row)
        scores = torch.cat(
            [
                network.network(torch.cat([states[rows[i : i + PAIRS]], features[i : i + PAIRS]], 1))
                for i in range(0, len(rows), PAIRS)
            ]
        )
        probability = Head(bundle.head).over_lists(scores.squeeze(1).double(), rows, len(data))
        return Plan(features, lists.offsets, probability.float())


def _plan_slates(bundle: Bundle, data: Transitions, choices: ChoiceModel) -> Plan:
    lists, generator = data.possible, torch.Generator().manual_seed(0)
    assert isinstance(lists, Lists)
    described, shown = _described(bundle, lists.described), []
    for gain, item in _gains(bundle, data):
        slates, counts = _head(bundle).samples(gain, DRAWS, generator)
        shown.append(item.gather(1, slates.flatten(1)).view(slates.shape))
    with torch.no_grad():
        states = normalized(bundle.network.normalization, data.state)
    return _chosen_from(states, described[torch.cat(shown)], counts.float(), choices)


def _chosen_from(states: Tensor, items: Tensor, counts: Tensor, choices: ChoiceModel) -> Plan:
    """Of N decisions with S slates each, [N, S, k, G], of which each counts for so much, [S], what is chosen."""
    n, s, k, _ = items.shape
    slates = items.flatten(0, 1)
    with torch.no_grad():
        probability = choices(states.repeat_interleave(s, 0), slates) * counts.repeat(n).unsqueeze(1)
    return Plan(with_nothing(slates).flatten(0, 1), np.arange(n + 1) * s * (k + 1), probability.flatten())


def slate_probability(bundle: Bundle, data: Transitions) -> np.ndarray:
    """Of the logged slates in their order, float64 [N]; items described alike are one."""
    found, start = [], 0
    for gain, item in _gains(bundle, data):
        slate = torch.from_numpy(data.action[start : start + len(gain)])
        found.append(_head(bundle).probability(gain, slate, item))
        start += len(gain)
    return torch.cat(found).numpy()


def _gains(bundle: Bundle, data: Transitions) -> Iterator[tuple[Tensor, Tensor]]:
    """In parts of the decisions, of up to W items that each lists: their gains, float64 [B, W], and numbers [B, W]."""
    lists, network = data.possible, bundle.network.network
    assert isinstance(lists, Lists)
    assert isinstance(network, SlateNetwork)
    described = _described(bundle, lists.described)
    size = max(1, PAIRS // int(np.diff(lists.offsets).max()))
    with torch.no_grad():
        states = normalized(bundle.network.normalization, data.state)
        for start in range(0, len(data), size):
            part = lists.select(np.arange(start, min(start + size, len(data))))
            lengths = np.diff(part.offsets)
            row = np.repeat(np.arange(len(lengths)), lengths)
            items = torch.from_numpy(part.items)
            listed = Listed(described[items], torch.from_numpy(row), len(lengths))
            gain = gains(judge_lists(network, states[start : start + size], listed), network.slate)
            item = torch.full(gain.shape, -1)
            item[row, np.arange(len(row)) - part.offsets[row]] = items
            yield gain.double(), item


def _head(bundle: Bundle) -> SlateHead:
    assert bundle.actions.slate is not None
    return SlateHead(bundle.head, bundle.actions.slate)


def taken_probability(chosen: Plan, data: Transitions) -> np.ndarray:
    """Of the logged actions among described ones, float64 [N]; of items described alike all together."""
    lists = data.possible
    assert isinstance(lists, Lists)
    row = np.repeat(np.arange(len(data)), np.diff(lists.offsets))
    same = lists.items == lists.taken(data.action)[row]
    return np.bincount(row[same], chosen.probability.double().numpy()[same], minlength=len(data))


def _described(bundle: Bundle, described: np.ndarray) -> Tensor:
    assert isinstance(bundle.network, NormalizedPairs)
    with torch.no_grad():
        return normalized(bundle.network.of_actions, described)


def _actor(bundle: Bundle) -> Actor:
    network = bundle.network.network
    assert isinstance(network, ActorCriticNetwork)
    return network.actor
