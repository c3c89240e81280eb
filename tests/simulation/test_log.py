"""The simulated product: its log, its propensities, its truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from components.export.repository import read_policies
from contracts.decision_log import SCHEMA
from contracts.job import JobError, JobSpec, load_job
from simulation.cartpole import ACTIONS, FEATURES, play
from simulation.log import write_log
from simulation.policies import behaviour_policy, check_job, export_behaviour, exported_policy
from simulation.truth import true_returns

SPEC = load_job(Path(__file__).parents[2] / "manifests" / "examples" / "cartpole.yaml").spec
POLICY = SPEC.simulation.behaviour_policy


def small(**changes: object) -> JobSpec:
    simulation = SPEC.simulation.model_copy(update={"episodes": 50, "truth_episodes": 50})
    return SPEC.model_copy(update={"simulation": simulation} | changes)


def test_the_same_seed_makes_the_same_log(tmp_path):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        write_log(small(seed=seed), tmp_path / name)
    a, b, c = (pq.read_table(tmp_path / name / "decisions.parquet") for name in "abc")
    assert a.equals(b)
    assert not a.equals(c)


def test_the_log_has_the_decision_log_s_schema(tmp_path):
    write_log(small(), tmp_path / "log")
    table = pq.read_table(tmp_path / "log" / "decisions.parquet")
    assert table.schema.equals(SCHEMA)
    assert pc.min(table["action_probability"]).as_py() > 0
    assert pc.max(table["action_probability"]).as_py() <= 1
    keys = set(zip(table["mdp_id"].to_pylist(), table["sequence_number"].to_pylist(), strict=True))
    assert len(keys) == len(table)


def test_logged_probabilities_are_those_that_actions_were_drawn_with():
    played = play(behaviour_policy(POLICY), 300, seed=1)
    expected = played.probability.mean()
    # An action with probability p is its own evidence: over all rows, E[1/p] is the number of actions.
    inverse = 1 / played.probability
    assert inverse.mean() == pytest.approx(2.0, abs=4 * inverse.std() / np.sqrt(len(inverse)))
    assert 0.5 < expected < 1


def test_every_episode_ends_once_and_counts_its_steps():
    played = play(behaviour_policy(POLICY), 100, seed=2)
    assert (np.diff(played.episode) >= 0).all()
    fell = np.bincount(played.episode, played.metrics[:, 1])
    cut = np.bincount(played.episode, played.truncated)
    assert (fell + cut == 1).all()
    assert (played.returns == np.bincount(played.episode, played.metrics[:, 0])).all()


def test_an_episode_at_the_time_limit_is_cut_off_not_ended():
    def balance(state, uniform):
        action = (state @ np.array([0.5, 1.0, 10.0, 3.0]) > 0).astype(np.int64)
        return action, np.ones(len(action))

    played = play(balance, 5, seed=3)
    assert (played.returns == 500).all()
    assert played.truncated.sum() == 5
    assert played.metrics[:, 1].sum() == 0


def test_the_exported_behaviour_policy_is_the_behaviour_policy(tmp_path):
    export_behaviour(POLICY, tmp_path)
    (version,) = read_policies(tmp_path)
    exported = exported_policy(tmp_path / "arm" / str(version))
    rng = np.random.default_rng(4)
    state = rng.normal(size=(500, 4)).astype(np.float32)
    uniform = rng.random(500, np.float32)
    action, probability = behaviour_policy(POLICY)(state, uniform)
    other_action, other_probability = exported(state, uniform)
    assert (action == other_action).all()
    np.testing.assert_allclose(probability, other_probability, atol=1e-6)


def test_the_truth_of_the_behaviour_policy_is_its_return(tmp_path):
    export_behaviour(POLICY, tmp_path)
    (version,) = read_policies(tmp_path)
    truth = true_returns(small(), tmp_path / "arm" / str(version))
    assert truth["policy"]["value"] == truth["behaviour"]["value"]
    assert truth["policy"]["episodes"] == 50


def test_a_job_that_does_not_fit_the_environment_is_refused():
    with pytest.raises(JobError, match=r"spec\.actions: the environment has \['left', 'right'\]"):
        check_job(SPEC.model_copy(update={"actions": ["up", "down"]}))
    policy = POLICY.model_copy(update={"weights": {"speed": 1.0}})
    wrong = SPEC.model_copy(update={"simulation": SPEC.simulation.model_copy(update={"behaviour_policy": policy})})
    with pytest.raises(JobError, match=r"behaviourPolicy\.weights\.speed: no such feature"):
        check_job(wrong)
    assert FEATURES[0] == "cart_position"
    assert ACTIONS == ("left", "right")
