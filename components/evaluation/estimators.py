"""Counterfactual estimates of a policy's value from logged MDPs, each with its bootstrap samples.

Every function takes per-row arrays over N logged decisions of n MDPs and `counts`, int [B, n]: how often each of B
bootstrap replicates drew each MDP, the first replicate being the log itself. It returns float64 [B].
"""

from __future__ import annotations

import numpy as np


def bootstrap_counts(mdps: int, samples: int, seed: int) -> np.ndarray:
    """int64 [samples + 1, mdps]: the log itself, then resamples of whole MDPs with replacement (Efron 1979)."""
    drawn = np.random.default_rng(seed).multinomial(mdps, np.full(mdps, 1 / mdps), size=samples)
    return np.concatenate([np.ones((1, mdps), np.int64), drawn])


def _mean_over_steps(values: np.ndarray, mdp: np.ndarray, counts: np.ndarray) -> np.ndarray:
    n = counts.shape[1]
    totals = np.bincount(mdp, values, minlength=n)
    lengths = np.bincount(mdp, minlength=n)
    return np.asarray((counts @ totals) / (counts @ lengths))


def logged_per_step(metric: np.ndarray, mdp: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The metric's mean per decision, as logged. `metric` [N], `mdp` int [N]."""
    return _mean_over_steps(metric, mdp, counts)


def stepwise_importance_sampling(
    metric: np.ndarray, weight: np.ndarray, mdp: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Mean of weight * metric per decision (Horvitz and Thompson 1952); `weight` [N] = target / logged propensity."""
    return _mean_over_steps(weight * metric, mdp, counts)


def stepwise_direct_method(modelled: np.ndarray, target: np.ndarray, mdp: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean of the modelled metric under the target policy; `modelled`, `target` [N, A]."""
    return _mean_over_steps((modelled * target).sum(1), mdp, counts)


def stepwise_doubly_robust(
    metric: np.ndarray,
    weight: np.ndarray,
    modelled: np.ndarray,
    target: np.ndarray,
    action: np.ndarray,
    mdp: np.ndarray,
    counts: np.ndarray,
) -> np.ndarray:
    """The direct method, corrected by the weighted error of its model (Dudik et al. 2011, arXiv 1103.4601, eq. 1)."""
    error = metric - modelled[np.arange(len(action)), action]
    return _mean_over_steps((modelled * target).sum(1) + weight * error, mdp, counts)


def logged_per_mdp(metric: np.ndarray, factor: np.ndarray, mdp: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The metric's mean discounted sum per MDP, as logged; `factor` [N] discounts each row to its MDP's beginning."""
    totals = np.bincount(mdp, metric * factor, minlength=counts.shape[1])
    return np.asarray(counts @ totals / counts.sum(1))


def sequential_direct_method(q: np.ndarray, target: np.ndarray, mdp: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean modelled value of an MDP's first decision (Le et al. 2019, arXiv 1903.08738): no propensity is needed.

    `q` [N, A] models the target policy's action values; what it has wrong, the estimate has wrong.
    """
    first = step_in_mdp(mdp) == 0
    values = np.bincount(mdp[first], (q * target).sum(1)[first], minlength=counts.shape[1])
    return np.asarray(counts @ values / counts.sum(1))


def weighted_sequential_doubly_robust(
    metric: np.ndarray,
    weight: np.ndarray,
    q: np.ndarray,
    target: np.ndarray,
    action: np.ndarray,
    factor: np.ndarray,
    mdp: np.ndarray,
    counts: np.ndarray,
) -> np.ndarray:
    """Mean discounted sum per MDP (Thomas and Brunskill 2016, arXiv 1604.00923, equation of WDR in section 5).

    `q` [N, A] models the target policy's action values, `factor` [N] discounts each row to its MDP's beginning. The
    cumulative weights of a step are normalized over all MDPs of the replicate. An MDP that has ended stays in that sum
    with its last weight, as if in an absorbing state: leaving it out, or counting it with weight one, would estimate
    the value of the MDPs that happened to last.
    """
    n, rows = counts.shape[1], np.arange(len(action))
    step = step_in_mdp(mdp)
    horizon = int(step.max()) + 1
    with np.errstate(divide="ignore"):
        log_weight = np.full((n, horizon), np.nan)
        log_weight[mdp, step] = np.log(weight)
    # An MDP that has ended keeps its weight: the ratio of every further step is one.
    cumulative = np.cumsum(np.where(np.isnan(log_weight), 0.0, log_weight), axis=1)
    before = np.concatenate([np.zeros((n, 1)), cumulative[:, :-1]], axis=1)
    gain, value = np.zeros((n, horizon)), np.zeros((n, horizon))
    gain[mdp, step] = factor * (metric - q[rows, action])
    value[mdp, step] = factor * (q * target).sum(1)
    return _self_normalized(cumulative, gain, counts) + _self_normalized(before, value, counts)


def _self_normalized(log_weight: np.ndarray, values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Per replicate, the sum over steps of the weighted mean of `values` [n, T] over the MDPs that it drew."""
    # Only ratios within a step matter, so each step's largest weight is scaled to one and nothing overflows.
    scaled = _exp_below_top(log_weight)
    weights, sums = counts @ scaled, counts @ (scaled * values)
    means = np.divide(sums, weights, out=np.zeros_like(sums), where=weights > 0)
    # A replicate without the largest may hold only weights that vanish beside it: scale by the largest it has.
    for b in np.flatnonzero((weights == 0).any(1)):
        drawn, steps = np.flatnonzero(counts[b]), np.flatnonzero(weights[b] == 0)
        scaled = _exp_below_top(log_weight[np.ix_(drawn, steps)]) * counts[b, drawn, None]
        weight, total = scaled.sum(0), (scaled * values[np.ix_(drawn, steps)]).sum(0)
        means[b, steps] = np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)
    return np.asarray(means.sum(1))


def _exp_below_top(log_weight: np.ndarray) -> np.ndarray:
    top = log_weight.max(0)
    return np.asarray(np.exp(log_weight - np.where(np.isfinite(top), top, 0.0)))


def step_in_mdp(mdp: np.ndarray) -> np.ndarray:
    """0-based place of each row in its MDP; the rows of an MDP stand together, in order."""
    starts = np.flatnonzero(np.diff(mdp, prepend=mdp[0] - 1))
    lengths = np.diff(np.append(starts, len(mdp)))
    return np.asarray(np.arange(len(mdp)) - np.repeat(starts, lengths))


def effective_sample_size(weight: np.ndarray) -> float:
    """Kish's (sum w)^2 / sum w^2: how many unweighted decisions the weighted ones are worth."""
    return float(weight.sum() ** 2 / np.square(weight).sum()) if weight.any() else 0.0
