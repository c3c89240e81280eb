"""Objects as a cluster would hold them, for the tests of the controllers."""

from __future__ import annotations

import copy
import json
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

from bluewhale_operator.backend import PipelineRun, Task
from bluewhale_operator.training_job import STAGES

NOW = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)
DIGEST = "ab" * 32
OTHER = "cd" * 32

SPEC: dict[str, Any] = {
    "actions": ["left", "right"],
    "data": {"decisionLog": "/var/bluewhale/logs/decisions.parquet"},
    "backoffLimit": 1,
}


def make_job(name: str = "shop", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "bluewhale.io/v1alpha1",
        "kind": "RLTrainingJob",
        "metadata": {
            "name": name,
            "namespace": "team",
            "uid": str(uuid.uuid5(uuid.NAMESPACE_DNS, name)),
            "generation": 1,
            "resourceVersion": "1",
            "creationTimestamp": "2026-05-04T11:59:00Z",
        },
        "spec": {**copy.deepcopy(SPEC), **spec},
    }


def record(stage: str, status: str = "succeeded", **facts: Any) -> dict[str, Any]:
    """What a stage leaves as its termination message."""
    given: dict[str, Any] = {
        "stage": stage,
        "status": status,
        "message": f"{stage} is done",
        "artifact": f"minio://{stage}",
    }
    if stage == "evaluation":
        given["cpe"] = {
            "estimator": "weighted_sequential_doubly_robust", "metric": "reward", "value": 1.4, "lower": 1.2,
            "upper": 1.6, "verdict": "pass",
        }  # fmt: skip
    if stage == "export":
        given["policy"] = {"digest": DIGEST, "version": "17"}
    if stage == "rollout":
        given |= {"rollout": "requested", "service": "shop"}
    return given | facts


def stage_pod(stage: str, message: dict[str, Any] | None = None, name: str = "shop", **status: Any) -> dict[str, Any]:
    """The pod of a stage: at work, or ended with a record."""
    state: dict[str, Any] = {"running": {}}
    phase = "Running"
    if message is not None:
        code = 0 if message["status"] == "succeeded" else 1
        phase = "Succeeded" if code == 0 else "Failed"
        state = {"terminated": {"exitCode": code, "message": json.dumps(message)}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"{name}-{stage}-x1",
            "namespace": "team",
            "labels": {"bluewhale.io/job": name, "bluewhale.io/stage": stage},
        },
        "status": {
            "phase": phase,
            "startTime": "2026-05-04T12:00:00Z",
            "containerStatuses": [{"name": "main", "image": "spark:1", "state": state}],
            **status,
        },
    }


def waiting_pod(stage: str, reason: str, message: str = "") -> dict[str, Any]:
    waiting = {"name": "main", "image": "registry/none:1", "state": {"waiting": {"reason": reason, "message": message}}}
    return stage_pod(stage, phase="Pending", containerStatuses=[waiting])


def unschedulable_pod(stage: str, message: str) -> dict[str, Any]:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return stage_pod(stage, phase="Pending", containerStatuses=[], conditions=[condition])


def make_run(
    name: str, done: int = 0, state: str = "RUNNING", failed: str | None = None, run_id: str = "r1"
) -> PipelineRun:
    """A run whose first `done` stages have succeeded; the next one is at work, or has failed."""
    tasks = []
    for number, stage in enumerate(STAGES):
        if stage == failed:
            tasks.append(Task(stage, "FAILED", pod=f"{stage}-pod"))
        elif failed and number > STAGES.index(failed):
            # What comes after a failure is left out, and is listed all the same.
            tasks += [Task(f"{stage}-driver", "SKIPPED"), Task(stage, "SKIPPED")]
        elif number < done:
            tasks.append(Task(stage, "SUCCEEDED", pod=f"{stage}-pod"))
        elif number == done and state == "RUNNING":
            tasks.append(Task(stage, "RUNNING", pod=f"{stage}-pod"))
    return PipelineRun(run_id, name, state, tasks=tuple(tasks))


def make_service(candidate: str | None = DIGEST, status: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    wished = {"candidate": {"digest": candidate, "version": "17", "attempt": 0, "job": "shop"}} if candidate else {}
    return {
        "apiVersion": "bluewhale.io/v1alpha1",
        "kind": "PolicyService",
        "metadata": {"name": "shop", "namespace": "team", "uid": "s" * 32, "generation": 1, "resourceVersion": "1"},
        "spec": {
            "features": ["x"], "actions": ["left", "right"], "stable": {"digest": OTHER, "version": "3"},
            **wished, **spec,
        },
        "status": status or {},
    }  # fmt: skip


def later(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)
