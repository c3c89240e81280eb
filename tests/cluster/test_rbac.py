"""The roles before a real API server: what each service account may do, and what it may not.

Runs in new namespaces of the cluster of `KUBECONFIG`, which must have the CRDs of this tree (test_crd.py applies them).
The ClusterRoles for users are added to it while the test runs.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import kopf
import pytest
from kubernetes import client, config, utils
from kubernetes.client.exceptions import ApiException

from bluewhale_operator.backend import KfpBackend
from bluewhale_operator.cluster import Cluster
from bluewhale_operator.controller import Controller
from bluewhale_operator.main import handlers
from bluewhale_operator.outcome import API_VERSION, Reference
from tests.manifests.granted import Right, granted
from tests.manifests.rendering import Object, of_kind, render
from tests.operator.bluewhale_operator.cel_cases import service
from tests.operator.bluewhale_operator.servers import servers
from tests.operator.bluewhale_operator.worlds import SPEC

pytestmark = pytest.mark.skipif(not os.environ.get("KUBECONFIG"), reason="KUBECONFIG names no cluster")

ACCOUNTS = ("bluewhale-operator", "bluewhale-pipeline")
REFUSED = {
    *(Right(verb, "", "secrets") for verb in ("get", "list", "watch", "create")),
    *(Right("create", "", resource) for resource in ("pods/exec", "serviceaccounts/token", "namespaces")),
    *(Right(verb, "rbac.authorization.k8s.io", "rolebindings") for verb in ("create", "bind", "escalate")),
    Right("impersonate", "", "serviceaccounts"),
    Right("deletecollection", "", "persistentvolumeclaims"),
    Right("delete", "bluewhale.io", "policyservices"),
}
ONLY_THE_PIPELINE = Right("create", "", "pods")


def connect() -> client.ApiClient:
    return config.new_client_from_config(os.environ["KUBECONFIG"])


@pytest.fixture(scope="module")
def admin() -> client.ApiClient:
    return connect()


@pytest.fixture(scope="module")
def namespace(admin: client.ApiClient) -> Iterator[str]:
    """One with the installation's accounts, roles and bindings, and a secret."""
    core = client.CoreV1Api(admin)
    metadata = client.V1ObjectMeta(generate_name="bluewhale-rbac-")
    name: str = core.create_namespace(client.V1Namespace(metadata=metadata)).metadata.name
    for document in render("base"):
        if document["kind"] in ("ServiceAccount", "Role", "RoleBinding"):
            utils.create_from_dict(admin, here(document, name), namespace=name)
    core.create_namespaced_secret(name, {"metadata": {"name": "key"}, "stringData": {"key": "secret"}})
    yield name
    core.delete_namespace(name)


def here(document: Object, namespace: str) -> Object:
    subjects = [s | {"namespace": namespace} for s in document.get("subjects", [])]
    return document | ({"subjects": subjects} if subjects else {})


@contextmanager
def user(name: str) -> Iterator[client.ApiClient]:
    """A connection in somebody else's name."""
    connection = connect()
    connection.set_default_header("Impersonate-User", name)
    with connection:
        yield connection


def account(namespace: str, name: str) -> str:
    return f"system:serviceaccount:{namespace}:{name}"


def may(connection: client.ApiClient, namespace: str | None, right: Right) -> bool:
    resource, _, subresource = right.resource.partition("/")
    asked = {
        "verb": right.verb, "group": right.group, "resource": resource, "subresource": subresource, "name": right.name,
        "namespace": namespace,
    }  # fmt: skip
    body = {"spec": {"resourceAttributes": {k: v for k, v in asked.items() if v}}}
    allowed: bool = client.AuthorizationV1Api(connection).create_self_subject_access_review(body).status.allowed
    return allowed


@pytest.mark.parametrize("name", ACCOUNTS)
def test_an_account_may_do_what_its_role_says_here_and_nowhere_else(namespace: str, name: str) -> None:
    rights = granted(of_kind(render("base"), "Role")[name])
    with user(account(namespace, name)) as connection:
        assert [str(r) for r in sorted(rights) if not may(connection, namespace, r)] == []
        assert [str(r) for r in sorted(rights) if may(connection, "default", r)] == []
        assert [str(r) for r in sorted(rights) if may(connection, None, r)] == []


@pytest.mark.parametrize("name", ACCOUNTS)
def test_an_account_may_not_help_itself_to_more(namespace: str, name: str) -> None:
    refused = REFUSED | ({ONLY_THE_PIPELINE} if name == "bluewhale-operator" else set())
    with user(account(namespace, name)) as connection:
        assert [str(r) for r in sorted(refused) if may(connection, namespace, r)] == []


def test_calls_are_answered_as_the_reviews_say(namespace: str) -> None:
    with user(account(namespace, "bluewhale-operator")) as connection:
        cluster, core = Cluster(connection), client.CoreV1Api(connection)
        assert cluster.list(API_VERSION, "RLTrainingJob", namespace) == []
        assert core.list_namespaced_pod(namespace).items == []
        assert refused(core.read_namespaced_secret, "key", namespace)
        assert refused(core.list_namespaced_pod, "kube-system")
        assert refused(core.list_namespace)
    with user(account(namespace, "bluewhale-pipeline")) as connection:
        core = client.CoreV1Api(connection)
        assert refused(core.read_namespaced_secret, "key", namespace)
        assert refused(core.delete_collection_namespaced_persistent_volume_claim, namespace)


def refused(call: Callable[..., Any], *arguments: str) -> bool:
    with pytest.raises(ApiException) as error:
        call(*arguments)
    return bool(error.value.status == 403)


def test_whoever_may_edit_or_view_a_namespace_may_do_so_with_our_kinds(
    admin: client.ApiClient, namespace: str, clusterroles: None
) -> None:
    rbac = client.RbacAuthorizationV1Api(admin)
    for name in ("edit", "view"):
        subject = {"kind": "User", "name": f"{name}or", "apiGroup": "rbac.authorization.k8s.io"}
        reference = {"kind": "ClusterRole", "name": name, "apiGroup": "rbac.authorization.k8s.io"}
        rbac.create_namespaced_role_binding(
            namespace, {"metadata": {"name": name}, "subjects": [subject], "roleRef": reference}
        )
    for kind in ("rltrainingjobs", "policyservices"):
        with user("editor") as editor, user("viewor") as viewer:
            wait(lambda: may(editor, namespace, Right("create", "bluewhale.io", kind)))  # noqa: B023
            wait(lambda: may(viewer, namespace, Right("list", "bluewhale.io", kind)))  # noqa: B023
            assert may(editor, namespace, Right("delete", "bluewhale.io", kind))
            assert not may(editor, namespace, Right("update", "bluewhale.io", f"{kind}/status"))
            assert not may(viewer, namespace, Right("create", "bluewhale.io", kind))


@pytest.fixture
def clusterroles(admin: client.ApiClient) -> Iterator[None]:
    rbac, made = client.RbacAuthorizationV1Api(admin), []
    for name, document in of_kind(render("base"), "ClusterRole").items():
        try:
            rbac.create_cluster_role(document)
        except ApiException as error:
            if error.status != 409:
                raise
        else:
            made.append(name)
    yield
    for name in made:
        rbac.delete_cluster_role(name)


def test_the_operator_does_its_work_with_the_rights_of_its_account(admin: client.ApiClient, namespace: str) -> None:
    """kopf and the controller by the account's own token: a service's objects, a job's run, and the job's end."""
    owner = Cluster(admin)
    served = service("shop", stable={"digest": "a" * 64, "version": "3"})
    job: Object = {"apiVersion": API_VERSION, "kind": "RLTrainingJob", "metadata": {"name": "shop"}, "spec": SPEC}
    with servers() as world, operator(admin, namespace, world.kfp_url):
        for document in (served, job):
            owner.create(document | {"metadata": document["metadata"] | {"namespace": namespace}})
        wait(lambda: world.runs)
        wait(lambda: len(owner.list("apps/v1", "Deployment", namespace)) == 2)
        wait(lambda: owner.list("policy/v1", "PodDisruptionBudget", namespace))
        wait(lambda: len(owner.list("v1", "Event", namespace, "")) > 0)
        owner.delete(namespace, Reference(API_VERSION, "RLTrainingJob", "shop"))
        wait(lambda: owner.get(API_VERSION, "RLTrainingJob", namespace, "shop") is None)
        time.sleep(3)
        found = owner.get(API_VERSION, "PolicyService", namespace, "shop") or {}
        owner.delete(namespace, Reference(API_VERSION, "PolicyService", "shop"))
    assert [r["state"] for r in world.runs.values()] == ["CANCELED"]
    assert "forbidden" not in str(found["status"])
    assert found["status"]["reason"] != "ReconcileFailed"


@contextmanager
def operator(admin: client.ApiClient, namespace: str, kfp_url: str) -> Iterator[None]:
    core, here = client.CoreV1Api(admin), admin.configuration
    request = {"spec": {"expirationSeconds": 600}}
    token = core.create_namespaced_service_account_token("bluewhale-operator", namespace, request).status.token
    mine = client.Configuration(host=here.host, api_key={"authorization": f"Bearer {token}"})
    mine.ssl_ca_cert = here.ssl_ca_cert
    controller = Controller(Cluster(client.ApiClient(mine)), KfpBackend(kfp_url), lambda *_: {"pipeline_spec": {}})
    registry = handlers(controller)

    @kopf.on.login(registry=registry)
    def login(**_: Any) -> kopf.ConnectionInfo:
        return kopf.ConnectionInfo(server=here.host, ca_path=here.ssl_ca_cert, scheme="Bearer", token=token)

    stop, ready = threading.Event(), threading.Event()
    flags = {"standalone": True, "namespaces": [namespace], "stop_flag": stop, "ready_flag": ready}
    thread = threading.Thread(target=kopf.run, kwargs={"registry": registry, **flags})
    thread.start()
    try:
        assert ready.wait(30)
        yield
    finally:
        stop.set()
        thread.join(30)


def wait(what: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"did not come within {seconds:.0f} s"
        time.sleep(0.2)
