"""The algorithms: one step by hand, and many steps against exact values."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from components.normalization.spec import FeatureNormalization, NormalizationSpec
from components.training.actions import Actions
from components.training.algorithms.build import build_learner, build_network
from components.training.algorithms.learner import Batch
from components.training.algorithms.values import (
    BCQLearner,
    BehaviourCloner,
    C51Learner,
    CQLLearner,
    DQNLearner,
    QRDQNLearner,
)
from components.training.network import NEVER, CategoricalNetwork, ConstrainedNetwork, Head, QuantileNetwork
from components.training.trainer import Trainer
from contracts.job import BCQ, C51, CQL, DQN, QRDQN, Algorithm, PolicyHead


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


def learner(double: bool, rate: float = 0.5, **config: Any) -> DQNLearner:
    made = DQNLearner(Table(FAST), DQN(double=double, targetUpdateRate=rate, **config))
    made.target.load_state_dict(Table(SLOW).state_dict())
    return made


def trainer(double: bool, rate: float = 0.5) -> Trainer:
    return Trainer(learner(double, rate), 0.1)


def batch(possible: list[bool] | None = None, terminal: bool = False, reward: float = 1.0) -> Batch:
    return Batch(
        state=torch.tensor([[0.0]]),
        action=torch.tensor([1]),
        possible=torch.tensor([[True] * 3]),
        reward=torch.tensor([reward]),
        next_state=torch.tensor([[1.0]]),
        next_action=torch.tensor([0]),
        next_possible=torch.tensor([possible or [True] * 3]),
        discount=torch.tensor([0.0 if terminal else 0.5]),
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
    loss, q, _ = learner(double)(batch(possible))
    assert loss.item() == pytest.approx(huber(1.0 + 0.5 * following))
    assert q.item() == 0


@pytest.mark.parametrize("double", [True, False])
def test_the_target_may_be_the_value_of_the_logged_action(double: bool) -> None:
    loss, *_ = learner(double, nextAction="logged")(batch())
    assert loss.item() == pytest.approx(huber(1.0 + 0.5 * 10.0))


@pytest.mark.parametrize("double", [True, False])
def test_nothing_follows_a_terminal_step(double: bool) -> None:
    loss, _ = trainer(double).step(batch(terminal=True, reward=0.75))
    assert loss.item() == pytest.approx(huber(0.75))


def test_after_a_terminal_step_nothing_need_be_possible() -> None:
    loss, *_ = learner(True)(batch(possible=[False] * 3, terminal=True, reward=0.75))
    assert loss.item() == pytest.approx(huber(0.75))


def test_only_the_logged_actions_value_is_moved_towards_the_target() -> None:
    made = trainer(True)
    made.step(batch())
    # Adam's first step has the size of the learning rate.
    np.testing.assert_allclose(made.learner.network.values.detach(), [[0, 0.1, 0], FAST[1]], atol=1e-5)


def test_each_transition_has_a_discount_of_its_own() -> None:
    late = replace(batch(), discount=torch.tensor([0.125]))
    loss, *_ = learner(False)(late)
    assert loss.item() == pytest.approx(huber(1.0 + 0.125 * 30.0))


def test_the_target_network_follows_slowly() -> None:
    made = trainer(True, rate=0.25)
    made.step(batch())
    wanted = 0.75 * np.array(SLOW) + 0.25 * made.learner.network.values.detach().numpy()
    np.testing.assert_allclose(made.learner.target.values, wanted, rtol=1e-6)


def test_a_batch_is_averaged() -> None:
    two = Batch(
        state=torch.tensor([[0.0], [1.0]]),
        action=torch.tensor([0, 2]),
        possible=torch.ones((2, 3), dtype=torch.bool),
        reward=torch.tensor([5.0, 3.5]),
        next_state=torch.tensor([[0.0], [0.0]]),
        next_action=torch.tensor([0, 0]),
        next_possible=torch.ones((2, 3), dtype=torch.bool),
        discount=torch.tensor([0.0, 0.5]),
    )
    loss, q, _ = learner(True)(two)
    assert loss.item() == pytest.approx((huber(5.0) + huber(0.5)) / 2)
    assert q.tolist() == [0.0, 3.0]


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


def chain_batch(rng: np.random.Generator, size: int, goes_on: float = 0.5) -> Batch:
    """Transitions from anywhere, the second action logged with the given probability."""
    state, action = rng.integers(CHAIN, size=size), (rng.random(size) < goes_on).astype(np.int64)
    following, reward, ends = chain(state, action)
    return Batch(
        torch.tensor(state, dtype=torch.float32)[:, None],
        torch.tensor(action),
        torch.ones((size, 2), dtype=torch.bool),
        torch.tensor(reward, dtype=torch.float32),
        torch.tensor(following, dtype=torch.float32)[:, None],
        torch.tensor((rng.random(size) < goes_on).astype(np.int64)),
        torch.ones((size, 2), dtype=torch.bool),
        torch.tensor(np.where(ends, 0, DISCOUNT), dtype=torch.float32),
    )


PLACE = FeatureNormalization(name="x", type="enum", values=list(range(CHAIN)), how="by hand", evidence={})
PLACES = NormalizationSpec(inputs=["x"], features=[PLACE])


def learned(algorithm: dict[str, Any], goes_on: float = 0.5, steps: int = 1200) -> tuple[np.ndarray, nn.Module]:
    """The scores of each place of the chain after so many steps, and the network."""
    torch.manual_seed(0)
    fast = {"hiddenLayers": [32], "learningRate": 0.005}
    name, settings = next(iter(algorithm.items()))
    slowly = {} if name == "behaviourCloning" else {"targetUpdateRate": 0.05}
    made = Algorithm.model_validate({name: fast | slowly | settings})
    network = build_network(made, PLACES, Actions(["back", "on"]))
    trainer = Trainer(build_learner(made, network), made.config.learning_rate)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        drawn = chain_batch(rng, 64, goes_on)
        state, following = (network.normalization(x) for x in (drawn.state, drawn.next_state))
        trainer.step(replace(drawn, state=state, next_state=following))
    with torch.no_grad():
        return network.eval()(torch.arange(CHAIN, dtype=torch.float32)[:, None]).numpy(), network


@pytest.mark.parametrize(
    "algorithm",
    [
        {"dqn": {"double": True, "dueling": True}},
        {"dqn": {"double": False, "dueling": False}},
        {"dqn": {"noisy": True}},
        {"c51": {"atoms": 21, "lowestReturn": 0.0, "highestReturn": 2.0}},
        {"c51": {"atoms": 21, "lowestReturn": 0.0, "highestReturn": 2.0, "dueling": False, "double": False}},
        {"qrDqn": {"quantiles": 11}},
        {"cql": {"alpha": 0.0}},
        {"bcq": {"threshold": 0.3}},
    ],
    ids=str,
)
def test_the_values_of_a_chain_are_learned(algorithm: dict[str, Any]) -> None:
    found, _ = learned(algorithm)
    np.testing.assert_allclose(found, value_iteration(), atol=0.06)


def test_sarsa_learns_the_values_of_the_logged_policy() -> None:
    goes_on = 0.3
    state, action = np.divmod(np.arange(2 * CHAIN), 2)
    following, reward, ends = chain(state, action)
    q = np.zeros((CHAIN, 2))
    for _ in range(500):
        q = (reward + DISCOUNT * np.where(ends, 0, q[following] @ [1 - goes_on, goes_on])).reshape(CHAIN, 2)
    found, _ = learned({"dqn": {"nextAction": "logged"}}, goes_on)
    np.testing.assert_allclose(found, q, atol=0.06)
    assert np.abs(found - value_iteration()).max() > 0.2


def test_behaviour_cloning_learns_the_logged_probabilities() -> None:
    scores, _ = learned({"behaviourCloning": {}}, goes_on=0.3)
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    np.testing.assert_allclose(probabilities, [[0.7, 0.3]] * CHAIN, atol=0.05)


def test_bcq_never_takes_what_the_log_does_not() -> None:
    scores, _ = learned({"bcq": {"threshold": 0.3}}, goes_on=0.02)
    assert (scores[:, 1] <= np.float32(NEVER)).all()
    assert torch.softmax(torch.from_numpy(scores), 1)[:, 1].max() == 0
    # What remains is the value of never going on: 0.1 for ever.
    np.testing.assert_allclose(scores[:, 0], 0.1 / (1 - DISCOUNT), atol=0.06)


def test_cql_holds_down_the_actions_that_the_log_lacks() -> None:
    conservative, _ = learned({"cql": {"alpha": 1.0}}, goes_on=0.02)
    free, _ = learned({"dqn": {}}, goes_on=0.02)
    assert (conservative[:, 1] - conservative[:, 0] < free[:, 1] - free[:, 0] - 0.5).all()


@pytest.mark.parametrize("possible", [[True, True, True], [True, True, False]])
def test_cqls_penalty_by_hand(possible: list[bool]) -> None:
    made = CQLLearner(Table(FAST), CQL(alpha=0.5, nextAction="logged"))
    at_1 = replace(batch(terminal=True), state=torch.tensor([[1.0]]), possible=torch.tensor([possible]))
    loss, *_ = made(at_1)
    penalty = np.log(np.exp(np.array([1.0, 2.0, 3.0])[possible]).sum()) - 2.0
    assert loss.item() == pytest.approx(huber(1.0 - 2.0) + 0.5 * penalty)


class Rows(nn.Module):
    """A vector for each action, kept in a table by state."""

    def __init__(self, values: list[list[list[float]]]) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))
        self.shape = tuple(self.values.shape[1:])

    def forward(self, state: Tensor) -> Tensor:
        return self.values[state[:, 0].long()]


def test_bcqs_target_is_the_best_action_that_the_log_would_take() -> None:
    likely = [[0.0, 0.0, 0.0], [0.0, -5.0, -0.5]]
    network = ConstrainedNetwork(Table(FAST), Table(likely), threshold=0.3)
    made = BCQLearner(network, BCQ(threshold=0.3))
    made.target.values.load_state_dict(Table(SLOW).state_dict())
    values, imitation = made(batch())[0].item(), np.log(3)
    assert values == pytest.approx(huber(1.0 + 0.5 * 20.0) + imitation)
    # What it would take is asked among what is possible.
    alone = made(batch(possible=[False, True, False]))[0].item()
    assert alone == pytest.approx(huber(1.0 + 0.5 * 30.0) + imitation)


def test_bcq_without_a_threshold_still_takes_only_what_is_possible() -> None:
    made = BCQLearner(ConstrainedNetwork(Table(FAST), Table([[0.0] * 3] * 2), threshold=0.0), BCQ(threshold=0.0))
    made.target.values.load_state_dict(Table(SLOW).state_dict())
    loss = made(batch(possible=[True, True, False]))[0].item()
    assert loss == pytest.approx(huber(1.0 + 0.5 * 30.0) + np.log(3))


@pytest.mark.parametrize(
    ("logits", "possible", "served"),
    [
        ([4.0, -3.6, 1.0], [True, True, True], 0),
        # Of what is left the log takes the second far less,
        ([4.0, -3.6, 1.0], [False, True, True], 2),
        # or both, and then the better is.
        ([4.0, 0.5, 1.0], [False, True, True], 1),
        ([4.0, -3.6, 1.0], [False, True, False], 1),
    ],
)
def test_bcq_serves_what_the_log_would_take_of_what_is_possible(
    logits: list[float], possible: list[bool], served: int
) -> None:
    network = ConstrainedNetwork(Table([[1.0, 9.0, 5.0]]), Table([logits]), threshold=0.3)
    mask = torch.tensor([possible])
    found = Head(PolicyHead())(network(torch.tensor([[0.0]]), mask), mask)
    assert found.argmax(1).item() == served
    torch.testing.assert_close(
        BCQLearner(network, BCQ()).valuing(torch.tensor([[0.0]])), torch.tensor([[1.0, 9.0, 5.0]])
    )


@pytest.mark.parametrize(
    ("reward", "terminal", "wanted"),
    [
        (0.25, True, [0.75, 0.25, 0.0]),
        (1.0, True, [0.0, 1.0, 0.0]),
        (7.0, True, [0.0, 0.0, 1.0]),
        (-7.0, True, [1.0, 0.0, 0.0]),
        # Atoms 0, 1, 2 with mass 0.2, 0.3, 0.5 become 0.5, 1, 1.5.
        (0.5, False, [0.1, 0.1 + 0.3 + 0.25, 0.25]),
    ],
)
def test_c51_shares_the_mass_between_the_nearest_atoms(reward: float, terminal: bool, wanted: list[float]) -> None:
    table = Rows([[[0.0] * 3] * 2, [np.log([0.2, 0.3, 0.5]).tolist()] * 2])
    table.values.data[0, 1] = torch.tensor([0.3, -0.2, 0.1])
    made = C51Learner(CategoricalNetwork(table, 0.0, 2.0), C51(atoms=3, lowestReturn=0.0, highestReturn=2.0))  # type: ignore[arg-type]
    one = replace(
        batch(reward=reward, terminal=terminal),
        possible=torch.tensor([[True] * 2]),
        next_possible=torch.tensor([[True] * 2]),
    )
    loss, expected, _ = made(one)
    predicted = torch.softmax(table.values[0, 1], 0).detach().numpy()
    assert loss.item() == pytest.approx(-(np.array(wanted) * np.log(predicted)).sum(), rel=1e-5)
    assert expected.item() == pytest.approx((predicted * [0, 1, 2]).sum(), rel=1e-5)


def test_qr_dqns_loss_by_hand() -> None:
    table = Rows([[[0.0, 0.0], [1.0, 4.0]], [[10.0, 20.0], [2.0, 6.0]]])
    made = QRDQNLearner(QuantileNetwork(table), QRDQN(quantiles=2))  # type: ignore[arg-type]
    one = replace(batch(reward=1.0), possible=torch.tensor([[True] * 2]), next_possible=torch.tensor([[True, True]]))
    loss, *_ = made(one)
    # The best next action has quantiles 10 and 20: targets 6 and 11, against 1 and 4 at levels 0.25 and 0.75.
    parts = [[0.25 * huber(5), 0.25 * huber(10)], [0.75 * huber(2), 0.75 * huber(7)]]
    assert loss.item() == pytest.approx(np.mean(parts, axis=1).sum())


@pytest.mark.parametrize("algorithm", [{"dqn": {"noisy": True}}, {"bcq": {}}, {"qrDqn": {}}], ids=str)
def test_the_same_seed_gives_the_same_weights(algorithm: dict[str, Any]) -> None:
    first, again = (learned(algorithm, steps=30)[1].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_an_impossible_action_has_no_part_in_cloning() -> None:
    one = replace(batch(), state=torch.tensor([[1.0]]), possible=torch.tensor([[True, True, False]]))
    loss, *_ = BehaviourCloner(Table(FAST))(one)
    assert loss.item() == pytest.approx(np.log(np.exp(1.0) + np.exp(2.0)) - 2.0)


def test_where_all_actions_are_possible_it_need_not_be_said() -> None:
    said = [
        CQLLearner(Table(FAST), CQL())(one)[0].item()
        for one in (batch(), replace(batch(), possible=None, next_possible=None))
    ]
    assert said[0] == said[1]


@pytest.mark.parametrize("algorithm", [{"dqn": {}}, {"bcq": {}}], ids=str)
def test_half_precision_is_near_and_of_training_alone(algorithm: dict[str, Any]) -> None:
    made = Algorithm.model_validate(algorithm)
    torch.manual_seed(0)
    policy = build_network(made, PLACES, Actions(["back", "on"]))
    learner = build_learner(made, policy)
    one = chain_batch(np.random.default_rng(0), 64)
    one = replace(one, state=policy.normalization(one.state), next_state=policy.normalization(one.next_state))
    exact = learner(one)[0]
    learner.compute_in("bfloat16")
    near = learner(one)[0]
    assert near.dtype == torch.float32
    assert near.item() != exact.item()
    assert near.item() == pytest.approx(exact.item(), rel=0.02)
    learner.compute_in("float32")
    assert learner(one)[0].item() == exact.item()


def test_the_target_network_starts_as_a_copy_and_is_never_trained() -> None:
    network = Table(FAST)
    before = copy.deepcopy(network.state_dict())
    made = DQNLearner(network, DQN(targetUpdateRate=1e-9))
    Trainer(made, 1e-3).step(batch())
    np.testing.assert_allclose(made.target.values, before["values"], atol=1e-6)
    assert not made.target.values.requires_grad
    assert not torch.equal(network.values, before["values"])
