"""Contextual bandits: what an action brings at once, by models that know how sure they are."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from components.training import shared
from components.training.algorithms.learner import Batch, Learner, taken

NODES = 161


class LinearRewards(nn.Module):
    """Ridge regression of the reward on the normalized features and 1, for each action by itself.

    Of each action the sum of x x^T over its decisions, and that of reward * x; `settle` finds from them the weights
    theta = (lambda I + sum x x^T)^-1 sum reward x and their covariance.
    """

    def __init__(self, inputs: int, actions: int, regularization: float) -> None:
        super().__init__()
        self.regularization, width = regularization, inputs + 1
        for name, shape in (
            ("outer", (actions, width, width)),
            ("moment", (actions, width)),
            ("theta", (actions, width)),
            ("covariance", (actions, width, width)),
        ):
            self.register_buffer(name, torch.zeros(shape))
        self.settle()

    def add(self, x: Tensor, action: Tensor, reward: Tensor) -> None:
        """Decisions [B] with normalized features [B, F]; of all workers, where there are several."""
        known, actions = _with_one(x), torch.arange(len(self.get_buffer("moment")), device=x.device)
        # Each action's sum is over all decisions, most of them times 0: which are its own, the device would be asked.
        took = (action == actions.unsqueeze(1)).to(x.dtype)
        outer = torch.stack([known.T * own @ known for own in took])
        moment = took * reward @ known
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(outer)
            dist.all_reduce(moment)
        self.get_buffer("outer").add_(outer)
        self.get_buffer("moment").add_(moment)

    def settle(self) -> None:
        """Find the weights."""
        outer = self.get_buffer("outer").double()
        outer = outer + self.regularization * torch.eye(outer.shape[1], dtype=outer.dtype, device=outer.device)
        # Without a check whether it has one, for which the device would be asked: of what is positive definite, it has.
        covariance, _ = torch.linalg.inv_ex(outer)
        theta = torch.einsum("aij,aj->ai", covariance, self.get_buffer("moment").double())
        self.get_buffer("covariance").copy_(covariance)
        self.get_buffer("theta").copy_(theta)

    def forward(self, x: Tensor) -> Tensor:
        """Expected rewards: float32 [B, F] -> [B, A]."""
        return _with_one(x) @ self.get_buffer("theta").T

    def deviation(self, x: Tensor) -> Tensor:
        """How unsure they are, in units of the noise's deviation: [B, A]."""
        known = _with_one(x)
        variance = torch.einsum("bi,aij,bj->ba", known, self.get_buffer("covariance"), known)
        return variance.clamp(min=1e-12).sqrt()


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


class UpperBounds(nn.Module):
    """LinUCB (Li et al. 2010, arXiv 1003.0146, algorithm 1): the expected reward and alpha times its deviation.

    theta_a . x + alpha sqrt(x^T A_a^-1 x), with A_a = lambda I + sum x x^T.
    """

    def __init__(self, rewards: LinearRewards, alpha: float) -> None:
        super().__init__()
        self.rewards, self.alpha = rewards, alpha

    def forward(self, x: Tensor) -> Tensor:
        return self.rewards(x) + self.alpha * self.rewards.deviation(x)


class ThompsonSampling(nn.Module):
    """Linear Thompson sampling (Agrawal and Goyal 2013, arXiv 1209.3352): log-probabilities of being the best action.

    So a softmax at temperature 1 acts as if rewards were drawn from the posterior N(theta_a . x, (v s_a)^2), with s_a
    the deviation and v the noise's, and with propensities that are known: the integral over an action's reward r of its
    density times the product over the others of P(r_b < r).
    """

    def __init__(self, rewards: LinearRewards, deviation: float) -> None:
        super().__init__()
        self.rewards, self.noise = rewards, deviation
        nodes = torch.linspace(-5, 5, NODES)
        self.register_buffer("nodes", nodes)
        self.register_buffer("log_density", torch.log_softmax(-nodes.square() / 2, 0))

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = self.rewards(x), self.noise * self.rewards.deviation(x)
        at = mean.unsqueeze(2) + deviation.unsqueeze(2) * self.get_buffer("nodes")  # [B, A, nodes]
        actions = mean.shape[1]
        total = self.get_buffer("log_density").expand(*at.shape)
        for other in range(actions):
            ahead = (at - mean[:, other, None, None]) / deviation[:, other, None, None]
            lower = log_normal_cdf(ahead)
            # An action need not be better than itself.
            itself = torch.arange(actions, device=x.device)[:, None] == other
            total = total + torch.where(itself, 0.0, lower)
        best = total.logsumexp(2)
        return best - best.logsumexp(1, keepdim=True)


def log_normal_cdf(x: Tensor) -> Tensor:
    """Within 2e-4 of the normal distribution (Bowling et al. 2009), and without a loss of digits far out."""
    x = x.clamp(-1e3, 1e3)
    return -functional.softplus(-(1.5976 * x + 0.07056 * x * x * x))


class LinearBandit(Learner):
    """Learns by counting, not by steps: each decision once, in the first pass, however often batches show it."""

    network: UpperBounds | ThompsonSampling

    def __init__(self, network: UpperBounds | ThompsonSampling) -> None:
        super().__init__(network)
        self.rows, self.seen = math.inf, 0

    def expect(self, rows: int) -> None:
        self.rows = rows

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.seen)

    def set_extra_state(self, state: Tensor) -> None:
        self.seen = int(state)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        expected = taken(self.network.rewards(batch.state), batch.action, None)
        mine = len(batch.reward)
        first, whole = shared.place(mine)
        # A batch may go over into the next pass.
        new = int(min(max(self.rows - self.seen - first, 0), mine))
        self.seen += whole
        with torch.no_grad():
            self.network.rewards.add(batch.state[:new], batch.action[:new], batch.reward[:new])
        loss = functional.mse_loss(expected, batch.reward)
        return loss, expected, loss

    def settle(self) -> None:
        self.network.rewards.settle()

    @property
    def valuing(self) -> nn.Module:
        return self.network.rewards


class LogisticBandit(Learner):
    """The probability of a reward by a logistic model of each action; scores are its logits.

    Minimizes the cross-entropy of sigmoid(theta_a . x) against the reward (Hosmer and Lemeshow 2000, section 1.2;
    served by epsilon-greedy, Sutton and Barto 2018, section 2.2).
    """

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        logit = taken(self.network(batch.state), batch.action, None)
        loss = functional.binary_cross_entropy_with_logits(logit, batch.reward)
        return loss, torch.sigmoid(logit.detach()), loss.detach()

    def examine(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        logged, own, action = super().examine(batch)
        return torch.sigmoid(logged), torch.sigmoid(own), action
