"""Checks of a canary step. Each says pass, fail, inconclusive (too little data) or error (cannot measure)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from contracts.job import Canary
from serving.processes import ServerError

Verdict = Literal["pass", "fail", "inconclusive", "error"]
Ask = Callable[[str], float | None]
"""Asks Prometheus: the value of an expression, None when there is none; raises `ServerError`."""
ARMS = ("stable", "candidate")


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
    """Running figures of one metric's total per finished MDP of an arm (Welford 1962: no digits cancel)."""

    count: int = 0
    mean: float = 0.0
    deviations: float = 0.0
    """Sum of squared deviations from the mean."""

    def add(self, total: float) -> None:
        self.count += 1
        before = total - self.mean
        self.mean += before / self.count
        self.deviations += before * (total - self.mean)

    @property
    def stddev(self) -> float:
        return math.sqrt(self.deviations / max(1, self.count - 1))


class Returns(Protocol):
    """What has been seen of the arms: here in the log, or by way of Prometheus."""

    arms: dict[str, ArmReturns]
    mixed: int
    metrics_seen: set[str]


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
        self.arms = {arm: ArmReturns() for arm in ARMS}
        self.mixed = 0
        self.metrics_seen: set[str] = set()
        self._decisions = Tail(log / "decisions.jsonl", skip_existing)
        self._outcomes = Tail(log / "outcomes.jsonl", skip_existing)
        self._answered_by: dict[str, set[str]] = {}
        # Per MDP and decision, so that an outcome reported twice counts once, the later report.
        self._rewards: dict[str, dict[int, float]] = {}
        if skip_existing:
            # An MDP that is under way belongs to no arm whole: it counts for neither when it ends.
            before = Tail(log / "decisions.jsonl").rows(self._decisions.offset)
            self._answered_by = {row["mdp_id"]: {"mixed"} for row in before}
            for row in Tail(log / "outcomes.jsonl").rows(self._outcomes.offset):
                if row["ended"]:
                    self._answered_by.pop(row["mdp_id"], None)

    def read(self) -> None:
        """Take in what has been written since the last call."""
        # Outcomes first: a decision is always logged before what it brought, so none of theirs is missed.
        outcomes = list(self._outcomes.rows())
        for row in self._decisions.rows():
            by = "mixed" if row["fallback"] else row["arm"]
            self._answered_by.setdefault(row["mdp_id"], set()).add(by)
        for row in outcomes:
            mdp = row["mdp_id"]
            metrics = with_reward(row["metrics"], self.metric, self.metric_weights)
            self.metrics_seen.update(metrics)
            self._rewards.setdefault(mdp, {})[row["sequence_number"]] = metrics.get(self.metric, 0.0)
            if row["ended"]:
                total, by = math.fsum(self._rewards.pop(mdp).values()), self._answered_by.pop(mdp, {"mixed"})
                if len(by) == 1 and by <= set(self.arms):
                    self.arms[by.pop()].add(total)
                else:
                    self.mixed += 1


@dataclass
class MeasuredReturns:
    """The figures of one rollout as `serving.analyst` exports them, read from Prometheus."""

    arms: dict[str, ArmReturns]
    mixed: int
    metrics_seen: set[str]


def read_returns(ask: Ask, metric: str, rollout: str, selector: str = "") -> MeasuredReturns:
    """Ask Prometheus for the figures of a rollout; raises `ServerError` when it cannot tell.

    Each figure is one expression, so that it is taken of one scrape. The largest counts where two analysts are seen, as
    while one takes the other's place.
    """

    def figure(expression: str, **labels: str) -> float:
        chosen = _labels(selector, metric=metric, rollout=rollout, **labels)
        return ask(f"max({expression.replace('{}', chosen)})") or 0.0

    # Of a rollout without a finished MDP there are no figures; this one is there as long as an analyst is.
    if ask(f"max(bluewhale_unreadable_log_lines{_labels(selector)})") is None:
        raise ServerError("Prometheus knows nothing of the arms' returns: does it scrape the analyst's pod?")
    arms = {}
    for arm in ARMS:
        count = int(figure("bluewhale_arm_mdps{}", arm=arm))
        mean = figure("bluewhale_arm_return_sum{} / bluewhale_arm_mdps{}", arm=arm)
        arms[arm] = ArmReturns(count, mean, figure("bluewhale_arm_return_squared_deviations_sum{}", arm=arm))
    seen = {metric} if figure("bluewhale_metric_reported{}") else set()
    return MeasuredReturns(arms, int(figure("bluewhale_mixed_mdps{}")), seen)


def with_reward(metrics: dict[str, float], metric: str, weights: dict[str, float]) -> dict[str, float]:
    """Add `reward`, when that is the metric and it is not reported: the weighted sum of what is."""
    known = weights.keys() & metrics.keys()
    if metric != "reward" or "reward" in metrics or not known:
        return metrics
    return metrics | {"reward": sum(weights[name] * metrics[name] for name in known)}


class Tail:
    """The rows that were added to a JSON-lines file since the last look; a line that is not whole yet waits."""

    def __init__(self, path: Path, skip_existing: bool = False) -> None:
        self.path = path
        self.offset = path.stat().st_size if skip_existing and path.exists() else 0
        self.unreadable = 0

    def rows(self, until: int | None = None) -> Iterator[dict[str, Any]]:
        """Rows up to the offset `until`, or to the end that the file has now; an unreadable line is counted."""
        if not self.path.exists():
            return
        with self.path.open("rb") as stream:
            end = stream.seek(0, 2) if until is None else until
            stream.seek(self.offset)
            while self.offset < end and (line := stream.readline()).endswith(b"\n"):
                self.offset += len(line)
                try:
                    row = json.loads(line)
                except ValueError:
                    self.unreadable += 1
                    continue
                yield row


def confidence_radius(count: int, stddev: float, significance: float, best_at: int) -> float:
    """Half the width of an asymptotic confidence sequence of a mean, valid at every look.

    Waudby-Smith et al. 2021, arXiv 2103.06476, equation 8, with rho tuned to be narrowest at `best_at` samples
    (their equation 11). A mean of few samples is watched without an error rate that grows with the number of looks.
    """
    rho2 = (-2 * math.log(significance) + math.log(-2 * math.log(significance) + 1)) / best_at
    scaled = count * rho2 + 1
    return stddev * math.sqrt(2 * scaled / (count**2 * rho2) * math.log(math.sqrt(scaled) / significance))


def check_reward(returns: Returns, canary: Canary, new_candidates: int) -> Check:
    """Does the candidate's mean reach its share of stable's? Judged by two confidence sequences together.

    `new_candidates`: finished MDPs of the candidate in this step; under the minimum there is no verdict.
    """
    name, metric = "reward", canary.metric
    stable, candidate = returns.arms["stable"], returns.arms["candidate"]
    finished = stable.count + candidate.count
    if finished and metric not in returns.metrics_seen:
        seen = f"; reported: {', '.join(sorted(returns.metrics_seen))}" if returns.metrics_seen else ""
        return Check(name, "error", f"no outcome of {finished} finished MDPs reports {metric}{seen}")
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


def check_errors(ask: Ask, canary: Canary, seconds: float, selector: str = "") -> Check:
    """Did the candidate answer nearly all of its calls in the last `seconds`?"""
    try:
        calls = candidate_calls(ask, seconds, selector)
    except ServerError as error:
        return Check("errors", "error", str(error))
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


def candidate_calls(ask: Ask, seconds: float, selector: str = "") -> dict[str, float]:
    """The candidate's calls in the last `seconds` by result; raises `ServerError` when Prometheus cannot tell.

    Each replica's count is taken for itself, so that one that went away or started anew hides no other's failures, and
    not by `increase`, which extrapolates: one failure must not become two.
    """
    calls = {}
    for result in ("answered", "failed", "late", "shed"):
        series = f"bluewhale_decisions_total{_labels(selector, arm='candidate', result=result)}"
        window = f"[{math.ceil(seconds * 1000)}ms]"
        grown = f"max_over_time({series}{window}) - min_over_time({series}{window})"
        calls[result] = ask(f"sum(max by (replica) ({grown}))") or 0.0
    return calls


def check_latency(ask: Ask, canary: Canary, selector: str = "") -> Check:
    """Is the candidate's 99th percentile over the last 30 s low enough?"""
    series = f"bluewhale_decision_seconds_bucket{_labels(selector, arm='candidate')}"
    try:
        milliseconds = ask(f"histogram_quantile(0.99, sum by (le) (rate({series}[30s]))) * 1000")
    except ServerError as error:
        return Check("latency", "error", str(error))
    if milliseconds is None:
        return Check("latency", "inconclusive", "the candidate's latency has not been scraped yet")
    verdict: Verdict = "pass" if milliseconds <= canary.max_latency_ms else "fail"
    return Check("latency", verdict, f"candidate p99 {milliseconds:.1f} ms", milliseconds)


def check_all(
    returns: Returns | ServerError, canary: Canary, new_candidates: int, ask: Ask, seconds: float, selector: str = ""
) -> list[Check]:
    """Every check of a look, `seconds` into its step; `returns` may be why they cannot be told."""
    if isinstance(returns, ServerError):
        reward = Check("reward", "error", str(returns))
    else:
        reward = check_reward(returns, canary, new_candidates)
    return [reward, check_errors(ask, canary, seconds, selector), check_latency(ask, canary, selector)]


def check_loaded(ask: Ask, rollout: str, replicas: int, selector: str = "") -> Check:
    """Have all replicas loaded the rollout's candidate?"""
    series = f"max by (replica) (bluewhale_candidate_loaded{_labels(selector, rollout=rollout)})"
    try:
        loaded, given_up = (int(ask(f"count({series} == {value})") or 0) for value in (1, 0))
    except ServerError as error:
        return Check("loaded", "error", str(error))
    if given_up:
        return Check("loaded", "fail", f"{given_up} of {replicas} replicas cannot load it; their logs say why")
    verdict: Verdict = "pass" if 0 < replicas <= loaded else "inconclusive"
    return Check("loaded", verdict, f"{loaded} of {replicas} replicas have loaded it", float(loaded))


def _labels(selector: str, **labels: str) -> str:
    """A PromQL selector of labels; `selector` holds further ones, as they are written there."""
    # JSON's strings are PromQL's.
    return f"{{{','.join([*(f'{k}={json.dumps(v)}' for k, v in labels.items()), *filter(None, [selector])])}}}"
