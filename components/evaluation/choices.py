"""What people choose from a slate, by a model that no policy was made with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from components.training.network import QNetwork

BATCH = 512
HIDDEN = [128, 128]
MOST_EPOCHS = 30
"""A model of few rows takes fewer steps, or it would learn them by heart."""


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


def fit_choices(state: Tensor, items: Tensor, chosen: Tensor, steps: int, seed: int) -> ChoiceModel:
    """The model fitted to logged choices int64 [N], k where nothing was chosen, by maximum likelihood."""
    torch.manual_seed(seed)
    model = ChoiceModel(state.shape[1], items.shape[2])
    steps = min(steps, 1 + MOST_EPOCHS * len(chosen) // BATCH)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(chosen), (BATCH,), generator=generator)
        loss = functional.cross_entropy(model.logits(state[rows], items[rows]), chosen[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return model.eval()
