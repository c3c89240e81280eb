"""Fitted models of the values against a small MDP whose values are known exactly."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from components.evaluation.fitted_q import FittedQ
from components.normalization.spec import FeatureNormalization, NormalizationSpec
from components.transitions import Transitions
from tests.components.evaluation.tabular_mdp import Log, TabularMdp

MODEL = TabularMdp.small()
LARGE = 1000.0
"""How many times larger than the first the second metric is."""


def enum(name: str, values: int) -> FeatureNormalization:
    return FeatureNormalization(
        name=name, type="enum", values=[float(v) for v in range(values)], how="by hand", evidence={}
    )


SPEC = NormalizationSpec(inputs=["state", "step"], features=[enum("state", 3), enum("step", MODEL.horizon)])


def transitions(log: Log) -> Transitions:
    """The log with two metrics: its own, and one that is large and pays for the second action alone."""
    n = len(log.mdp)
    metrics = np.stack([log.metric, LARGE * log.action], 1)
    return Transitions(
        features=["state", "step"],
        actions=["first", "second"],
        metric_names=["small", "large"],
        state=np.stack([log.state, log.step], 1).astype(np.float32),
        action=log.action,
        propensity=MODEL.behaviour[log.state, log.action],
        possible=np.ones((n, 2), bool),
        metrics=metrics.astype(np.float32),
        time_diff=np.ones(n),
        terminal=log.ends(),
        truncated=np.zeros(n, bool),
        ordinal=log.step + 1,
        mdp=log.mdp,
        mdp_ids=[str(m) for m in range(int(log.mdp.max()) + 1)],
    )


def per_row(discount: float, data: Transitions) -> np.ndarray:
    return np.full(len(data), discount, np.float32)


def every_state() -> np.ndarray:
    step, state = np.divmod(np.arange(MODEL.horizon * 3), 3)
    return np.stack([state, step], 1).astype(np.float32)


def exact() -> np.ndarray:
    """[horizon * S, A, 2]: action values of the target policy for both metrics."""
    large = replace(MODEL, reward=np.array([[0.0, LARGE]] * 3))
    return np.stack([model.q_values().reshape(-1, 2) for model in (MODEL, large)], 2)


@pytest.fixture(scope="module")
def log() -> Log:
    return MODEL.simulate(4000, np.random.default_rng(0))


def met(log: Log) -> np.ndarray:
    """How often each state was met, as weights over `every_state`."""
    return np.bincount(log.step * 3 + log.state, minlength=MODEL.horizon * 3) / len(log.step)


def test_action_values_of_metrics_of_very_different_size_are_learned(log: Log) -> None:
    data = transitions(log)
    fitted = FittedQ(data, SPEC, per_row(MODEL.discount, data), seed=0)
    fitted.fit(MODEL.target[log.state], 900)
    found, wanted = fitted.predict(every_state()), exact()
    for metric in (0, 1):
        error = np.sqrt((met(log)[:, None] * (found - wanted)[:, :, metric] ** 2).sum() / 2)
        assert error < 0.1 * wanted[:, :, metric].std()


def test_without_discount_the_metrics_themselves_are_learned(log: Log) -> None:
    data = transitions(log)
    fitted = FittedQ(data, SPEC, per_row(0.0, data), seed=0)
    fitted.fit(np.zeros((len(log.mdp), 2)), 400)
    found = fitted.predict(every_state())
    wanted = np.tile(np.stack([MODEL.reward, [[0, LARGE]] * 3], 2), (MODEL.horizon, 1, 1))
    for metric in (0, 1):
        error = np.sqrt((met(log)[:, None] * (found - wanted)[:, :, metric] ** 2).sum() / 2)
        assert error < 0.1 * wanted[:, :, metric].std()


def test_a_rare_metric_is_estimated_by_its_mean(log: Log) -> None:
    data = transitions(log)
    rare = (np.random.default_rng(1).random(len(data)) < 0.02).astype(np.float32)
    fitted = FittedQ(replace(data, metric_names=["sale"], metrics=rare[:, None]), SPEC, per_row(0.0, data), seed=0)
    fitted.fit(np.zeros((len(data), 2)), 300)
    mean = fitted.predict(data.state)[np.arange(len(data)), data.action, 0].mean()
    assert mean == pytest.approx(rare.mean(), rel=0.25)


@pytest.mark.parametrize("constant", [1.0, 1000.0])
def test_a_metric_that_never_changes_is_learned(log: Log, constant: float) -> None:
    data = transitions(log)
    metrics = np.full((len(data), 1), constant, np.float32)
    fitted = FittedQ(replace(data, metric_names=["fee"], metrics=metrics), SPEC, per_row(0.0, data), seed=0)
    fitted.fit(np.zeros((len(data), 2)), 300)
    np.testing.assert_allclose(fitted.predict(every_state()), constant, rtol=0.1)


@pytest.mark.parametrize(("discount", "learned_from"), [(0.9, False), (0.0, True)])
def test_what_followed_a_cut_is_not_made_up(log: Log, discount: float, learned_from: bool) -> None:
    """A truncated row teaches the metrics of its step, and nothing when what follows counts."""
    data = transitions(log)
    cut = replace(data, terminal=np.zeros(len(data), bool), truncated=data.terminal)
    other = replace(cut, action=np.where(cut.truncated, 1 - cut.action, cut.action))
    predictions = []
    for each in (cut, other):
        fitted = FittedQ(each, SPEC, per_row(discount, each), seed=0)
        fitted.fit(MODEL.target[log.state], 20)
        predictions.append(fitted.predict(every_state()))
    assert np.array_equal(*predictions) != learned_from


def test_the_bound_on_values_is_that_of_the_least_discounted_step(log: Log) -> None:
    """Bursts within long pauses: a mean discount would bound the value of a burst below what it was."""
    data = transitions(log)
    uneven = np.where(data.terminal, 1.0, np.where(np.arange(len(data)) % 2, 0.1, 0.99)).astype(np.float32)
    fitted = FittedQ(data, SPEC, uneven, seed=0)
    np.testing.assert_allclose(fitted.highest * fitted.scale, data.metrics.max(0) / (1 - 0.99), rtol=1e-4)


def test_what_follows_an_end_is_no_looking_ahead(log: Log) -> None:
    data = transitions(log)
    fitted = FittedQ(data, SPEC, np.where(data.terminal, 1.0, 0.0).astype(np.float32), seed=0)
    assert not fitted.looks_ahead


def test_a_fit_is_repeatable_and_goes_on_from_the_one_before(log: Log) -> None:
    data, policy = transitions(log), MODEL.target[log.state]
    once, again, on = (FittedQ(data, SPEC, per_row(MODEL.discount, data), seed=0) for _ in range(3))
    once.fit(policy, 20)
    again.fit(policy, 20)
    on.fit(policy, 10)
    half = on.predict(every_state())
    on.fit(policy, 10)
    np.testing.assert_array_equal(once.predict(every_state()), again.predict(every_state()))
    np.testing.assert_array_equal(once.predict(every_state()), on.predict(every_state()))
    assert not np.array_equal(half, on.predict(every_state()))


def test_the_reach_of_a_fit_is_that_of_the_discount_or_of_the_longest_mdp(log: Log) -> None:
    data, policy = transitions(log), MODEL.target[log.state]
    to_the_end = np.ceil((MODEL.horizon + 1.65 * MODEL.horizon**0.5) / 0.05)
    for discount, steps in ((0.0, 0), (0.3, 85), (0.99, to_the_end), (1.0, to_the_end)):
        assert FittedQ(data, SPEC, per_row(discount, data), seed=0).reach == steps
    enough, few = (FittedQ(data, SPEC, per_row(MODEL.discount, data), seed=0) for _ in range(2))
    enough.fit(policy, enough.reach)
    few.fit(policy, 10)
    distance = [np.abs(each.predict(every_state()) - exact()).mean() for each in (enough, few)]
    assert distance[0] < 0.5 * distance[1]


def test_the_reach_is_where_a_first_guess_has_faded() -> None:
    left = (1 - 0.05 * (1 - 0.99)) ** np.array([FittedQ._reach(0.99, 10**6) - 1, FittedQ._reach(0.99, 10**6)])
    assert left[0] > 0.05 >= left[1]
    # Values have come from the end of 100 decisions once 100 of so many steps, with a chance of 5 % each, have struck.
    assert stats.binom(FittedQ._reach(1.0, 100), 0.05).sf(99) > 0.94
    assert FittedQ._reach(1.0, 10**6) == 50_000


def test_no_value_is_followed_beyond_what_the_logged_metrics_could_sum_to(log: Log) -> None:
    data = transitions(log)
    fitted = FittedQ(replace(data, terminal=np.zeros(len(data), bool)), SPEC, per_row(MODEL.discount, data), seed=0)
    for values in fitted.learner.target.parameters():
        values.fill_(50.0)
    fitted.fit(MODEL.target[log.state], 1)
    highest = data.metrics.max(0) / (1 - MODEL.discount)
    np.testing.assert_allclose(fitted.highest * fitted.scale, highest, rtol=1e-5)
    assert fitted.lowest[1] == 0
    # Adam's first steps are as long as its rate however far off a target lies: only the loss shows what was followed.
    for _ in range(300):
        for values in fitted.learner.target.parameters():
            values.fill_(50.0)
        fitted.fit(MODEL.target[log.state], 1)
    assert (fitted.predict(data.state).max((0, 1)) < 1.5 * (data.metrics.max(0) + MODEL.discount * highest)).all()
