"""The estimators against a small MDP whose values are known exactly."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from components.evaluation import estimators as cpe
from tests.components.evaluation.tabular_mdp import Log, TabularMdp

SMALL, UNEVEN = TabularMdp.small(), TabularMdp.uneven()
Estimate = Callable[[TabularMdp, Log, cpe.Replicates], np.ndarray]


def once(mdps: int) -> cpe.Replicates:
    return drawn([[1] * mdps])


def drawn(counts: list[list[int]]) -> cpe.Replicates:
    """Replicates that draw each MDP so many times."""
    return cpe.Replicates(np.array(counts, float), np.arange(len(counts[0])))


def logs_of(model: TabularMdp, logs: int, mdps: int, seed: int) -> list[Log]:
    rng = np.random.default_rng(seed)
    return [model.simulate(mdps, rng) for _ in range(logs)]


def standard_errors_off(estimates: list[float], truth: float) -> float:
    values = np.array(estimates)
    return float((values.mean() - truth) / (values.std(ddof=1) / np.sqrt(len(values))))


def importance_sampling(model: TabularMdp, log: Log, replicates: cpe.Replicates) -> np.ndarray:
    return cpe.stepwise_importance_sampling(log.metric, model.weights(log), log.mdp, replicates)


def direct_method(model: TabularMdp, log: Log, replicates: cpe.Replicates) -> np.ndarray:
    return cpe.stepwise_direct_method(model.reward[log.state], model.target[log.state], log.mdp, replicates)


def doubly_robust(
    model: TabularMdp, log: Log, replicates: cpe.Replicates, modelled: np.ndarray, weight: np.ndarray
) -> np.ndarray:
    return cpe.stepwise_doubly_robust(
        log.metric, weight, modelled[log.state], model.target[log.state], log.action, log.mdp, replicates
    )


def right_model(model: TabularMdp, log: Log, replicates: cpe.Replicates) -> np.ndarray:
    """Doubly robust with the exact model, and propensities that are wrong."""
    return doubly_robust(model, log, replicates, model.reward, 0.5 + 0.3 * log.action + 0.2 * log.state)


def right_propensities(model: TabularMdp, log: Log, replicates: cpe.Replicates) -> np.ndarray:
    """Doubly robust with the logged propensities, and a model that is wrong."""
    return doubly_robust(model, log, replicates, WRONG, model.weights(log))


def both_wrong(model: TabularMdp, log: Log, replicates: cpe.Replicates) -> np.ndarray:
    return doubly_robust(model, log, replicates, WRONG, 0.5 + 0.3 * log.action + 0.2 * log.state)


WRONG = 1 - 2 * SMALL.reward


def factor(mdp: np.ndarray, discount: float) -> np.ndarray:
    """What discounts each row to its MDP's beginning."""
    return np.asarray(discount ** cpe.step_in_mdp(mdp))


def sequential(
    model: TabularMdp, log: Log, replicates: cpe.Replicates, q: np.ndarray, weight: np.ndarray | None = None
) -> np.ndarray:
    """Weighted sequential doubly robust with a model of the values, [horizon, S, A]."""
    return cpe.weighted_sequential_doubly_robust(
        log.metric,
        model.weights(log) if weight is None else weight,
        q[log.step, log.state],
        model.target[log.state],
        log.action,
        factor(log.mdp, model.discount),
        log.mdp,
        replicates,
    )


def exact_q(model: TabularMdp, log: Log, replicates: cpe.Replicates) -> np.ndarray:
    return sequential(model, log, replicates, model.q_values())


def no_q(model: TabularMdp, log: Log, replicates: cpe.Replicates) -> np.ndarray:
    return sequential(model, log, replicates, np.zeros_like(model.q_values()))


def wrong_q(model: TabularMdp, log: Log, replicates: cpe.Replicates) -> np.ndarray:
    return sequential(model, log, replicates, 3 - 0.5 * model.q_values())


def exact_q_wrong_propensities(model: TabularMdp, log: Log, replicates: cpe.Replicates) -> np.ndarray:
    return sequential(model, log, replicates, model.q_values(), 0.6 + 0.5 * log.action + 0.1 * log.state)


@pytest.mark.parametrize("estimate", [importance_sampling, direct_method, right_model, right_propensities])
def test_a_step_wise_estimator_agrees_with_the_truth(estimate: Estimate) -> None:
    found = [float(estimate(SMALL, log, once(1000))[0]) for log in logs_of(SMALL, 200, 1000, seed=1)]
    assert abs(standard_errors_off(found, SMALL.value_per_step())) < 4
    assert np.std(found) < 0.1


def test_doubly_robust_needs_the_model_or_the_propensities() -> None:
    found = [float(both_wrong(SMALL, log, once(1000))[0]) for log in logs_of(SMALL, 50, 1000, seed=2)]
    assert abs(standard_errors_off(found, SMALL.value_per_step())) > 10


def test_an_exact_model_makes_doubly_robust_surer_than_importance_sampling() -> None:
    logs = logs_of(SMALL, 200, 200, seed=3)
    weighted = [float(importance_sampling(SMALL, log, once(200))[0]) for log in logs]
    robust = [float(doubly_robust(SMALL, log, once(200), SMALL.reward, SMALL.weights(log))[0]) for log in logs]
    assert np.std(robust) < 0.8 * np.std(weighted)


@pytest.mark.parametrize("model", [SMALL, UNEVEN], ids=["small", "uneven"])
@pytest.mark.parametrize("estimate", [exact_q, no_q, wrong_q, exact_q_wrong_propensities])
def test_the_sequential_estimator_agrees_with_the_truth(model: TabularMdp, estimate: Estimate) -> None:
    found = [float(estimate(model, log, once(5000))[0]) for log in logs_of(model, 100, 5000, seed=4)]
    assert abs(standard_errors_off(found, model.value())) < 4
    assert np.std(found) < 0.1 * model.value()


def test_an_exact_model_makes_the_sequential_estimator_surer() -> None:
    quiet = replace(SMALL, noise=0.1)
    logs = logs_of(quiet, 200, 200, seed=5)
    with_model = [float(exact_q(quiet, log, once(200))[0]) for log in logs]
    without = [float(no_q(quiet, log, once(200))[0]) for log in logs]
    assert np.std(with_model) < 0.9 * np.std(without)


def naive_sequential(model: TabularMdp, log: Log, q: np.ndarray, ended: str) -> float:
    """The sequential estimator with ended MDPs left out of each step's normalization, or counted with weight one."""
    n, rows = int(log.mdp.max()) + 1, np.arange(len(log.mdp))
    weights = model.weights(log)
    rho = np.zeros((n, model.horizon)) if ended == "left out" else np.ones((n, model.horizon))
    before = rho.copy()
    running = np.ones(n)
    for t in range(model.horizon):
        at = rows[log.step == t]
        before[log.mdp[at], t] = running[log.mdp[at]]
        running[log.mdp[at]] *= weights[at]
        rho[log.mdp[at], t] = running[log.mdp[at]]
    q_rows = q[log.step, log.state]
    gain = rho[log.mdp, log.step] * (log.metric - q_rows[rows, log.action])
    value = before[log.mdp, log.step] * (q_rows * model.target[log.state]).sum(1)
    factor = model.discount**log.step
    return float((factor * (gain / rho.sum(0)[log.step] + value / before.sum(0)[log.step])).sum())


@pytest.mark.parametrize("ended", ["left out", "weight one"])
def test_ended_mdps_must_keep_their_weight_in_the_normalization(ended: str) -> None:
    """The estimators that do otherwise miss the truth that the house's own meets above."""
    q = np.zeros_like(UNEVEN.q_values())
    logs = logs_of(UNEVEN, 50, 5000, seed=6)
    naive = [naive_sequential(UNEVEN, log, q, ended) for log in logs]
    ours = [float(no_q(UNEVEN, log, once(5000))[0]) for log in logs]
    assert abs(standard_errors_off(naive, UNEVEN.value())) > 10
    assert abs(np.mean(naive) - UNEVEN.value()) > 0.04 * UNEVEN.value()
    assert abs(np.mean(ours) - UNEVEN.value()) < 0.02 * UNEVEN.value()


@pytest.mark.parametrize(
    ("estimate", "truth"),
    [
        (importance_sampling, SMALL.value_per_step()),
        (right_propensities, SMALL.value_per_step()),
        (direct_method, SMALL.value_per_step()),
        (exact_q, SMALL.value()),
        (no_q, SMALL.value()),
    ],
)
def test_bootstrap_intervals_are_as_wide_as_they_should_be(estimate: Estimate, truth: float) -> None:
    logs, mdps = 400, 200
    rng = np.random.default_rng(7)
    values, low, high = np.empty(logs), np.empty(logs), np.empty(logs)
    for i in range(logs):
        log = SMALL.simulate(mdps, rng)
        samples = estimate(SMALL, log, cpe.bootstrap(log.mdp, 300, seed=i))
        values[i] = samples[0]
        low[i], high[i] = np.quantile(samples[1:], [0.025, 0.975])
    covered = np.mean((low <= truth) & (truth <= high))
    assert abs(covered - 0.95) < 4 * np.sqrt(0.95 * 0.05 / logs)
    assert np.mean(high - low) / 2 == pytest.approx(1.96 * values.std(ddof=1), rel=0.15)


@pytest.mark.parametrize(("groups", "held"), [(30, 10_000), (7, 10_000), (30, 1), (7, 20)])
def test_replicates_are_what_the_estimator_finds_in_a_log_with_whole_mdps_repeated(
    groups: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many MDPs are drawn at a time, and steps are looked at."""
    monkeypatch.setattr(cpe, "MOST_GROUPS", groups)
    monkeypatch.setattr(cpe, "FEWEST_GROUPS", 1)
    log = SMALL.simulate(30, np.random.default_rng(8))
    replicates = cpe.bootstrap(log.mdp, 5, seed=9)
    assert replicates.counts.shape == (6, groups)
    times = replicates.counts[:, replicates.group].astype(int)
    drawn = [np.repeat(np.arange(30), t) for t in times]
    for estimate in (importance_sampling, right_propensities, direct_method, exact_q, wrong_q):
        with monkeypatch.context() as few:
            few.setattr(cpe, "HELD", held)
            samples = estimate(SMALL, log, replicates)
        for replicate, mdps in enumerate(drawn):
            rows = [np.flatnonzero(log.mdp == m) for m in mdps]
            mdp = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
            take = np.concatenate(rows)
            repeated = Log(mdp, log.step[take], log.state[take], log.action[take], log.metric[take])
            alone = estimate(SMALL, repeated, once(len(mdps)))
            assert samples[replicate] == pytest.approx(alone[0], rel=1e-9)


class TestTheLoggedPolicyItself:
    log = SMALL.simulate(50, np.random.default_rng(10))
    replicates = cpe.bootstrap(log.mdp, 20, seed=11)
    target = SMALL.behaviour[log.state]
    ones = np.ones(len(log.mdp))

    def test_importance_sampling_gives_the_logged_mean(self) -> None:
        found = cpe.stepwise_importance_sampling(self.log.metric, self.ones, self.log.mdp, self.replicates)
        logged = cpe.logged_per_step(self.log.metric, self.log.mdp, self.replicates)
        np.testing.assert_allclose(found, logged)
        assert logged[0] == pytest.approx(self.log.metric.mean())

    def test_doubly_robust_gives_the_logged_mean_when_the_model_sees_no_actions(self) -> None:
        modelled = np.repeat(np.sin(np.arange(len(self.log.mdp)))[:, None], 2, axis=1)
        found = cpe.stepwise_doubly_robust(
            self.log.metric, self.ones, modelled, self.target, self.log.action, self.log.mdp, self.replicates
        )
        np.testing.assert_allclose(found, cpe.logged_per_step(self.log.metric, self.log.mdp, self.replicates))

    def test_doubly_robust_gives_the_logged_mean_when_the_policy_is_deterministic(self) -> None:
        found = cpe.stepwise_doubly_robust(
            self.log.metric,
            self.ones,
            SMALL.reward[self.log.state],
            np.eye(2)[self.log.action],
            self.log.action,
            self.log.mdp,
            self.replicates,
        )
        np.testing.assert_allclose(found, cpe.logged_per_step(self.log.metric, self.log.mdp, self.replicates))

    @pytest.mark.parametrize("slope", [0.0, 1.7])
    def test_the_sequential_estimator_gives_the_logged_mean_when_the_model_sees_no_actions(self, slope: float) -> None:
        q = np.repeat(slope * self.log.state[:, None].astype(float), 2, axis=1)
        discounts = factor(self.log.mdp, 0.9)
        found = cpe.weighted_sequential_doubly_robust(
            self.log.metric, self.ones, q, self.target, self.log.action, discounts, self.log.mdp, self.replicates
        )
        np.testing.assert_allclose(found, cpe.logged_per_mdp(self.log.metric, discounts, self.log.mdp, self.replicates))


def test_the_logged_value_per_mdp_is_a_mean_of_discounted_sums() -> None:
    mdp, metric = np.array([0, 0, 0, 1]), np.array([1.0, 2.0, 4.0, 8.0])
    replicates = drawn([[1, 1], [2, 0], [0, 2]])
    np.testing.assert_allclose(cpe.logged_per_mdp(metric, factor(mdp, 0.5), mdp, replicates), [(3 + 8) / 2, 3, 8])
    np.testing.assert_allclose(cpe.logged_per_step(metric, mdp, replicates), [15 / 4, 7 / 3, 8])


def long_log(ratios: list[float], steps: int, discount: float = 1.0) -> dict[str, np.ndarray]:
    """One MDP per ratio, every step of it with that ratio; the metric is the MDP's number plus one."""
    mdp = np.repeat(np.arange(len(ratios)), steps)
    return {
        "metric": mdp + 1.0,
        "weight": np.repeat(ratios, steps),
        "q": np.zeros((len(mdp), 2)),
        "target": np.full((len(mdp), 2), 0.5),
        "action": np.zeros(len(mdp), np.int64),
        "mdp": mdp,
        "factor": factor(mdp, discount),
    }


@pytest.mark.parametrize("ratio", [1e-6, 1.0, 1e6])
def test_only_ratios_of_weights_matter_however_long_an_mdp(ratio: float) -> None:
    with np.errstate(over="raise", invalid="raise"):
        found = cpe.weighted_sequential_doubly_robust(
            **long_log([ratio, ratio], 2000), replicates=drawn([[1, 1], [2, 0], [0, 2]])
        )
    np.testing.assert_allclose(found, [3000, 2000, 4000])


def test_the_most_likely_mdp_decides_when_weights_are_far_apart() -> None:
    with np.errstate(over="raise", invalid="raise"):
        found = cpe.weighted_sequential_doubly_robust(**long_log([0.5, 2.0], 2000), replicates=once(2))
    # At the k-th step the weights stand as 1 to 4^k.
    share = 1 / (1 + 4.0 ** -np.arange(1, 200))
    assert found[0] == pytest.approx(4000 - (1 - share).sum(), rel=1e-9)


def test_a_replicate_without_the_most_likely_mdp_is_normalized_over_those_it_drew() -> None:
    found = cpe.weighted_sequential_doubly_robust(**long_log([0.5, 2.0], 2000), replicates=drawn([[2, 0]]))
    assert found[0] == pytest.approx(2000)


def test_an_mdp_that_the_target_policy_would_not_have_lived_counts_for_nothing() -> None:
    rows = long_log([0.0, 1.0], 3, discount=0.5)
    found = cpe.weighted_sequential_doubly_robust(**rows, replicates=once(2))
    assert found[0] == pytest.approx(2 * (1 + 0.5 + 0.25))


def test_without_any_weight_the_model_alone_is_left() -> None:
    rows = long_log([0.0, 0.0], 3, discount=0.5) | {"q": np.tile([1.0, 3.0], (6, 1))}
    with np.errstate(invalid="raise"):
        found = cpe.weighted_sequential_doubly_robust(**rows, replicates=once(2))
    assert found[0] == pytest.approx(2.0)


def test_the_step_in_an_mdp_counts_from_zero() -> None:
    assert cpe.step_in_mdp(np.array([0, 0, 0, 1, 2, 2])).tolist() == [0, 1, 2, 0, 0, 1]
    assert cpe.step_in_mdp(np.array([7])).tolist() == [0]


def test_the_effective_sample_size_is_kishs() -> None:
    assert cpe.effective_sample_size(np.full(10, 0.3)) == pytest.approx(10)
    assert cpe.effective_sample_size(np.array([5.0, 0, 0])) == pytest.approx(1)
    assert cpe.effective_sample_size(np.array([1.0, 2.0])) == pytest.approx(9 / 5)
    assert cpe.effective_sample_size(np.zeros(4)) == 0


def test_a_bootstrap_starts_with_the_log_and_always_draws_as_many_mdps() -> None:
    mdp = np.repeat(np.arange(40), 3)
    found = cpe.bootstrap(mdp, 500, seed=12)
    assert found.counts.shape == (501, 40)
    assert (found.counts[0] == 1).all()
    assert (found.mdps == 40).all()
    # Each MDP is drawn Binomial(40, 1/40) times.
    assert found.counts[1:].var() == pytest.approx(1 - 1 / 40, rel=0.05)
    np.testing.assert_array_equal(found.counts, cpe.bootstrap(mdp, 500, seed=12).counts)
    assert (found.counts != cpe.bootstrap(mdp, 500, seed=13).counts).any()


@pytest.mark.parametrize(("length", "groups"), [(1, 10_000), (5_000, 2_000), (100_000, 1_000)])
def test_many_mdps_are_drawn_in_groups_of_as_many_fewer_where_one_is_long(length: int, groups: int) -> None:
    mdp = np.append(np.zeros(length - 1, np.int64), np.arange(25_000))
    found = cpe.bootstrap(mdp, 3, seed=1)
    sizes = np.bincount(found.group)
    assert found.counts.shape == (4, groups)
    assert set(sizes) <= {25_000 // groups, -(-25_000 // groups)}
    assert found.mdps[0] == 25_000
    # Neighbours in the log are in different groups.
    assert len(np.unique(found.group[:100])) > 90


def test_intervals_over_groups_are_as_wide_as_over_mdps(monkeypatch: pytest.MonkeyPatch) -> None:
    log = UNEVEN.simulate(20_000, np.random.default_rng(13))
    widths = {}
    for groups in (20_000, 1_000):
        monkeypatch.setattr(cpe, "MOST_GROUPS", groups)
        samples = no_q(UNEVEN, log, cpe.bootstrap(log.mdp, 2_000, seed=14))
        widths[groups] = samples[1:].std()
        assert samples[0] == pytest.approx(no_q(UNEVEN, log, once(20_000))[0], rel=1e-9)
    assert widths[1_000] == pytest.approx(widths[20_000], rel=0.1)


def test_no_more_is_held_at_a_time_than_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few MDPs many replicates, of many replicates few MDPs: both sides of every product are bounded."""
    sizes = []
    real = cpe._mean_of_groups
    monkeypatch.setattr(cpe, "HELD", 1_000)
    monkeypatch.setattr(cpe, "_mean_of_groups", lambda w, v, c: sizes.append(w.shape) or real(w, v, c))
    for ratios, samples in (([1.0, 1.0], 100), ([1.0] * 100, 1)):
        rows = long_log(ratios, 200)
        cpe.weighted_sequential_doubly_robust(**rows, replicates=cpe.bootstrap(rows["mdp"], samples, seed=1))
        assert all(max(groups, samples + 1) * steps <= 1_000 for groups, steps in sizes)
        assert sum(steps for _, steps in sizes) >= 2 * 200
        sizes.clear()
