"""A Kubernetes API server and a KFP backend over real HTTP, in threads of the test."""

from __future__ import annotations

import asyncio
import copy
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

import attrs
import kmock
import kubernetes

from bluewhale_operator.cluster import Cluster, path_of
from bluewhale_operator.training_job import STAGES
from tests.operator.bluewhale_operator.worlds import record, stage_pod


@attrs.frozen
class ConflictError(kmock.KubernetesError):
    status: int = 409
    reason: str = "Conflict"
    message: str = "the object has been modified"


@attrs.define(kw_only=True)
class ApiServer(kmock.KubernetesEmulator):
    """kmock's emulator with what the controllers rely on: versions, conflicts, status apart, server-side apply."""

    version: int = 0
    down: bool = False
    seen: list[kmock.Request] = attrs.field(factory=list)

    async def _handle(self, request: kmock.Request) -> Any:
        self.seen.append(request)
        _forget(self)
        if self.down:
            raise ConnectionError("the API server is away")
        if request.resource is not None and isinstance(request.data, dict) and request.method.value != "GET":
            self._arrange(request)
        return await super()._handle(request)

    def _arrange(self, request: kmock.Request) -> None:
        """Turn the request into the creation or the merge patch that has its effect."""
        body: dict[str, Any] = copy.deepcopy(dict(request.data))
        meta = body.setdefault("metadata", {})
        self.version += 1
        if request.method.value == "POST":
            if "generateName" in meta:
                meta["name"] = f"{meta['generateName']}{self.version}"
            body = self._new(body, request.namespace)
        else:
            key = (request.resource, request.namespace, request.name)
            held = self.objects[key] if key in self.objects else None  # noqa: SIM401
            if held is None or held.deleted:
                if request.method.value == "PATCH" and "fieldManager" in request.params and "kind" in body:
                    self.objects[key] = self._new(body, request.namespace)
                    held = self.objects[key]
                else:
                    return
            old = copy.deepcopy(dict(held.raw))
            given = meta.get("resourceVersion")
            if given is not None and given != old["metadata"]["resourceVersion"]:
                raise ConflictError()
            if request.subresource == "status":
                body = {"status": _replacement(old.get("status", {}), body.get("status", {}))}
            else:
                body.pop("status", None)
                changed = "spec" in body and body["spec"] != old.get("spec")
                if changed:
                    body["metadata"]["generation"] = old["metadata"].get("generation", 1) + 1
            body.setdefault("metadata", {})["resourceVersion"] = str(self.version)
        changes = {"data": body}
        if request.method.value == "PUT":
            changes |= {"method": kmock.method.PATCH, "action": kmock.action.UPDATE}
        for field, value in changes.items():
            object.__setattr__(request, field, value)  # requests are frozen

    def _new(self, body: dict[str, Any], namespace: str | None) -> dict[str, Any]:
        meta = {
            "uid": f"{self.version:032d}", "generation": 1, "creationTimestamp": "2026-05-04T12:00:00Z",
            "namespace": namespace, **body["metadata"], "resourceVersion": str(self.version),
        }  # fmt: skip
        return body | {"metadata": meta}

    async def _serve_list(self, request: kmock.Request) -> Any:
        found: Any = await super()._serve_list(request)
        selector = unquote(request.params.get("labelSelector", ""))
        wanted = dict(part.split("=", 1) for part in selector.split(",") if part)
        found["metadata"]["resourceVersion"] = str(self.version)
        found["items"] = [
            item for item in found["items"]
            if wanted.items() <= (item["metadata"].get("labels") or {}).items()
        ]  # fmt: skip
        return found


class Kfp(kmock.RawHandler):
    async def _handle(self, request: kmock.Request) -> Any:
        _forget(self)
        return await super()._handle(request)


def _forget(server: kmock.RawHandler) -> None:
    """Drop the past requests: kmock looks through all of them at each new one."""
    del server._requests[:-1]


def _replacement(old: Any, new: Any) -> Any:
    """The merge patch that turns one dict into the other."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return {k: None for k in old if k not in new} | {k: _replacement(old.get(k), v) for k, v in new.items()}


class Servers:
    """The Kubernetes API at `url`, and KFP at `kfp_url`, whose runs the test moves on by hand."""

    def __init__(self, loop: asyncio.AbstractEventLoop, api: ApiServer, url: str, kfp_url: str) -> None:
        self.loop, self.api, self.url, self.kfp_url = loop, api, url, kfp_url
        self.runs: dict[str, dict[str, Any]] = {}
        self.kfp_down = False
        self.kfp_refuses = ""

    # -- Kubernetes --

    def cluster(self) -> Cluster:
        configuration = kubernetes.client.Configuration(host=self.url)
        configuration.retries = False
        return Cluster(kubernetes.client.ApiClient(configuration))

    def put(self, document: dict[str, Any]) -> None:
        """Store an object as it is, status included, and tell whoever watches."""
        cluster, meta = self.cluster(), document["metadata"]
        kind, name = (document["apiVersion"], document["kind"]), meta["name"]
        body = {k: v for k, v in document.items() if k != "status"}
        if self.get(*kind, name, meta["namespace"]) is None:
            cluster.create(body)
        else:
            unversioned = {k: v for k, v in meta.items() if k != "resourceVersion"}
            cluster.patch(*kind, meta["namespace"], name, body | {"metadata": unversioned})
        if "status" in document:
            path = path_of(*kind, meta["namespace"], name)
            cluster.request("PUT", f"{path}/status", None, {"metadata": {}, "status": document["status"]})

    def get(self, api_version: str, kind: str, name: str, namespace: str = "team") -> dict[str, Any] | None:
        return self.cluster().get(api_version, kind, namespace, name)

    def job(self, name: str = "shop") -> dict[str, Any]:
        found = self.get("bluewhale.io/v1alpha1", "RLTrainingJob", name)
        assert found is not None, f"no job {name}"
        return found

    def events(self) -> list[str]:
        return [e["reason"] for e in self.cluster().list("v1", "Event", "team")]

    # -- KFP --

    def serve_kfp(self, request: kmock.Request) -> kmock.Response:
        code, body = self._answer(request)
        return kmock.Response(status=code, payload=body)

    def _answer(self, request: kmock.Request) -> tuple[int, dict[str, Any]]:
        path = request.url.path.removeprefix("/apis/v2beta1/")
        if self.kfp_down:
            return 503, {"error": "the backend is away"}
        if path == "healthz":
            return 200, {"multi_user": False}
        if path == "runs" and request.method.value == "POST":
            if self.kfp_refuses:
                return 400, {"error": self.kfp_refuses}
            body = request.data
            run_id = f"run-{len(self.runs) + 1}"
            self.runs[run_id] = {
                "run_id": run_id,
                "display_name": body["display_name"],
                "state": "RUNNING",
                "body": body,
            }
            return 200, self._view(run_id)
        if path == "runs":
            name = json.loads(request.params["filter"])["predicates"][0]["string_value"]
            named = [self._view(i) for i, r in reversed(self.runs.items()) if r["display_name"] == name]
            return 200, {"runs": named[:1]}
        run_id, _, verb = path.removeprefix("runs/").partition(":")
        if run_id not in self.runs:
            return 404, {"error": "run not found"}
        if verb == "terminate" and self.runs[run_id]["state"] == "RUNNING":
            self.runs[run_id]["state"] = "CANCELED"
        return 200, self._view(run_id)

    def _view(self, run_id: str) -> dict[str, Any]:
        return {k: v for k, v in self.runs[run_id].items() if k != "body"}

    def advance(self, name: str = "shop", **facts: Any) -> None:
        """The newest run of a job ends the stage that is at work, and begins the next."""
        run_id, run = list(self.runs.items())[-1]
        if run["state"] != "RUNNING":
            return
        details = run.setdefault("run_details", {"task_details": []})["task_details"]
        done = len(details)
        for task in details:
            task["state"] = "SUCCEEDED"
        if details:
            stage = STAGES[len(details) - 1]
            self.pod(run_id, stage, record(stage, **facts.get(stage, {})), name)
            done = STAGES.index(stage) + 1
        if done == len(STAGES):
            run["state"] = "SUCCEEDED"
            return
        stage = STAGES[done]
        details.append({"display_name": stage, "state": "RUNNING", "pod_name": f"{run_id}-{stage}"})
        self.pod(run_id, stage, None, name)

    def fail(self, stage: str, message: dict[str, Any] | None, name: str = "shop") -> None:
        """The newest run fails in a stage."""
        run_id, run = list(self.runs.items())[-1]
        details = run.setdefault("run_details", {"task_details": []})["task_details"]
        for before in STAGES[: STAGES.index(stage)]:
            details.append({"display_name": before, "state": "SUCCEEDED"})
        details.append({"display_name": stage, "state": "FAILED", "pod_name": f"{run_id}-{stage}"})
        # KFP lists what was left out, without a state.
        for after in STAGES[STAGES.index(stage) + 1 :]:
            details += [{"display_name": f"{after}-driver"}, {"display_name": after}]
        run["state"] = "FAILED"
        if message:
            self.pod(run_id, stage, message, name)

    def pod(self, run_id: str, stage: str, message: dict[str, Any] | None, name: str) -> None:
        document = stage_pod(stage, message, name)
        document["metadata"]["name"] = f"{run_id}-{stage}"
        document["metadata"]["labels"]["pipeline/runid"] = run_id
        self.put(document)


@contextmanager
def servers() -> Iterator[Servers]:
    """Both servers on ports of their own, until the block ends."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(10)

    async def start() -> tuple[list[Any], Servers]:
        api = ApiServer()
        for resource in (
            "bluewhale.io/v1alpha1/rltrainingjobs", "bluewhale.io/v1alpha1/policyservices", "v1/pods", "v1/events",
            "v1/services", "v1/configmaps", "apps/v1/deployments", "batch/v1/jobs", "policy/v1/poddisruptionbudgets",
            "autoscaling/v2/horizontalpodautoscalers", "argoproj.io/v1alpha1/workflows",
        ):  # fmt: skip
            api.resources[resource] = {
                "namespaced": True, "subresources": {"status"}, "verbs": {"list", "watch", "get", "patch"},
            }  # fmt: skip
        for resource in ("v1/namespaces", "apiextensions.k8s.io/v1/customresourcedefinitions"):
            api.resources[resource] = {"namespaced": False, "subresources": set(), "verbs": {"list", "watch", "get"}}
        kfp = Kfp()
        api_server, kfp_server = kmock.Server(api), kmock.Server(kfp)
        for entered in (api, kfp, api_server, kfp_server):
            await entered.__aenter__()
        found = Servers(loop, api, str(api.url).rstrip("/"), str(kfp.url).rstrip("/"))
        kfp.fallback << found.serve_kfp
        return [api, kfp, api_server, kfp_server], found

    opened, found = run(start())
    try:
        yield found
    finally:

        async def stop() -> None:
            for entered in reversed(opened):
                await entered.__aexit__(None, None, None)

        run(stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
