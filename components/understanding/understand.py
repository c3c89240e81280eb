"""Is the logged problem a Markov decision process at all? Asked before a policy is trained on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from components.normalization.spec import NormalizationSpec
from components.transitions import Transitions, load_transitions
from components.understanding.dynamics import Expectation, Outcomes, fit, outcomes, squared_errors, without_memory
from components.understanding.page import write_page
from contracts.hashing import unit_interval
from contracts.job import REWARD, UNDERSTANDING_CHECKS, JobSpec
from contracts.progress import report
from contracts.stage import StageError, stage

LEVEL = 0.95
"""Of the intervals, over all outcomes of a check together (Bonferroni)."""
NEGLIGIBLE = {"state_effect": 0.01, "action_effect": 0.01, "markov": 0.05}
"""Share of an outcome's variance below which knowing more makes no difference that matters.

More for the step before: a fitted model always leaves some of a sharp edge (an MDP's end) for it to tell.
"""
FEWEST_MDPS = 10
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
    Horizon's data understanding tool (arXiv 1811.00260). A step before helps a model also by saying again, in other
    words, what the state says; so it is set against one that is as likely, but knows no more than state and action.

    state_effect: what follows depends on the state. action_effect: it depends on the action. markov: the step before
    adds nothing to that. Each says pass, fail or inconclusive. Raises `StageError` when a check that the job requires
    does not pass, and for a metric that is to be judged later but that the log does not have.
    """
    with stage("understanding", output) as (directory, facts):
        settings = spec.understanding
        everything = load_transitions(features, spec)
        judged = {
            "evaluation.gate.metric": spec.evaluation.gate.metric,
            "deploy.canary.metric": spec.deploy.canary.metric,
        }
        for field, metric in judged.items():
            # Asked here, since hours of training would go before either is looked at.
            if metric != REWARD:
                everything.metric_index(metric, field)
        train, _ = everything.split(spec)
        train = sample(train, settings.sample_rows, spec.seed)
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
        for name in settings.require:
            check = document["checks"][name]
            if check["verdict"] != "pass":
                raise StageError(f"understanding.require: {name}: {check['verdict']}: {check['reason']}")


def sample(data: Transitions, rows: int, seed: int) -> Transitions:
    """Whole MDPs, by their hash, until there are about `rows` rows."""
    places = np.array([unit_interval(f"understanding-{seed}", mdp) for mdp in data.mdp_ids])
    counts = np.bincount(data.mdp, minlength=len(places))
    order = np.argsort(places)
    kept = order[np.cumsum(counts[order]) - counts[order] < rows]
    return data.select(np.flatnonzero(np.isin(data.mdp, kept)))


def _examine(data: Outcomes, mdp_ids: list[str], steps: int, seed: int) -> dict[str, Any]:
    # Halves that neither the split into training and held-out MDPs nor the sampling depends on.
    first = np.array([unit_interval(f"dynamics-{seed}", mdp) < 0.5 for mdp in mdp_ids])[data.mdp]
    fitted, tried = np.flatnonzero(first), np.flatnonzero(~first)
    mdps = min(len(np.unique(data.mdp[rows])) for rows in (fitted, tried))
    if mdps < FEWEST_MDPS or not data.names:
        few = f"{mdps} MDPs to fit or to try a model on; {FEWEST_MDPS} are needed"
        reason = few if mdps < FEWEST_MDPS else "nothing that follows a decision ever varies"
        unknown = {"verdict": "inconclusive", "reason": reason}
        return {"checks": dict.fromkeys(UNDERSTANDING_CHECKS, unknown), "outcomes": [], "importance": {}}

    now = data.without("before")
    shown = {
        "state_effect": data.without("action", "before"),
        "action_effect": now,
        "memory": without_memory(data, fitted, steps, seed),
        "markov": data.known,
    }
    errors = {"nothing": squared_errors(torch.zeros(()), data)[tried]}
    for number, (name, known) in enumerate(shown.items(), 1):
        model = fit(known, data.values, data.present, fitted, steps, seed)
        with torch.no_grad():
            errors[name] = squared_errors(model(known), data)[tried]
        if name == "action_effect":
            importance = _importance(model, now, data, tried, seed)
        report(number, len(shown), "models of what follows")
    mdp = data.mdp[tried]
    compared = {
        "state_effect": ("nothing", "state_effect"),
        "action_effect": ("state_effect", "action_effect"),
        "markov": ("memory", "markov"),
    }
    gains = {
        check: shares(errors[less] - errors[more], errors["nothing"], mdp) for check, (less, more) in compared.items()
    }
    return {
        "checks": {name: judge(name, gains[name], data.names) for name in UNDERSTANDING_CHECKS},
        "outcomes": [
            {"name": name, **{check: gains[check][o] for check in UNDERSTANDING_CHECKS}}
            for o, name in enumerate(data.names)
        ],
        "importance": importance,
    }


def shares(gain: Tensor, whole: Tensor, mdp: np.ndarray) -> list[dict[str, float]]:
    """Sum of each outcome's gain over that of its squared deviations, both [N, O]; with an interval over MDPs."""
    _, group = np.unique(mdp, return_inverse=True)
    n = int(group.max()) + 1
    z = float(norm.ppf(1 - (1 - LEVEL) / 2 / gain.shape[1]))
    result = []
    for o in range(gain.shape[1]):
        part = np.bincount(group, gain[:, o].double().numpy(), minlength=n)
        total = np.bincount(group, whole[:, o].double().numpy(), minlength=n)
        scale = max(total.sum(), 1e-12)
        value = part.sum() / scale
        # The ratio of two sums over MDPs, by its linearization.
        error = np.sqrt(np.square(part - value * total).sum() * n / max(n - 1, 1)) / scale
        result.append({"share": float(value), "low": float(value - z * error), "high": float(value + z * error)})
    return result


def judge(check: str, gains: list[dict[str, float]], names: list[str]) -> dict[str, str]:
    """The verdict over all outcomes, with the outcome that speaks loudest."""
    none = all(gain["high"] < NEGLIGIBLE[check] for gain in gains)
    loudest = max(range(len(gains)), key=lambda o: gains[o]["high" if none else "low"])
    gain = gains[loudest]
    figures = f"{gain['share']:.1%} [{gain['low']:.1%}, {gain['high']:.1%}] of the variance of {names[loudest]!r}"
    found = gain["low"] > (NEGLIGIBLE[check] if check == "markov" else 0.0)
    told = {"state_effect": "the state", "action_effect": "the action", "markov": "the step before"}[check]
    if not found and not none:
        return {"verdict": "inconclusive", "reason": f"{told} explains {figures}: too little data to tell"}
    good = none if check == "markov" else found
    reason = f"{told} explains {figures}" if found else f"{told} adds next to nothing, at most {figures}"
    if good:
        return {"verdict": "pass", "reason": reason}
    return {"verdict": "fail", "reason": f"{reason}; {REMEDIES[check]}"}


def _importance(model: Expectation, known: Tensor, data: Outcomes, rows: np.ndarray, seed: int) -> dict[str, float]:
    """By how much the mean share explained falls when a feature, or the action, is taken from another decision.

    Permutation importance (Breiman 2001, section 10).
    """
    generator = np.random.default_rng(seed)

    def error(x: Tensor) -> float:
        with torch.no_grad():
            errors = squared_errors(model(x), data)[rows]
        return float((errors.sum(0) / data.present[rows].sum(0).clamp(min=1)).mean())

    base, result = error(known), {}
    for source, columns in data.sources.items():
        if source != "before":
            shuffled = known.clone()
            shuffled[np.ix_(rows, columns)] = known[np.ix_(generator.permutation(rows), columns)]
            result[source] = error(shuffled) - base
    return dict(sorted(result.items(), key=lambda item: -item[1]))
