"""Training begins with another policy's weights, or says why it does not."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from components.normalization.spec import FeatureNormalization, NormalizationSpec
from components.training.actions import Actions
from components.training.algorithms.build import build_learner, build_network
from components.training.algorithms.learner import Batch
from components.training.bundle import read_bundle, write_bundle
from components.training.network import Normalized
from components.training.trainer import Trainer
from components.training.warm_start import IncompatibleError, check_compatible, start_from
from contracts.job import Algorithm, PolicyHead
from contracts.stage import StageError

ACTIONS = Actions(["left", "right"])


def feature(name: str, type_: str = "continuous", **parameters: Any) -> FeatureNormalization:
    return FeatureNormalization(name=name, type=type_, how="by hand", evidence={}, **parameters)


def spec(*features: FeatureNormalization, presence: tuple[str, ...] = ()) -> NormalizationSpec:
    return NormalizationSpec(inputs=[f.name for f in features], features=list(features), presence=list(presence))


X, PLACE = feature("x", mean=1.0, stddev=2.0), feature("place", "enum", values=[1.0, 2.0])
BEFORE = spec(X, PLACE)
DQN: dict[str, Any] = {"dqn": {"hiddenLayers": [8]}}
BCQ: dict[str, Any] = {"bcq": {"hiddenLayers": [8], "noisy": True}}


def begun(algorithm: dict[str, Any], normalization: NormalizationSpec, seed: int = 0) -> tuple[Normalized, Trainer]:
    made = Algorithm.model_validate(algorithm)
    torch.manual_seed(seed)
    network = build_network(made, normalization, ACTIONS)
    return network, Trainer(build_learner(made, network), 0.01)


def start(
    bundle: Path, network: Normalized, trainer: Trainer, normalization: NormalizationSpec, algorithm: dict[str, Any],
    actions: Actions = ACTIONS,
) -> str:  # fmt: skip
    made = Algorithm.model_validate(algorithm)
    return start_from(str(bundle), network, trainer.optimizer, normalization, actions, made, {})


def learn(trainer: Trainer, network: Normalized, rows: torch.Tensor) -> None:
    state, n = network.normalization(rows), len(rows)
    action, ones = torch.arange(n) % 2, torch.ones(n)
    trainer.step(Batch(state, action, None, ones, state, action, None, 0.9 * ones))


@pytest.fixture(params=[DQN, BCQ], ids=["dqn", "bcq"])
def algorithm(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


@pytest.fixture
def bundle(tmp_path: Path, algorithm: dict[str, Any]) -> Path:
    network, trainer = begun(algorithm, BEFORE, seed=1)
    for _ in range(3):
        learn(trainer, network, torch.tensor([[0.5, 1.0], [3.0, 2.0]]))
    made = Algorithm.model_validate(algorithm)
    write_bundle(tmp_path / "bundle", network, made, BEFORE, ACTIONS, PolicyHead(), {}, trainer.optimizer)
    return tmp_path / "bundle"


def test_begins_with_the_policys_weights_and_says_whose(bundle: Path, algorithm: dict[str, Any]) -> None:
    network, trainer = begun(algorithm, BEFORE)
    digest = start(bundle, network, trainer, BEFORE, algorithm)
    assert digest == json.loads((bundle / "bundle.json").read_text())["digest"]
    theirs = load_file(bundle / "weights.safetensors")
    assert all(torch.equal(weights, theirs[name]) for name, weights in network.named_parameters())


def test_goes_on_with_what_the_optimizer_knew(bundle: Path, algorithm: dict[str, Any]) -> None:
    network, trainer = begun(algorithm, BEFORE)
    start(bundle, network, trainer, BEFORE, algorithm)
    known = load_file(bundle / "optimizer.safetensors")
    for i, (name, _) in enumerate(network.named_parameters()):
        for moment, value in trainer.optimizer.state_dict()["state"][i].items():
            torch.testing.assert_close(value, known[f"{name}.{moment}"])
    learn(trainer, network, torch.tensor([[0.5, 1.0], [3.0, 2.0]]))
    assert trainer.optimizer.state_dict()["state"][0]["step"] == 4


def test_new_features_and_values_change_nothing_at_first_and_are_learned(
    bundle: Path, algorithm: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    more = feature("place", "enum", values=[0.0, 1.0, 2.0])
    now = spec(feature("age", mean=40.0), more, X, presence=("x",))
    network, trainer = begun(algorithm, now)
    assert start(bundle, network, trainer, now, algorithm)
    # age, one value of place, the presence of x
    assert "3 of its inputs new" in capsys.readouterr().err
    then = read_bundle(bundle).network
    network.eval()
    for age, place, x in ((90.0, 1.0, 0.5), (float("nan"), 2.0, 3.0), (1.0, 7.0, 3.0)):
        torch.testing.assert_close(network(torch.tensor([[age, place, x]])), then(torch.tensor([[x, place]])))
    network.train()
    learn(trainer, network, torch.tensor([[90.0, 0.0, 1.0], [20.0, 1.0, 2.0]]))
    weights = dict(network.named_parameters())[
        "network.body.0.weight" if "dqn" in algorithm else "network.values.body.0.weight"
    ]
    columns = [network.normalization.output_columns.index(c) for c in (("age", "value"), ("place", "value 0"))]
    assert (weights[:, columns].abs().sum(0) > 0).all()


@pytest.mark.parametrize("dueling", [False, True])
@pytest.mark.parametrize("name", ["dqn", "bcq"])
def test_new_features_of_items_change_nothing_at_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, dueling: bool
) -> None:
    colour = feature("colour", "enum", values=[1.0, 2.0])
    then, now = (Actions([], described=spec(X, colour)), Actions([], described=spec(PLACE, colour, X)))
    made = Algorithm.model_validate({name: {"hiddenLayers": [8], "dueling": dueling}})
    torch.manual_seed(0)
    before, network = build_network(made, BEFORE, then), build_network(made, BEFORE, now)
    bundle = tmp_path / "bundle"
    write_bundle(bundle, before, made, BEFORE, then, PolicyHead(), {})
    trainer = Trainer(build_learner(made, network), 0.01)
    assert start_from(str(bundle), network, trainer.optimizer, BEFORE, now, made, {})
    assert "3 of its inputs new" in capsys.readouterr().err  # place and its two values
    state = torch.tensor([[0.5, 1.0], [3.0, 2.0]])
    scores = before(state, torch.tensor([[0.5, 1.0], [7.0, 2.0]]))
    torch.testing.assert_close(network(state, torch.tensor([[1.0, 1.0, 0.5], [2.0, 2.0, 7.0]])), scores)
    gone = Actions([], described=spec(colour))
    with pytest.raises(StageError, match=r"x \(continuous\) is gone"):
        start_from(str(bundle), build_network(made, BEFORE, gone), trainer.optimizer, BEFORE, gone, made, {})


def test_slates_of_another_size_are_refused(tmp_path: Path) -> None:
    made = Algorithm.model_validate({"slateQ": {"hiddenLayers": [8]}})
    of = {size: Actions([], described=spec(X), slate=size) for size in (2, 5)}
    network = build_network(made, BEFORE, of[2])
    write_bundle(tmp_path / "bundle", network, made, BEFORE, of[2], PolicyHead(), {})
    trainer = Trainer(build_learner(made, network), 0.01)
    with pytest.raises(StageError, match="its actions are slates of 2, this job's are slates of 5"):
        start_from(str(tmp_path / "bundle"), network, trainer.optimizer, BEFORE, of[5], made, {})


def test_numbers_with_other_bounds_are_refused(tmp_path: Path) -> None:
    made = Algorithm.model_validate({"iql": {"hiddenLayers": [8]}})
    before, now = (Actions(["price"], bounds=[(0.0, high)]) for high in (1.0, 2.0))
    network = build_network(made, BEFORE, before)
    write_bundle(tmp_path / "bundle", network, made, BEFORE, before, PolicyHead(), {})
    with pytest.raises(IncompatibleError, match=r"bounds {'price': \(0.0, 1.0\)}, .*\(0.0, 2.0\)}. Set actionBounds"):
        check_compatible(str(tmp_path / "bundle"), BEFORE, now)


@pytest.mark.parametrize(
    ("now", "actions", "layers", "error", "said"),
    [
        (BEFORE, ACTIONS, [9], StageError, "its layers are not this job's"),
        (
            BEFORE,
            Actions(["up", "down"]),
            [8],
            IncompatibleError,
            "its actions are left, right, this job's are up, down",
        ),
        (spec(PLACE), ACTIONS, [8], IncompatibleError, "its features are not this job's: x (continuous) is gone"),
        (spec(feature("x", "binary"), PLACE), ACTIONS, [8], IncompatibleError, "x (continuous) is binary now"),
        (
            spec(X, feature("place", "enum", values=[2.0, 3.0])),
            ACTIONS,
            [8],
            StageError,
            "place has no value 1 any more",
        ),
    ],
)
def test_a_policy_that_does_not_fit_is_refused_and_says_why(
    bundle: Path, algorithm: dict[str, Any], now: NormalizationSpec, actions: Actions, layers: list[int],
    error: type[StageError], said: str,
) -> None:  # fmt: skip
    """Other features and actions are told apart from what a job may change, with which training begins anew."""
    name, settings = next(iter(algorithm.items()))
    network, trainer = begun({name: settings | {"hiddenLayers": layers}}, now)
    before = [weights.clone() for weights in network.parameters()]
    with pytest.raises(StageError, match=re.escape(said)) as raised:
        start(bundle, network, trainer, now, algorithm, actions)
    assert raised.type is error
    assert all(torch.equal(*pair) for pair in zip(before, network.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"metric_weights": {"sale": 0.01}}, "its values are of metric_weights {'sale': 1.0}, and this job's of"),
        ({"discount": 0.9}, "its values are of discount 0.99, and this job's of 0.9"),
        ({"reward_clip": [0.0, 1.0]}, "its values are of reward_clip None"),
    ],
)
def test_values_of_other_rewards_are_refused(
    tmp_path: Path, algorithm: dict[str, Any], changed: dict[str, Any], said: str
) -> None:
    was = {"metric_weights": {"sale": 1.0}, "discount": 0.99, "reward_clip": None}
    for name, settings, refused in (("values", algorithm, True), ("clone", {"behaviourCloning": {}}, False)):
        made = Algorithm.model_validate(settings)
        network, trainer = begun(settings, BEFORE)
        write_bundle(tmp_path / name, network, made, BEFORE, ACTIONS, PolicyHead(), was, trainer.optimizer)
        given = network, trainer.optimizer, BEFORE, ACTIONS, made
        assert start_from(str(tmp_path / name), *given, was)
        if refused:
            with pytest.raises(StageError, match=re.escape(said)):
                start_from(str(tmp_path / name), *given, was | changed)
        else:
            assert start_from(str(tmp_path / name), *given, was | changed), "a clone knows of no reward"


def test_another_algorithms_policy_is_refused(tmp_path: Path, bundle: Path) -> None:
    other = {"qrDqn": {"hiddenLayers": [8]}}
    network, trainer = begun(other, BEFORE)
    with pytest.raises(StageError):
        start(bundle, network, trainer, BEFORE, other)


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (
            {"behaviourCloning": {"hiddenLayers": [8]}},
            {"dqn": {"hiddenLayers": [8], "dueling": False}},
            "its scores are log-probabilities, and this job's are values",
        ),
        (
            {"c51": {"hiddenLayers": [8], "lowestReturn": 0, "highestReturn": 100}},
            {"c51": {"hiddenLayers": [8], "lowestReturn": 0, "highestReturn": 200}},
            "its scores are values from 0 to 100, and this job's are values from 0 to 200",
        ),
    ],
    ids=["cloning", "atoms"],
)
def test_weights_of_the_same_shapes_that_say_something_else_are_not_taken(
    tmp_path: Path, before: dict[str, Any], now: dict[str, Any], said: str
) -> None:
    network, _ = begun(before, BEFORE)
    made = Algorithm.model_validate(before)
    write_bundle(tmp_path / "bundle", network, made, BEFORE, ACTIONS, PolicyHead(), {})
    with pytest.raises(StageError, match=said):
        start(tmp_path / "bundle", *begun(now, BEFORE), BEFORE, now)


def test_an_optimizer_state_that_is_torn_is_refused(bundle: Path, algorithm: dict[str, Any]) -> None:
    (bundle / "optimizer.safetensors").write_bytes(b"torn")
    network, trainer = begun(algorithm, BEFORE)
    before = [weights.clone() for weights in network.parameters()]
    with pytest.raises(StageError, match=r"optimizer\.safetensors: cannot be read"):
        start(bundle, network, trainer, BEFORE, algorithm)
    assert all(torch.equal(*pair) for pair in zip(before, network.parameters(), strict=True))


def test_a_policy_that_is_gone_is_refused(tmp_path: Path) -> None:
    network, trainer = begun(DQN, BEFORE)
    with pytest.raises(StageError):
        start(tmp_path / "gone", network, trainer, BEFORE, DQN)
