"""Slates: of the items that a decision lists k are shown, and people choose one of them or none.

Of each item two numbers are learned, and last those of choosing nothing: what it is worth if it is chosen, and its
appeal, the logit of how likely that is (a conditional logit model).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from components.training.algorithms.learner import Batch, BootstrappingLearner, Listed
from components.training.network import QNetwork
from contracts.job import PolicyHead, SlateQ

ROUNDS = 8
"""Of Dinkelbach's iteration, which rarely takes more than four."""


class SlateNetwork(nn.Module):
    """What a choice is worth, and how likely it is: for each item by itself, and for choosing nothing."""

    def __init__(self, state: int, item: int, slate: int, hidden_layers: list[int]) -> None:
        super().__init__()
        self.slate = slate

        def apart(inputs: int) -> nn.ModuleList:
            # Value and appeal: in one network the errors of large values would drown those of appeals.
            return nn.ModuleList(QNetwork(inputs, 1, hidden_layers) for _ in range(2))

        self.of_items = apart(state + item)
        self.of_nothing = apart(state) if state else None
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, pairs: Tensor) -> Tensor:
        """Normalized features of states and items side by side, float32 [T, S + G] -> [T, 2]."""
        return torch.cat([each(pairs) for each in self.of_items], 1)

    def nothing(self, state: Tensor) -> Tensor:
        """float32 [B, S] -> [B, 2]."""
        known = self.bias.expand(len(state), -1)
        return known if self.of_nothing is None else known + torch.cat([each(state) for each in self.of_nothing], 1)


def judge_lists(network: SlateNetwork, state: Tensor, listed: Listed) -> Tensor:
    """All that each of B decisions lists, up to W items, and nothing: [B, W + 1, 2].

    A list that is shorter has items of no appeal, -inf, behind its own.
    """
    found = network(torch.cat([state.index_select(0, listed.row), listed.features], 1))
    place = torch.arange(len(found), device=found.device) - listed.begins().index_select(0, listed.row)
    filler = found.new_zeros(listed.decisions, listed.longest, 2)
    filler[..., 1] = -torch.inf
    judged = filler.index_put((listed.row, place), found)
    return torch.cat([judged, network.nothing(state).unsqueeze(1)], 1)


def judge_slates(network: SlateNetwork, state: Tensor, slate: Tensor, listed: Listed) -> Tensor:
    """The items of slates [B, k], places among all listed ones, and nothing: [B, k + 1, 2]."""
    features = listed.features.index_select(0, slate.flatten())
    known = state.repeat_interleave(slate.shape[1], 0)
    found = network(torch.cat([known, features], 1)).view(*slate.shape, 2)
    return torch.cat([found, network.nothing(state).unsqueeze(1)], 1)


def on_slates(judged: Tensor, slate: Tensor) -> Tensor:
    """Of [B, W + 1, 2] the items of slates [B, k], which are places in the lists, and nothing: [B, k + 1, 2]."""
    return torch.cat([judged.gather(1, slate.unsqueeze(2).expand(-1, -1, 2)), judged[:, -1:]], 1)


def worth(shown: Tensor) -> Tensor:
    """Of slates, [B, k + 1, 2] -> [B]: the choices' values, each as likely as its appeal makes it (equation 6)."""
    value, appeal = shown.unbind(2)
    return (torch.softmax(appeal, 1) * value).sum(1)


def gains(judged: Tensor, size: int) -> Tensor:
    """What each item adds to the worth of a slate of `size`, [B, W + 1, 2] -> float64 [B, W]; -inf where there is none.

    The items that add most are the slate that is worth most. Its worth is a ratio of sums over its items, which
    Dinkelbach's iteration (1967) raises to the largest: what is worth more than the slate so far counts by how likely
    it is chosen. The paper solves the same by linear programming.
    """
    # Beside an item that nearly all would choose, float32 would lose what others add.
    value, appeal = judged.double().unbind(2)
    mass = torch.exp((appeal - appeal.amax(1, keepdim=True)).clamp(min=-300.0))

    def beyond(level: Tensor) -> Tensor:
        there = appeal[:, :-1] > -torch.inf
        return torch.where(there, mass[:, :-1] * (value[:, :-1] - level.unsqueeze(1)), -torch.inf)

    level, both = value[:, -1], torch.stack([value, mass], 2)
    for _ in range(ROUNDS):
        value_shown, shares = on_slates(both, beyond(level).topk(size, 1).indices).unbind(2)
        total = shares.sum(1)
        level = (shares * value_shown).sum(1) / total
    return beyond(level) / total.unsqueeze(1)


def best_slate(judged: Tensor, size: int) -> Tensor:
    """Of all slates of `size` items the one that is worth most: places in the lists, int64 [B, size]."""
    return most(gains(judged, size), size)


def most(gain: Tensor, size: int) -> Tensor:
    """The places of the largest gains, [B, W] -> int64 [B, size]; of equal ones the first."""
    # One after another, as neither a sort nor `topk` keeps equal ones in order both here and in ONNX.
    left, places = gain, []
    for _ in range(size):
        places.append(left.argmax(1, keepdim=True))
        left = left.scatter(1, places[-1], -torch.inf)
    return torch.cat(places, 1)


class SlateHead(nn.Module):
    """A policy over slates of k items from what each adds, its gain.

    The best k, most first; or one after another from a softmax over the gains of those that are left (Plackett and
    Luce); or with probability epsilon k of them by chance.
    """

    def __init__(self, chosen: PolicyHead, size: int) -> None:
        super().__init__()
        self.chosen, self.size = chosen, size

    def forward(self, gain: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """gain float [B, W], uniform [B, k + 1] in [0, 1) -> a slate int64 [B, k], and the best one."""
        best = most(gain, self.size)
        if self.chosen.policy == "greedy":
            return best, best
        drawn = self._draw(gain, uniform)
        if self.chosen.policy == "epsilonGreedy":
            drawn = torch.where(uniform[:, -1:] < self.chosen.epsilon, drawn, best)
        return drawn, best

    def _draw(self, gain: Tensor, uniform: Tensor) -> Tensor:
        left, places = self._logits(gain), []
        for j in range(self.size):
            cumulative = torch.softmax(left, 1).cumsum(1)
            passed = cumulative <= uniform[:, j : j + 1].clamp(max=1 - 2**-24) * cumulative[:, -1:]
            places.append(passed.to(torch.int64).sum(1, keepdim=True).clamp(max=gain.shape[1] - 1))
            left = left.scatter(1, places[-1], -torch.inf)
        return torch.cat(places, 1)

    def _logits(self, gain: Tensor) -> Tensor:
        if self.chosen.policy == "softmax":
            return gain / self.chosen.temperature
        return torch.where(gain > -torch.inf, 0.0, gain)

    def samples(self, gain: Tensor, draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Slates that stand for all that the policy may show: int64 [B, S, k], and what each of S counts for, [S]."""
        best = most(gain, self.size)
        if self.chosen.policy == "greedy":
            return best.unsqueeze(1), gain.new_ones(1)
        drawn = [self._draw(gain, torch.rand(len(gain), self.size, generator=generator)) for _ in range(draws)]
        counts = gain.new_full((draws,), 1 / draws)
        if self.chosen.policy == "epsilonGreedy":
            drawn, counts = (
                [best, *drawn],
                torch.cat([gain.new_ones(1) - self.chosen.epsilon, counts * self.chosen.epsilon]),
            )
        return torch.stack(drawn, 1), counts

    def probability(self, gain: Tensor, slate: Tensor, alike: Tensor) -> Tensor:
        """How likely slates [B, k] are shown, in their order: [B].

        `alike` bool [B, k, W] tells which items are described as those on the slate are: to people they are one.
        """
        best = most(gain, self.size).unsqueeze(2)
        greedy = alike.gather(2, best).squeeze(2).all(1).to(gain.dtype)
        if self.chosen.policy == "greedy":
            return greedy
        left, drawn = self._logits(gain), torch.ones_like(greedy)
        for j in range(self.size):
            drawn = drawn * (torch.softmax(left, 1) * alike[:, j]).sum(1)
            left = left.scatter(1, slate[:, j : j + 1], -torch.inf)
        if self.chosen.policy == "softmax":
            return drawn
        return (1 - self.chosen.epsilon) * greedy + self.chosen.epsilon * drawn


class SlateQLearner(BootstrappingLearner):
    """SlateQ (Ie et al. 2019, arXiv 1905.12767, equations 6, 17 and 19).

    The value Q(s, i) of the item i that was chosen moves towards r + discount * W'(s', A'). A slate's worth W(s, A) is
    the sum of P(i | s, A) Q(s, i) over its items and choosing nothing; A' is the slate of the largest W', or the one
    logged. A conditional logit model of the choice is learned beside: P(i | s, A) = e^v(s, i) / sum_j e^v(s, j).
    """

    network: SlateNetwork
    target: SlateNetwork

    def __init__(self, network: SlateNetwork, config: SlateQ) -> None:
        super().__init__(network, config.target_update_rate)
        self.config = config

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        assert isinstance(batch.possible, Listed)
        assert isinstance(batch.next_possible, Listed)
        assert batch.chosen is not None
        with torch.no_grad():
            if self.config.next_slate == "best":
                judged = judge_lists(self.target, batch.next_state, batch.next_possible)
                following = on_slates(judged, best_slate(judged, self.network.slate))
            else:
                following = judge_slates(self.target, batch.next_state, batch.next_action, batch.next_possible)
            wanted = batch.reward + batch.discount * worth(following)
        value, appeal = judge_slates(self.network, batch.state, batch.action, batch.possible).unbind(2)
        q = value.gather(1, batch.chosen.unsqueeze(1)).squeeze(1)
        # Squared, not Huber's: of skewed rewards, such as the time that people stay, the mean is wanted.
        loss = functional.mse_loss(q, wanted)
        return loss + functional.cross_entropy(appeal, batch.chosen), q.detach(), loss.detach()

    def examine(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Values of the choices made, [B], and what the best slates are worth, [B], and those, [B, k]."""
        assert isinstance(batch.possible, Listed)
        assert batch.chosen is not None
        judged = judge_lists(self.network, batch.state, batch.possible)
        own, begins = best_slate(judged, self.network.slate), batch.possible.begins().unsqueeze(1)
        shown = judge_slates(self.network, batch.state, batch.action, batch.possible)[:, :, 0]
        return shown.gather(1, batch.chosen.unsqueeze(1)).squeeze(1), worth(on_slates(judged, own)), own + begins
