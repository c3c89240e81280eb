"""Counterfactual estimates of a policy's value from logged MDPs, each with its bootstrap samples.

Every function takes per-row arrays over N logged decisions of n MDPs, whose rows stand together and in order, and the
bootstrap's replicates of them. It returns float64 [B], the first being the estimate from the log itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MOST_GROUPS, FEWEST_GROUPS = 10_000, 1_000
"""Of MDPs that are drawn together; where there are fewer MDPs, each is one."""
GROUP_STEPS = 10_000_000
"""Groups of MDPs times steps of the longest one, beyond which groups become fewer."""
HELD = 2_000_000
"""Groups, or replicates, times steps that are held at a time."""


@dataclass(frozen=True)
class Replicates:
    """B resamples of n MDPs in G groups, the first being the log itself."""

    counts: np.ndarray  # float64 [B, G], how often each replicate drew each group
    group: np.ndarray  # int64 [n], of each MDP

    def sums(self, values: np.ndarray, mdp: np.ndarray) -> np.ndarray:
        """float64 [B]: of values that some rows, [N], have."""
        return np.asarray(self.counts @ np.bincount(self.group[mdp], values, minlength=self.counts.shape[1]))

    @property
    def mdps(self) -> np.ndarray:
        """float64 [B]: how many MDPs each drew."""
        return np.asarray(self.counts @ np.bincount(self.group, minlength=self.counts.shape[1]))


def bootstrap(mdp: np.ndarray, samples: int, seed: int) -> Replicates:
    """The log itself, then resamples of whole MDPs with replacement (Efron 1979); `mdp` int [N] numbers them from 0.

    Where there are many MDPs, random groups of as many of them each are drawn in their stead: means over groups vary as
    means over MDPs do, and what is held does not grow with the log.
    """
    n, rng = int(mdp[-1]) + 1, np.random.default_rng(seed)
    groups = min(n, max(FEWEST_GROUPS, min(MOST_GROUPS, GROUP_STEPS // int(np.bincount(mdp).max()))))
    drawn = rng.multinomial(groups, np.full(groups, 1 / groups), size=samples)
    counts = np.concatenate([np.ones((1, groups)), drawn])
    return Replicates(counts, np.arange(n) if groups == n else rng.permutation(n) % groups)


def _mean_over_steps(values: np.ndarray, mdp: np.ndarray, replicates: Replicates) -> np.ndarray:
    return replicates.sums(values, mdp) / replicates.sums(np.ones(len(mdp)), mdp)


def logged_per_step(metric: np.ndarray, mdp: np.ndarray, replicates: Replicates) -> np.ndarray:
    """The metric's mean per decision, as logged. `metric` [N], `mdp` int [N]."""
    return _mean_over_steps(metric, mdp, replicates)


def stepwise_importance_sampling(
    metric: np.ndarray, weight: np.ndarray, mdp: np.ndarray, replicates: Replicates
) -> np.ndarray:
    """Mean of weight * metric per decision (Horvitz and Thompson 1952); `weight` [N] = target / logged propensity."""
    return _mean_over_steps(weight * metric, mdp, replicates)


def stepwise_direct_method(
    modelled: np.ndarray, target: np.ndarray, mdp: np.ndarray, replicates: Replicates
) -> np.ndarray:
    """Mean of the modelled metric under the target policy; `modelled`, `target` [N, A]."""
    return _mean_over_steps((modelled * target).sum(1), mdp, replicates)


def stepwise_doubly_robust(
    metric: np.ndarray,
    weight: np.ndarray,
    modelled: np.ndarray,
    target: np.ndarray,
    action: np.ndarray,
    mdp: np.ndarray,
    replicates: Replicates,
) -> np.ndarray:
    """The direct method, corrected by the weighted error of its model (Dudik et al. 2011, arXiv 1103.4601, eq. 1)."""
    error = metric - modelled[np.arange(len(action)), action]
    return _mean_over_steps((modelled * target).sum(1) + weight * error, mdp, replicates)


def logged_per_mdp(metric: np.ndarray, factor: np.ndarray, mdp: np.ndarray, replicates: Replicates) -> np.ndarray:
    """The metric's mean discounted sum per MDP, as logged; `factor` [N] discounts each row to its MDP's beginning."""
    return replicates.sums(metric * factor, mdp) / replicates.mdps


def sequential_direct_method(q: np.ndarray, target: np.ndarray, mdp: np.ndarray, replicates: Replicates) -> np.ndarray:
    """Mean modelled value of an MDP's first decision (Le et al. 2019, arXiv 1903.08738): no propensity is needed.

    `q` [N, A] models the target policy's action values; what it has wrong, the estimate has wrong.
    """
    first = step_in_mdp(mdp) == 0
    return replicates.sums((q * target).sum(1)[first], mdp[first]) / replicates.mdps


def weighted_sequential_doubly_robust(
    metric: np.ndarray,
    weight: np.ndarray,
    q: np.ndarray,
    target: np.ndarray,
    action: np.ndarray,
    factor: np.ndarray,
    mdp: np.ndarray,
    replicates: Replicates,
) -> np.ndarray:
    """Mean discounted sum per MDP (Thomas and Brunskill 2016, arXiv 1604.00923, equation of WDR in section 5).

    `q` [N, A] models the target policy's action values, `factor` [N] discounts each row to its MDP's beginning. The
    cumulative weights of a step are normalized over all MDPs of the replicate. An MDP that has ended stays in that sum
    with its last weight, as if in an absorbing state: leaving it out, or counting it with weight one, would estimate
    the value of the MDPs that happened to last.
    """
    step = step_in_mdp(mdp)
    by_step = np.argsort(step, kind="stable")
    with np.errstate(divide="ignore"):
        through = _sums_so_far(np.log(weight), step, by_step)
    before = np.where(step == 0, 0.0, np.roll(through, 1))
    gain = factor * (metric - q[np.arange(len(action)), action])
    value = factor * (q * target).sum(1)
    given = through, replicates.group[mdp], step, by_step, replicates.counts
    return _self_normalized(through, gain, *given) + _self_normalized(before, value, *given)


def _sums_so_far(values: np.ndarray, step: np.ndarray, by_step: np.ndarray) -> np.ndarray:
    """Of each MDP's values, [N], those up to each row; `by_step` are the rows in the order of their steps."""
    sums = values.copy()
    # From step to step, since what one MDP comes to may be infinite, or swallow what the next one does.
    for rows in np.split(by_step, np.flatnonzero(np.diff(step[by_step])) + 1)[1:]:
        sums[rows] += sums[rows - 1]
    return sums


def _self_normalized(
    log_weight: np.ndarray,
    values: np.ndarray,
    through: np.ndarray,
    group: np.ndarray,
    step: np.ndarray,
    by_step: np.ndarray,
    counts: np.ndarray,
) -> np.ndarray:
    """Per replicate, the sum over steps of the weighted mean of `values` [N] over its MDPs.

    `log_weight` [N] is of MDPs that are still under way, `through` [N] at its last row what an MDP keeps thereafter.
    """
    groups, horizon = counts.shape[1], int(step.max()) + 1
    width = min(horizon, max(1, HELD // max(groups, len(counts))))
    last = np.append(step[1:] == 0, True)
    total, ended = np.zeros(len(counts)), np.full((groups, 1), -np.inf)
    for rows in np.split(by_step, np.searchsorted(step[by_step], np.arange(width, horizon, width))):
        key = group[rows] * width + step[rows] % width
        under_way = _log_sums(log_weight[rows], key, groups * width).reshape(groups, width)
        over = rows[last[rows]]
        # Those that end with a step count as ended from the next one on.
        ending = _log_sums(through[over], group[over] * width + step[over] % width, groups * width)
        gone = np.logaddexp.accumulate(np.concatenate([ended, ending.reshape(groups, width)], axis=1), axis=1)
        ended = gone[:, -1:]
        weight = np.logaddexp(under_way, gone[:, :-1])
        share = np.exp(log_weight[rows] - _finite(weight).ravel()[key])
        mean = np.bincount(key, share * values[rows], minlength=groups * width).reshape(groups, width)
        total += _mean_of_groups(weight, mean, counts)
    return total


def _log_sums(log_weight: np.ndarray, key: np.ndarray, size: int) -> np.ndarray:
    """float64 [size]: the logarithm of the sum of the weights of each key."""
    top = np.full(size, -np.inf)
    np.maximum.at(top, key, log_weight)
    top = _finite(top)
    with np.errstate(divide="ignore"):
        return np.asarray(top + np.log(np.bincount(key, np.exp(log_weight - top[key]), minlength=size)))


def _mean_of_groups(log_weight: np.ndarray, values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Per replicate, the sum over steps of the weighted mean of `values` [G, T] over the groups that it drew."""
    # Only ratios within a step matter, so each step's largest weight is scaled to one and nothing overflows.
    scaled = _exp_below_top(log_weight)
    weights, sums = counts @ scaled, counts @ (scaled * values)
    means = np.divide(sums, weights, out=np.zeros_like(sums), where=weights > 0)
    # A replicate without the largest may hold only weights that vanish beside it: scale by the largest it has.
    lost = (weights == 0) & np.isfinite(log_weight.max(0))
    for b in np.flatnonzero(lost.any(1)):
        drawn, steps = np.flatnonzero(counts[b]), np.flatnonzero(lost[b])
        scaled = _exp_below_top(log_weight[np.ix_(drawn, steps)]) * counts[b, drawn, None]
        weight, total = scaled.sum(0), (scaled * values[np.ix_(drawn, steps)]).sum(0)
        means[b, steps] = np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)
    return np.asarray(means.sum(1))


def _exp_below_top(log_weight: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(log_weight - _finite(log_weight.max(0))))


def _finite(logarithms: np.ndarray) -> np.ndarray:
    """The same, and 0 for the logarithm of nothing."""
    return np.where(np.isfinite(logarithms), logarithms, 0.0)


def step_in_mdp(mdp: np.ndarray) -> np.ndarray:
    """0-based place of each row in its MDP; the rows of an MDP stand together, in order."""
    starts = np.flatnonzero(np.diff(mdp, prepend=mdp[0] - 1))
    lengths = np.diff(np.append(starts, len(mdp)))
    return np.asarray(np.arange(len(mdp)) - np.repeat(starts, lengths))


def effective_sample_size(weight: np.ndarray) -> float:
    """Kish's (sum w)^2 / sum w^2: how many unweighted decisions the weighted ones are worth."""
    return float(weight.sum() ** 2 / np.square(weight).sum()) if weight.any() else 0.0
