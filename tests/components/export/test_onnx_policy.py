"""The exported graph does what the network does, and its actions follow its propensities."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from scipy import stats
from scipy.special import softmax
from torch import nn

from components.export.onnx_policy import TOLERANCE, ServedPolicy, check_onnx, export_onnx, served
from components.normalization.spec import FeatureNormalization, NormalizationSpec
from components.training.actions import Actions
from components.training.algorithms.bandit import LinearRewards
from components.training.algorithms.build import build_network
from components.training.network import NEVER, Head, LogisticPolicy, Normalized
from contracts.job import Algorithm, PolicyHead
from contracts.stage import StageError


def feature(name: str, type_: str, **parameters: object) -> FeatureNormalization:
    return FeatureNormalization.model_validate(
        {"name": name, "type": type_, "how": "by hand", "evidence": {}, **parameters}
    )


SPEC = NormalizationSpec(
    inputs=["a", "b", "c", "d", "e", "unused", "f"],
    features=[
        feature("a", "continuous", mean=1.0, stddev=2.0),
        feature("b", "binary"),
        feature("c", "enum", values=[0.0, 1.0, 2.0]),
        feature("d", "quantile", quantiles=[-2.0, 0.0, 0.5, 3.0]),
        feature("e", "box_cox", box_cox_lambda=0.4, box_cox_shift=3.0, mean=1.0, stddev=2.0),
        feature("f", "probability", mean=0.5, stddev=1.5),
    ],
)
OUTPUTS = ["q_values", "greedy_action", "propensities", "sampled_action"]
ABC = Actions(["a", "b", "c"])
AT_07 = PolicyHead(temperature=0.7)
EXTREMES = np.array([[v] * 7 for v in (np.nan, np.inf, -np.inf, 0, -0.0, 1e-45, 1e30, -1e30)], np.float32)


class Exported(NamedTuple):
    policy: ServedPolicy
    path: Path
    features: int
    actions: int
    temperature: float

    def run(self, state: np.ndarray, uniform: np.ndarray, possible: np.ndarray) -> dict[str, np.ndarray]:
        session = onnxruntime.InferenceSession(str(self.path), providers=["CPUExecutionProvider"])
        inputs = {"state": state, "uniform": uniform.astype(np.float32), "possible": possible}
        return dict(zip(OUTPUTS, session.run(OUTPUTS, inputs), strict=True))


def q_network(seed: int = 0) -> Normalized:
    torch.manual_seed(seed)
    network = build_network(Algorithm.model_validate({"dqn": {"hiddenLayers": [16, 16]}}), SPEC, ABC)
    with torch.no_grad():
        network.network.advantage.weight *= 5
    return network


def described(features: int, actions: int) -> dict[str, Any]:
    return {"features": [""] * features, "actions": [""] * actions, "action_space": "discrete"}


def exported_to(path: Path, network: nn.Module, head: PolicyHead, features: int, actions: int) -> ServedPolicy:
    made = served(network, head, "discrete")
    assert isinstance(made, ServedPolicy)
    export_onnx(made, described(features, actions), path)
    return made


def states(rows: int, features: int, seed: int = 0) -> np.ndarray:
    made = np.random.default_rng(seed).normal(0.5, 2, (rows, features)).astype(np.float32)
    made[:, 2 % features] = made[:, 2 % features].round()
    made[::5, 0] = np.nan
    return made


@pytest.fixture(scope="module")
def q_policy(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    path = tmp_path_factory.mktemp("q") / "model.onnx"
    return Exported(exported_to(path, q_network(), AT_07, 7, 3), path, 7, 3, 0.7)


@pytest.fixture(scope="module")
def logistic_policy(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    path = tmp_path_factory.mktemp("logistic") / "model.onnx"
    return Exported(exported_to(path, LogisticPolicy([0.4, -1.0], 0.2), PolicyHead(), 2, 2), path, 2, 2, 1.0)


@pytest.fixture(params=["q_policy", "logistic_policy"])
def exported(request: pytest.FixtureRequest) -> Exported:
    return request.getfixturevalue(request.param)


def test_the_graph_agrees_with_torch_on_ordinary_and_extreme_states(exported: Exported) -> None:
    every = np.concatenate([states(1000, exported.features), EXTREMES[:, : exported.features]])
    assert (
        check_onnx(exported.policy, described(exported.features, exported.actions), exported.path, every, seed=0)
        <= TOLERANCE
        == 1e-5
    )


@pytest.mark.parametrize(
    "algorithm",
    [
        {"dqn": {"noisy": True}},
        {"c51": {"lowestReturn": 0.0, "highestReturn": 50.0}},
        {"qrDqn": {}},
        {"cql": {"dueling": False}},
        {"bcq": {"threshold": 0.9}},
        {"behaviourCloning": {}},
        {"linUcb": {}},
        {"linearThompson": {"deviation": 0.3}},
        {"logisticBandit": {}},
    ],
    ids=str,
)
def test_each_algorithms_network_agrees_with_its_graph(tmp_path: Path, algorithm: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = build_network(Algorithm.model_validate(algorithm), SPEC, ABC).eval()
    for rewards in (module for module in network.modules() if isinstance(module, LinearRewards)):
        # Some log, of which the third action is hardly a part.
        x, action = torch.randn(5000, 12), (torch.rand(5000) < 0.5).long()
        action[:5] = 2
        rewards.add(x[:, : rewards.theta.shape[1] - 1], action, action + 0.3 * torch.randn(5000))
        rewards.settle()
    policy = exported_to(tmp_path / "model.onnx", network, AT_07, 7, 3)
    every = np.concatenate([states(1000, 7), EXTREMES])
    assert check_onnx(policy, described(7, 3), tmp_path / "model.onnx", every, seed=0) <= TOLERANCE


@pytest.mark.parametrize("name", ["ddpg", "td3", "td3Bc", "sac", "iql"])
def test_each_actors_graph_takes_its_own_action(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    numbers = Actions(["price", "share"], [(0.0, 4.0), (-1.0, 1.0)])
    network = build_network(Algorithm.model_validate({name: {"hiddenLayers": [16]}}), SPEC, numbers).eval()
    actor, policy = served(network, PolicyHead(policy="greedy"), "continuous"), described(7, 2) | numbers.as_json()
    policy["action_space"] = "continuous"
    export_onnx(actor, policy, tmp_path / "model.onnx")
    every = np.concatenate([states(1000, 7), EXTREMES])
    assert check_onnx(actor, policy, tmp_path / "model.onnx", every, seed=0) <= TOLERANCE
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (action,) = session.run(["action"], {"state": every})
    assert ((action >= [0.0, -1.0]) & (action <= [4.0, 1.0])).all()
    assert np.ptp(action, axis=0).min() > 0.01, "it depends on the state"


@pytest.mark.parametrize(
    "algorithm",
    [
        {"dqn": {"noisy": True}},
        {"c51": {"lowestReturn": 0.0, "highestReturn": 50.0}},
        {"qrDqn": {}},
        {"cql": {"dueling": True}},
        {"bcq": {"threshold": 0.9, "dueling": True}},
        {"behaviourCloning": {}},
    ],
    ids=lambda a: next(iter(a)),
)
def test_each_algorithms_scores_of_described_actions_are_its_graphs(tmp_path: Path, algorithm: dict[str, Any]) -> None:
    torch.manual_seed(0)
    items = NormalizationSpec(
        inputs=["topic", "quality"], features=[feature("topic", "continuous"), feature("quality", "binary")]
    )
    listed = Actions([], described=items)
    network = build_network(Algorithm.model_validate(algorithm), SPEC, listed).eval()
    with torch.no_grad():
        for name, weights in network.named_parameters():
            # As after training: else most items are equally good, but for rounding.
            weights *= 20 if name.endswith("advantage.weight") else 1
    choice, policy = served(network, AT_07, "parametric"), {"features": [""] * 7, "action_space": "parametric"}
    policy |= listed.as_json()
    export_onnx(choice, policy, tmp_path / "model.onnx")
    every = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    assert check_onnx(choice, policy, tmp_path / "model.onnx", states(200, 7), seed=0, items=every) <= TOLERANCE


@pytest.mark.parametrize(
    ("head", "wanted"),
    [
        # Scores 1, 3, 2 and 1, 9, 2 of which the second is not possible.
        ({"policy": "greedy"}, [[0, 1, 0], [0, 0, 1]]),
        ({"policy": "epsilonGreedy", "epsilon": 0.3}, [[0.1, 0.8, 0.1], [0.15, 0, 0.85]]),
        ({"policy": "softmax", "temperature": 0.5}, [[*softmax([2.0, 6.0, 4.0])], [*softmax([2.0, -1e9, 4.0])]]),
    ],
    ids=str,
)
def test_a_head_says_how_an_action_is_chosen(head: dict[str, Any], wanted: list[list[float]]) -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0], [1.0, 9.0, 2.0]])
    possible = torch.tensor([[True, True, True], [True, False, True]])
    found = Head(PolicyHead.model_validate(head))(scores, possible)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize(("advantage", "second"), [(1.3, 0.0), (1.4, 1.0), (-5.0, 0.0), (200.0, 1.0)])
def test_a_threshold_is_reached_by_the_sigmoid_of_the_seconds_advantage(advantage: float, second: float) -> None:
    head = Head(PolicyHead(policy="threshold", threshold=0.8))  # sigmoid(1.3863) = 0.8
    both = torch.tensor([[True, True]])
    assert head(torch.tensor([[2.0, 2.0 + advantage]]), both).tolist() == [[1 - second, second]]
    assert head(torch.tensor([[2.0, 2.0 + advantage]]), torch.tensor([[True, False]])).tolist() == [[1.0, 0.0]]
    assert head(torch.tensor([[2.0, 2.0 + advantage]]), torch.tensor([[False, True]])).tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("policy", ["greedy", "epsilonGreedy", "threshold"])
def test_a_graph_chooses_as_its_head_does(tmp_path: Path, policy: str) -> None:
    actions = 2 if policy == "threshold" else 3
    network = build_network(Algorithm.model_validate({"dqn": {}}), SPEC, Actions(ABC.names[:actions])).eval()
    made = exported_to(tmp_path / "model.onnx", network, PolicyHead.model_validate({"policy": policy}), 7, actions)
    every = np.concatenate([states(1000, 7), EXTREMES])
    assert check_onnx(made, described(7, actions), tmp_path / "model.onnx", every, seed=0) <= TOLERANCE


def test_an_impossible_action_is_not_taken_in_place_of_one_that_the_log_never_takes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build_network(Algorithm.model_validate({"bcq": {"threshold": 1.0}}), SPEC, ABC).eval()
    policy = exported_to(tmp_path / "model.onnx", network, PolicyHead(), 7, 3)
    exported = Exported(policy, tmp_path / "model.onnx", 7, 3, 1.0)
    rows = states(64, 7)
    best = exported.run(rows, np.zeros((64, 1)), np.ones((64, 3), bool))["greedy_action"]
    found = exported.run(rows, np.full((64, 1), 0.5), np.arange(3) != best)
    np.testing.assert_allclose(np.take_along_axis(found["propensities"], best, 1), 0)
    np.testing.assert_allclose(found["propensities"].sum(1), 1, rtol=1e-6)


def test_of_a_list_bcqs_graph_takes_what_the_log_would_take_of_just_that_list(tmp_path: Path) -> None:
    torch.manual_seed(0)
    items = NormalizationSpec(inputs=["topic"], features=[feature("topic", "continuous")])
    listed = Actions([], described=items)
    network = build_network(Algorithm.model_validate({"bcq": {"threshold": 1.0}}), SPEC, listed).eval()
    policy = {"features": [""] * 7, "action_space": "parametric"} | listed.as_json()
    export_onnx(served(network, PolicyHead(policy="greedy"), "parametric"), policy, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    state, topics = states(1, 7), np.linspace(-2, 2, 5, dtype=np.float32)[:, None]
    with torch.no_grad():
        pairs = [
            network.normalization(torch.from_numpy(state)).expand(5, -1),
            network.of_actions(torch.from_numpy(topics)),
        ]
        likely = network.network.imitation(torch.cat(pairs, 1))[:, 0].numpy()
    # The likeliest of all five, and without it the likeliest of the rest.
    for kept in (np.arange(5), np.delete(np.arange(5), likely.argmax())):
        given = {"state": state, "action": topics[kept], "uniform": np.full((1, 1), 0.5, np.float32)}
        q_values, greedy = session.run(["q_values", "greedy_action"], given)
        assert greedy[0] == likely[kept].argmax()
        assert (np.delete(q_values, greedy[0]) == np.float32(NEVER)).all()


def test_propensities_are_a_softmax_at_the_temperature_over_possible_actions(exported: Exported) -> None:
    rows = states(64, exported.features)
    possible = np.random.default_rng(1).random((64, exported.actions)) < 0.6
    possible[:, 0] |= ~possible.any(1)
    found = exported.run(rows, np.full((64, 1), 0.5), possible)
    scaled = np.where(possible, found["q_values"].astype(float) / exported.temperature, -np.inf)
    wanted = np.exp(scaled - scaled.max(1, keepdims=True))
    np.testing.assert_allclose(found["propensities"], wanted / wanted.sum(1, keepdims=True), atol=1e-5)
    assert (found["propensities"][~possible] == 0).all()
    np.testing.assert_array_equal(found["greedy_action"][:, 0], scaled.argmax(1))


def test_a_logistic_policy_is_served_with_its_own_probabilities(logistic_policy: Exported) -> None:
    found = logistic_policy.run(np.array([[1.0, 2.0]], np.float32), np.array([[0.5]]), np.ones((1, 2), bool))
    second = 0.1 + 0.8 / (1 + np.exp(1.6))
    np.testing.assert_allclose(found["propensities"], [[1 - second, second]], rtol=1e-5)


def test_sampled_actions_follow_the_propensities(exported: Exported) -> None:
    grid = (np.arange(4000) + 0.5) / 4000
    drawn = np.random.default_rng(2).random(4000)
    for one in states(4, exported.features, seed=3):
        every = np.repeat(one[None], 4000, 0)
        possible = np.ones((4000, exported.actions), bool)
        even = exported.run(every, grid[:, None], possible)
        shares = even["propensities"][0]
        counts = np.bincount(even["sampled_action"][:, 0], minlength=exported.actions)
        np.testing.assert_allclose(counts / 4000, shares, atol=1.5 / 4000)
        sampled = exported.run(every, drawn[:, None], possible)["sampled_action"][:, 0]
        counts = np.bincount(sampled, minlength=exported.actions)
        assert stats.chisquare(counts, 4000 * shares.astype(float) / shares.astype(float).sum()).pvalue > 1e-3


def test_impossible_actions_are_never_sampled_nor_greedy(exported: Exported) -> None:
    edges = np.array([0.0, 1e-45, 1e-8, 0.25, 0.5, 0.999, 1 - 2**-24], np.float32)
    rows = states(200, exported.features)
    for bits in range(1, 2**exported.actions):
        possible = np.array([bool(bits >> a & 1) for a in range(exported.actions)])
        for uniform in edges:
            found = exported.run(rows, np.full((200, 1), uniform), np.tile(possible, (200, 1)))
            assert possible[found["sampled_action"]].all()
            assert possible[found["greedy_action"]].all()


def test_a_row_does_not_depend_on_its_batch(exported: Exported) -> None:
    rows, possible = states(64, exported.features), np.ones((64, exported.actions), bool)
    uniform = np.random.default_rng(4).random((64, 1))
    together = exported.run(rows, uniform, possible)
    for i in range(0, 64, 9):
        alone = exported.run(rows[i : i + 1], uniform[i : i + 1], possible[i : i + 1])
        for name in OUTPUTS:
            assert alone[name].shape == (1, *together[name].shape[1:])
            np.testing.assert_allclose(alone[name][0], together[name][i], rtol=1e-5, atol=1e-6)


def test_outputs_have_the_declared_types(exported: Exported) -> None:
    found = exported.run(states(2, exported.features), np.full((2, 1), 0.5), np.ones((2, exported.actions), bool))
    assert {n: (v.dtype.name, v.shape[1]) for n, v in found.items()} == {
        "q_values": ("float32", exported.actions),
        "greedy_action": ("int64", 1),
        "propensities": ("float32", exported.actions),
        "sampled_action": ("int64", 1),
    }


def refused(policy: ServedPolicy, path: Path) -> str:
    with pytest.raises(StageError) as caught:
        check_onnx(policy, described(7, 3), path, states(200, 7), seed=0)
    return str(caught.value)


def test_the_graph_of_another_network_is_refused(q_policy: Exported) -> None:
    other = ServedPolicy(q_network(seed=1), AT_07).eval()
    assert "q_values of the ONNX graph differs from torch" in refused(other, q_policy.path)


def test_the_graph_at_another_temperature_is_refused(q_policy: Exported) -> None:
    other = ServedPolicy(q_policy.policy.network, PolicyHead(temperature=0.8)).eval()
    assert "propensities of the ONNX graph differs from torch" in refused(other, q_policy.path)


@pytest.mark.parametrize("value", [0.01, float("nan")])
def test_a_corrupted_weight_is_refused(q_policy: Exported, tmp_path: Path, value: float) -> None:
    model = onnx.load(str(q_policy.path))
    weight = max(model.graph.initializer, key=lambda i: np.prod(i.dims))
    changed = numpy_helper.to_array(weight).copy()
    changed += value
    weight.CopyFrom(numpy_helper.from_array(changed, weight.name))
    onnx.save(model, str(tmp_path / "model.onnx"))
    assert "differs from torch" in refused(q_policy.policy, tmp_path / "model.onnx")


class Reversed(ServedPolicy):
    """Samples from the other end: the same propensities, other actions."""

    def choose(self, q_values: torch.Tensor, uniform: torch.Tensor, possible: torch.Tensor) -> tuple[Any, ...]:
        q, greedy, propensities, _ = super().choose(q_values, uniform, possible)
        return q, greedy, propensities, super().choose(q_values, 1 - uniform, possible)[3]


def test_other_actions_are_refused_though_all_probabilities_agree(q_policy: Exported) -> None:
    other = Reversed(q_policy.policy.network, AT_07).eval()
    assert "sampled_action of the ONNX graph differs from torch" in refused(other, q_policy.path)


def test_an_item_of_much_appeal_and_little_worth_is_left_out_by_graph_and_torch_alike(tmp_path: Path) -> None:
    torch.manual_seed(0)
    item = NormalizationSpec(inputs=["price"], features=[feature("price", "continuous")])
    algorithm = Algorithm.model_validate({"slateQ": {"hiddenLayers": [8]}})
    network = build_network(algorithm, SPEC, Actions([], described=item, slate=2)).eval()
    with torch.no_grad():
        for of, slope in zip(network.network.of_items, (-60.0, 4.0), strict=True):
            # Two units that are the price's positive and its negative part.
            of.body[0].weight[:2] = of.body[0].bias[:2] = 0
            of.body[0].weight[:2, -1] = torch.tensor([1.0, -1.0])
            of.advantage.weight[0, :2] = torch.tensor([slope, -slope])
    made = served(network, PolicyHead(policy="greedy"), "slate")
    policy = described(7, 0) | {"action_space": "slate", "action_features": ["price"], "slate": 2}
    export_onnx(made, policy, tmp_path / "model.onnx")
    assert check_onnx(made, policy, tmp_path / "model.onnx", states(300, 7), seed=0) <= TOLERANCE
