"""Algorithms for continuous actions: one step by hand, and many against a known best action."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from components.normalization.spec import FeatureNormalization, NormalizationSpec
from components.training.actions import Actions
from components.training.algorithms.actor_critic import (
    Actor,
    ActorCriticNetwork,
    Critics,
    DDPGLearner,
    IQLLearner,
    SACLearner,
    TD3BCLearner,
    TD3Learner,
    actor_critic_network,
)
from components.training.algorithms.build import build_learner, build_network
from components.training.algorithms.learner import Batch
from components.training.network import QNetwork
from components.training.trainer import Trainer
from contracts.job import DDPG, IQL, SAC, TD3, TD3BC, Algorithm

ALGORITHMS = ["ddpg", "td3", "td3Bc", "sac", "iql"]


class Fixed(nn.Module):
    """A network that says the same of every state; its shape is that of a `QNetwork`."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))
        self.shape = (len(values),)

    def forward(self, x: Tensor) -> Tensor:
        return self.values.expand(len(x), -1)


class Slope(nn.Module):
    """A critic that is linear in the action, the last of its inputs."""

    def __init__(self, slope: float, level: float) -> None:
        super().__init__()
        self.slope, self.level = nn.Parameter(torch.tensor(slope)), nn.Parameter(torch.tensor(level))

    def forward(self, both: Tensor) -> Tensor:
        return (self.level + self.slope * both[:, -1]).unsqueeze(1)


def network(action: float, *critics: tuple[float, float]) -> ActorCriticNetwork:
    actor = Actor(Fixed(math.atanh(action)), [-2.0], [4.0])  # type: ignore[arg-type]
    return ActorCriticNetwork(actor, Critics(Slope(*each) for each in critics))


def batch(action: float = 0.5, reward: float = 1.0, terminal: bool = False) -> Batch:
    return Batch(
        state=torch.tensor([[0.0]]),
        action=torch.tensor([[action]]),
        possible=None,
        reward=torch.tensor([reward]),
        next_state=torch.tensor([[1.0]]),
        next_action=torch.tensor([[0.0]]),
        next_possible=None,
        discount=torch.tensor([0.0 if terminal else 0.5]),
    )


def test_an_action_is_served_in_the_products_units_and_learned_in_its_own() -> None:
    actor = network(0.5, (1.0, 0.0)).actor
    assert actor(torch.zeros(1, 1)).item() == pytest.approx(-2 + 1.5 / 2 * 6)
    raw = torch.tensor([[-2.0], [1.0], [4.0], [9.0]])
    assert actor.as_unit(raw).squeeze(1).tolist() == pytest.approx([-1, 0, 1, 8 / 3])
    torch.testing.assert_close(actor.in_units(actor.as_unit(raw[:3])), raw[:3])


def test_a_sampled_actions_density_is_that_of_the_squashed_gaussian() -> None:
    torch.manual_seed(0)
    actor = Actor(QNetwork(1, 2, [8], outputs=2), [0.0, 0.0], [1.0, 1.0])
    state = torch.randn(500, 1)
    with torch.no_grad():
        action, density = actor.sampled(state)
        mean, raw = actor.network(state).unbind(2)
        deviation = torch.exp(-5 + (torch.tanh(raw) + 1) / 2 * 7)
    before = np.arctanh(action.double().numpy())
    wanted = stats.norm.logpdf(before, mean.numpy(), deviation.numpy()) - np.log(1 - action.double().numpy() ** 2)
    inside = (np.abs(action.numpy()) < 0.999).all(1)
    assert inside.sum() > 200
    np.testing.assert_allclose(density.numpy()[inside], wanted.sum(1)[inside], atol=0.01)


def test_the_target_is_the_value_of_what_the_actor_would_do_next() -> None:
    learner = DDPGLearner(network(0.25, (2.0, 1.0)), DDPG())
    loss, q, watched = learner(batch())
    wanted = 1.0 + 0.5 * (1 + 2 * 0.25)
    assert q.item() == pytest.approx(1 + 2 * 0.5)
    assert loss.item() == pytest.approx((q.item() - wanted) ** 2 - (1 + 2 * 0.25), rel=1e-5)
    assert watched.item() == pytest.approx((q.item() - wanted) ** 2, rel=1e-5), "the actor's part is no distance"


def test_nothing_follows_a_terminal_step() -> None:
    loss, q, _ = DDPGLearner(network(0.25, (2.0, 1.0)), DDPG())(batch(terminal=True))
    assert loss.item() == pytest.approx((q.item() - 1.0) ** 2 - 1.5, rel=1e-5)


def test_of_two_critics_the_lower_is_followed() -> None:
    learner = TD3Learner(network(0.25, (2.0, 1.0), (-2.0, 1.0)), TD3(targetNoise=0.0))
    value = learner.next_value(batch())
    assert value.item() == pytest.approx(1 - 2 * 0.25)


def test_the_noise_on_a_targets_action_is_limited() -> None:
    torch.manual_seed(0)
    learner = TD3Learner(network(0.25, (1.0, 0.0)), TD3(targetNoise=5.0, noiseLimit=0.5))
    values = {round(learner.next_value(batch()).item(), 5) for _ in range(50)}
    assert {-0.25, 0.75} <= values
    assert min(values) == -0.25
    assert max(values) == 0.75


def test_the_delayed_actor_moves_every_second_step() -> None:
    seen = []
    state = None
    for _ in range(4):
        # Each in a process of its own, as after a kill: the steps go on to be counted.
        learner = TD3Learner(network(0.25, (1.0, 0.0), (1.0, 0.0)), TD3(policyDelay=2))
        trainer = Trainer(learner, 0.1)
        if state:
            trainer.load_state(state)
        trainer.step(batch())
        state = trainer.state()
        seen.append(learner.network.actor.network.values.item())
    assert seen[0] == pytest.approx(math.atanh(0.25))
    assert seen[1] > seen[0]
    assert seen[2] == seen[1]
    assert seen[3] > seen[2]


@pytest.mark.parametrize("kind", [(DDPGLearner, DDPG()), (TD3BCLearner, TD3BC(policyDelay=1))], ids=["ddpg", "td3Bc"])
def test_what_the_actor_wants_does_not_change_the_critics(kind: tuple[Any, Any]) -> None:
    made = kind[0](network(0.25, (2.0, 1.0)), kind[1])
    made.actor_loss(batch()).backward()
    assert made.network.actor.network.values.grad is not None
    assert all(p.grad is None for p in made.network.critics.parameters())


def test_td3_bc_with_little_weight_on_values_clones_the_log() -> None:
    learner = TD3BCLearner(network(0.0, (5.0, 0.0), (5.0, 0.0)), TD3BC(alpha=1e-6, policyDelay=1))
    trainer = Trainer(learner, 0.01)
    for _ in range(300):
        trainer.step(batch(action=-0.5, terminal=True))
    assert learner.network.actor.unit(torch.zeros(1, 1)).item() == pytest.approx(-0.5, abs=0.02)


@pytest.mark.parametrize(("entropy", "rises"), [(5.0, True), (-50.0, False)])
def test_the_temperature_is_learned_for_an_entropy(entropy: float, rises: bool) -> None:
    torch.manual_seed(0)
    made = actor_critic_network(SAC(), 1, [-1.0], [1.0])
    learner = SACLearner(made, SAC(targetEntropy=entropy))  # type: ignore[arg-type]
    trainer = Trainer(learner, 1e-3)
    for _ in range(20):
        trainer.step(batch())
    assert (learner.network.log_temperature.item() > 0) == rises


def test_iql_never_asks_of_an_action_that_was_not_logged() -> None:
    asked: list[float] = []

    class Watched(Critics):
        def forward(self, state: Tensor, action: Tensor) -> Tensor:
            asked.extend(action.flatten().tolist())
            return super().forward(state, action)

    torch.manual_seed(0)
    made: Any = actor_critic_network(IQL(), 1, [-1.0], [1.0])
    made.critics = Watched(made.critics)
    learner = IQLLearner(made, IQL())
    for action in (0.5, -0.25):
        learner(batch(action=action))
    assert set(asked) == {0.5, -0.25}


X = FeatureNormalization(name="x", type="continuous", mean=0.0, stddev=1.0, how="by hand", evidence={})


def learned(algorithm: str, **settings: Any) -> nn.Module:
    """The policy after some steps where the reward is -(action - x)^2 and every step the last."""
    torch.manual_seed(0)
    fast = {"hiddenLayers": [64, 64], "learningRate": 0.003, "targetUpdateRate": 0.05}
    made = Algorithm.model_validate({algorithm: fast | settings})
    policy = build_network(made, NormalizationSpec(inputs=["x"], features=[X]), Actions(["a"], bounds=[(-2.0, 2.0)]))
    trainer = Trainer(build_learner(made, policy), made.config.learning_rate)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1500):
        x, unit = torch.rand(128, 1, generator=generator) * 2 - 1, torch.rand(128, 1, generator=generator) * 2 - 1
        reward = -(2 * unit - x).square().squeeze(1)
        nothing = torch.zeros(128)
        trainer.step(Batch(x, unit, None, reward, x, unit, None, nothing))
    return policy.eval()


@pytest.mark.parametrize(
    ("algorithm", "settings", "tolerance"),
    [
        ("ddpg", {}, 0.15),
        ("td3", {}, 0.15),
        ("td3Bc", {"alpha": 50.0}, 0.15),
        # It rewards entropy too: little of it is wanted here.
        ("sac", {"targetEntropy": -4.0}, 0.2),
        ("iql", {"expectile": 0.9, "inverseTemperature": 10.0}, 0.2),
    ],
)
def test_the_best_action_is_learned(algorithm: str, settings: dict[str, Any], tolerance: float) -> None:
    x = torch.linspace(-0.9, 0.9, 19)[:, None]
    policy = learned(algorithm, **settings)
    np.testing.assert_allclose(policy(x).detach(), x, atol=tolerance)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_same_seed_gives_the_same_weights_and_precision_is_of_training_alone(algorithm: str) -> None:
    made = Algorithm.model_validate({algorithm: {"hiddenLayers": [16]}})
    spec, actions = NormalizationSpec(inputs=["x"], features=[X]), Actions(["a"], bounds=[(0.0, 1.0)])
    found = []
    for precision in ("float32", "float32", "bfloat16"):
        torch.manual_seed(0)
        policy = build_network(made, spec, actions)
        learner = build_learner(made, policy)
        learner.compute_in(precision)
        trainer = Trainer(learner, 1e-3)
        for _ in range(4):
            trainer.step(batch())
        found.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0], found[2], atol=0.02, rtol=0.1)
