"""Learning by playing: what is remembered, and that it is learned from."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from components.normalization.graph import CLAMP, NormalizationGraph
from components.training.algorithms.build import build_learner, build_network
from components.training.bundle import read_bundle
from contracts.job import JobError
from simulation import online
from simulation.online import (
    Held,
    Replay,
    Settings,
    actions_of,
    greedy_returns,
    learn_online,
    make,
    normalization_of,
    settings_for,
)
from simulation.standardized import standardized
from simulation.studies import ONLINE, STUDIES


def remembered(rows: int, filled: int) -> Replay:
    """One copy; the state is the number of the row, the reward ten times that; every fourth row an episode ends, by
    turns in a terminal state and by a time limit, and the row after holds no decision."""
    replay = Replay(rows, np.zeros((1, 1), np.float32), np.zeros(1, np.int64))
    for n in range(filled):
        ends, after = n % 4 == 2, n % 4 == 3
        outcome = [np.array([10.0 * n], np.float32), np.array([ends and n % 8 == 2]), np.array([ends and n % 8 == 6])]
        replay.add(torch.tensor([[float(n)]]), np.array([n % 2]), *outcome, np.array([not after]))
    return replay


@pytest.mark.parametrize("filled", [19, 40])
def test_a_transition_leads_to_the_next_row_and_no_further_than_its_episode(filled: int) -> None:
    batch = remembered(20, filled).sample(400, 1, 0.9, np.random.default_rng(0))
    state, following = batch.state[:, 0].numpy(), batch.next_state[:, 0].numpy()
    assert (following == state + 1).all()
    assert (state % 4 != 3).all()
    assert state.max() == filled - 2
    assert state.min() == max(0, filled - 20)
    np.testing.assert_allclose(batch.reward, 10 * state)
    np.testing.assert_allclose(batch.discount, np.where(state % 8 == 2, 0, 0.9))
    assert (batch.action.numpy() == state % 2).all()


def test_over_several_decisions_rewards_are_summed_until_the_episode_ends() -> None:
    batch = remembered(40, 40).sample(600, 3, 0.5, np.random.default_rng(0))
    for state, reward, following, discount in zip(
        batch.state[:, 0].tolist(), batch.reward.tolist(), batch.next_state[:, 0].tolist(), batch.discount.tolist(),
        strict=True,
    ):  # fmt: skip
        left = int(3 - state % 4)  # decisions to the episode's end, this one included
        taken = min(3, left)
        assert reward == pytest.approx(sum(0.5**k * 10 * (state + k) for k in range(taken)))
        assert following == state + taken
        ended = taken == left and (state + taken - 1) % 8 == 2
        assert discount == (0 if ended else pytest.approx(0.5**taken))


def test_no_state_within_bounds_is_beyond_the_clamp() -> None:
    environment = make("Acrobot-v1", 2)
    seen = np.random.default_rng(0).normal(scale=0.1, size=(500, 6)).astype(np.float32)
    graph = NormalizationGraph(normalization_of(environment, seen))
    extremes = np.stack([environment.single_observation_space.low, environment.single_observation_space.high])
    assert graph(torch.from_numpy(extremes)).abs().max() <= CLAMP
    assert graph(torch.from_numpy(seen)).std(0).min() > 0.02
    environment.close()


def test_features_without_bounds_go_by_what_was_seen() -> None:
    environment = make("CartPole-v1", 2)
    seen = np.random.default_rng(0).normal(2.0, 0.5, size=(2000, 4)).astype(np.float32)
    velocity = normalization_of(environment, seen).features[1]
    assert (velocity.mean, velocity.stddev) == (pytest.approx(2.0, abs=0.05), pytest.approx(0.5, abs=0.05))
    environment.close()


@pytest.mark.parametrize(("environment", "bar"), [("CartPole-v1", 475), ("Pendulum-v1", -200)])
def test_what_is_known_to_work_works(environment: str, bar: float) -> None:
    algorithm = {"CartPole-v1": "dqn", "Pendulum-v1": "td3"}[environment]
    settings, made = settings_for(environment, algorithm, {})
    learned = learn_online(environment, made, settings, seed=0)
    assert len(learned.returns) == 100
    assert np.mean(learned.returns) >= bar


PLAYS = STUDIES["online"].fits


@pytest.mark.parametrize(
    ("environment", "row", "decisions", "bar"),
    [
        *[("CartPole-v1", row, 40_000, 120) for row in ONLINE if PLAYS("CartPole-v1", row) and row != "double DQN"],
        *[("Pendulum-v1", row, 6_000, -300) for row in ONLINE if PLAYS("Pendulum-v1", row) and row != "TD3"],
        ("Acrobot-v1", "double DQN", 60_000, -200),
    ],
)
def test_a_short_play_is_far_better_than_chance(environment: str, row: str, decisions: int, bar: float) -> None:
    name, given = ONLINE[row]
    settings, made = settings_for(environment, name, given, decisions)
    enough = {"CartPole-v1": 150, "Pendulum-v1": -200, "Acrobot-v1": -150}[environment]
    learned = learn_online(environment, made, replace(settings, enough=enough), seed=0)
    assert np.mean(learned.returns) >= bar


def test_the_same_seed_plays_and_learns_the_same() -> None:
    settings, made = settings_for("CartPole-v1", "dqn", {"hiddenLayers": [16]}, decisions=1500)
    first, again, other = (learn_online("CartPole-v1", made, settings, seed) for seed in (1, 1, 2))
    assert first.returns == again.returns
    assert first.returns != other.returns
    weights = [torch.cat([p.flatten() for p in each.network.parameters()]) for each in (first, again)]
    assert torch.equal(*weights)


def test_no_two_seeds_play_the_same_episodes() -> None:
    still = torch.nn.Linear(3, 1)
    torch.nn.init.zeros_(still.weight)
    torch.nn.init.zeros_(still.bias)
    returns = [greedy_returns("Pendulum-v1", still, 20, seed) for seed in (0, 1, 0)]
    assert returns[0] == returns[2]
    assert not set(returns[0]) & set(returns[1])


def test_learning_that_runs_away_says_so() -> None:
    settings, made = settings_for("Pendulum-v1", "ddpg", {"hiddenLayers": [8], "learningRate": 1e30}, decisions=4000)
    with pytest.raises(JobError, match=r"learning diverges: after [0-9,]+ decisions the loss is (nan|inf)"):
        learn_online("Pendulum-v1", made, settings, seed=0)


def test_what_was_learned_is_kept_as_a_policy_bundle(tmp_path: Any) -> None:
    settings, made = settings_for("Pendulum-v1", "ddpg", {"hiddenLayers": [8]}, decisions=1200)
    learned = learn_online("Pendulum-v1", made, settings, seed=0)
    online.save(learned, tmp_path / "out", online.result("Pendulum-v1", learned, 0))
    bundle = read_bundle(tmp_path / "out" / "policy")
    assert bundle.actions == learned.actions == actions_of(make("Pendulum-v1", 1))
    states = torch.randn(50, 3)
    torch.testing.assert_close(bundle.network(states), learned.network(states))
    assert bundle.provenance["environment"] == "Pendulum-v1"


def test_noise_on_the_weights_is_all_that_noisy_layers_explore_by() -> None:
    _, made = settings_for("CartPole-v1", "dqn", {"noisy": True, "hiddenLayers": [8]})
    torch.manual_seed(0)
    spec = standardized(["x"] * 4, np.zeros(4), np.ones(4))
    network = build_network(made, spec, actions_of(make("CartPole-v1", 1)))
    with torch.no_grad():
        network.network.advantage.bias[1] += 100.0
    learner = build_learner(made, network)
    chosen = online.explore(learner, torch.zeros(500, 4), np.zeros(500, int), Settings(1), 1, np.random.default_rng(0))
    assert (chosen == 1).all()


def test_random_actions_are_held_for_up_to_so_many_decisions_each_number_as_likely() -> None:
    rng, held = np.random.default_rng(0), Held(1_000, 50, 4)
    drawn = np.array([held.next(rng) for _ in range(400)])
    lengths = np.concatenate([np.diff(np.flatnonzero(np.diff(copy, prepend=-1))) for copy in drawn.T])
    assert np.bincount(lengths)[1:5] / len(lengths) == pytest.approx([0.25] * 4, abs=0.02)
    assert len(np.unique(drawn[0])) > 40


def test_random_actions_that_are_not_held_are_drawn_anew_each_time() -> None:
    rng, held = np.random.default_rng(0), Held(3, 2_000, 1)
    first, second = held.next(rng), held.next(rng)
    assert np.bincount(first) / 2_000 == pytest.approx([1 / 3] * 3, abs=0.05)
    assert (first == second).mean() == pytest.approx(1 / 3, abs=0.05)


@pytest.mark.parametrize("algorithm", ["iql", "td3Bc"])
def test_what_learns_from_logs_alone_does_not_play(algorithm: str) -> None:
    settings, made = settings_for("Pendulum-v1", algorithm, {})
    with pytest.raises(JobError, match="learns from logs alone"):
        learn_online("Pendulum-v1", made, settings, 0)


def test_an_environment_of_pictures_is_refused() -> None:
    with pytest.raises(JobError, match="vectors of numbers"):
        make("FrozenLake-v1", 2)


def test_a_look_keeps_the_best_policy() -> None:
    settings = Settings(6000, look_every=1000, copies=4)
    _, made = settings_for("CartPole-v1", "dqn", {"hiddenLayers": [64], "learningRate": 0.01, "steps": 1})
    learned = learn_online("CartPole-v1", made, settings, 0)
    looks = [look["mean_return"] for look in learned.looks]
    assert len(looks) >= 3
    again = online.greedy_returns("CartPole-v1", learned.network, online.GLANCE, 0 + online.FRESH)
    assert np.mean(again) == max(looks) > looks[-1]
