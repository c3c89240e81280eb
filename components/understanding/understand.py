"""Is the logged problem a Markov decision process at all? Asked before a policy is trained on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from components.columns import Choose, load_transitions
from components.normalization.spec import NormalizationSpec
from components.transitions import check_held_out, sample_mdps
from components.understanding.dynamics import (
    Expectation,
    Outcomes,
    fit,
    likely_action,
    likely_before,
    outcomes,
    squared_errors,
)
from components.understanding.page import write_page
from contracts.hashing import unit_interval
from contracts.job import REWARD, UNDERSTANDING_CHECKS, JobSpec
from contracts.progress import report
from contracts.stage import StageError, message, stage

LEVEL = 0.95
"""Of the intervals, over all outcomes of a check together (Bonferroni)."""
FLOOR = {"state_effect": 0.0025, "action_effect": 0.0025, "markov": 0.05}
"""Share of an outcome's variance from which on an effect is one: two fits to the same rows differ by about as much.

More for the step before: a fitted model always leaves some of a sharp edge (an MDP's end) for it to tell.
"""
NEGLIGIBLE = {"state_effect": 0.01, "action_effect": 0.01, "markov": 0.05}
"""Share below which knowing more makes no difference that matters."""
FEWEST_MDPS = 10
MOST_SHUFFLED = 5000
"""Rows that the importance of features is measured on."""
REMEDIES = {
    "state_effect": "features that tell nothing of what follows cannot steer a policy; log others",
    "action_effect": "where no action changes anything, no policy is better than another; check that the actions and "
    "metrics are joined to the right decisions",
    "markov": "add what the step before tells, such as the last action or a rate of change, to the state",
}


def understand(spec: JobSpec, features: str | Path, normalization: str | Path, output: str | Path) -> None:
    """Write `understanding.json` and `report.html`: three checks, and how much of each outcome is explained by what.

    A model of the dynamics learns what follows a decision (next state, reward, whether the MDP goes on) from half of
    the training MDPs: knowing the state, the action too, the step before too. Its errors on the other half tell the
    share of each outcome's variance that each of them explains, with an interval over MDPs. The approach is that of
    Horizon's data understanding tool (arXiv 1811.00260). An action and a step before help a model also by saying again,
    in other words, what the state says; so each is set against one that is as likely, but knows no more than that.

    state_effect: what follows depends on the state. action_effect: it depends on the action. markov: the step before
    adds nothing to that. Each says pass, fail or inconclusive. Raises `StageError` when a check that the job requires
    does not pass, and for a gate on a metric that the log does not have.
    """
    with stage("understanding", output) as (directory, facts):
        settings = spec.understanding
        train = load_transitions(features, spec, training_sample(spec))
        if spec.evaluation.gate.metric != REWARD:
            # Asked here, since hours of training would go before the gate does.
            train.metric_index(spec.evaluation.gate.metric, "evaluation.gate.metric")
        data = outcomes(
            train, NormalizationSpec.read(Path(normalization) / "spec.json"), train.reward(spec.reward.metric_weights)
        )
        document = _examine(data, train.mdp_ids, settings.model_steps, spec.seed) | {
            "transitions": len(data.mdp),
            "mdps": len(np.unique(data.mdp)),
            "steady": data.steady,
        }
        (directory / "understanding.json").write_text(json.dumps(document, indent=2, allow_nan=False))
        write_page(document, directory / "report.html")
        facts |= {name: document[name] for name in ("checks", "transitions", "mdps", "steady")}
        report(1, 1, message({"stage": "understanding"} | facts))
        for name in settings.require:
            check = document["checks"][name]
            if check["verdict"] != "pass":
                raise StageError(f"understanding.require: {name}: {check['verdict']}: {check['reason']}")


def training_sample(spec: JobSpec) -> Choose:
    """Training MDPs, by their hash, until there are about as many rows as the job says."""

    def choose(mdp_ids: list[str], lengths: np.ndarray) -> np.ndarray:
        train, limit = ~check_held_out(mdp_ids, spec), spec.understanding.sample_rows
        return sample_mdps(mdp_ids, lengths, train, limit, f"understanding-{spec.seed}")

    return choose


def _examine(data: Outcomes, mdp_ids: list[str], steps: int, seed: int) -> dict[str, Any]:
    # Parts that neither the split into training and held-out MDPs nor the sampling depends on.
    place = np.array([unit_interval(f"dynamics-{seed}", mdp) for mdp in mdp_ids])[data.mdp]
    fitted, tried = np.flatnonzero(place < 0.5), np.flatnonzero(place >= 0.5)
    # A stand-in for the step before is made by a model of rows that no other model sees.
    first, second = np.flatnonzero(place < 0.25), np.flatnonzero((place >= 0.25) & (place < 0.5))
    mdps = min(len(np.unique(data.mdp[rows])) for rows in (first, second, tried))
    if mdps < FEWEST_MDPS or not data.names:
        few = f"{mdps} MDPs to fit or to try a model on; {FEWEST_MDPS} are needed"
        unknown = _unknown(few if mdps < FEWEST_MDPS else "nothing that follows a decision ever varies")
        return {"checks": dict.fromkeys(UNDERSTANDING_CHECKS, unknown), "outcomes": [], "importance": {}}

    present, wanted = data.present[tried], data.values[tried]
    nothing = squared_errors(torch.zeros(()), wanted, present)

    def errors(rows: np.ndarray, *known: Tensor) -> tuple[Tensor, Expectation]:
        x = torch.cat(known, 1)
        model = fit(x, data.values, data.present, rows, steps, seed)
        with torch.no_grad():
            return squared_errors(model(x[tried]), wanted, present), model

    mdp, gains = data.mdp[tried], {}
    report(0, 5, "models of what follows")
    state, _ = errors(fitted, data.state)
    gains["state_effect"] = shares(nothing - state, nothing, mdp)
    report(1, 5, "models of what follows")
    drawn, _ = errors(fitted, data.state, likely_action(data, fitted, steps, seed))
    taken, model = errors(fitted, data.state, data.action)
    gains["action_effect"] = shares(drawn - taken, nothing, mdp)
    report(3, 5, "models of what follows")
    likely, _ = errors(second, data.state, data.action, likely_before(data, first, steps, seed))
    before, _ = errors(second, data.state, data.action, data.before)
    gains["markov"] = shares(likely - before, nothing, mdp)
    checks = {name: judge(name, gains[name], data.names) for name in UNDERSTANDING_CHECKS}
    if (data.action == data.action[0]).all():
        checks["action_effect"] = _unknown("one action alone is in the log: nothing else was tried")
    return {
        "checks": checks,
        "outcomes": [
            {"name": name, **{check: gains[check][o] for check in UNDERSTANDING_CHECKS}}
            for o, name in enumerate(data.names)
        ],
        "importance": _importance(model, data, tried[:: 1 + len(tried) // MOST_SHUFFLED], seed),
    }


def _unknown(reason: str) -> dict[str, str]:
    return {"verdict": "inconclusive", "reason": reason}


def shares(gain: Tensor, whole: Tensor, mdp: np.ndarray) -> list[dict[str, float]]:
    """Sum of each outcome's gain over that of its squared deviations, both [N, O]; with an interval over MDPs.

    Of an outcome that only a few MDPs show, nothing can be said: its interval is [-1, 1].
    """
    _, group = np.unique(mdp, return_inverse=True)
    n = int(group.max()) + 1
    quantile = float(stats.t.ppf(1 - (1 - LEVEL) / 2 / gain.shape[1], n - 1))
    result = []
    for o in range(gain.shape[1]):
        part = np.bincount(group, gain[:, o].double().numpy(), minlength=n)
        total = np.bincount(group, whole[:, o].double().numpy(), minlength=n)
        scale = max(total.sum(), 1e-12)
        value = part.sum() / scale
        # The ratio of two sums over MDPs, by its linearization.
        half = quantile * np.sqrt(np.square(part - value * total).sum() * n / max(n - 1, 1)) / scale
        effective = scale**2 / max(np.square(total).sum(), 1e-12)
        low, high = (value - half, value + half) if effective >= FEWEST_MDPS else (-1.0, 1.0)
        result.append({"share": float(value), "low": float(low), "high": float(high)})
    return result


def judge(check: str, gains: list[dict[str, float]], names: list[str]) -> dict[str, str]:
    """The verdict over all outcomes, with the outcome that speaks loudest."""
    found = any(gain["low"] > FLOOR[check] for gain in gains)
    none = all(gain["high"] < NEGLIGIBLE[check] for gain in gains)
    loudest = max(range(len(gains)), key=lambda o: gains[o]["low" if found else "high"])
    gain = gains[loudest]
    told = {"state_effect": "the state", "action_effect": "the action", "markov": "the step before"}[check]
    figures = f"{gain['share']:.1%} [{gain['low']:.1%}, {gain['high']:.1%}] of the variance of {names[loudest]!r}"
    if found:
        reason = f"{told} explains {figures}"
    elif none:
        reason = f"{told} adds next to nothing: at most {gain['high']:.1%} of the variance of {names[loudest]!r}"
    else:
        return _unknown(f"{told} explains {figures}: too little data to tell")
    if found != (check == "markov"):
        return {"verdict": "pass", "reason": reason}
    return {"verdict": "fail", "reason": f"{reason}; {REMEDIES[check]}"}


def _importance(model: Expectation, data: Outcomes, rows: np.ndarray, seed: int) -> dict[str, float]:
    """By how much the mean share explained falls when a feature, or the action, is taken from another decision.

    Permutation importance (Breiman 2001, section 10).
    """
    generator = np.random.default_rng(seed)
    known, values, present = torch.cat([data.state, data.action], 1)[rows], data.values[rows], data.present[rows]

    def error() -> float:
        with torch.no_grad():
            errors = squared_errors(model(known), values, present)
        return float((errors.sum(0) / present.sum(0).clamp(min=1)).mean())

    width = data.state.shape[1]
    sources = data.features | {"the action": np.arange(width, width + data.action.shape[1])}
    base, result = error(), {}
    for name, columns in sources.items():
        kept = known[:, columns].clone()
        known[:, columns] = kept[generator.permutation(len(rows))]
        result[name] = error() - base
        known[:, columns] = kept
    return dict(sorted(result.items(), key=lambda item: -item[1]))
