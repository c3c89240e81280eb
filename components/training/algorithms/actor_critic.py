"""Algorithms for continuous actions: an actor that chooses, critics that value what it chooses."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from components.training import shared
from components.training.algorithms.learner import Batch, BootstrappingLearner
from components.training.network import QNetwork
from contracts import job

LOWEST_DEVIATION, HIGHEST_DEVIATION = math.exp(-5.0), math.exp(2.0)
LARGEST_ADVANTAGE_WEIGHT = 100.0


class Actor(nn.Module):
    """A policy over D numbers, each within bounds: from normalized features to the action that is served.

    Inside, an action lies in [-1, 1] (`unit`); what is served is in the product's own units.
    """

    def __init__(self, network: QNetwork, low: list[float], high: list[float]) -> None:
        super().__init__()
        self.network = network
        """[batch, inputs] -> [batch, D], or [batch, D, 2] where the policy has a deviation, too."""
        self.register_buffer("low", torch.tensor(low))
        self.register_buffer("high", torch.tensor(high))

    def forward(self, x: Tensor) -> Tensor:
        """float32 [batch, inputs] -> [batch, D], in the product's units."""
        return self.in_units(self.unit(x))

    def unit(self, x: Tensor) -> Tensor:
        """The action without any noise, [batch, D] in [-1, 1]."""
        found = self.network(x)
        return torch.tanh(found[..., 0] if len(self.network.shape) > 1 else found)

    def sampled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """An action of a Gaussian squashed by tanh, [batch, D], and the log of its density in [-1, 1], [batch]."""
        mean, raw = self.network(x).unbind(2)
        # Smoothly within limits, so that a gradient leads back from there.
        share = (torch.tanh(raw) + 1) / 2
        logs = math.log(LOWEST_DEVIATION), math.log(HIGHEST_DEVIATION)
        deviation = torch.exp(logs[0] + share * (logs[1] - logs[0]))
        noise = shared.normal(len(mean), mean.shape[1], mean)
        before = mean + deviation * noise
        density = -0.5 * noise.square() - deviation.log() - 0.5 * math.log(2 * math.pi)
        # log(1 - tanh^2) in a form that holds far out (Haarnoja et al. 2018, appendix C).
        squashing = 2 * (math.log(2) - before - functional.softplus(-2 * before))
        return torch.tanh(before), (density - squashing).sum(1)

    def in_units(self, unit: Tensor) -> Tensor:
        low, high = self.get_buffer("low"), self.get_buffer("high")
        return low + (unit + 1) / 2 * (high - low)

    def as_unit(self, action: Tensor) -> Tensor:
        """What `in_units` turns back; beyond [-1, 1] outside of the bounds."""
        low, high = self.get_buffer("low"), self.get_buffer("high")
        return 2 * (action - low) / (high - low) - 1


class Critics(nn.ModuleList):
    """Action values by several networks: normalized features [B, F] and actions [B, D] in [-1, 1] -> [critics, B]."""

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        both = torch.cat([state, action], 1)
        return torch.stack([critic(both).squeeze(1) for critic in self])


class ActorCriticNetwork(nn.Module):
    """All that such an algorithm trains; served is the actor."""

    def __init__(self, actor: Actor, critics: Critics) -> None:
        super().__init__()
        self.actor, self.critics = actor, critics

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.actor(x)
        return found


class DDPGLearner(BootstrappingLearner):
    """Deep deterministic policy gradient (Lillicrap et al. 2016, arXiv 1509.02971, algorithm 1).

    Critics move towards r + discount * Q'(s', mu'(s')), of several the lowest; the actor towards what the critic values
    most. Both in one loss: of the actor's part no gradient reaches the critics.
    """

    network: ActorCriticNetwork
    target: ActorCriticNetwork

    def __init__(self, network: ActorCriticNetwork, config: job.ActorCritic) -> None:
        super().__init__(network, config.target_update_rate)
        self.config = config

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            wanted = batch.reward + batch.discount * self.next_value(batch)
        values = self.network.critics(batch.state, batch.action)
        loss = functional.mse_loss(values, wanted.expand_as(values), reduction="none").mean(1).sum()
        return loss + self.actor_loss(batch), values[0].detach(), loss.detach()

    def next_value(self, batch: Batch) -> Tensor:
        """[B]: of the next state, under the policy."""
        lowest: Tensor = self.target.critics(batch.next_state, self.target.actor.unit(batch.next_state)).amin(0)
        return lowest

    def actor_loss(self, batch: Batch) -> Tensor:
        return -self.valued(batch.state, self.network.actor.unit(batch.state))[0].mean()

    def valued(self, state: Tensor, action: Tensor) -> Tensor:
        """[critics, B], of which no gradient reaches the critics' weights."""
        fixed = {name: value.detach() for name, value in self.network.critics.named_parameters()}
        found: Tensor = torch.func.functional_call(self.network.critics, fixed, (state, action))
        return found

    def examine(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        own = self.network.actor.unit(batch.state)
        logged, best = (self.network.critics(batch.state, action).amin(0) for action in (batch.action, own))
        return logged, best, self.network.actor.in_units(own)


class TD3Learner(DDPGLearner):
    """Twin delayed DDPG (Fujimoto et al. 2018, arXiv 1802.09477, algorithm 1).

    Critics move towards r + discount * min_i Q'_i(s', mu'(s') + noise), of clipped normal noise; the actor along
    Q_1(s, mu(s)), every few steps, and with it what follows.
    """

    config: job.TD3

    def __init__(self, network: ActorCriticNetwork, config: job.TD3) -> None:
        super().__init__(network, config)
        # Counted here, not on the device, which would have to be asked for it at each step.
        self.steps = 0

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        self.steps = int(state)

    def next_value(self, batch: Batch) -> Tensor:
        action = self.target.actor.unit(batch.next_state)
        limit = self.config.noise_limit
        noise = (self.config.target_noise * shared.normal(len(action), action.shape[1], action)).clamp(-limit, limit)
        lowest: Tensor = self.target.critics(batch.next_state, (action + noise).clamp(-1, 1)).amin(0)
        return lowest

    def actor_loss(self, batch: Batch) -> Tensor:
        self.steps += 1
        if self.steps % self.config.policy_delay:
            return batch.reward.new_zeros(())
        return self.delayed_actor_loss(batch)

    def delayed_actor_loss(self, batch: Batch) -> Tensor:
        return super().actor_loss(batch)

    def follow(self) -> None:
        # What follows moves with the actor.
        if self.steps % self.config.policy_delay == 0:
            super().follow()


class TD3BCLearner(TD3Learner):
    """TD3 held near the log by behaviour cloning (Fujimoto and Gu 2021, arXiv 2106.06860, equations 3 and 5).

    The actor maximizes lambda Q_1(s, mu(s)) - (mu(s) - a)^2 with lambda = alpha / mean |Q_1(s, mu(s))|, of a batch.
    """

    config: job.TD3BC

    def delayed_actor_loss(self, batch: Batch) -> Tensor:
        action = self.network.actor.unit(batch.state)
        value = self.valued(batch.state, action)[0]
        weight = self.config.alpha / shared.mean(value.abs()).clamp(min=1e-6)
        return functional.mse_loss(action, batch.action) - weight * value.mean()


class SACNetwork(ActorCriticNetwork):
    """With the temperature that is learned beside."""

    def __init__(self, actor: Actor, critics: Critics) -> None:
        super().__init__(actor, critics)
        self.log_temperature = nn.Parameter(torch.zeros(()))


class SACLearner(DDPGLearner):
    """Soft actor-critic (Haarnoja et al. 2018, arXiv 1812.05905, equations 5, 7 and 18): rewards entropy, too.

    Critics move towards r + discount * (min_i Q'_i(s', a') - t log pi(a' | s')), a' of pi(s'); the actor minimizes
    t log pi(a | s) - min_i Q_i(s, a), a of pi(s). The temperature t, what entropy counts for, is learned so that the
    entropy is the configuration's, H: it minimizes -t (log pi(a | s) + H).
    """

    network: SACNetwork
    config: job.SAC

    def next_value(self, batch: Batch) -> Tensor:
        action, density = self.network.actor.sampled(batch.next_state)
        lowest: Tensor = self.target.critics(batch.next_state, action).amin(0)
        return lowest - self.network.log_temperature.exp() * density

    def actor_loss(self, batch: Batch) -> Tensor:
        action, density = self.network.actor.sampled(batch.state)
        temperature = self.network.log_temperature
        actor = (temperature.exp().detach() * density - self.valued(batch.state, action).amin(0)).mean()
        given = self.config.target_entropy
        entropy = -action.shape[1] if given is None else given
        return actor - (temperature.exp() * (density.detach() + entropy)).mean()


class IQLNetwork(ActorCriticNetwork):
    """With the states' values, and the deviation of the policy's Gaussian, the same in all states."""

    def __init__(self, actor: Actor, critics: Critics, value: QNetwork, dimensions: int) -> None:
        super().__init__(actor, critics)
        self.value = value
        self.log_deviation = nn.Parameter(torch.full((dimensions,), -1.0))


class IQLLearner(DDPGLearner):
    """Implicit Q-learning (Kostrikov et al. 2022, arXiv 2110.06169, equations 5 to 7).

    V is an expectile of Q' over the log's own actions, Q moves towards r + discount * V(s'), and the policy clones the
    log's actions, each weighted by exp(beta * (Q' - V)), at most 100.
    """

    network: IQLNetwork
    config: job.IQL

    def next_value(self, batch: Batch) -> Tensor:
        found: Tensor = self.network.value(batch.next_state).squeeze(1)
        return found

    def actor_loss(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            logged = self.target.critics(batch.state, batch.action).amin(0)
        value = self.network.value(batch.state).squeeze(1)
        advantage = logged - value
        weight = (self.config.expectile - (advantage.detach() < 0).float()).abs()
        expectile = (weight * advantage.square()).mean()
        # The Gaussian's log-density but for a constant.
        log_deviation = self.network.log_deviation.clamp(-5.0, 2.0)
        distance = (batch.action - self.network.actor.unit(batch.state)) / log_deviation.exp()
        likelihood = -(0.5 * distance.square() + log_deviation).sum(1)
        better = (self.config.inverse_temperature * advantage.detach()).exp().clamp(max=LARGEST_ADVANTAGE_WEIGHT)
        return expectile - (better * likelihood).mean()


LEARNERS: dict[type[job.ActorCritic], type[DDPGLearner]] = {
    job.DDPG: DDPGLearner,
    job.TD3: TD3Learner,
    job.TD3BC: TD3BCLearner,
    job.SAC: SACLearner,
    job.IQL: IQLLearner,
}


def actor_critic_network(
    config: job.ActorCritic, inputs: int, low: list[float], high: list[float]
) -> ActorCriticNetwork:
    """The networks of an algorithm for actions of as many numbers as there are bounds."""
    dimensions = len(low)
    outputs = 2 if isinstance(config, job.SAC) else None
    actor = Actor(QNetwork(inputs, dimensions, config.hidden_layers, outputs=outputs), low, high)
    number = 1 if isinstance(config, job.DDPG) else 2
    critics = Critics(QNetwork(inputs + dimensions, 1, config.hidden_layers) for _ in range(number))
    match config:
        case job.SAC():
            return SACNetwork(actor, critics)
        case job.IQL():
            return IQLNetwork(actor, critics, QNetwork(inputs, 1, config.hidden_layers), dimensions)
    return ActorCriticNetwork(actor, critics)


def actor_critic_learner(config: job.ActorCritic, network: Any) -> DDPGLearner:
    return LEARNERS[type(config)](network, config)
