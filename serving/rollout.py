"""The canary: move MDPs from the stable policy to the candidate in steps, each on evidence, or back at once."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from contracts.job import Canary
from serving import analysis
from serving.processes import ServerError
from serving.prometheus import query
from serving.state import read_state, write_state

POLL_SECONDS = 1.0
LEASE_SECONDS = 30.0
"""Without another look by then, all MDPs go back to stable."""
ERRORS_TOLERATED = 10
"""Looks in a row that cannot measure before the rollout gives up."""


StepOutcome = Literal["", "passed", "failed", "cannot be measured", "did not pass in time"]


class Advance(NamedTuple):
    """What one look means for its step."""

    outcome: StepOutcome
    """Empty while the step goes on."""
    reason: str
    """Why the candidate is rolled back; empty when it is not."""
    failures: int
    """Looks in a row that could not measure, this one included."""


def advance(
    canary: Canary, weight: float, checks: list[analysis.Check], seconds_in_step: float, failures: int
) -> Advance:
    """Decide by the checks of one look; `failures` is of the look before. Only passes of every check move a step."""
    verdicts = {check.verdict for check in checks}
    failures = failures + 1 if "error" in verdicts else 0
    outcome: StepOutcome = ""
    to_blame: tuple[analysis.Verdict, ...] = ("inconclusive", "error")
    if "fail" in verdicts:
        outcome, to_blame = "failed", ("fail",)
    elif failures >= ERRORS_TOLERATED:
        outcome, to_blame = "cannot be measured", ("error",)
    elif verdicts == {"pass"}:
        return Advance("passed", "", failures)
    elif seconds_in_step > canary.step_timeout_seconds:
        outcome = "did not pass in time"
    else:
        return Advance("", "", failures)
    worst = next(check for check in checks if check.verdict in to_blame)
    reason = f"at weight {percent(weight)} the check of {worst.name} {outcome}: {worst.message}"
    return Advance(outcome, reason, failures)


def percent(weight: float) -> str:
    """10 % as `10%`, without losing a half per cent."""
    return f"{100 * weight:.10g}%"


def roll_out(
    canary: Canary,
    state_file: Path,
    log: Path,
    prometheus: str,
    metric_weights: dict[str, float] | None = None,
    progress: Callable[[float, str], None] = lambda share, text: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Run the rollout that `state_file` holds to its end; returns {verdict, reason, steps, mixed_mdps}.

    Verdicts: `promoted`, when every check of every step passed; `rolled_back`, when a check failed, a step did not
    pass in time, or nothing could be measured. Either way the state file holds the new stable policy and no candidate.
    Interrupted, the candidate gets no more traffic and can be rolled out again. Raises `ServerError` when there is no
    candidate.
    """
    returns = analysis.LiveReturns(log, canary.metric, metric_weights, skip_existing=True)
    ask = functools.partial(query, prometheus)
    state = read_state(state_file)
    candidate = state["candidate"]
    if candidate is None:
        raise ServerError(f"{state_file}: the service has no candidate; export a policy and serve it beside this one")
    steps: list[dict[str, Any]] = []
    began = clock()
    verdict, reason = "promoted", "every check of every step passed"
    try:
        for number, weight in enumerate(canary.weights):
            step = _Step(weight, clock() - began, returns.arms["candidate"].count)
            steps.append(step.record)
            result = Advance("", "", 0)
            while not result.outcome:
                # The weight holds only as long as somebody watches.
                write_state(state_file, state | {"weight": weight, "weight_until": time.time() + LEASE_SECONDS})
                sleep(POLL_SECONDS)
                returns.read()
                checks = step.look(returns, canary, ask, clock() - began)
                progress(
                    (number + min(1.0, step.new_candidates / canary.minimum_mdps)) / len(canary.weights),
                    f"weight {percent(weight)}, {step.new_candidates} candidate MDPs, reward {checks[0].verdict}",
                )
                result = advance(canary, weight, checks, clock() - began - step.record["started"], result.failures)
            step.record["outcome"] = result.outcome
            if result.reason:
                verdict, reason = "rolled_back", result.reason
                break
    except BaseException:
        # Interrupted: nobody watches the candidate any longer.
        write_state(state_file, state | {"weight": 0.0})
        raise
    stable = candidate if verdict == "promoted" else state["stable"]
    write_state(state_file, state | {"stable": stable, "candidate": None, "weight": 0.0})
    return {"verdict": verdict, "reason": reason, "steps": steps, "mixed_mdps": returns.mixed}


class _Step:
    def __init__(self, weight: float, started: float, candidates: int) -> None:
        self.candidates, self.new_candidates = candidates, 0
        self.record: dict[str, Any] = {"weight": weight, "started": round(started, 1), "looks": []}

    def look(
        self, returns: analysis.LiveReturns, canary: Canary, ask: analysis.Ask, now: float
    ) -> list[analysis.Check]:
        self.new_candidates = returns.arms["candidate"].count - self.candidates
        seconds = max(POLL_SECONDS, now - self.record["started"])
        checks = analysis.check_all(returns, canary, self.new_candidates, ask, seconds)
        self.record["looks"].append({"time": round(now, 1), "checks": [check.as_dict() for check in checks]})
        self.record["seconds"] = round(now - self.record["started"], 1)
        for arm in analysis.ARMS:
            self.record[f"{arm}_mdps"] = returns.arms[arm].count
            self.record[f"{arm}_mean"] = returns.arms[arm].mean if returns.arms[arm].count else None
        return checks
