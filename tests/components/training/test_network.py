"""The networks' identities."""

import numpy as np
import pytest
import torch

from components.normalization.graph import NormalizationGraph
from components.normalization.spec import FeatureNormalization, NormalizationSpec
from components.training.network import LogisticPolicy, NoisyLinear, Normalized, QNetwork

SPEC = NormalizationSpec(
    inputs=["x", "y"],
    features=[
        FeatureNormalization(name=name, type="continuous", mean=1.0, stddev=2.0, how="by hand", evidence={})
        for name in ("x", "y")
    ],
)
STATES = torch.tensor(np.random.default_rng(0).normal(1, 3, (40, 2)).astype(np.float32))


def network(**changes: object) -> QNetwork:
    torch.manual_seed(0)
    return QNetwork(2, 3, [8, 8], **changes)


def test_a_dueling_networks_mean_over_actions_is_the_states_value() -> None:
    dueling = network(dueling=True)
    hidden = dueling.body(STATES)
    q = dueling(STATES)
    torch.testing.assert_close(q.mean(1, keepdim=True), dueling.value(hidden))
    advantage = dueling.advantage(hidden)
    torch.testing.assert_close(q - q.mean(1, keepdim=True), advantage - advantage.mean(1, keepdim=True))


def test_adding_to_all_advantages_changes_no_value() -> None:
    dueling = network(dueling=True)
    before = dueling(STATES)
    with torch.no_grad():
        dueling.advantage.bias += 5
    torch.testing.assert_close(dueling(STATES), before)


def test_without_dueling_the_head_gives_the_values() -> None:
    plain = network()
    wanted = plain.advantage(plain.body(STATES))
    torch.testing.assert_close(plain(STATES), wanted)


def test_outputs_make_a_vector_of_each_actions_value() -> None:
    many = network(outputs=4)
    found = many(STATES)
    assert found.shape == (40, 3, 4)
    hidden = many.body(STATES)
    torch.testing.assert_close(found.reshape(40, 12), many.advantage(hidden))


def test_a_dueling_network_with_outputs_has_a_value_for_each() -> None:
    dueling = network(dueling=True, outputs=2)
    torch.testing.assert_close(dueling(STATES).mean(1), dueling.value(dueling.body(STATES)))


def test_raw_features_are_normalized_before_the_network() -> None:
    made = Normalized(NormalizationGraph(SPEC), network())
    torch.testing.assert_close(made(STATES), made.network((STATES - 1) / 2))


def test_a_noisy_layer_is_noisy_in_training_alone_and_learns_how_much() -> None:
    torch.manual_seed(0)
    layer = NoisyLinear(4, 3)
    assert (layer.weight_noise == NoisyLinear.SIZE / 2).all()
    assert (layer.bias_noise == NoisyLinear.SIZE / 2).all()
    x = torch.randn(5, 4)
    assert not torch.equal(layer(x), layer(x))
    layer(x).square().sum().backward()
    assert layer.weight_noise.grad.abs().sum() > 0
    assert torch.equal(layer.eval()(x), layer(x))


def test_each_row_has_factorised_noise_of_its_own() -> None:
    torch.manual_seed(0)
    layer, x = NoisyLinear(4, 3), torch.randn(5, 4)
    torch.nn.init.normal_(layer.weight_noise)
    torch.nn.init.normal_(layer.bias_noise)
    torch.manual_seed(1)
    found = layer(x)
    torch.manual_seed(1)
    before, after = torch.randn(5, 4), torch.randn(5, 3)
    before, after = (z.sign() * z.abs().sqrt() for z in (before, after))
    for row in range(5):
        weight = layer.weight + layer.weight_noise * torch.outer(after[row], before[row])
        torch.testing.assert_close(found[row], weight @ x[row] + layer.bias + layer.bias_noise * after[row])


@pytest.mark.parametrize("layer_norm", [True, False])
def test_layer_normalization_takes_the_size_out_of_the_hidden_layers(layer_norm: bool) -> None:
    made = network(layer_norm=layer_norm)
    before = made(STATES)
    with torch.no_grad():
        for layer in made.body:
            if isinstance(layer, torch.nn.Linear):
                layer.weight *= 100
                layer.bias *= 100
    assert torch.allclose(made(STATES), before, atol=0.01) == layer_norm


def test_missing_features_give_finite_values() -> None:
    assert torch.isfinite(Normalized(NormalizationGraph(SPEC), network())(torch.full((1, 2), float("nan")))).all()


@pytest.mark.parametrize("exploration", [0.0, 0.2, 1.0])
def test_a_logistic_policy_mixes_its_sigmoid_with_uniform_exploration(exploration: float) -> None:
    policy = LogisticPolicy([0.5, -1.5], exploration)
    states = STATES.double().numpy()
    second = exploration / 2 + (1 - exploration) / (1 + np.exp(-(states @ [0.5, -1.5])))
    probabilities = policy(STATES).exp().numpy()
    np.testing.assert_allclose(probabilities, np.stack([1 - second, second], 1), atol=1e-6)
    served = torch.softmax(policy(STATES), 1).numpy()
    np.testing.assert_allclose(served, probabilities, atol=1e-6)


def test_a_logistic_policy_counts_a_missing_feature_as_zero() -> None:
    policy = LogisticPolicy([0.5, -1.5], 0.1)
    torch.testing.assert_close(policy(torch.tensor([[2.0, float("nan")]])), policy(torch.tensor([[2.0, 0.0]])))


def test_a_logistic_policy_that_is_sure_has_no_score_that_is_not_a_number() -> None:
    served = torch.softmax(LogisticPolicy([100.0, 0.0], 0.0)(torch.tensor([[50.0, 0], [-50.0, 0]])), 1)
    torch.testing.assert_close(served, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
