"""A model of what follows a decision, fitted with more and with less of what it may know."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from components.normalization.graph import NormalizationGraph
from components.normalization.spec import NormalizationSpec
from components.transitions import Transitions

BATCH = 512
HIDDEN = 128


@dataclass(frozen=True)
class Outcomes:
    """N transitions as a regression: K known columns before a decision, O outcomes after it."""

    known: Tensor  # float32 [N, K]: normalized state, action, and both of the step before; 0 where there is none
    sources: dict[str, np.ndarray]  # columns of `known` by what they tell: "action", "before", or a feature's name
    values: Tensor  # float32 [N, O], each with mean 0 and variance 1 over the rows that have it
    present: Tensor  # bool [N, O]; an MDP's last step has no next state
    names: list[str]  # of the outcomes: `next FEATURE`, `reward`, `goes on`
    steady: list[str]  # outcomes that never vary, and so are left out
    mdp: np.ndarray  # int64 [N]

    def without(self, *sources: str) -> Tensor:
        """`known` with the columns of these sources set to 0."""
        known = self.known.clone()
        for source in sources:
            known[:, self.sources[source]] = 0.0
        return known


def outcomes(data: Transitions, normalization: NormalizationSpec, reward: np.ndarray) -> Outcomes:
    """What was known at each decision whose successor is known, and what followed it."""
    with torch.no_grad():
        graph = NormalizationGraph(normalization)
        state = graph(torch.from_numpy(data.state))
    action = nn.functional.one_hot(torch.from_numpy(data.action), len(data.actions)).float()
    follows = np.append(False, (data.mdp[1:] == data.mdp[:-1]) & ~(data.terminal | data.truncated)[:-1])
    before = torch.cat([state, action, torch.ones(len(data), 1)], 1).roll(1, 0)
    before *= torch.from_numpy(follows).float().unsqueeze(1)

    goes_on = torch.from_numpy(~data.terminal)
    following = torch.cat([state[data.next_row], torch.from_numpy(reward)[:, None], goes_on.float()[:, None]], 1)
    features = graph.output_features
    names = [f"next {name}" for name in features] + ["reward", "goes on"]
    present = torch.ones(following.shape, dtype=torch.bool)
    present[:, : len(features)] = goes_on[:, None]

    usable = torch.from_numpy(~data.truncated)
    following, present = following[usable], present[usable]
    counts = present.sum(0).clamp(min=1)
    mean = (following * present).sum(0) / counts
    variance = ((following - mean).square() * present).sum(0) / counts
    varies = variance > 1e-8
    values = ((following - mean) / variance.clamp(min=1e-8).sqrt()) * present

    kinds = np.array([*features, *["action"] * action.shape[1], *["before"] * before.shape[1]])
    return Outcomes(
        known=torch.cat([state, action, before], 1)[usable],
        sources={kind: np.flatnonzero(kinds == kind) for kind in dict.fromkeys(kinds.tolist())},
        values=values[:, varies],
        present=present[:, varies],
        names=[name for name, kept in zip(names, varies.tolist(), strict=True) if kept],
        steady=[name for name, kept in zip(names, varies.tolist(), strict=True) if not kept],
        mdp=data.mdp[usable.numpy()],
    )


class Expectation(nn.Module):
    """Expected value of y given x: a linear part, for what merely goes on, and a network for the rest."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.network = nn.Sequential(
            nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        """float32 [batch, inputs] -> float32 [batch, outputs]."""
        expected: Tensor = self.linear(x) + self.network(x)
        return expected


def fit(x: Tensor, y: Tensor, present: Tensor, rows: np.ndarray, steps: int, seed: int) -> Expectation:
    """E[y | x] fitted to `rows` by least squares over the values that are `present`.

    For one width of x, the same seed gives the same first weights and the same batches, so that two models differ by
    what they are shown alone.
    """
    torch.manual_seed(seed)
    model = Expectation(x.shape[1], y.shape[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = np.random.default_rng(seed)
    for _ in range(steps):
        batch = torch.from_numpy(generator.choice(rows, min(BATCH, len(rows))))
        here = present[batch]
        loss = ((model(x[batch]) - y[batch]).square() * here).sum() / here.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def squared_errors(expected: Tensor, data: Outcomes) -> Tensor:
    """float32 [N, O], 0 where the outcome is not present."""
    return torch.where(data.present, (expected - data.values).square(), 0.0)


def without_memory(data: Outcomes, rows: np.ndarray, steps: int, seed: int) -> Tensor:
    """`known` with the step before replaced by one that is as likely, but knows no more than the state and the action.

    What they tell of the step before stays, the rest is another decision's: the conditional randomization of Candes
    et al. 2018 (arXiv 1610.02351, section 4.1), with a fitted mean.
    """
    columns = data.sources["before"]
    before = data.known[:, columns]
    has_before = before[:, -1:] > 0
    now = data.without("before")
    known = np.flatnonzero(has_before.squeeze(1).numpy())
    usable = np.intersect1d(rows, known)
    if len(usable) == 0:
        return data.known
    model = fit(now, before, has_before.expand_as(before), usable, steps, seed)
    with torch.no_grad():
        expected = model(now)
    rest = before - expected
    generator = np.random.default_rng(seed)
    for part in (usable, np.setdiff1d(known, rows)):
        rest[part] = rest[generator.permutation(part)]
    now[:, columns] = torch.where(has_before, expected + rest, 0.0)
    now[:, columns[-1]] = before[:, -1]
    return now
