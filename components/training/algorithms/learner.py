"""What every algorithm is given, a batch of transitions, and what it is, a learner."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional

from components.training.network import IMPOSSIBLE, ConstrainedNetwork, QNetwork, among


@dataclass(frozen=True)
class Listed:
    """What each of B decisions could choose among, each described by G numbers: lists of any length, end to end.

    None of them is filled up: T is the sum of their lengths.
    """

    features: Tensor  # float32 [T, G], normalized
    row: Tensor  # int64 [T], the decision that each belongs to, in rising order
    decisions: int  # B
    longest: int  # items of the longest list; known here, as to ask the device for it would be to wait for it

    def begins(self) -> Tensor:
        """Where each list begins, int64 [B]."""
        return torch.searchsorted(self.row, torch.arange(self.decisions, device=self.row.device))


Possible = Tensor | Listed | None
"""Of discrete actions, bool [B, A], or None where all are possible; of described ones their lists."""


@dataclass(frozen=True)
class Batch:
    """B transitions over F features, each over as many decisions as the algorithm looks ahead.

    Actions are discrete (numbers below A), described (places among all T listed ones), slates (k such places each) or
    continuous (D numbers each).
    """

    state: Tensor  # float32 [B, F], normalized
    action: Tensor  # int64 [B], of slates [B, k]; of continuous actions float32 [B, D] in [-1, 1]
    possible: Possible
    reward: Tensor  # float32 [B], the discounted sum over the decisions
    next_state: Tensor  # float32 [B, F]; any finite value where nothing follows
    next_action: Tensor  # like action, the logged one
    next_possible: Possible
    discount: Tensor  # float32 [B], what a value at the next state counts for: 0 where the MDP has ended
    chosen: Tensor | None = None  # int64 [B], of slates: the place that was chosen, k where nothing was

    def split(self, size: int) -> list[Batch]:
        """The same in parts of so many transitions; of described actions, whose lists are of any length, the one."""
        if len(self.reward) == size:
            return [self]
        columns = (getattr(self, field.name) for field in fields(self))
        parts = (itertools.repeat(None) if column is None else column.split(size) for column in columns)
        return [Batch(*each) for each in zip(*parts, strict=False)]


class Learner(nn.Module):
    """What a step of an optimizer lowers: a call with a batch returns the loss; the scores of logged actions, [B]; and,
    without a gradient, what people watch of the loss, of values their distance to their targets alone.

    `network` maps normalized features to a score for each action, on which the served policy acts.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @property
    def valuing(self) -> nn.Module:
        """The part of the network that says what each action is worth, whether it is to be taken or not."""
        return self.network

    def examine(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of the logged actions, [B], and of the policy's own, [B], and those, as in a batch; numbers in their
        units."""
        scores = score(self.network, batch.state, batch.possible)
        own = best(scores, batch.possible)
        if self.valuing is not self.network:
            scores = score(self.valuing, batch.state, batch.possible)
        return taken(scores, batch.action, batch.possible), taken(scores, own, batch.possible), own

    def compute_in(self, precision: str) -> None:
        """Compute the hidden layers in `float32` or `bfloat16`."""
        for module in self.modules():
            if isinstance(module, QNetwork):
                module.reduced = precision == "bfloat16"

    def expect(self, rows: int) -> None:
        """Hear how many different transitions there are to learn from."""

    def settle(self) -> None:
        """Bring the policy up to what was learned, before it is looked at or written."""

    def follow(self) -> None:
        """Let what follows the network slowly take a step towards it."""

    def catch_up(self) -> None:
        """Let it be where the network is."""


class BootstrappingLearner(Learner):
    """A learner whose targets hold values of later states, by a copy of the network that follows it slowly.

    The copy has no noise where layers are noisy.
    """

    def __init__(self, network: nn.Module, target_update_rate: float) -> None:
        super().__init__(network)
        self.target = copy.deepcopy(network).requires_grad_(False).eval()
        self.target_update_rate = target_update_rate
        self._slow: list[Tensor] = list(self.target.parameters())
        self._fast: list[Tensor] = list(network.parameters())

    def follow(self) -> None:
        with torch.no_grad():
            torch._foreach_lerp_(self._slow, self._fast, self.target_update_rate)

    def catch_up(self) -> None:
        self.target.load_state_dict(self.network.state_dict())


def score(network: nn.Module, state: Tensor, possible: Possible) -> Tensor:
    """What a network says of each action: [B, A, ...], or of listed ones [T, ...]."""
    if isinstance(possible, Listed):
        pairs = torch.cat([state.index_select(0, possible.row), possible.features], 1)
        if isinstance(network, ConstrainedNetwork):
            return constrained(network, network.values(pairs).squeeze(1), network.imitation(pairs).squeeze(1), possible)
        return network(pairs).squeeze(1)
    return among(network, state, possible)


def constrained(network: ConstrainedNetwork, values: Tensor, logits: Tensor, possible: Possible) -> Tensor:
    """Those values whose actions the log would take, by the logits of its model; others are `NEVER`.

    Impossible ones among named actions are for the caller to leave out.
    """
    likeliest = highest(logits, possible)
    each = likeliest.index_select(0, possible.row) if isinstance(possible, Listed) else likeliest.unsqueeze(1)
    return network.constrained(values, logits, each)


def score_taken(network: nn.Module, state: Tensor, action: Tensor, possible: Possible) -> Tensor:
    """The same of the actions taken alone: [B, ...]."""
    if isinstance(possible, Listed):
        pairs = torch.cat([state, possible.features.index_select(0, action)], 1)
        return network(pairs).squeeze(1)
    return taken(network(state), action, possible)


def taken(scores: Tensor, action: Tensor, possible: Possible) -> Tensor:
    """Of all scores those of one action of each decision: [B, ...]."""
    if isinstance(possible, Listed):
        return scores.index_select(0, action)
    place = action.view(-1, *[1] * (scores.dim() - 1)).expand(-1, 1, *scores.shape[2:])
    return scores.gather(1, place).squeeze(1)


def highest(scores: Tensor, possible: Possible) -> Tensor:
    """The largest score of each decision's possible actions: [B, A] or [T] -> [B]."""
    if isinstance(possible, Listed):
        lowest = scores.new_full((possible.decisions,), -torch.inf)
        return lowest.scatter_reduce(0, possible.row, scores, "amax")
    return possible_only(scores, possible).amax(1)


def best(scores: Tensor, possible: Possible) -> Tensor:
    """The action of the largest score, int64 [B], the first of those that have it; 0 where a decision lists none."""
    if not isinstance(possible, Listed):
        return possible_only(scores, possible).argmax(1)
    reached = scores >= highest(scores, possible).index_select(0, possible.row)
    beyond = len(scores)
    place = torch.where(reached, torch.arange(beyond, device=scores.device), beyond)
    first = place.new_full((possible.decisions,), beyond).scatter_reduce(0, possible.row, place, "amin")
    return torch.where(first < beyond, first, 0)


def logsumexp(scores: Tensor, possible: Possible) -> Tensor:
    """log sum exp of the scores of each decision's possible actions: [B]."""
    if not isinstance(possible, Listed):
        return possible_only(scores, possible).logsumexp(1)
    top = highest(scores.detach(), possible)
    shifted = (scores - top.index_select(0, possible.row)).exp()
    return scores.new_zeros(possible.decisions).index_add(0, possible.row, shifted).log() + top


def mean(scores: Tensor, possible: Possible) -> Tensor:
    """The mean of what each decision's scores are on average: of all named actions, possible or not, of all listed ones
    however long the list is."""
    if not isinstance(possible, Listed):
        return scores.mean()
    lengths = scores.new_zeros(possible.decisions).index_add(0, possible.row, torch.ones_like(scores))
    return (scores / lengths.index_select(0, possible.row)).sum() / possible.decisions


def negative_log_likelihood(scores: Tensor, action: Tensor, possible: Possible) -> Tensor:
    """Mean of -log of a softmax's probability of the actions taken, over the possible ones."""
    if isinstance(possible, Listed):
        return (logsumexp(scores, possible) - scores.index_select(0, action)).mean()
    return functional.cross_entropy(possible_only(scores, possible), action)


def possible_only(scores: Tensor, possible: Tensor | None) -> Tensor:
    return scores if possible is None else torch.where(possible, scores, IMPOSSIBLE)
