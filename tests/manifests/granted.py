"""What a Role grants, and what requests ask for, in the terms of RBAC."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import kmock

from tests.manifests.rendering import Object

VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch"}
DISCOVERY = re.compile(r"/(version|api|apis(/[^/]+(/[^/]+)?)?|api/v1)/?")
"""What every authenticated user may read."""
PATH = re.compile(
    r"/(api|apis/(?P<group>[^/]+))/[^/]+/namespaces/(?P<namespace>[^/]+)"
    r"/(?P<resource>[^/]+)(/(?P<name>[^/]+)(/(?P<subresource>[^/]+))?)?"
)


class Right(NamedTuple):
    verb: str
    group: str
    resource: str
    name: str = ""
    """The one object that it is about; empty for all."""

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}{f'.{self.group}' if self.group else ''} {self.name}".rstrip()


def granted(role: Object) -> set[Right]:
    return {
        Right(verb, group, resource, name)
        for rule in role["rules"]
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for name in rule.get("resourceNames", [""])
    }


def used(requests: Iterable[kmock.Request]) -> set[Right]:
    """The rights that requests need; each must be about one namespace, or discovery."""
    found = set()
    for request in requests:
        path, method = request.url.path, _method(request)
        if method == "GET" and DISCOVERY.fullmatch(path):
            continue
        parts = PATH.fullmatch(path)
        assert parts, f"{method} {path} is not about a namespace"
        found |= {Right(verb, parts["group"] or "", _resource(parts)) for verb in _verbs(request, method, parts)}
    return found


def _method(request: kmock.Request) -> str:
    """As it was sent: the emulated server makes a PATCH of each PUT."""
    assert request._raw_request
    return request._raw_request.method


def _resource(parts: re.Match[str]) -> str:
    return "/".join(filter(None, (parts["resource"], parts["subresource"])))


def _verbs(request: kmock.Request, method: str, parts: re.Match[str]) -> set[str]:
    if method == "GET":
        watch = request.params.get("watch", "").lower() == "true"
        return {"get" if parts["name"] else "watch" if watch else "list"}
    if method == "DELETE":
        return {"delete" if parts["name"] else "deletecollection"}
    return {VERBS[method]} | ({"create"} if _may_create(request.headers, request.data) else set())


def _may_create(headers: Mapping[str, str], body: object) -> bool:
    """Server-side apply makes what is not there, unless it names the uid of what must be."""
    applied = headers.get("Content-Type", "").startswith("application/apply-patch")
    return applied and isinstance(body, dict) and "uid" not in body.get("metadata", {})
