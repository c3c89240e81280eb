"""Counterfactual policy evaluation of every epoch's policy, for every metric, and the gate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from components.columns import Choose, load_transitions
from components.evaluation import estimators as cpe
from components.evaluation.acted import Plan, logged_features, one_each, plan, propensities, taken_probability
from components.evaluation.fitted_q import FittedPairs, FittedQ
from components.evaluation.slates import chosen_features, fit_choices, plan_logged, plan_slates, slate_probability
from components.training.bundle import Bundle, read_bundle
from components.transitions import Lists, Transitions, check_held_out, sample_mdps
from contracts.job import ESTIMATORS, REWARD, Gate, JobSpec
from contracts.progress import report
from contracts.stage import StageError, read_record, stage

SAMPLED_MDPS = 1_000
"""Of each side that are read, where there are so many, whatever rows they have."""
FEWEST_MDPS = 10
"""Whose resamples make an interval."""


def evaluate(
    spec: JobSpec, features: str | Path, training: str | Path, output: str | Path, last_only: bool = False
) -> None:
    """Write `report.json`: per epoch, estimator and metric {value, low, high, relative, relative_low, relative_high}.

    Models of the values are fitted to the training MDPs, estimates are made on the held-out ones, of both on a sample
    where there are more rows than `evaluation.sampleRows`, and intervals come from resampling whole MDPs. `relative` is
    the estimate over the logged policy's value, its interval resampled jointly. Estimators that need propensities are
    refused, with the reason, where the log has none. Raises `StageError` for a gate on a metric that the log does not
    have. With `last_only`, of the last epoch alone.
    """
    read_record(training)
    with stage("evaluation", output) as (directory, facts):
        train, sample = load_transitions(features, spec, sampled(spec)).split(spec)
        held_out, excluded = _whole_mdps(sample)
        unread = int(check_held_out(sample.mdp_ids, spec).sum()) - len(np.unique(sample.mdp))
        if spec.evaluation.gate.metric != REWARD:
            held_out.metric_index(spec.evaluation.gate.metric, "evaluation.gate.metric")
        directories = sorted((Path(training) / "epochs").iterdir(), key=lambda p: int(p.name))
        bundles = [read_bundle(directory) for directory in directories[-1 if last_only else 0 :]]
        evaluator = _Evaluator(spec, train, held_out, bundles[-1])
        epochs: list[dict[str, Any]] = []
        for number, bundle in enumerate(bundles, 1):
            # Those in between show the way; they lag a little behind.
            whole = number in (1, len(bundles))
            epochs.append({"epoch": number, "estimates": evaluator.estimate(bundle, whole)})
            name = spec.evaluation.gate.metric
            judged = epochs[-1]["estimates"][spec.evaluation.gate.estimator].get(name)
            text = f"epoch {number}"
            if isinstance(judged, dict) and judged["relative"] is not None:
                text += f" {name} {judged['relative']:.2f}x logged"
            report(number, len(bundles), text)
        final: dict[str, Any] = epochs[-1]["estimates"]
        verdict = judge(spec.evaluation.gate, final, evaluator.n)
        document = {
            "final": final,
            "epochs": epochs,
            "gate": verdict,
            "logged": evaluator.logged,
            "diagnostics": evaluator.diagnostics(bundles[-1])
            | {
                "held_out_mdps": evaluator.n,
                "held_out_decisions": len(held_out),
                "excluded_mdps": excluded,
                "unread_mdps": unread,
                "as_logged_decisions": int((~evaluator.listed).sum()),
            },
        }
        (directory / "report.json").write_text(json.dumps(document, indent=2, allow_nan=False))
        facts |= {
            "gate": verdict, "held_out_mdps": evaluator.n, "excluded_mdps": excluded, "unread_mdps": unread,
        }  # fmt: skip


def sampled(spec: JobSpec) -> Choose:
    """Of training and of held-out MDPs some, by their hash, until they have about as many rows as the job says."""

    def choose(mdp_ids: list[str], lengths: np.ndarray) -> np.ndarray:
        out = check_held_out(mdp_ids, spec)
        limit = spec.evaluation.sample_rows, f"evaluation-{spec.seed}", SAMPLED_MDPS
        return sample_mdps(mdp_ids, lengths, out, *limit) | sample_mdps(mdp_ids, lengths, ~out, *limit)

    return choose


def judge(gate: Gate, final: dict[str, Any], mdps: int) -> dict[str, Any]:
    """The gate's verdict on estimates from so many MDPs, and the reason.

    It is pass, fail, inconclusive (there is no estimate, or no interval) or disabled.
    """
    asked = f"{gate.estimator.replace('_', ' ')} estimate of {gate.metric}"
    if not gate.enabled:
        return {"verdict": "disabled", "reason": "the gate is switched off in the job"}
    estimates = final[gate.estimator]
    if "refused" in estimates:
        return {"verdict": "inconclusive", "reason": f"{asked}: {estimates['refused']}"}
    if gate.metric not in estimates:
        raise StageError(
            f"evaluation.gate.metric: no metric {gate.metric!r} in the log; there are {', '.join(sorted(estimates))}"
        )
    if mdps < FEWEST_MDPS:
        few = f"{mdps} held-out MDPs are too few for an interval; {FEWEST_MDPS} are needed"
        return {"verdict": "inconclusive", "reason": f"{asked}: {few}"}
    low = estimates[gate.metric]["relative_low"]
    if low is None:
        return {
            "verdict": "inconclusive",
            "reason": f"{asked}: the logged policy's value is not positive, so nothing can be set relative to it",
        }
    comparison = "at least" if low >= gate.minimum_relative else "under"
    reason = f"{asked}: lower bound {low:.3f} of the logged policy, {comparison} the minimum {gate.minimum_relative:g}"
    return {"verdict": "pass" if low >= gate.minimum_relative else "fail", "reason": reason}


class _Evaluator:
    """What does not change from epoch to epoch: the data, the replicates, the models."""

    def __init__(self, spec: JobSpec, train: Transitions, held_out: Transitions, bundle: Bundle) -> None:
        self.spec, self.train, self.held_out = spec, train, held_out
        self.factor = held_out.discount_from_start(spec.reward)
        _, self.mdp = np.unique(held_out.mdp, return_inverse=True)
        self.n = int(self.mdp.max()) + 1
        self.replicates = cpe.bootstrap(self.mdp, spec.evaluation.bootstrap_samples, spec.seed)
        lists = held_out.possible
        # bool [N]: where it is known what could be chosen; elsewhere the policy is taken to do what was logged.
        self.listed = np.asarray(lists.logged) if isinstance(lists, Lists) else np.ones(len(held_out), bool)
        self.discrete = bundle.actions.space == "discrete"
        self.fit_steps = spec.evaluation.fitted_q_steps
        self.choices = fit_choices(bundle, train, self.fit_steps, spec.seed) if spec.slate else None
        self.q = self._model(bundle, train.discount(spec.reward))
        self.model = self._model(bundle, np.zeros(len(train), np.float32))
        self.model.fit(None, self.fit_steps)
        weights = held_out.weight_vector(spec.reward.metric_weights)
        self.names = list(held_out.metric_names)
        self.mix = np.eye(len(self.names))
        if REWARD not in self.names:
            self.names.append(REWARD)
            self.mix = np.concatenate([self.mix, weights[:, None]], axis=1)
        self.metrics = held_out.metrics.astype(np.float64) @ self.mix
        drawn = self.mdp, self.replicates
        # Each decision for itself: those that could choose, or, where nothing is estimated since none is known to, all.
        here = self.listed | ~self.listed.any()
        self.one_by_one = self.mdp[here], self.replicates
        steps = [cpe.logged_per_step(metric[here], *self.one_by_one) for metric in self.metrics.T]
        totals = [cpe.logged_per_mdp(metric, self.factor, *drawn) for metric in self.metrics.T]
        self.logged_samples = {"stepwise": steps, "sequential": totals}
        self.logged = {
            "per_step": {name: float(s[0]) for name, s in zip(self.names, steps, strict=True)},
            "per_mdp": {name: float(s[0]) for name, s in zip(self.names, totals, strict=True)},
        }

    def _model(self, bundle: Bundle, discount: np.ndarray) -> FittedQ:
        given = self.train, bundle.normalization
        if self.discrete:
            return FittedQ(*given, discount, self.spec.seed)
        features = chosen_features if self.choices else logged_features
        return FittedPairs(*given, features(bundle, self.train), discount, self.spec.seed)

    def _planned(self, bundle: Bundle, data: Transitions) -> Plan:
        """What would happen under the policy, where actions have no names."""
        return plan_slates(bundle, data, self.choices) if self.choices else plan(bundle, data)

    def _logged(self, bundle: Bundle) -> Plan:
        """The same of what was done."""
        if self.choices:
            return plan_logged(bundle, self.held_out, self.choices)
        return one_each(logged_features(bundle, self.held_out))

    def _modelled(self, bundle: Bundle) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Over K alternatives of each held-out decision: the policy's probabilities [N, K], the logged one [N], and
        by each metric [N, K, M] what the discounted model and that of a single decision say of them."""
        held_out, models = self.held_out, (self.q, self.model)
        if isinstance(self.q, FittedPairs):
            # Two alternatives: what the policy does, and what was done.
            plans = self._planned(bundle, held_out), self._logged(bundle)
            target, action = np.tile([1.0, 0.0], (len(held_out), 1)), np.ones(len(held_out), np.int64)
            found = [m.predict_acted(held_out.state, *plans) for m in models if isinstance(m, FittedPairs)]
        else:
            target, action = propensities(bundle, held_out), held_out.action
            found = [model.predict(held_out.state) for model in models]
        q, modelled = (values @ self.mix for values in found)
        return target, action, q, modelled

    def estimate(self, bundle: Bundle, whole: bool) -> dict[str, Any]:
        """By estimator and metric; `whole` fits values until they have come from as far as they count."""
        if self.unlisted:
            return {estimator: {"refused": self.unlisted} for estimator in ESTIMATORS}
        policy = propensities(bundle, self.train) if self.discrete else self._planned(bundle, self.train)
        self.q.fit(policy, max(self.fit_steps, self.q.reach) if whole else self.fit_steps)
        target, action, q, expected = self._modelled(bundle)
        weight = self._weight(bundle)
        estimates: dict[str, Any] = {name: {} for name in ESTIMATORS}
        for m, name in enumerate(self.names):
            metric, modelled = self.metrics[:, m], expected[:, :, m]
            here, one_by_one = self.listed, self.one_by_one
            samples = {
                "stepwise_direct_method": cpe.stepwise_direct_method(modelled[here], target[here], *one_by_one),
            }
            if not self.broken_off:
                samples["sequential_direct_method"] = cpe.sequential_direct_method(
                    q[:, :, m], target, self.mdp, self.replicates
                )
            if weight is not None:
                samples |= {
                    "stepwise_importance_sampling": cpe.stepwise_importance_sampling(
                        metric[here], weight[here], *one_by_one
                    ),
                    "stepwise_doubly_robust": cpe.stepwise_doubly_robust(
                        metric[here], weight[here], modelled[here], target[here], action[here], *one_by_one
                    ),
                    "weighted_sequential_doubly_robust": cpe.weighted_sequential_doubly_robust(
                        metric, weight, q[:, :, m], target, action, self.factor, self.mdp, self.replicates
                    ),
                }
            for estimator, values in samples.items():
                logged = self.logged_samples["stepwise" if estimator.startswith("stepwise") else "sequential"][m]
                estimates[estimator][name] = self._interval(values, logged)
        for estimator in ESTIMATORS:
            if not estimates[estimator]:
                sequential = estimator == "sequential_direct_method"
                estimates[estimator] = {"refused": self.broken_off if sequential else self.refused}
        return estimates

    def diagnostics(self, bundle: Bundle) -> dict[str, Any]:
        weight = None if self.unlisted else self._weight(bundle)
        if weight is None:
            return {}
        with np.errstate(divide="ignore"):
            final = np.bincount(self.mdp, np.log(weight), minlength=self.n)
        whole = np.exp(final - final.max()) if np.isfinite(final.max()) else np.zeros(self.n)
        return {
            "effective_sample_size_decisions": round(cpe.effective_sample_size(weight[self.listed]), 1),
            "effective_sample_size_mdps": round(cpe.effective_sample_size(whole), 1),
            "largest_weight": round(float(weight[self.listed].max()), 2),
        }

    @property
    def unlisted(self) -> str:
        """Why nothing can be said of a policy over described actions, where that is so."""
        # An end may be without: its weight is that of all that came before. Elsewhere, MDPs without lists would stand
        # for the policy where it leaves all others.
        step = cpe.step_in_mdp(self.mdp)
        last = np.append(step[1:] == 0, True)
        if not (without := ~self.listed & ~(last & (step > 0))).any():
            return ""
        return (
            f"{without.sum():,} held-out decisions have no possible_actions to choose among, and are not the last of "
            "several"
        )

    @property
    def broken_off(self) -> str:
        """Why a model of all that follows cannot be set against what was logged, where that is so."""
        if not self.held_out.truncated.any() or not self.q.looks_ahead:
            return ""
        return "MDPs break off in the log (data.lastStep): a model goes on beyond, the logged sum does not"

    @property
    def refused(self) -> str:
        """Why there are no importance weights."""
        if self.spec.action_space == "continuous":
            return "a policy that always takes one of infinitely many actions has no propensities"
        return "the log has decisions without action_probability"

    def _weight(self, bundle: Bundle) -> np.ndarray | None:
        logged = self.held_out.propensity
        if np.isnan(logged[self.listed]).any() or self.spec.action_space == "continuous":
            return None
        if self.discrete:
            taken = propensities(bundle, self.held_out)[np.arange(len(logged)), self.held_out.action]
        elif self.spec.slate:
            taken = slate_probability(bundle, self.held_out)
        else:
            taken = taken_probability(plan(bundle, self.held_out), self.held_out)
        return np.where(self.listed, taken / logged, 1.0)

    def _interval(self, values: np.ndarray, logged: np.ndarray) -> dict[str, float | None]:
        """Percentile interval of the replicates around the estimate from the log itself."""
        tail = (1 - self.spec.evaluation.confidence) / 2
        low, high = np.quantile(values[1:], [tail, 1 - tail])
        result: dict[str, float | None] = {"value": float(values[0]), "low": float(low), "high": float(high)}
        if logged[0] <= 0 or (logged[1:] <= 0).any():
            return result | {"relative": None, "relative_low": None, "relative_high": None}
        relative = values / logged
        low, high = np.quantile(relative[1:], [tail, 1 - tail])
        return result | {"relative": float(relative[0]), "relative_low": float(low), "relative_high": float(high)}


def _whole_mdps(data: Transitions) -> tuple[Transitions, int]:
    """The MDPs without a rejected decision before their last one, and how many had one: their weights are not known."""
    place = cpe.step_in_mdp(data.mdp) + 1
    holed = np.unique(data.mdp[data.ordinal != place])
    kept = data.select(np.flatnonzero(~np.isin(data.mdp, holed)))
    if len(kept) == 0:
        raise StageError("evaluation: every held-out MDP read has quarantined decisions before its last; mend the log")
    return kept, len(holed)
