"""Deep Q-learning, one step by hand and many steps against value iteration."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from components.normalization.spec import FeatureNormalization, NormalizationSpec
from components.training.bundle import build_network
from components.training.dqn import Batch, DQNTrainer
from contracts.job import DQN


class Table(nn.Module):
    """Q-values kept in a table; a state is the number of its row."""

    def __init__(self, values: list[list[float]]) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

    def forward(self, state: Tensor) -> Tensor:
        return self.values[state[:, 0].long()]


# At state 1 the network prefers the third action, the slowly following one the second.
FAST = [[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]
SLOW = [[0.0, 0.0, 0.0], [10.0, 30.0, 20.0]]


def trainer(double: bool, rate: float = 0.5) -> DQNTrainer:
    made = DQNTrainer(Table(FAST), DQN(double=double, learningRate=0.1, targetUpdateRate=rate))
    made.target.load_state_dict(Table(SLOW).state_dict())
    return made


def batch(possible: list[bool] | None = None, terminal: bool = False, reward: float = 1.0) -> Batch:
    return Batch(
        state=torch.tensor([[0.0]]),
        action=torch.tensor([1]),
        reward=torch.tensor([reward]),
        next_state=torch.tensor([[1.0]]),
        next_possible=torch.tensor([possible or [True] * 3]),
        terminal=torch.tensor([terminal]),
        discount=torch.tensor([0.5]),
    )


def huber(difference: float) -> float:
    size = abs(difference)
    return size - 0.5 if size > 1 else size**2 / 2


@pytest.mark.parametrize(
    ("double", "possible", "following"),
    [
        (True, [True, True, True], 20.0),
        (False, [True, True, True], 30.0),
        (True, [True, True, False], 30.0),
        (False, [True, False, True], 20.0),
        (True, [True, False, False], 10.0),
        (False, [True, False, False], 10.0),
    ],
)
def test_the_target_is_the_value_of_the_chosen_possible_action(
    double: bool, possible: list[bool], following: float
) -> None:
    loss, q = trainer(double).step(batch(possible))
    assert loss.item() == pytest.approx(huber(1.0 + 0.5 * following))
    assert q.item() == 0


@pytest.mark.parametrize("double", [True, False])
def test_nothing_follows_a_terminal_step(double: bool) -> None:
    loss, _ = trainer(double).step(batch(terminal=True, reward=0.75))
    assert loss.item() == pytest.approx(huber(0.75))


def test_a_terminal_steps_next_state_may_be_anything() -> None:
    made = trainer(True)
    made.network = Unsettled()
    made.target = made.forward = made.network
    made.optimizer = torch.optim.Adam(made.network.parameters())
    loss, _ = made.step(batch(possible=[False] * 3, terminal=True, reward=0.75))
    assert np.isfinite(loss.item())


class Unsettled(Table):
    """A table whose values are not numbers at state 1."""

    def __init__(self) -> None:
        super().__init__([[0.0] * 3, [float("nan")] * 3])


def test_only_the_logged_actions_value_is_moved_towards_the_target() -> None:
    made = trainer(True)
    made.step(batch())
    # Adam's first step has the size of the learning rate.
    np.testing.assert_allclose(made.network.values.detach(), [[0, 0.1, 0], FAST[1]], atol=1e-5)


def test_each_transition_has_a_discount_of_its_own() -> None:
    late = replace(batch(), discount=torch.tensor([0.125]))
    loss, _ = trainer(False).step(late)
    assert loss.item() == pytest.approx(huber(1.0 + 0.125 * 30.0))


def test_the_target_network_follows_slowly() -> None:
    made = trainer(True, rate=0.25)
    made.step(batch())
    wanted = 0.75 * np.array(SLOW) + 0.25 * made.network.values.detach().numpy()
    np.testing.assert_allclose(made.target.values, wanted, rtol=1e-6)


def test_a_batch_is_averaged() -> None:
    two = Batch(
        state=torch.tensor([[0.0], [1.0]]),
        action=torch.tensor([0, 2]),
        reward=torch.tensor([5.0, 3.5]),
        next_state=torch.tensor([[0.0], [0.0]]),
        next_possible=torch.ones((2, 3), dtype=torch.bool),
        terminal=torch.tensor([True, False]),
        discount=torch.tensor([0.5, 0.5]),
    )
    loss, q = trainer(True).step(two)
    assert loss.item() == pytest.approx((huber(5.0) + huber(0.5)) / 2)
    assert q.item() == pytest.approx(1.5)


CHAIN, DISCOUNT = 5, 0.9


def chain(state: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Next state, reward and end: the second action goes on, at the end for a prize; the first goes back for little."""
    ends = (state == CHAIN - 1) & (action == 1)
    following = np.where(action == 1, np.minimum(state + 1, CHAIN - 1), np.maximum(state - 1, 0))
    return following, np.where(ends, 1.0, np.where(action == 0, 0.1, 0.0)), ends


def value_iteration() -> np.ndarray:
    state, action = np.divmod(np.arange(2 * CHAIN), 2)
    following, reward, ends = chain(state, action)
    q = np.zeros((CHAIN, 2))
    for _ in range(500):
        q = (reward + DISCOUNT * np.where(ends, 0, q[following].max(1))).reshape(CHAIN, 2)
    return q


@pytest.mark.parametrize(("double", "dueling"), [(True, True), (False, False)])
def test_the_values_of_a_chain_are_learned(double: bool, dueling: bool) -> None:
    place = FeatureNormalization(name="x", type="enum", values=list(range(CHAIN)), how="by hand", evidence={})
    torch.manual_seed(0)
    config = DQN(double=double, dueling=dueling, hiddenLayers=[32], learningRate=0.005, targetUpdateRate=0.05)
    network = build_network(config, NormalizationSpec(inputs=["x"], features=[place]), 2)
    made = DQNTrainer(network, config)
    rng = np.random.default_rng(0)
    for _ in range(1200):
        state, action = rng.integers(CHAIN, size=64), rng.integers(2, size=64)
        following, reward, ends = chain(state, action)
        made.step(
            Batch(
                torch.tensor(state, dtype=torch.float32)[:, None],
                torch.tensor(action),
                torch.tensor(reward, dtype=torch.float32),
                torch.tensor(following, dtype=torch.float32)[:, None],
                torch.ones((64, 2), dtype=torch.bool),
                torch.tensor(ends),
                torch.full((64,), DISCOUNT),
            )
        )
    with torch.no_grad():
        found = network(torch.arange(CHAIN, dtype=torch.float32)[:, None]).numpy()
    np.testing.assert_allclose(found, value_iteration(), atol=0.05)


def test_the_target_network_starts_as_a_copy_and_is_never_trained() -> None:
    network = Table(FAST)
    before = copy.deepcopy(network.state_dict())
    made = DQNTrainer(network, DQN(targetUpdateRate=1e-9))
    made.step(batch())
    np.testing.assert_allclose(made.target.values, before["values"], atol=1e-6)
    assert not made.target.values.requires_grad
    assert not torch.equal(network.values, before["values"])
