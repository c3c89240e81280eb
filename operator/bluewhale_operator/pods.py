"""What pods say: which stage they are, what their stage reported, and why they do not start."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Any

from bluewhale_operator.outcome import Object
from contracts.status import Reason

STAGE_LABEL = "bluewhale.io/stage"
ROLE_LABEL = "bluewhale.io/role"
"""`worker` of a training job, or Spark's `executor`."""
PULL_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError")
PULL_SECRETS_MISSING = "Unable to retrieve some image pull secrets"
CONFIG_REASONS = ("CreateContainerConfigError", "CreateContainerError")


# The launcher's own failures are kept, but for that of what it has launched.
_WRAPPERS = re.compile(r"argo=true|^[IW]\d{4} |^[EF]\d{4} .*exit status \d+$|^Error: exit status")


@dataclass(frozen=True)
class Stall:
    """Why a child cannot start; `hopeless` when waiting will not help unless somebody acts."""

    reason: Reason
    message: str
    hopeless: bool


def stage_of(pod: Object) -> str | None:
    stage: str | None = (pod["metadata"].get("labels") or {}).get(STAGE_LABEL)
    return stage


def record_of(pod: Object) -> dict[str, Any] | None:
    """The record that a stage left as its container's termination message."""
    for container in pod.get("status", {}).get("containerStatuses") or []:
        ended = (container.get("state") or {}).get("terminated") or {}
        try:
            record = json.loads(ended.get("message") or "")
        except ValueError:
            continue
        if isinstance(record, dict) and "stage" in record:
            return record
    return None


def succeeded(pod: Object) -> bool:
    """Whether the stage's own container has ended well; its sidecar may still be at work."""
    record = record_of(pod)
    return bool(record and record.get("status") == "succeeded") or pod.get("status", {}).get("phase") == "Succeeded"


def is_executor(pod: Object) -> bool:
    """Whether the pod is one of Spark's, made by a stage."""
    return (pod["metadata"].get("labels") or {}).get(ROLE_LABEL) == "executor"


def has_ended(thing: Object) -> bool:
    """Of a pod or a batch Job."""
    status = thing.get("status") or {}
    if thing["kind"] == "Pod":
        return status.get("phase") in ("Succeeded", "Failed")
    return any(c["type"] in ("Complete", "Failed") and c["status"] == "True" for c in status.get("conditions") or [])


def last_lines(log: str, most: int = 3) -> str:
    """The end of what a stage's container said, without what KFP's launcher and Argo's executor say of themselves."""
    said = [line.strip() for line in log.splitlines() if line.strip()]
    return " | ".join([line for line in said if not _WRAPPERS.search(line)][-most:])


def last_words(pod: Object, said: str | None = None) -> str:
    """How a container of the pod ended badly, with what it `said`: by default its termination message."""
    for container in pod.get("status", {}).get("containerStatuses") or []:
        for state in (container.get("state") or {}, container.get("lastState") or {}):
            if (ended := state.get("terminated") or {}).get("exitCode"):
                how = f"pod {pod['metadata']['name']}: {ended.get('reason', 'Error')}, exit code {ended['exitCode']}"
                words = (ended.get("message") or "").strip() if said is None else said
                return f"{how}: {words}" if words else how
    return ""


def started_at(pod: Object) -> str | None:
    start: str | None = pod.get("status", {}).get("startTime")
    return start


def is_pending(pod: Object) -> bool:
    return bool(pod.get("status", {}).get("phase") == "Pending")


def is_being_made(pod: Object) -> bool:
    """Whether its containers wait for their volumes, or merely for their turn: kubelet tells which in Events alone."""
    status = pod.get("status", {})
    states = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    waiting = [(s.get("state") or {}).get("waiting") or {} for s in states]
    conditions = status.get("conditions") or []
    mounted = any(c.get("type") == "PodReadyToStartContainers" and c.get("status") == "True" for c in conditions)
    creating = any(w.get("reason") in ("ContainerCreating", "PodInitializing") for w in waiting)
    return is_pending(pod) and creating and not mounted


def cannot_be_pulled(pod: Object) -> bool:
    """Whether an image is missing, and secrets are named to pull it with."""
    stall = _pod_stall(pod)
    return bool(stall and stall.reason == Reason.IMAGE_PULL_FAILED and pod.get("spec", {}).get("imagePullSecrets"))


def find_stall(pods: list[Object], messages: list[str]) -> Stall | None:
    """The first reason why any pod cannot start, or could not even be made."""
    for pod in pods:
        if stall := _pod_stall(pod):
            # Kubelet tells of a pull secret that is not there in an Event alone, and tries without.
            secrets = [m for m in messages if stall.reason == Reason.IMAGE_PULL_FAILED and PULL_SECRETS_MISSING in m]
            return replace(stall, message="; ".join([stall.message, *secrets[:1]]))
    for message in messages:
        if "exceeded quota" in message:
            return Stall(Reason.QUOTA_EXCEEDED, f"{message}; raise the quota or ask for less", False)
        if "forbidden" in message or "not found" in message:
            return Stall(Reason.MISSING_DEPENDENCY, message, True)
    return None


def _pod_stall(pod: Object) -> Stall | None:
    status, name = pod.get("status", {}), pod["metadata"]["name"]
    if status.get("phase") != "Pending":
        return None
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason, detail = waiting.get("reason", ""), waiting.get("message", "")
        if reason in PULL_REASONS:
            text = f"pod {name}: image {container.get('image', '')} cannot be pulled ({reason}): {detail}"
            return Stall(Reason.IMAGE_PULL_FAILED, f"{text}; check its name and the pull secrets", True)
        if reason in CONFIG_REASONS:
            return Stall(Reason.MISSING_DEPENDENCY, f"pod {name}: {detail or reason}", True)
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("reason") == "Unschedulable":
            detail = condition.get("message", "")
            missing = "persistentvolumeclaim" in detail and "not found" in detail
            reason = Reason.MISSING_DEPENDENCY if missing else Reason.UNSCHEDULABLE
            return Stall(reason, f"pod {name} cannot be placed: {detail}", missing)
    return None
