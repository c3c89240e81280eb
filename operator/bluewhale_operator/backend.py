"""The Kubeflow Pipelines backend: runs by name, their state and their tasks (KFP API v2beta1)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import requests

TIMEOUT_SECONDS = 15
RunState = Literal["PENDING", "RUNNING", "SUCCEEDED", "SKIPPED", "FAILED", "CANCELING", "CANCELED", "PAUSED"]
ENDED = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")


class BackendError(RuntimeError):
    """The backend cannot be reached, or refused; `refused` when asking again would not help."""

    def __init__(self, message: str, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


@dataclass(frozen=True)
class Task:
    """One task of a run, as KFP shows it."""

    name: str
    state: str
    pod: str | None = None
    start: str | None = None
    end: str | None = None
    error: str = ""
    children: tuple[str, ...] = ()


@dataclass(frozen=True)
class PipelineRun:
    id: str
    name: str
    state: str
    error: str = ""
    tasks: tuple[Task, ...] = field(default=())

    @property
    def ended(self) -> bool:
        return self.state in ENDED


class Backend(Protocol):
    """What the controller asks of a pipeline backend."""

    def check(self) -> None: ...
    def find(self, name: str, namespace: str) -> PipelineRun | None: ...
    def get(self, run_id: str) -> PipelineRun | None: ...
    def submit(self, name: str, namespace: str, spec: Mapping[str, Any]) -> PipelineRun: ...
    def terminate(self, run_id: str) -> None: ...


class KfpBackend:
    """A KFP API server over HTTP."""

    def __init__(self, url: str, multi_user: bool = False, token_file: str | None = None) -> None:
        self.url, self.multi_user, self.token_file = url.rstrip("/"), multi_user, token_file
        self._experiments: dict[str, str] = {}

    def check(self) -> None:
        """Raises `BackendError` when the backend does not answer."""
        self._call("GET", "healthz")

    def find(self, name: str, namespace: str) -> PipelineRun | None:
        """The newest run of this name."""
        predicate = {"key": "name", "operation": "EQUALS", "string_value": name}
        query = {"filter": json.dumps({"predicates": [predicate]}), "page_size": "1", "sort_by": "created_at desc"}
        if self.multi_user:
            query["namespace"] = namespace
        runs = self._call("GET", "runs", query).get("runs") or []
        return self.get(runs[0]["run_id"]) if runs else None

    def get(self, run_id: str) -> PipelineRun | None:
        try:
            return _run(self._call("GET", f"runs/{run_id}"))
        except _NotFoundError:
            return None

    def submit(self, name: str, namespace: str, spec: Mapping[str, Any]) -> PipelineRun:
        return _run(self._call("POST", "runs", body={"display_name": name, **spec, **self._experiment(namespace)}))

    def terminate(self, run_id: str) -> None:
        """End a run; one that has ended, is about to, or is gone, is as good."""
        try:
            self._call("POST", f"runs/{run_id}:terminate")
        except _NotFoundError:
            return
        except BackendError as error:
            run = self.get(run_id)
            if run is None or run.ended or run.state == "CANCELING":
                return
            raise error

    def _experiment(self, namespace: str) -> dict[str, str]:
        """In multi-user mode the experiment carries the namespace that a run is made in."""
        if not self.multi_user:
            return {}
        if namespace not in self._experiments:
            predicate = {"key": "name", "operation": "EQUALS", "string_value": "bluewhale"}
            query = {"namespace": namespace, "filter": json.dumps({"predicates": [predicate]})}
            found = self._call("GET", "experiments", query).get("experiments") or []
            made = found[0] if found else self._call(
                "POST", "experiments", body={"display_name": "bluewhale", "namespace": namespace}
            )  # fmt: skip
            self._experiments[namespace] = made["experiment_id"]
        return {"experiment_id": self._experiments[namespace]}

    def _call(
        self, method: str, path: str, query: Mapping[str, str] | None = None, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {Path(self.token_file).read_text()}"} if self.token_file else {}
        try:
            response = requests.request(
                method, f"{self.url}/apis/v2beta1/{path}", params=query, json=body, headers=headers,
                timeout=TIMEOUT_SECONDS,
            )  # fmt: skip
        except requests.RequestException as error:
            raise BackendError(f"no Kubeflow Pipelines API server answers at {self.url}: {error}") from None
        if response.status_code == 404 and path.startswith("runs/"):
            raise _NotFoundError(f"{path}: no such run")
        if not response.ok:
            refused = 400 <= response.status_code < 500 and response.status_code not in (401, 403, 404, 408, 429)
            raise BackendError(f"Kubeflow Pipelines: {_message(response)}", refused)
        found: dict[str, Any] = response.json() if response.content else {}
        return found


class _NotFoundError(BackendError):
    pass


def _message(response: requests.Response) -> str:
    try:
        body = response.json()
        return str(body.get("error") or body.get("message") or response.reason)
    except ValueError:
        return f"{response.status_code} {response.reason}"


def _run(body: Mapping[str, Any]) -> PipelineRun:
    details = (body.get("run_details") or {}).get("task_details") or []
    names = {task["task_id"]: task.get("display_name", "") for task in details if "task_id" in task}
    tasks = []
    for task in details:
        children = task.get("child_tasks") or []
        tasks.append(
            Task(
                name=task.get("display_name", ""),
                # A task that was left out, since one before it failed, has none.
                state=task.get("state", "SKIPPED"),
                pod=task.get("pod_name") or next((c["pod_name"] for c in children if c.get("pod_name")), None),
                start=task.get("start_time"),
                end=_ended(task.get("end_time")),
                error=(task.get("error") or {}).get("message", ""),
                children=tuple(names.get(c.get("task_id", ""), "") for c in children),
            )
        )
    return PipelineRun(
        id=body["run_id"],
        name=body.get("display_name", ""),
        state=body.get("state", "PENDING"),
        error=(body.get("error") or {}).get("message", ""),
        tasks=tuple(tasks),
    )


def _ended(time: str | None) -> str | None:
    """KFP gives a task that has not ended the year 1 or 1970."""
    return None if not time or time.startswith(("0001", "1970")) else time
