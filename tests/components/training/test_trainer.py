"""A step is Adam's, whether the optimizer has begun, goes on, or knows nothing."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from components.normalization.spec import FeatureNormalization, NormalizationSpec
from components.training.actions import Actions
from components.training.algorithms.build import build_learner, build_network
from components.training.algorithms.learner import Batch
from components.training.algorithms.values import DQNLearner
from components.training.network import QNetwork
from components.training.trainer import Trainer, missing_to_compile
from contracts.job import DQN, Algorithm

NORMALIZATION = NormalizationSpec(
    inputs=["x", "y", "z"],
    features=[FeatureNormalization(name=n, type="continuous", how="by hand", evidence={}) for n in "xyz"],
)

COMPILES = pytest.mark.skipif(bool(missing_to_compile()), reason=f"there is no {missing_to_compile()}")


def batches(n: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(n):
        state, following = (torch.randn(16, 3, generator=generator) for _ in range(2))
        action, reward = torch.randint(2, (16,), generator=generator), torch.randn(16, generator=generator)
        found.append(Batch(state, action, None, reward, following, action, None, torch.full((16,), 0.9)))
    return found


@pytest.fixture
def learner() -> DQNLearner:
    torch.manual_seed(0)
    return DQNLearner(QNetwork(3, 2, [8]), DQN())


def test_steps_are_those_of_torchs_adam(learner: DQNLearner) -> None:
    other = copy.deepcopy(learner)
    # What follows, and how, is held in lists of its own.
    other = DQNLearner(other.network, DQN())
    trainer = Trainer(learner, 0.01)
    adam = torch.optim.Adam(other.network.parameters(), lr=0.01, fused=True)
    for batch in batches(20):
        trainer.step(batch)
        adam.zero_grad()
        other(batch)[0].backward()
        adam.step()
        other.follow()
    for mine, wanted in zip(learner.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=0)


@COMPILES
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "algorithm",
    [
        {"dqn": {"dueling": True}},
        {"dqn": {"double": False, "nextAction": "logged"}},
        {"cql": {}},
        {"bcq": {}},
        {"c51": {"lowestReturn": -5.0, "highestReturn": 5.0}},
        {"qrDqn": {}},
        {"behaviourCloning": {}},
    ],
    ids=lambda algorithm: next(iter(algorithm)),
)
def test_a_compiled_step_is_the_same(algorithm: dict[str, Any], precision: str) -> None:
    # Of one function no more than some are held compiled.
    torch.compiler.reset()
    made = Algorithm.model_validate({name: given | {"hiddenLayers": [16, 16]} for name, given in algorithm.items()})
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        learner = build_learner(made, build_network(made, NORMALIZATION, Actions(["first", "second"])))
        learner.compute_in(precision)
        learner.expect(100)
        trainer = Trainer(learner, 0.01, compiled)
        for batch in batches(5):
            possible = torch.rand(16, 2) < 0.7
            possible[range(16), batch.action] = True
            loss, scores = trainer.step(replace(batch, possible=possible, next_possible=possible))
        found.append(learner.state_dict() | {"loss": loss, "scores": scores})
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-3, atol=1e-5)


@COMPILES
def test_compiled_noise_is_the_same_by_the_same_seed_and_goes_on_from_a_saved_state() -> None:
    def begun() -> Trainer:
        torch.compiler.reset()
        torch.manual_seed(0)
        return Trainer(DQNLearner(QNetwork(3, 2, [8], noisy=True), DQN(noisy=True)), 0.01, compiled=True)

    first, second = batches(2)
    whole, broken_off, resumed = begun(), begun(), begun()
    torch.manual_seed(1)
    whole.step(first)
    whole.step(second)
    torch.manual_seed(1)
    broken_off.step(first)
    saved = {name: value.clone() for name, value in broken_off.state().items()}
    torch.manual_seed(5)
    resumed.load_state(saved)
    resumed.step(second)
    for name, value in whole.learner.state_dict().items():
        assert torch.equal(resumed.learner.state_dict()[name], value)
    noisy = whole.learner.network.advantage.weight_noise
    assert not torch.equal(noisy, torch.full_like(noisy, noisy[0, 0].item()))


def test_a_changed_learning_rate_counts(learner: DQNLearner) -> None:
    trainer, (first, second) = Trainer(learner, 0.01), batches(2)
    trainer.step(first)
    trainer.optimizer.param_groups[0]["lr"] = 0.0
    before = copy.deepcopy(learner.network.state_dict())
    trainer.step(second)
    assert all(torch.equal(before[name], value) for name, value in learner.network.state_dict().items())


def test_an_optimizer_that_was_told_nothing_begins_anew(learner: DQNLearner) -> None:
    trainer = Trainer(learner, 0.01)
    trainer.optimizer.load_state_dict(trainer.optimizer.state_dict() | {"state": {i: {} for i in range(4)}})
    for batch in batches(2):
        trainer.step(batch)
    assert len(trainer.optimizer.state) == 4
    assert all(state["step"] == 2 for state in trainer.optimizer.state.values())
