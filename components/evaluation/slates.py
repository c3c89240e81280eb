"""What a policy over slates would show, what people would choose from it, and how likely the logged slates were.

Values are those of what is chosen, an item or nothing; what people choose is told by a model of evaluation's own.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from components.evaluation.acted import PAIRS, Plan, described
from components.training.algorithms.learner import Listed
from components.training.algorithms.slate import SlateHead, SlateNetwork, gains, judge_lists
from components.training.bundle import Bundle
from components.training.network import QNetwork
from components.training.store import normalized
from components.transitions import Lists, Transitions

BATCH = 512
HIDDEN = [128, 128]
MOST_EPOCHS = 30
"""A model of few rows takes fewer steps, or it would learn them by heart."""
DRAWS = 4
"""Slates that are drawn for each decision of a policy that draws: few do for a mean over many decisions."""


class ChoiceModel(nn.Module):
    """A conditional logit model: an item, or nothing, is chosen in proportion to the exponential of its appeal."""

    def __init__(self, state: int, item: int) -> None:
        super().__init__()
        self.appeal = QNetwork(state + item, 1, HIDDEN, layer_norm=True)
        self.of_nothing = QNetwork(state, 1, HIDDEN, layer_norm=True)

    def logits(self, state: Tensor, items: Tensor) -> Tensor:
        """Normalized states float32 [N, S] and items of slates [N, k, G] -> [N, k + 1], last that of nothing."""
        shown = torch.cat([state.unsqueeze(1).expand(-1, items.shape[1], -1), items], 2)
        return torch.cat([self.appeal(shown.flatten(0, 1)).view(items.shape[:2]), self.of_nothing(state)], 1)

    def forward(self, state: Tensor, items: Tensor) -> Tensor:
        """The same -> probabilities."""
        return torch.softmax(self.logits(state, items), 1)


def fit_choices(bundle: Bundle, data: Transitions, steps: int, seed: int) -> ChoiceModel:
    """The model fitted to logged choices by maximum likelihood, with the bundle's normalization."""
    torch.manual_seed(seed)
    state, (items, features), chosen = _states(bundle, data), _shown(bundle, data), torch.from_numpy(_chosen(data))
    model = ChoiceModel(state.shape[1], features.shape[1])
    steps = min(steps, 1 + MOST_EPOCHS * len(chosen) // BATCH)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(chosen), (BATCH,), generator=generator)
        loss = functional.cross_entropy(model.logits(state[rows], features[items[rows]]), chosen[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return model.eval()


def chosen_features(bundle: Bundle, data: Transitions) -> Tensor:
    """Features of what was chosen from the logged slates, float32 [N, G + 1], the last that it was nothing."""
    items, features = _shown(bundle, data)
    choices = torch.cat([items, torch.full((len(items), 1), len(features))], 1)
    return _with_nothing(features)[choices.gather(1, torch.from_numpy(_chosen(data))[:, None]).squeeze(1)]


def plan_logged(bundle: Bundle, data: Transitions, choices: ChoiceModel) -> Plan:
    """What people would choose from the logged slates."""
    items, features = _shown(bundle, data)
    return _choose(_states(bundle, data), features, items.unsqueeze(1), torch.ones(1), choices)


def plan_slates(bundle: Bundle, data: Transitions, choices: ChoiceModel) -> Plan:
    """What people would choose from the slates that the policy would show."""
    generator, shown = torch.Generator().manual_seed(0), []
    for gain, item in _gains(bundle, data):
        slates, counts = _head(bundle).samples(gain, DRAWS, generator)
        shown.append(item.gather(1, slates.flatten(1)).view(slates.shape))
    features = described(bundle, _lists(data).described)
    return _choose(_states(bundle, data), features, torch.cat(shown), counts.float(), choices)


def slate_probability(bundle: Bundle, data: Transitions) -> np.ndarray:
    """Of the logged slates in their order, float64 [N]; items described alike are one."""
    found, start = [], 0
    for gain, item in _gains(bundle, data):
        slate = torch.from_numpy(data.action[start : start + len(gain)])
        alike = item.gather(1, slate).unsqueeze(2) == item.unsqueeze(1)
        found.append(_head(bundle).probability(gain, slate, alike))
        start += len(gain)
    return torch.cat(found).numpy()


def _choose(states: Tensor, features: Tensor, shown: Tensor, counts: Tensor, choices: ChoiceModel) -> Plan:
    """Of N decisions with S slates each, items int64 [N, S, k], which count for so much, [S], what is chosen."""
    n, s, k = shown.shape
    size = max(1, PAIRS // (s * (k + 1)))
    parts = []
    with torch.no_grad():
        for start in range(0, n, size):
            items = shown[start : start + size].flatten(0, 1)
            chances = choices(states[start : start + size].repeat_interleave(s, 0), features[items])
            parts.append((chances.view(-1, s, k + 1) * counts[:, None]).flatten())
    items = torch.cat([shown, torch.full((n, s, 1), len(features))], 2).flatten()
    return Plan(_with_nothing(features), items, np.arange(n + 1) * s * (k + 1), torch.cat(parts))


def _with_nothing(features: Tensor) -> Tensor:
    """float32 [I, G] -> [I + 1, G + 1]: the items and, last, nothing, which the last feature is 1 of."""
    table = functional.pad(features, (0, 1, 0, 1))
    table[-1, -1] = 1
    return table


def _gains(bundle: Bundle, data: Transitions) -> Iterator[tuple[Tensor, Tensor]]:
    """Part by part, B decisions with up to W items each: their gains, float64 [B, W], and which they are, int64 [B, W].

    Behind a shorter list stands -1.
    """
    lists, network, states = _lists(data), bundle.network.network, _states(bundle, data)
    assert isinstance(network, SlateNetwork)
    features = described(bundle, lists.described)
    size = max(1, PAIRS // int(np.diff(lists.offsets).max()))
    for start in range(0, len(data), size):
        offsets = torch.from_numpy(lists.offsets[start : start + size + 1])
        items = torch.from_numpy(lists.items[offsets[0] : offsets[-1]])
        lengths = offsets.diff()
        row = torch.repeat_interleave(lengths)
        listed = Listed(features[items], row, len(lengths), int(lengths.max()))
        with torch.no_grad():
            judged = judge_lists(network, states[start : start + size], listed)
        gain = gains(judged, _head(bundle).size)
        item = torch.full(gain.shape, -1)
        item[row, torch.arange(len(row)) - (offsets - offsets[0])[row]] = items
        yield gain, item


def _shown(bundle: Bundle, data: Transitions) -> tuple[Tensor, Tensor]:
    """Items of the logged slates, int64 [N, k], and the features of all, float32 [I, G]."""
    lists = _lists(data)
    return torch.from_numpy(lists.taken(data.action)), described(bundle, lists.described)


def _states(bundle: Bundle, data: Transitions) -> Tensor:
    return normalized(bundle.network.normalization, data.state)


def _lists(data: Transitions) -> Lists:
    assert isinstance(data.possible, Lists)
    return data.possible


def _chosen(data: Transitions) -> np.ndarray:
    assert data.chosen is not None
    return data.chosen


def _head(bundle: Bundle) -> SlateHead:
    assert bundle.actions.slate is not None
    return SlateHead(bundle.head, bundle.actions.slate)
