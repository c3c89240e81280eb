"""Algorithms for actions that are listed, by name or by description: what each is worth, or how likely it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from components.training.algorithms.learner import (
    Batch,
    BootstrappingLearner,
    Learner,
    best,
    constrained,
    logsumexp,
    mean,
    negative_log_likelihood,
    score,
    score_taken,
    taken,
)
from components.training.network import CategoricalNetwork, ConstrainedNetwork, QuantileNetwork
from contracts import job


class BehaviourCloner(Learner):
    """Behaviour cloning (Pomerleau 1991): the logged policy by maximum likelihood.

    Minimizes -log pi(a | s), with pi a softmax of the scores over the possible actions.
    """

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        scores = score(self.network, batch.state, batch.possible)
        loss = negative_log_likelihood(scores, batch.action, batch.possible)
        return loss, taken(scores, batch.action, batch.possible).detach(), loss.detach()


class DQNLearner(BootstrappingLearner):
    """Deep Q-learning (Mnih et al. 2015): Huber's loss of Q(s, a) against r + discount * Q'(s', a').

    Q' follows Q slowly. a' is the best action at s' by Q when double (van Hasselt et al. 2016, arXiv 1509.06461,
    equation 4), else by Q', or the logged one (SARSA: Rummery and Niranjan 1994). Actions that are not possible at s'
    are never chosen. Over n steps r is r_1 + g_1 r_2 + ... + g_1..g_{n-1} r_n, the discount g_1..g_n, and s' the state
    after them (Sutton 1988; Hessel et al. 2018, arXiv 1710.02298).
    """

    def __init__(self, network: nn.Module, config: job.QLearning) -> None:
        super().__init__(network, config.target_update_rate)
        self.config = config

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            scores = score(self.target, batch.next_state, batch.next_possible)
            following = taken(scores, self.next_action(batch, scores), batch.next_possible)
            wanted = batch.reward + batch.discount * following
        q, penalty = self.value_and_penalty(batch)
        loss = functional.smooth_l1_loss(q, wanted)
        return loss if penalty is None else loss + penalty, q.detach(), loss.detach()

    def next_action(self, batch: Batch, by_target: Tensor) -> Tensor:
        """int64 [B]: the action whose value at the next state the target adds; `by_target` are the scores of Q'."""
        if self.config.next_action == "logged":
            return batch.next_action
        scores = score(self.network, batch.next_state, batch.next_possible) if self.config.double else by_target
        return best(scores, batch.next_possible)

    def value_and_penalty(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Q(s, a) of the logged actions, [B], and what the loss has beside the temporal difference."""
        return score_taken(self.network, batch.state, batch.action, batch.possible), None


class CQLLearner(DQNLearner):
    """Conservative Q-learning for discrete actions (Kumar et al. 2020, arXiv 2006.04779, equation 4, CQL(H)).

    Adds alpha * mean(log sum_a exp Q(s, a) - Q(s, a_logged)), over the actions that were possible.
    """

    config: job.CQL

    def value_and_penalty(self, batch: Batch) -> tuple[Tensor, Tensor]:
        values = score(self.network, batch.state, batch.possible)
        q = taken(values, batch.action, batch.possible)
        return q, self.config.alpha * (logsumexp(values, batch.possible) - q).mean()


class BCQLearner(DQNLearner):
    """Batch-constrained Q-learning of listed actions (Fujimoto et al. 2019, arXiv 1910.01708, equations 19-20).

    Double Q-learning whose a' is among the possible actions that the log would take: G(a' | s') is at least a threshold
    times max_b G(b | s'). G, a model of the logged policy, is learned with the values, by -log G(a | s) in the loss.
    """

    network: ConstrainedNetwork
    target: ConstrainedNetwork

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            # What may be chosen is said by the network that learns; the value is that of the one that follows.
            values = score(self.target.values, batch.next_state, batch.next_possible)
            following = taken(values, self.next_action(batch, values), batch.next_possible)
            wanted = batch.reward + batch.discount * following
        q = score_taken(self.network.values, batch.state, batch.action, batch.possible)
        logits = score(self.network.imitation, batch.state, batch.possible)
        imitation = negative_log_likelihood(logits, batch.action, batch.possible)
        # A logit that grows without bound says nothing more (the paper's own code regularizes it so).
        loss = functional.smooth_l1_loss(q, wanted)
        return loss + imitation + 1e-2 * mean(logits.square(), batch.possible), q.detach(), loss.detach()

    def next_action(self, batch: Batch, by_target: Tensor) -> Tensor:
        if self.config.next_action == "logged":
            return batch.next_action
        state, possible = batch.next_state, batch.next_possible
        scores = score(self.network.values, state, possible) if self.config.double else by_target
        logits = score(self.network.imitation, state, possible)
        return best(constrained(self.network, scores, logits, possible), possible)

    @property
    def valuing(self) -> nn.Module:
        return self.network.values


class C51Learner(DQNLearner):
    """The distribution of returns over fixed atoms (Bellemare et al. 2017, arXiv 1707.06887, algorithm 1).

    Minimizes the cross-entropy of the predicted distribution against that of r + discount * Z'(s', a'), whose mass is
    shared between the two atoms next to where it falls.
    """

    network: CategoricalNetwork
    target: CategoricalNetwork

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        atoms = self.network.get_buffer("atoms")
        width = (atoms[-1] - atoms[0]) / (len(atoms) - 1)
        with torch.no_grad():
            logits = score(self.target.logits, batch.next_state, batch.next_possible)
            action = self.next_action(batch, self.target.expected(logits))
            mass = torch.softmax(taken(logits, action, batch.next_possible), 1)
            fallen = (batch.reward.unsqueeze(1) + batch.discount.unsqueeze(1) * atoms).clamp(atoms[0], atoms[-1])
            place = (fallen - atoms[0]) / width
            # How much of each share falls to each atom: all where it falls upon it, nothing a width away.
            near = (1 - (place.unsqueeze(2) - torch.arange(len(atoms), device=atoms.device)).abs()).clamp(min=0)
            wanted = (mass.unsqueeze(2) * near).sum(1)
        predicted = score_taken(self.network.logits, batch.state, batch.action, batch.possible)
        loss = functional.cross_entropy(predicted, wanted)
        return loss, self.network.expected(predicted).detach(), loss.detach()


class QRDQNLearner(DQNLearner):
    """Quantiles of the distribution of returns (Dabney et al. 2018, arXiv 1710.10044, equations 9-10, kappa = 1).

    Minimizes sum_i mean_j |tau_i - 1[u_ij < 0]| Huber(u_ij) with u_ij = r + discount * theta'_j(s', a') - theta_i(s, a)
    and tau_i = (i + 0.5) / N, i = 0, ..., N - 1. Q is the mean of the N quantiles theta.
    """

    network: QuantileNetwork
    target: QuantileNetwork

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            quantiles = score(self.target.quantiles, batch.next_state, batch.next_possible)
            ahead = taken(quantiles, self.next_action(batch, quantiles.mean(-1)), batch.next_possible)
            wanted = batch.reward.unsqueeze(1) + batch.discount.unsqueeze(1) * ahead
        predicted = score_taken(self.network.quantiles, batch.state, batch.action, batch.possible)
        n = predicted.shape[1]
        level = (torch.arange(n, device=predicted.device) + 0.5) / n
        difference = wanted.unsqueeze(1) - predicted.unsqueeze(2)
        size = difference.abs()
        huber = torch.where(size > 1, size - 0.5, 0.5 * size.square())
        weight = (level.unsqueeze(1) - (difference.detach() < 0).float()).abs()
        loss = (weight * huber).mean(2).sum(1).mean()
        return loss, predicted.detach().mean(1), loss.detach()
