"""From an algorithm's configuration to its network and its learner."""

from __future__ import annotations

from typing import Any

from torch import nn

from components.normalization.graph import NormalizationGraph
from components.normalization.spec import NormalizationSpec
from components.training.actions import Actions
from components.training.algorithms.actor_critic import actor_critic_learner, actor_critic_network
from components.training.algorithms.bandit import (
    LinearBandit,
    LinearRewards,
    LogisticBandit,
    ThompsonSampling,
    UpperBounds,
)
from components.training.algorithms.learner import Learner
from components.training.algorithms.slate import SlateNetwork, SlateQLearner
from components.training.algorithms.values import (
    BCQLearner,
    BehaviourCloner,
    C51Learner,
    CQLLearner,
    DQNLearner,
    QRDQNLearner,
)
from components.training.network import (
    CategoricalNetwork,
    ConstrainedNetwork,
    DuelingPairs,
    Normalized,
    NormalizedPairs,
    QNetwork,
    QuantileNetwork,
)
from contracts import job


def build_network(algorithm: job.Algorithm, normalization: NormalizationSpec, actions: Actions) -> Normalized:
    """The network that an algorithm trains, untrained.

    Raw features [B, F] -> a score for each discrete action [B, A], or a continuous action [B, D]; of described actions
    (raw features [B, F], [B, G]) -> scores [B, 1], of items of slates [B, 2], as in `slate`.
    """
    graph, config = NormalizationGraph(normalization), algorithm.config
    if isinstance(config, job.ActorCritic):
        low, high = map(list, zip(*actions.bounds or [], strict=True))
        return Normalized(graph, actor_critic_network(config, graph.outputs, low, high))
    if actions.described is None:
        return Normalized(graph, _network(config, graph.outputs, len(actions.names)))
    of_actions = NormalizationGraph(actions.described)
    if isinstance(config, job.SlateQ):
        assert actions.slate is not None
        slates = SlateNetwork(graph.outputs, of_actions.outputs, actions.slate, config.hidden_layers)
        return NormalizedPairs(graph, of_actions, slates)
    network = _network(config, graph.outputs + of_actions.outputs, 1, state_inputs=graph.outputs)
    return NormalizedPairs(graph, of_actions, network)


def _network(config: Any, inputs: int, actions: int, state_inputs: int | None = None) -> nn.Module:
    """Of described actions, of which one is scored at a time, the first `state_inputs` are the state's."""

    def plain(inputs: int, outputs: int | None = None, dueling: bool = False) -> QNetwork:
        noisy = isinstance(config, job.QLearning) and config.noisy
        return QNetwork(inputs, actions, config.hidden_layers, dueling=dueling, noisy=noisy, outputs=outputs)

    def network(outputs: int | None = None) -> QNetwork | DuelingPairs:
        dueling = isinstance(config, job.QLearning) and config.dueling
        if dueling and state_inputs is not None:
            return DuelingPairs(plain(state_inputs, outputs), plain(inputs, outputs), state_inputs)
        return plain(inputs, outputs, dueling)

    match config:
        case job.LinUCB():
            return UpperBounds(LinearRewards(inputs, actions, config.regularization), config.alpha)
        case job.LinearThompson():
            return ThompsonSampling(LinearRewards(inputs, actions, config.regularization), config.deviation)
        case job.LogisticBandit():
            return QNetwork(inputs, actions, [])
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
        case job.ActorCritic() as config:
            return actor_critic_learner(config, network)
        case job.SlateQ() as config:
            return SlateQLearner(network, config)
        case job.BehaviourCloning():
            return BehaviourCloner(network)
        case job.LinearBandit():
            return LinearBandit(network)
        case job.LogisticBandit():
            return LogisticBandit(network)
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
