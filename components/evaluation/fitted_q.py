"""Models of a policy's action values, fitted to logged transitions, one value per metric."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from components.evaluation.acted import PAIRS, Plan
from components.normalization.graph import NormalizationGraph
from components.normalization.spec import NormalizationSpec
from components.training.algorithms.learner import BootstrappingLearner, taken
from components.training.network import QNetwork
from components.transitions import Transitions

BATCH = 512
HIDDEN = [128, 128]
TARGET_UPDATE_RATE = 0.05
REMAINDER = 0.05
"""Of what a fit began with, in values that it has reached."""
MOST_STEPS = 50_000
"""That a fit takes to reach all that it should."""


class FittedQ:
    """Fitted Q evaluation (Le et al. 2019, arXiv 1903.08738, algorithm 3) by stochastic gradient steps.

    Q(s, a) in R^M moves towards metrics + discount * sum_a' pi(a'|s') Q'(s', a'), with a discount for each row, [N].
    Where all are 0 this is the regression of the metrics themselves, the direct method's model. Fits go on from the one
    before, so that the policy of the next epoch needs few steps; `reach` are those after which little is left of what
    the fit began with.

    Off the log's beaten track such a fit can run away. Layer normalization bounds what it says there (Ball et al. 2023,
    arXiv 2302.02948, section 4.2), and no value is followed beyond what the metric's logged extremes would sum to.
    """

    def __init__(self, data: Transitions, normalization: NormalizationSpec, discount: np.ndarray, seed: int) -> None:
        torch.manual_seed(seed)
        self.normalization = NormalizationGraph(normalization)
        self.network = self._network(self.normalization.outputs, data)
        self.learner = BootstrappingLearner(self.network, TARGET_UPDATE_RATE)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-3, fused=True)
        self.generator = torch.Generator().manual_seed(seed)
        ahead = discount[~(data.terminal | data.truncated)]
        self.looks_ahead = bool(ahead.any())
        usable = ~data.truncated if self.looks_ahead else np.ones(len(data), bool)
        self.rows = torch.from_numpy(np.flatnonzero(usable))
        self.state = self.normalization(torch.from_numpy(data.state))
        self.action = self._actions(data)
        self.next_row = torch.from_numpy(data.next_row)
        self.discount = torch.from_numpy(np.where(data.terminal, np.float32(0), discount)).unsqueeze(1)
        # Metrics differ in size by orders of magnitude; each is fitted in units of its own root mean square.
        metrics = torch.from_numpy(data.metrics)
        size = metrics.square().mean(0).sqrt()
        self.scale = torch.where(size > 0, size, 1.0)
        self.metrics = scaled = metrics / self.scale

        most = float(ahead.max(initial=0.0))
        forever = 1 / (1 - most) if most < 1 else torch.inf
        self.reach = self._reach(most, int(np.bincount(data.mdp).max())) if self.looks_ahead else 0
        self.lowest = torch.where(scaled.amin(0) < 0, scaled.amin(0) * forever, 0.0)
        self.highest = torch.where(scaled.amax(0) > 0, scaled.amax(0) * forever, 0.0)

    @staticmethod
    def _reach(discount: float, longest: int) -> int:
        """Steps that a first guess needs to fade by the discount, or values to come from the end of the longest MDP."""
        # A value comes one decision closer every 1 / rate steps, give or take: the square root makes sure.
        steps = (longest + 1.65 * math.sqrt(longest)) / TARGET_UPDATE_RATE
        if discount < 1:
            steps = min(steps, math.log(REMAINDER) / math.log1p(-TARGET_UPDATE_RATE * (1 - discount)))
        return min(math.ceil(steps), MOST_STEPS)

    def _network(self, inputs: int, data: Transitions) -> QNetwork:
        return QNetwork(inputs, len(data.actions), HIDDEN, outputs=len(data.metric_names), layer_norm=True)

    def _actions(self, data: Transitions) -> Tensor:
        return torch.from_numpy(data.action)

    def _expected(self, rows: Tensor, policy: Any) -> Tensor:
        """What follows is worth at the rows [B] under the policy, [B, M]."""
        probabilities = torch.from_numpy(policy[rows.numpy()]).float()
        values = self.learner.target(self.state.index_select(0, rows))
        return torch.bmm(probabilities.unsqueeze(1), values).squeeze(1)

    def _logged(self, rows: Tensor) -> Tensor:
        """Q(s, a) of the logged actions, [B, M]."""
        values = self.network(self.state.index_select(0, rows))
        return taken(values, self.action.index_select(0, rows), None)

    def fit(self, policy: Any, steps: int) -> None:
        """Take `steps` steps towards the values of `policy`, probabilities [N, A] at the rows of the data."""
        for _ in range(steps):
            rows = self.rows[torch.randint(len(self.rows), (BATCH,), generator=self.generator)]
            wanted = self.metrics.index_select(0, rows)
            if self.looks_ahead:
                following = self.next_row.index_select(0, rows)
                with torch.no_grad():
                    value = self._expected(following, policy).clamp(self.lowest, self.highest)
                wanted = wanted + self.discount.index_select(0, rows) * value
            q = self._logged(rows)
            # Squared, not Huber's, whose minimum is not the mean: a rare event would be estimated as none.
            loss = nn.functional.mse_loss(q, wanted)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.learner.follow()

    def predict(self, state: np.ndarray) -> np.ndarray:
        """Action values per metric, float64 [N, A, M]."""
        with torch.no_grad():
            return np.asarray((self.network(self.normalization(torch.from_numpy(state))) * self.scale).double().numpy())


class FittedPairs(FittedQ):
    """The same over states and actions that are described or continuous: a policy is a `Plan` of what it may take."""

    def __init__(
        self, data: Transitions, normalization: NormalizationSpec, action: Tensor, discount: np.ndarray, seed: int
    ) -> None:
        """`action` [N, G]: normalized features of the logged ones."""
        self.features = action
        super().__init__(data, normalization, discount, seed)

    def _network(self, inputs: int, data: Transitions) -> QNetwork:
        width = inputs + self.features.shape[1]
        return QNetwork(width, 1, HIDDEN, outputs=len(data.metric_names), layer_norm=True)

    def _actions(self, data: Transitions) -> Tensor:
        return self.features

    def _expected(self, rows: Tensor, policy: Plan) -> Tensor:
        return _over_plan(self.learner.target, self.state.index_select(0, rows), policy, rows)

    def _logged(self, rows: Tensor) -> Tensor:
        pairs = [values.index_select(0, rows) for values in (self.state, self.action)]
        found: Tensor = self.network(torch.cat(pairs, 1)).squeeze(1)
        return found

    def predict_acted(self, state: np.ndarray, *plans: Plan) -> np.ndarray:
        """What each of P plans is worth per metric, float64 [N, P, M]."""
        with torch.no_grad():
            known = self.normalization(torch.from_numpy(state))
            found = []
            for each in plans:
                size = max(1, PAIRS * len(known) // max(1, len(each.items)))
                parts = (torch.arange(i, min(i + size, len(known))) for i in range(0, len(known), size))
                found.append(torch.cat([_over_plan(self.network, known[rows], each, rows) for rows in parts]))
            return np.asarray((torch.stack(found, 1) * self.scale).double().numpy())


def _over_plan(network: nn.Module, state: Tensor, policy: Plan, rows: Tensor) -> Tensor:
    """Values of the states [B, F] at the rows [B] under the policy, [B, M]."""
    row, features, probability = policy.at(rows)
    values = network(torch.cat([state.index_select(0, row), features], 1)).squeeze(1) * probability.unsqueeze(1)
    return values.new_zeros(len(rows), values.shape[1]).index_add(0, row, values)
