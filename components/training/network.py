"""Networks that map a raw state to one score per action."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from components.normalization.graph import NormalizationGraph
from components.normalization.spec import NormalizationSpec


class QNetwork(nn.Module):
    """Q-values from raw features: normalization, fully connected layers, then one head, or two when dueling.

    The dueling heads combine as Q = V + A - mean(A) (Wang et al. 2016, arXiv 1511.06581, equation 9).
    With `outputs`, each action has a vector of that many values.
    """

    def __init__(
        self,
        normalization: NormalizationSpec,
        actions: int,
        hidden_layers: list[int],
        dueling: bool = False,
        outputs: int | None = None,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        if dueling and outputs:
            raise ValueError("a dueling network has one output per action")
        self.normalization = NormalizationGraph(normalization)
        widths = [self.normalization.outputs, *hidden_layers]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), *([nn.LayerNorm(after)] if layer_norm else []), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.advantage = nn.Linear(widths[-1], actions * (outputs or 1))
        self.value = nn.Linear(widths[-1], 1) if dueling else None
        self.shape = (actions, outputs) if outputs else (actions,)

    def forward(self, raw: Tensor) -> Tensor:
        """float32 [batch, features], NaN = missing -> float32 [batch, actions] or [batch, actions, outputs]."""
        hidden = self.body(self.normalization(raw))
        scores: Tensor = self.advantage(hidden).view(-1, *self.shape)
        if self.value is not None:
            scores = self.value(hidden) + scores - scores.mean(1, keepdim=True)
        return scores


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
