"""What a policy would do at logged decisions, in the form that the estimators take, for every kind of action."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from components.training.algorithms.actor_critic import Actor, ActorCriticNetwork
from components.training.algorithms.learner import Listed, score
from components.training.bundle import Bundle
from components.training.network import Head, NormalizedPairs, among
from components.training.store import normalized
from components.transitions import Lists, Transitions

PAIRS = 1_000_000
"""Pairs of state and action that are scored at a time."""


@dataclass(frozen=True)
class Plan:
    """What a policy may do at each of N decisions: lists end to end, of some of I actions with G normalized features.

    Of slates, what people may choose from them: an item or nothing.
    """

    described: Tensor  # float32 [I, G]
    items: Tensor  # int64 [T], which of them
    offsets: np.ndarray  # int64 [N + 1]
    probability: Tensor  # float32 [T]

    def at(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the rows [B]: which of them each action belongs to, its features, its probability."""
        offsets = torch.from_numpy(self.offsets)
        starts = offsets[rows]
        lengths = offsets[rows + 1] - starts
        row = torch.repeat_interleave(torch.arange(len(rows)), lengths)
        begins = lengths.cumsum(0) - lengths
        places = (starts - begins)[row] + torch.arange(len(row))
        return row, self.described[self.items[places]], self.probability[places]


def propensities(bundle: Bundle, data: Transitions) -> np.ndarray:
    """The served policy's probability of each discrete action, float64 [N, A]: 0 of those not possible."""
    with torch.no_grad():
        possible = torch.from_numpy(data.possible)
        scores = among(bundle.network, torch.from_numpy(data.state), possible).double()
        return np.asarray(Head(bundle.head)(scores, possible).numpy())


def logged_features(bundle: Bundle, data: Transitions) -> Tensor:
    """Normalized features of the logged actions, float32 [N, G], where actions are described or continuous."""
    if isinstance(data.possible, Lists):
        return described(bundle, data.possible.described)[torch.from_numpy(data.possible.taken(data.action))]
    return _actor(bundle).as_unit(torch.from_numpy(data.action))


def one_each(features: Tensor) -> Plan:
    """To take the one action, of features [N, G], in each decision."""
    n = len(features)
    return Plan(features, torch.arange(n), np.arange(n + 1), torch.ones(n))


def plan(bundle: Bundle, data: Transitions) -> Plan:
    """What the policy would do where actions are described or continuous."""
    with torch.no_grad():
        if not isinstance(data.possible, Lists):
            states = torch.from_numpy(data.state)
            return one_each(_actor(bundle).as_unit(bundle.network(states)))
        lists, network = data.possible, bundle.network
        assert isinstance(network, NormalizedPairs)
        features, items = described(bundle, lists.described), torch.from_numpy(lists.items)
        states = normalized(network.normalization, data.state)
        lengths = np.diff(lists.offsets)
        rows = torch.from_numpy(np.repeat(np.arange(len(data)), lengths))
        scores = []
        for begin, end in _parts(lists.offsets):
            pairs = slice(lists.offsets[begin], lists.offsets[end])
            longest = int(lengths[begin:end].max())
            listed = Listed(features[items[pairs]], rows[pairs] - begin, end - begin, longest)
            scores.append(score(network.network, states[begin:end], listed))
        probability = Head(bundle.head).over_lists(torch.cat(scores).double(), rows, len(data))
        return Plan(features, items, lists.offsets, probability.float())


def _parts(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """Decisions from one to before another whose lists have up to `PAIRS` items together; one at least."""
    begin, n = 0, len(offsets) - 1
    while begin < n:
        end = max(begin + 1, int(np.searchsorted(offsets, offsets[begin] + PAIRS, "right")) - 1)
        yield begin, end
        begin = end


def taken_probability(chosen: Plan, data: Transitions) -> np.ndarray:
    """Of the logged actions among described ones, float64 [N]; of items described alike all together."""
    lists = data.possible
    assert isinstance(lists, Lists)
    row = np.repeat(np.arange(len(data)), np.diff(lists.offsets))
    same = lists.items == lists.taken(data.action)[row]
    return np.bincount(row[same], chosen.probability.double().numpy()[same], minlength=len(data))


def described(bundle: Bundle, raw: np.ndarray) -> Tensor:
    """Described actions, raw features float32 [I, G], normalized."""
    assert isinstance(bundle.network, NormalizedPairs)
    with torch.no_grad():
        return normalized(bundle.network.of_actions, raw)


def _actor(bundle: Bundle) -> Actor:
    network = bundle.network.network
    assert isinstance(network, ActorCriticNetwork)
    return network.actor
