"""Checks of a canary step. Each says pass, fail, inconclusive (too little data) or error (cannot measure)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from contracts.job import Canary
from serving.processes import ServerError

Verdict = Literal["pass", "fail", "inconclusive", "error"]


@dataclass(frozen=True)
class Check:
    name: str
    verdict: Verdict
    message: str
    value: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class ArmReturns:
    """Totals of one metric over the finished MDPs of an arm."""

    values: list[float] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / self.count

    @property
    def stddev(self) -> float:
        mean = self.mean
        return math.sqrt(math.fsum((v - mean) ** 2 for v in self.values) / max(1, self.count - 1))


class LiveReturns:
    """Follows the decision log and its outcomes as serving writes them, and sums a metric per finished MDP.

    An MDP that both arms answered, or that stable answered in the candidate's place, measures neither: it is left out
    and counted in `mixed`. The metric `reward`, where no outcome has it, is the dot product of the reported metrics and
    `metric_weights`. With `skip_existing`, what was written before is not looked at.
    """

    def __init__(
        self, log: Path, metric: str, metric_weights: dict[str, float] | None = None, skip_existing: bool = False
    ) -> None:
        self.metric, self.metric_weights = metric, metric_weights or {}
        self.arms = {"stable": ArmReturns(), "candidate": ArmReturns()}
        self.mixed = 0
        self.metrics_seen: set[str] = set()
        self._decisions = _Tail(log / "decisions.jsonl", skip_existing)
        self._outcomes = _Tail(log / "outcomes.jsonl", skip_existing)
        self._answered_by: dict[str, set[str]] = {}
        # Per MDP and decision, so that an outcome reported twice counts once, the later report.
        self._rewards: dict[str, dict[int, float]] = {}
        if skip_existing:
            # An MDP that is under way belongs to no arm whole: it counts for neither when it ends.
            before = _Tail(log / "decisions.jsonl", False).lines(self._decisions.offset)
            self._answered_by = {row["mdp_id"]: {"mixed"} for row in before}
            for row in _Tail(log / "outcomes.jsonl", False).lines(self._outcomes.offset):
                if row["ended"]:
                    self._answered_by.pop(row["mdp_id"], None)

    def read(self) -> None:
        """Take in what has been written since the last call."""
        # Outcomes first: a decision is always logged before what it brought, so none of theirs is missed.
        outcomes = self._outcomes.lines()
        for row in self._decisions.lines():
            by = "mixed" if row["fallback"] else row["arm"]
            self._answered_by.setdefault(row["mdp_id"], set()).add(by)
        for row in outcomes:
            mdp = row["mdp_id"]
            metrics = self._with_reward(row["metrics"])
            self.metrics_seen.update(metrics)
            self._rewards.setdefault(mdp, {})[row["sequence_number"]] = metrics.get(self.metric, 0.0)
            if row["ended"]:
                total, by = math.fsum(self._rewards.pop(mdp).values()), self._answered_by.pop(mdp, {"mixed"})
                if len(by) == 1 and by <= set(self.arms):
                    self.arms[by.pop()].values.append(total)
                else:
                    self.mixed += 1

    def _with_reward(self, metrics: dict[str, float]) -> dict[str, float]:
        known = self.metric_weights.keys() & metrics.keys()
        if self.metric != "reward" or "reward" in metrics or not known:
            return metrics
        return metrics | {"reward": sum(self.metric_weights[name] * metrics[name] for name in known)}


class _Tail:
    """The whole lines that were added to a JSON-lines file since the last look."""

    def __init__(self, path: Path, skip_existing: bool) -> None:
        self.path = path
        self.offset = path.stat().st_size if skip_existing and path.exists() else 0

    def lines(self, until: int | None = None) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            data = stream.read() if until is None else stream.read(until - self.offset)
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def confidence_radius(count: int, stddev: float, significance: float, best_at: int) -> float:
    """Half the width of an asymptotic confidence sequence of a mean, valid at every look.

    Waudby-Smith et al. 2021, arXiv 2103.06476, equation 8, with rho tuned to be narrowest at `best_at` samples
    (their equation 11). A mean of few samples is watched without an error rate that grows with the number of looks.
    """
    rho2 = (-2 * math.log(significance) + math.log(-2 * math.log(significance) + 1)) / best_at
    scaled = count * rho2 + 1
    return stddev * math.sqrt(2 * scaled / (count**2 * rho2) * math.log(math.sqrt(scaled) / significance))


def check_reward(returns: LiveReturns, canary: Canary, new_candidates: int) -> Check:
    """Does the candidate's mean reach its share of stable's? Judged by two confidence sequences together.

    `new_candidates`: finished MDPs of the candidate in this step; under the minimum there is no verdict.
    """
    name, metric = "reward", canary.metric
    stable, candidate = returns.arms["stable"], returns.arms["candidate"]
    finished = stable.count + candidate.count
    if finished and metric not in returns.metrics_seen:
        seen = ", ".join(sorted(returns.metrics_seen)) or "none"
        return Check(name, "error", f"no outcome of {finished} finished MDPs reports {metric}; reported: {seen}")
    least = canary.minimum_mdps
    if stable.count < least or new_candidates < least:
        return Check(name, "inconclusive", f"{new_candidates} candidate and {stable.count} stable MDPs of {least} each")
    share = canary.minimum_relative
    largest = max(stable.stddev, candidate.stddev)
    if largest == 0:
        return Check(name, "inconclusive", f"every MDP of both arms has the same {metric}: its spread is not known yet")
    # An arm without spread so far is not one without spread: it is taken to have the other's.
    radii = [
        confidence_radius(a.count, a.stddev or largest, canary.significance / 2, least) for a in (stable, candidate)
    ]
    difference = candidate.mean - share * stable.mean
    radius = radii[1] + abs(share) * radii[0]
    low, high = difference - radius, difference + radius
    text = (
        f"{metric} per MDP: candidate {candidate.mean:.1f} ({candidate.count}), stable {stable.mean:.1f} "
        f"({stable.count}); candidate - {share:g} x stable in [{low:.1f}, {high:.1f}]"
    )
    verdict: Verdict = "pass" if low >= 0 else "fail" if high < 0 else "inconclusive"
    return Check(name, verdict, text, difference)


def check_errors(ask: Callable[[str], float | None], canary: Canary, before: dict[str, float]) -> Check:
    """Did the candidate answer nearly all of its calls since `before`, the counters at the step's start?"""
    try:
        now = candidate_calls(ask)
    except ServerError as error:
        return Check("errors", "error", str(error))
    calls = {result: now[result] - before.get(result, 0.0) for result in now}
    total = sum(calls.values())
    if total < 1:
        return Check("errors", "inconclusive", "the candidate has not been called yet")
    bad = total - calls["answered"]
    text = f"{bad:.0f} of {total:.0f} candidate calls failed, came late or were shed"
    allowed = canary.max_error_fraction
    verdict: Verdict = "pass"
    if bad > allowed * total:
        # A single bad call among few says little; what would be too many of 1 / allowed calls says enough.
        verdict = "fail" if allowed == 0 or bad > max(1.0, allowed * total) else "inconclusive"
    return Check("errors", verdict, text, bad / total)


def candidate_calls(ask: Callable[[str], float | None]) -> dict[str, float]:
    """The candidate's calls so far by result; raises `ServerError` when Prometheus cannot tell."""
    return {
        result: ask(f'sum(bluewhale_decisions_total{{arm="candidate",result="{result}"}})') or 0.0
        for result in ("answered", "failed", "late", "shed")
    }


def check_latency(ask: Callable[[str], float | None], canary: Canary) -> Check:
    """Is the candidate's 99th percentile over the last 30 s low enough?"""
    expression = (
        'histogram_quantile(0.99, sum by (le) (rate(bluewhale_decision_seconds_bucket{arm="candidate"}[30s]))) * 1000'
    )
    try:
        milliseconds = ask(expression)
    except ServerError as error:
        return Check("latency", "error", str(error))
    if milliseconds is None:
        return Check("latency", "inconclusive", "the candidate's latency has not been scraped yet")
    verdict: Verdict = "pass" if milliseconds <= canary.max_latency_ms else "fail"
    return Check("latency", verdict, f"candidate p99 {milliseconds:.1f} ms", milliseconds)
