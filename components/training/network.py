"""Networks that map a raw state to one score per action."""

from __future__ import annotations

import math
from contextlib import nullcontext
from itertools import pairwise

import torch
from torch import Tensor, nn

from components.normalization.graph import NormalizationGraph
from components.training.shared import normal
from contracts.job import PolicyHead


class NoisyLinear(nn.Linear):
    """A linear layer with noise on its weights, whose size is learned (Fortunato et al. 2018, arXiv 1706.10295).

    The noise is factorised Gaussian (equation 11), drawn anew in each forward pass of training and for each row, which
    of listed actions is one of them: where all rows share it, it moves all values of a batch alike, and gradients with
    them. There is none at evaluation.
    """

    SIZE = 0.1
    """Of the noise at first, times 1 / sqrt(inputs). The paper's 0.5 drowns the differences that values begin with."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight_noise = nn.Parameter(torch.full((outputs, inputs), self.SIZE / inputs**0.5))
        self.bias_noise = nn.Parameter(torch.full((outputs,), self.SIZE / inputs**0.5))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        before, after = (self._noise(size, x) for size in (self.in_features, self.out_features))
        # (W' o after before^T) x = after o W' (before o x)
        return super().forward(x) + after * nn.functional.linear(x * before, self.weight_noise, self.bias_noise)

    @staticmethod
    def _noise(size: int, x: Tensor) -> Tensor:
        drawn = normal(len(x), size, x)
        return drawn.sign() * drawn.abs().sqrt()


class Normalized(nn.Module):
    """A network behind the normalization of its features: raw features in. What is normalized is never learned."""

    def __init__(self, normalization: NormalizationGraph, network: nn.Module) -> None:
        super().__init__()
        self.normalization, self.network = normalization, network

    def forward(self, raw: Tensor) -> Tensor:
        """float32 [batch, features], NaN = missing -> what the network makes of them."""
        found: Tensor = self.network(self.normalization(raw))
        return found


class NormalizedPairs(Normalized):
    """The same for states and described actions, whose normalized features the network gets side by side."""

    def __init__(self, normalization: NormalizationGraph, of_actions: NormalizationGraph, network: nn.Module) -> None:
        super().__init__(normalization, network)
        self.of_actions = of_actions

    def forward(self, raw: Tensor, action: Tensor) -> Tensor:  # type: ignore[override]
        """float32 [batch, features] and [batch, action features] -> [batch, 1], or what the network makes of them."""
        found: Tensor = self.network(torch.cat([self.normalization(raw), self.of_actions(action)], 1))
        return found


class QNetwork(nn.Module):
    """Q-values from normalized features: fully connected layers, then one head, or two when dueling.

    The dueling heads combine as Q = V + A - mean(A) (Wang et al. 2016, arXiv 1511.06581, equation 9).
    With `outputs`, each action has a vector of that many values; with `noisy`, the heads have noise.
    """

    def __init__(
        self,
        inputs: int,
        actions: int,
        hidden_layers: list[int],
        dueling: bool = False,
        outputs: int | None = None,
        layer_norm: bool = False,
        noisy: bool = False,
    ) -> None:
        super().__init__()
        # In the heads alone: what it does in all layers hides small differences between values.
        last_layer = NoisyLinear if noisy else nn.Linear
        widths = [inputs, *hidden_layers]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            # In place: memory is what an activation costs.
            layers += [nn.Linear(before, after), *([nn.LayerNorm(after)] if layer_norm else []), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers)
        self.advantage = last_layer(widths[-1], actions * (outputs or 1))
        self.value = last_layer(widths[-1], outputs or 1) if dueling else None
        self.reduced = False
        """Whether the hidden layers are computed in bfloat16, as training may."""
        self.shape: tuple[int, ...] = (actions, outputs) if outputs else (actions,)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [batch, inputs] -> float32 [batch, actions] or [batch, actions, outputs]."""
        with torch.autocast(x.device.type, torch.bfloat16) if self.reduced else nullcontext():
            hidden = self.body(x)
        # The heads stay in float32: of a value of 100, bfloat16 keeps no tenth.
        hidden = hidden.float()
        scores: Tensor = self.advantage(hidden).view(-1, *self.shape)
        if self.value is not None:
            value = self.value(hidden).view(-1, 1, *self.shape[1:])
            scores = value + scores - scores.mean(1, keepdim=True)
        return scores


class DuelingPairs(nn.Module):
    """Q(s, a) = V(s) + A(s, a) for actions that are described: normalized features of both in, state first.

    Of advantages over a list of any length no mean is taken off.
    """

    def __init__(self, value: QNetwork, advantage: QNetwork, state_inputs: int) -> None:
        super().__init__()
        self.value, self.advantage, self.state_inputs = value, advantage, state_inputs
        self.shape = advantage.shape

    def forward(self, pairs: Tensor) -> Tensor:
        """[batch, inputs] -> as a `QNetwork` with one action."""
        found: Tensor = self.value(pairs[:, : self.state_inputs]) + self.advantage(pairs)
        return found


class CategoricalNetwork(nn.Module):
    """Expected returns from a distribution over fixed atoms (Bellemare et al. 2017, arXiv 1707.06887)."""

    def __init__(self, logits: QNetwork | DuelingPairs, lowest: float, highest: float) -> None:
        super().__init__()
        self.logits = logits
        """[batch, inputs] -> [batch, actions, atoms]."""
        self.register_buffer("atoms", torch.linspace(lowest, highest, logits.shape[-1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.expected(self.logits(x))

    def expected(self, logits: Tensor) -> Tensor:
        """[..., atoms] -> [...]."""
        return (torch.softmax(logits, -1) * self.get_buffer("atoms")).sum(-1)


class QuantileNetwork(nn.Module):
    """Expected returns from quantiles of their distribution (Dabney et al. 2018, arXiv 1710.10044)."""

    def __init__(self, quantiles: QNetwork | DuelingPairs) -> None:
        super().__init__()
        self.quantiles = quantiles
        """[batch, inputs] -> [batch, actions, quantiles]."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.quantiles(x).mean(-1)
        return found


class ConstrainedNetwork(nn.Module):
    """Q-values of the actions that the log would take; others score `NEVER`.

    The log would take those whose probability, by a model of its policy, is at least `threshold` times that of the
    likeliest (Fujimoto et al. 2019, arXiv 1910.01708, equation 19) of those that are possible.
    """

    def __init__(self, values: QNetwork | DuelingPairs, imitation: QNetwork, threshold: float) -> None:
        super().__init__()
        self.values, self.imitation = values, imitation
        self.floor = math.log(threshold) if threshold else -math.inf

    def forward(self, x: Tensor, possible: Tensor | None = None) -> Tensor:
        """float32 [batch, inputs], and bool [batch, actions] where not all actions are -> float32 [batch, actions].

        Of described actions, which come one by one, nothing is excluded here: that takes their lists, as `score` has.
        """
        logits = self.imitation(x)
        if possible is not None:
            logits = torch.where(possible, logits, IMPOSSIBLE)
        return self.constrained(self.values(x), logits, logits.amax(1, keepdim=True))

    def constrained(self, values: Tensor, logits: Tensor, likeliest: Tensor) -> Tensor:
        """Of one shape, or such as broadcast: `likeliest` is the largest logit of what is possible there."""
        return torch.where(logits - likeliest >= self.floor, values, NEVER)


NEVER = -1e26
"""Score of an action that is not to be taken: finite, of probability 0, and above `IMPOSSIBLE`."""


def among(network: nn.Module, x: Tensor, possible: Tensor | None) -> Tensor:
    """A network's scores of named actions: what it would take may depend on what is possible."""
    if isinstance(network, Normalized):
        return among(network.network, network.normalization(x), possible)
    found: Tensor = network(x, possible) if isinstance(network, ConstrainedNetwork) else network(x)
    return found


class Head(nn.Module):
    """A policy from scores: the probability of each action. Actions that are not possible have probability 0."""

    def __init__(self, chosen: PolicyHead) -> None:
        super().__init__()
        self.chosen = chosen

    def forward(self, scores: Tensor, possible: Tensor) -> Tensor:
        """scores float [B, A], possible bool [B, A] -> [B, A], which sum to 1."""
        allowed = torch.where(possible, scores, IMPOSSIBLE)
        if self.chosen.policy == "softmax":
            return torch.softmax(allowed / self.chosen.temperature, 1)
        if self.chosen.policy == "threshold":
            # As sigmoid(second - first) >= threshold, but without a sigmoid that rounds to 1.
            level = math.log(self.chosen.threshold / (1 - self.chosen.threshold))
            best = (allowed[:, 1:2] - allowed[:, 0:1] >= level).to(torch.int64)
        else:
            best = allowed.argmax(1, keepdim=True)
        greedy = torch.zeros_like(allowed).scatter(1, best, 1.0)
        if self.chosen.policy != "epsilonGreedy":
            return greedy
        uniform = possible.to(allowed.dtype)
        uniform = uniform / uniform.sum(1, keepdim=True).clamp(min=1.0)
        return (1 - self.chosen.epsilon) * greedy + self.chosen.epsilon * uniform

    def over_lists(self, scores: Tensor, row: Tensor, decisions: int) -> Tensor:
        """The same for lists of actions end to end: scores [T], of which `row` [T] is the decision, -> [T]."""
        top = scores.new_full((decisions,), -torch.inf).scatter_reduce(0, row, scores, "amax")[row]
        if self.chosen.policy == "softmax":
            size = ((scores - top) / self.chosen.temperature).exp()
            return size / scores.new_zeros(decisions).index_add(0, row, size)[row]
        place = torch.where(scores >= top, torch.arange(len(scores)), len(scores))
        first = place.new_full((decisions,), len(scores)).scatter_reduce(0, row, place, "amin")
        greedy = (place == first[row]).to(scores.dtype)
        if self.chosen.policy != "epsilonGreedy":
            return greedy
        uniform = 1 / torch.bincount(row, minlength=decisions).to(scores.dtype)[row]
        return (1 - self.chosen.epsilon) * greedy + self.chosen.epsilon * uniform


IMPOSSIBLE = -1e30


class LogisticPolicy(nn.Module):
    """A behaviour policy over two actions: logistic in the raw features, mixed with uniform exploration.

    Its scores are log-probabilities, so that a softmax at temperature 1 gives the probabilities themselves.
    """

    def __init__(self, weights: list[float], exploration: float) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor(weights))
        self.exploration = exploration

    def forward(self, raw: Tensor) -> Tensor:
        """float32 [batch, features] -> log-probabilities, float32 [batch, 2]; a missing feature counts as 0."""
        second = torch.sigmoid(torch.nan_to_num(raw) @ self.get_buffer("weights").unsqueeze(1))
        second = self.exploration / 2 + (1 - self.exploration) * second
        return torch.log(torch.cat([1 - second, second], 1))
