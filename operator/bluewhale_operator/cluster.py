"""The Kubernetes API by plain paths: objects in, objects out, as dicts."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

import kubernetes
import urllib3
from kubernetes.client import ApiClient
from kubernetes.client.exceptions import ApiException

from bluewhale_operator.outcome import FIELD_MANAGER, Object, Reference

TIMEOUT_SECONDS = 20

PLURALS: Mapping[str, str] = {
    "RLTrainingJob": "rltrainingjobs",
    "PolicyService": "policyservices",
    "NetworkPolicy": "networkpolicies",
}
"""Plurals that are not the lower-case kind with an s."""


class ApiError(RuntimeError):
    """The API server refused, or could not be reached (`code` 0)."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason


def path_of(api_version: str, kind: str, namespace: str | None, name: str | None = None) -> str:
    """The REST path of a collection or, with a name, of an object."""
    root = f"/api/{api_version}" if "/" not in api_version else f"/apis/{api_version}"
    where = f"/namespaces/{namespace}" if namespace else ""
    plural = PLURALS.get(kind, f"{kind.lower()}s")
    return f"{root}{where}/{plural}" + (f"/{name}" if name else "")


class Cluster:
    """A connection to one API server; safe to share among threads."""

    def __init__(self, client: ApiClient | None = None) -> None:
        self.client = client or connect()

    def get(self, api_version: str, kind: str, namespace: str, name: str) -> Object | None:
        try:
            return self.request("GET", path_of(api_version, kind, namespace, name))
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    def list(self, api_version: str, kind: str, namespace: str | None, selector: str = "") -> list[Object]:
        """Objects by label selector; none when the API server does not know the kind."""
        try:
            found = self.request("GET", path_of(api_version, kind, namespace), {"labelSelector": selector})
        except ApiError as error:
            if error.code == 404:
                return []
            raise
        return [{"apiVersion": api_version, "kind": kind} | item for item in found.get("items", [])]

    def apply(self, document: Object) -> Object:
        """Server-side apply: the fields given are ours, others' are left alone."""
        meta = document["metadata"]
        path = path_of(document["apiVersion"], document["kind"], meta["namespace"], meta["name"])
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        return self.request("PATCH", path, query, document, "application/apply-patch+yaml")

    def create(self, document: Object) -> Object:
        path = path_of(document["apiVersion"], document["kind"], document["metadata"]["namespace"])
        return self.request("POST", path, {"fieldManager": FIELD_MANAGER}, document)

    def delete(self, namespace: str, reference: Reference) -> None:
        """Delete in the background; gone already is as good."""
        path = path_of(reference.api_version, reference.kind, namespace, reference.name)
        try:
            self.request("DELETE", path, {"propagationPolicy": "Background"})
        except ApiError as error:
            if error.code != 404:
                raise

    def patch(self, api_version: str, kind: str, namespace: str, name: str, patch: Object) -> Object:
        """Merge patch; with metadata.resourceVersion in it, refused (409) when the object has changed since."""
        path = path_of(api_version, kind, namespace, name)
        return self.request("PATCH", path, {"fieldManager": FIELD_MANAGER}, patch, "application/merge-patch+json")

    def replace_status(self, document: Object) -> Object:
        """Write the status of the very version that was read; raises `ApiError` 409 when it has changed since."""
        meta = document["metadata"]
        path = path_of(document["apiVersion"], document["kind"], meta["namespace"], meta["name"])
        return self.request("PUT", f"{path}/status", {"fieldManager": FIELD_MANAGER}, document)

    def log(self, namespace: str, pod: str, container: str, lines: int) -> str:
        """The last lines of a container's log; none when there is none to be had."""
        path = path_of("v1", "Pod", namespace, f"{pod}/log")
        try:
            return self._send("GET", path, {"container": container, "tailLines": str(lines)}).decode(errors="replace")
        except ApiError:
            return ""

    def request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str = "application/json",
    ) -> Object:
        found: Object = json.loads(self._send(method, path, query, body, content_type))
        return found

    def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str = "application/json",
    ) -> bytes:
        headers = {"Accept": "application/json"} | ({"Content-Type": content_type} if body is not None else {})
        try:
            response: Any = self.client.call_api(
                path, method, query_params=[(k, v) for k, v in (query or {}).items() if v], header_params=headers,
                body=body, auth_settings=["BearerToken"], _preload_content=False, _return_http_data_only=True,
                _request_timeout=TIMEOUT_SECONDS,
            )  # fmt: skip
        except ApiException as error:
            raise _explain(error) from None
        except urllib3.exceptions.HTTPError as error:
            raise ApiError(0, "Unreachable", f"the API server cannot be reached: {error}") from None
        data: bytes = response.data
        return data


def _explain(error: ApiException) -> ApiError:
    status: dict[str, Any] = {}
    with contextlib.suppress(ValueError, TypeError):
        status = json.loads(error.body or "{}")
    return ApiError(error.status or 0, status.get("reason") or str(error.reason), status.get("message") or str(error))


def connect() -> ApiClient:
    """In a pod by its service account, elsewhere by kubeconfig."""
    try:
        kubernetes.config.load_incluster_config()
    except kubernetes.config.ConfigException:
        kubernetes.config.load_kube_config()
    configuration = kubernetes.client.Configuration.get_default_copy()
    configuration.retries = urllib3.Retry(total=0)
    configuration.connection_pool_maxsize = 32
    return ApiClient(configuration)
