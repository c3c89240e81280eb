"""The algorithms: what is minimized over a batch of transitions, and the network that it leaves."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from components.normalization.graph import NormalizationGraph
from components.normalization.spec import NormalizationSpec
from components.training.network import (
    IMPOSSIBLE,
    CategoricalNetwork,
    ConstrainedNetwork,
    Normalized,
    QNetwork,
    QuantileNetwork,
)
from contracts import job


@dataclass(frozen=True)
class Batch:
    """B transitions over F features and A actions, each over as many decisions as the algorithm looks ahead."""

    state: Tensor  # float32 [B, F], normalized
    action: Tensor  # int64 [B]
    possible: Tensor | None  # bool [B, A]; None where all actions are
    reward: Tensor  # float32 [B], the discounted sum over the decisions
    next_state: Tensor  # float32 [B, F]; any finite value where terminal
    next_action: Tensor  # int64 [B], the logged one
    next_possible: Tensor | None  # bool [B, A]; likewise
    terminal: Tensor  # bool [B]
    discount: Tensor  # float32 [B], what a value at the next state counts for


class Learner(nn.Module):
    """What a step of an optimizer lowers: a call with a batch returns the loss and the mean score of logged actions.

    `network` maps normalized features to a score for each action, on which the served policy acts.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def values(self, state: Tensor) -> Tensor:
        """What is learned of each action, [B, F] -> [B, A], whether it is to be taken or not."""
        found: Tensor = self.network(state)
        return found

    def compute_in(self, precision: str) -> None:
        """Compute the hidden layers in `float32` or `bfloat16`."""
        for module in self.modules():
            if isinstance(module, QNetwork):
                module.reduced = precision == "bfloat16"

    def follow(self) -> None:
        """Let what follows the network slowly take a step towards it."""

    def catch_up(self) -> None:
        """Let it be where the network is."""


class BehaviourCloner(Learner):
    """The logged policy by maximum likelihood: minimizes -log pi(a | s) over the possible actions."""

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        scores = self.network(batch.state)
        loss = functional.cross_entropy(_possible_only(scores, batch.possible), batch.action)
        return loss, _of(scores, batch.action).detach().mean()


class DQNLearner(Learner):
    """Deep Q-learning (Mnih et al. 2015): Huber's loss of Q(s, a) against r + discount * Q'(s', a').

    Q' follows Q slowly. a' is the best action at s' by Q when double (van Hasselt et al. 2016, arXiv 1509.06461,
    equation 4), else by Q', or the logged one (SARSA). Actions that are not possible at s' are never chosen. Q' has no
    noise where layers are noisy.
    """

    def __init__(self, network: nn.Module, config: job.QLearning) -> None:
        super().__init__(network)
        self.target = copy.deepcopy(network).requires_grad_(False).eval()
        self.config = config
        self._slow: list[Tensor] = list(self.target.parameters())
        self._fast: list[Tensor] = list(network.parameters())

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            scores = self.target(batch.next_state)
            following = _of(scores, self.next_action(batch, scores))
            wanted = batch.reward + batch.discount * torch.where(batch.terminal, 0.0, following)
        values = self.network(batch.state)
        q = _of(values, batch.action)
        return functional.smooth_l1_loss(q, wanted) + self.penalty(values, q, batch), q.detach().mean()

    def next_action(self, batch: Batch, by_target: Tensor) -> Tensor:
        """int64 [B]: the action whose value at the next state the target adds; `by_target` are the scores of Q'."""
        if self.config.next_action == "logged":
            return batch.next_action
        scores = self.network(batch.next_state) if self.config.double else by_target
        return _possible_only(scores, batch.next_possible).argmax(1)

    def penalty(self, values: Tensor, q: Tensor, batch: Batch) -> Tensor | float:
        """What the loss has beside the temporal difference; `values` are Q(s, .), `q` those of the logged actions."""
        return 0.0

    def follow(self) -> None:
        with torch.no_grad():
            torch._foreach_lerp_(self._slow, self._fast, self.config.target_update_rate)

    def catch_up(self) -> None:
        self.target.load_state_dict(self.network.state_dict())


class CQLLearner(DQNLearner):
    """Conservative Q-learning for discrete actions (Kumar et al. 2020, arXiv 2006.04779, equation 4, CQL(H)).

    Adds alpha * mean(log sum_a exp Q(s, a) - Q(s, a_logged)), over the actions that were possible.
    """

    config: job.CQL

    def penalty(self, values: Tensor, q: Tensor, batch: Batch) -> Tensor:
        return self.config.alpha * (_possible_only(values, batch.possible).logsumexp(1) - q).mean()


class BCQLearner(DQNLearner):
    """Batch-constrained Q-learning for discrete actions (Fujimoto et al. 2019, arXiv 1910.01708, equations 19-20).

    A model of the logged policy, learned with the values, says which actions may be chosen. Where none of them is
    possible, the likeliest that is stands in.
    """

    network: ConstrainedNetwork
    target: ConstrainedNetwork

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            # What may be chosen is said by the network that learns; the value is that of the one that follows.
            values = self.target.values(batch.next_state)
            following = _of(values, self.next_action(batch, values))
            wanted = batch.reward + batch.discount * torch.where(batch.terminal, 0.0, following)
        q = _of(self.network.values(batch.state), batch.action)
        logits = self.network.imitation(batch.state)
        imitation = functional.cross_entropy(_possible_only(logits, batch.possible), batch.action)
        # A logit that grows without bound says nothing more (the paper's own code regularizes it so).
        return functional.smooth_l1_loss(q, wanted) + imitation + 1e-2 * logits.square().mean(), q.detach().mean()

    def next_action(self, batch: Batch, by_target: Tensor) -> Tensor:
        if self.config.next_action == "logged":
            return batch.next_action
        scores = self.network.values(batch.next_state) if self.config.double else by_target
        chosen = self.network.constrained(scores, self.network.imitation(batch.next_state))
        return _possible_only(chosen, batch.next_possible).argmax(1)

    def values(self, state: Tensor) -> Tensor:
        return self.network.values(state)


class C51Learner(DQNLearner):
    """The distribution of returns over fixed atoms (Bellemare et al. 2017, arXiv 1707.06887, algorithm 1).

    Minimizes the cross-entropy of the predicted distribution against that of r + discount * Z'(s', a'), whose mass is
    shared between the two atoms next to where it falls.
    """

    network: CategoricalNetwork
    target: CategoricalNetwork

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        atoms = self.network.get_buffer("atoms")
        width = (atoms[-1] - atoms[0]) / (len(atoms) - 1)
        with torch.no_grad():
            logits = self.target.logits(batch.next_state)
            action = self.next_action(batch, self.target.expected(logits))
            mass = torch.softmax(_of(logits, action), 1)
            ahead = torch.where(batch.terminal, 0.0, batch.discount).unsqueeze(1) * atoms
            fallen = (batch.reward.unsqueeze(1) + ahead).clamp(atoms[0], atoms[-1])
            place = (fallen - atoms[0]) / width
            # How much of each share falls to each atom: all where it falls upon it, nothing a width away.
            near = (1 - (place.unsqueeze(2) - torch.arange(len(atoms), device=atoms.device)).abs()).clamp(min=0)
            wanted = (mass.unsqueeze(2) * near).sum(1)
        predicted = _of(self.network.logits(batch.state), batch.action)
        return functional.cross_entropy(predicted, wanted), self.network.expected(predicted).detach().mean()


class QRDQNLearner(DQNLearner):
    """Quantiles of the distribution of returns (Dabney et al. 2018, arXiv 1710.10044, equations 9-10, kappa = 1)."""

    network: QuantileNetwork
    target: QuantileNetwork

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            quantiles = self.target.quantiles(batch.next_state)
            ahead = _of(quantiles, self.next_action(batch, quantiles.mean(2)))
            ahead = batch.discount.unsqueeze(1) * torch.where(batch.terminal.unsqueeze(1), 0.0, ahead)
            wanted = batch.reward.unsqueeze(1) + ahead
        predicted = _of(self.network.quantiles(batch.state), batch.action)
        n = predicted.shape[1]
        level = (torch.arange(n, device=predicted.device) + 0.5) / n
        difference = wanted.unsqueeze(1) - predicted.unsqueeze(2)
        size = difference.abs()
        huber = torch.where(size > 1, size - 0.5, 0.5 * size.square())
        weight = (level.unsqueeze(1) - (difference.detach() < 0).float()).abs()
        return (weight * huber).mean(2).sum(1).mean(), predicted.detach().mean()


def _of(scores: Tensor, action: Tensor) -> Tensor:
    """Of [B, A, ...] what belongs to each row's action, [B, ...]."""
    place = action.view(-1, *[1] * (scores.dim() - 1)).expand(-1, 1, *scores.shape[2:])
    return scores.gather(1, place).squeeze(1)


def _possible_only(scores: Tensor, possible: Tensor | None) -> Tensor:
    return scores if possible is None else torch.where(possible, scores, IMPOSSIBLE)


def build_network(algorithm: job.Algorithm, normalization: NormalizationSpec, actions: int) -> Normalized:
    """The network that an algorithm trains, untrained: raw features [B, F] -> scores [B, actions]."""
    graph = NormalizationGraph(normalization)
    return Normalized(graph, _network(algorithm.config, graph.outputs, actions))


def _network(config: job.LearnerConfig, inputs: int, actions: int) -> nn.Module:
    def network(outputs: int | None = None) -> QNetwork:
        heads = {"dueling": config.dueling, "noisy": config.noisy} if isinstance(config, job.QLearning) else {}
        return QNetwork(inputs, actions, config.hidden_layers, outputs=outputs, **heads)

    match config:
        case job.C51():
            return CategoricalNetwork(network(config.atoms), config.lowest_return, config.highest_return)
        case job.QRDQN():
            return QuantileNetwork(network(config.quantiles))
        case job.BCQ():
            imitation = QNetwork(inputs, actions, config.hidden_layers)
            return ConstrainedNetwork(network(), imitation, config.threshold)
    return network()


def build_learner(algorithm: job.Algorithm, policy: Normalized) -> Learner:
    """The learner of the network in what `build_network` has built for the same algorithm."""
    network: Any = policy.network
    match algorithm.config:
        case job.BehaviourCloning():
            return BehaviourCloner(network)
        case job.C51() as config:
            return C51Learner(network, config)
        case job.QRDQN() as config:
            return QRDQNLearner(network, config)
        case job.CQL() as config:
            return CQLLearner(network, config)
        case job.BCQ() as config:
            return BCQLearner(network, config)
        case job.DQN() as config:
            return DQNLearner(network, config)
    raise AssertionError(algorithm.name)
