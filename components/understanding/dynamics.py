"""Models of what follows a decision, and stand-ins for what they may not know."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from components.normalization.graph import NormalizationGraph
from components.normalization.spec import NormalizationSpec
from components.transitions import Lists, Transitions

BATCH = 512
HIDDEN = 128
OTHER = " = other"
"""Of the name of an outcome: an enum's next value is none of those seen, which the log itself may never show."""
MOST_EPOCHS = 30
"""A model of few rows takes fewer steps, or it would learn them by heart."""


@dataclass(frozen=True)
class Outcomes:
    """N transitions as a regression: what was known at a decision, and O outcomes after it."""

    state: Tensor  # float32 [N, S], normalized
    features: dict[str, np.ndarray]  # columns of the state by feature
    action: Tensor  # float32 [N, A], one-hot; of others their standardized numbers, item by item of slates
    named: bool  # whether actions are names
    possible: Tensor | None  # bool [N, A], of names those that could be taken
    propensity: Tensor  # float32 [N], NaN = not logged
    before: Tensor  # float32 [N, S + A + 1]: the step before, and 1; all 0 where there is none
    values: Tensor  # float32 [N, O], each with mean 0 and variance 1 over the rows that have it
    present: Tensor  # bool [N, O]; an MDP's last step has no next state
    names: list[str]  # of the outcomes: `next FEATURE`, `reward`, `goes on`
    steady: list[str]  # outcomes that never vary, and so are left out
    mdp: np.ndarray  # int64 [N]


def outcomes(data: Transitions, normalization: NormalizationSpec, reward: np.ndarray) -> Outcomes:
    """What was known at each decision whose successor is known, and what followed it."""
    graph = NormalizationGraph(normalization)
    with torch.no_grad():
        state = graph(torch.from_numpy(data.state))
    action, named = _action(data)
    follows = np.append(False, (data.mdp[1:] == data.mdp[:-1]) & ~(data.terminal | data.truncated)[:-1])
    before = torch.cat([state, action, torch.ones(len(data), 1)], 1).roll(1, 0)
    before *= torch.from_numpy(follows).float().unsqueeze(1)

    goes_on = torch.from_numpy(~data.terminal)
    following = torch.cat([state[data.next_row], torch.from_numpy(reward)[:, None], goes_on.float()[:, None]], 1)
    present = torch.ones(following.shape, dtype=torch.bool)
    present[:, : state.shape[1]] = goes_on[:, None]
    names = [*_next_names(graph.output_features, normalization), "reward", "goes on"]

    usable = torch.from_numpy(~data.truncated)
    following, present = following[usable].double(), present[usable]
    counts = present.sum(0).clamp(min=1)
    mean = (following * present).sum(0) / counts
    spread = ((following - mean).square() * present).sum(0).div(counts).sqrt()
    least, most = (torch.where(present, following, end) for end in (torch.inf, -torch.inf))
    varies = most.amax(0) > least.amin(0) if len(following) else torch.zeros(len(names), dtype=torch.bool)
    values = torch.where(present, (following - mean) / torch.where(varies, spread, 1.0), 0.0)
    sources = np.array(graph.output_features)
    return Outcomes(
        state=state[usable],
        features={name: np.flatnonzero(sources == name) for name in dict.fromkeys(graph.output_features)},
        action=action[usable],
        named=named,
        possible=torch.from_numpy(np.asarray(data.possible))[usable] if named else None,
        propensity=torch.from_numpy(data.propensity).float()[usable],
        before=before[usable],
        values=values[:, varies].float(),
        present=present[:, varies],
        names=[name for name, kept in zip(names, varies.tolist(), strict=True) if kept],
        steady=[name for name, kept in zip(names, varies.tolist(), strict=True) if not (kept or name.endswith(OTHER))],
        mdp=data.mdp[usable.numpy()],
    )


def _action(data: Transitions) -> tuple[Tensor, bool]:
    """The logged actions as numbers, float32 [N, A], and whether those only tell names apart."""
    if isinstance(data.possible, Lists):
        numbers = data.possible.described[data.possible.taken(data.action)].reshape(len(data), -1)
    elif data.action.ndim == 2:
        numbers = data.action
    else:
        return nn.functional.one_hot(torch.from_numpy(data.action), len(data.actions)).float(), True
    # What is missing is the mean, as in the networks; that it is missing may tell items apart.
    missing = np.isnan(numbers)
    numbers = np.concatenate([numbers, missing[:, missing.any(0) & ~missing.all(0)]], 1)
    mean, spread = np.nanmean(numbers, 0), np.nanstd(numbers, 0)
    return torch.from_numpy(np.nan_to_num((numbers - mean) / np.where(spread > 0, spread, 1)).astype(np.float32)), False


def _next_names(features: list[str], normalization: NormalizationSpec) -> list[str]:
    """A name for each normalized column of the next state; an enum has one for each of its values, and one more."""
    enums = {f.name: f.values for f in normalization.features if f.type == "enum"}
    seen: Counter[str] = Counter()
    names = []
    for feature in features:
        values = [f" = {value:g}" for value in enums[feature]] + [OTHER] if feature in enums else [""]
        names.append(f"next {feature}{[*values, ' is there'][seen[feature]]}")
        seen[feature] += 1
    return names


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
    steps = min(steps, 1 + MOST_EPOCHS * len(rows) // BATCH)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = np.random.default_rng(seed)
    for _ in range(steps):
        batch = torch.from_numpy(generator.choice(rows, min(BATCH, len(rows))))
        here = present[batch]
        loss = ((model(x[batch]) - y[batch]).square() * here).sum() / here.sum().clamp(min=1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def squared_errors(expected: Tensor, values: Tensor, present: Tensor) -> Tensor:
    """float32 [N, O], 0 where the outcome is not present."""
    return torch.where(present, (expected - values).square(), 0.0)


def likely_action(data: Outcomes, rows: np.ndarray, steps: int, seed: int) -> Tensor:
    """An action drawn as the logged one was, as far as the state tells, float32 [N, A].

    It says about the state what the logged action says, and nothing else: what is explained beyond it is the action's
    doing. This is the conditional randomization of Candes et al. 2018 (arXiv 1610.02351, section 4.1), as is
    `likely_before`. Where the propensity p was logged, the action stays with probability p; else, and among the others,
    probabilities fitted to `rows` decide, of what was possible. Of actions that are numbers, what the state tells of
    them stays, and the rest is another decision's.
    """
    if not data.named:
        everywhere = torch.ones(len(data.action), 1, dtype=torch.bool)
        return _with_anothers_rest(data.state, data.action, everywhere, rows, steps, seed)
    model = fit(data.state, data.action, torch.ones_like(data.action, dtype=torch.bool), rows, steps, seed)
    with torch.no_grad():
        probability = model(data.state).clamp(min=1e-6)
    generator = torch.Generator().manual_seed(seed)
    known = ~data.propensity.isnan()
    if data.possible is not None:
        probability = probability * (data.possible | (data.action > 0))
    # Drawn again without itself, an action that does not stay leaves the others in their proportions.
    others = torch.where(data.action > 0, 0.0, probability)
    probability = torch.where(known[:, None] & (others.sum(1, keepdim=True) > 0), others, probability)
    drawn = nn.functional.one_hot(
        torch.multinomial(probability, 1, generator=generator).squeeze(1), probability.shape[1]
    )
    stays = known & (torch.rand(len(known), generator=generator) < data.propensity)
    return torch.where(stays[:, None], data.action, drawn.float())


def likely_before(data: Outcomes, rows: np.ndarray, steps: int, seed: int) -> Tensor:
    """A step before that is as likely, but knows no more than the state and the action, float32 [N, S + A + 1].

    What they tell of the step before, by a model fitted to `rows`, stays; the rest is another decision's. The rest of
    `rows` themselves is smaller than it should be, the model having seen them: do not use theirs.
    """
    now = torch.cat([data.state, data.action], 1)
    made = _with_anothers_rest(now, data.before, data.before[:, -1:] > 0, rows, steps, seed)
    made[:, -1] = data.before[:, -1]
    return made


def _with_anothers_rest(x: Tensor, y: Tensor, known: Tensor, rows: np.ndarray, steps: int, seed: int) -> Tensor:
    """y where it is `known` [N, 1], of which what x tells stays, and outside of `rows` the rest is another row's."""
    there = np.flatnonzero(known.squeeze(1).numpy())
    usable = np.intersect1d(rows, there)
    if len(usable) == 0:
        return y.clone()
    model = fit(x, y, known.expand_as(y), usable, steps, seed)
    with torch.no_grad():
        expected = model(x)
    rest = y - expected
    others = np.setdiff1d(there, rows)
    rest[others] = rest[np.random.default_rng(seed).permutation(others)]
    return torch.where(known, expected + rest, 0.0)
