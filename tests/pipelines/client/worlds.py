"""Jobs and services as a cluster would hold them, for the tests of the client."""

from __future__ import annotations

from typing import Any

from tests.operator.bluewhale_operator.worlds import DIGEST, OTHER, make_job, make_service

STAGES = (
    "timeline", "features", "normalization", "understanding", "training", "evaluation", "export", "rollout",
)  # fmt: skip
LOOK = {
    "time": "2026-05-04T12:04:00Z",
    "weight": "25%",
    "checks": [
        {"name": "reward", "verdict": "inconclusive", "message": "12 candidate and 34 stable MDPs of 30 each"},
        {"name": "errors", "verdict": "pass", "message": "0 of 1120 candidate calls failed"},
    ],
}


def condition(type: str, status: str, reason: str, message: str = "") -> dict[str, Any]:
    return {
        "type": type, "status": status, "reason": reason, "message": message,
        "lastTransitionTime": "2026-05-04T12:05:00Z",
    }  # fmt: skip


def stage(name: str, state: str = "Pending", message: str = "", **fields: Any) -> dict[str, Any]:
    times = {"startTime": "2026-05-04T12:00:00Z"} if state not in ("Pending", "Skipped") else {}
    if state in ("Succeeded", "Failed"):
        times["completionTime"] = "2026-05-04T12:01:05Z"
    return {"name": name, "state": state, "message": message, **times, **fields}


def training(**status: Any) -> dict[str, Any]:
    """A job whose second worker is awaited."""
    states = [stage("timeline", "Cached"), *(stage(name, "Succeeded", f"{name} is done") for name in STAGES[1:4])]
    return make_job() | {
        "status": {
            "phase": "Running", "stage": "training", "startTime": "2026-05-04T12:00:00Z",
            "workers": {"current": 1, "max": 2, "summary": "1/2"}, "run": {"name": "shop-1", "id": "r1"},
            "stages": [*states, stage("training", "Running", attempts=2), *map(stage, STAGES[5:])],
            **status,
        }
    }  # fmt: skip


def rolling_out(**status: Any) -> dict[str, Any]:
    """A job whose canary stands at a quarter."""
    return make_job() | {
        "status": {
            "phase": "RollingOut", "reason": "InProgress", "stage": "rollout", "startTime": "2026-05-04T12:00:00Z",
            "candidate": DIGEST, "policy": DIGEST[:12], "stages": [stage(name, "Succeeded") for name in STAGES],
            "conditions": [condition("RolledOut", "Unknown", "InProgress")],
            "cpe": {
                "estimator": "weighted_sequential_doubly_robust", "metric": "reward", "value": 1.4, "lower": 1.2,
                "upper": 1.6, "verdict": "pass", "summary": "1.40 [1.20, 1.60] pass",
            },
            "rollout": {"service": "shop", "weight": "25%", "step": 1, "verdicts": [LOOK]},
            **status,
        }
    }  # fmt: skip


def failed(phase: str, reason: str, message: str, **status: Any) -> dict[str, Any]:
    job = rolling_out(phase=phase, reason=reason, completionTime="2026-05-04T12:05:00Z", **status)
    conditions = [c for c in job["status"]["conditions"] if c["type"] != "RolledOut"]
    if phase == "RolledBack":
        conditions.append(condition("RolledOut", "False", reason, message))
    job["status"]["conditions"] = [*conditions, condition("Failed", "True", reason, message)]
    return job


def canary(**status: Any) -> dict[str, Any]:
    """The service that tries the job's policy."""
    candidate = {"digest": DIGEST, "version": "17"}
    return make_service(
        status={"phase": "Canary", "stable": {"digest": OTHER, "version": "3"}, "candidate": candidate, "weight": "25%"}
        | status
    )
