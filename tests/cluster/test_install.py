"""The overlays before a real API server: it takes every object, and a restricted namespace admits the pods.

Asks the cluster of `KUBECONFIG` by dry runs, in the name of new namespaces; what it has installed is left as it is.
"""

from __future__ import annotations

import copy
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import yaml
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from bluewhale_operator.cluster import ApiError, Cluster
from tests.manifests.rendering import OVERLAYS, Object, of_kind, overlay, pod_templates
from tests.manifests.test_overlays import ROOTLY

pytestmark = pytest.mark.skipif(not os.environ.get("KUBECONFIG"), reason="KUBECONFIG names no cluster")
overlays = pytest.mark.parametrize("name", OVERLAYS)


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return Cluster(config.new_client_from_config(os.environ["KUBECONFIG"]))


@contextmanager
def enforcing(cluster: Cluster, standard: str) -> Iterator[str]:
    """A namespace that takes only pods of a Pod Security Standard, with the accounts that they run as."""
    core = client.CoreV1Api(cluster.client)
    labels = {"pod-security.kubernetes.io/enforce": standard}
    metadata = client.V1ObjectMeta(generate_name="bluewhale-install-", labels=labels)
    name: str = core.create_namespace(client.V1Namespace(metadata=metadata)).metadata.name
    try:
        for account in {account for o in OVERLAYS for account in of_kind(overlay(o), "ServiceAccount")}:
            core.create_namespaced_service_account(name, {"metadata": {"name": account}})
        yield name
    finally:
        core.delete_namespace(name)


@pytest.fixture(scope="module")
def namespace(cluster: Cluster) -> Iterator[str]:
    with enforcing(cluster, "restricted") as name:
        yield name


def moved(objects: tuple[Object, ...], namespace: str) -> Iterator[Object]:
    """The objects in another namespace; its volume too, since one there may be bound already."""
    for original in objects:
        document = copy.deepcopy(original)
        meta, spec = document["metadata"], document.get("spec", {})
        if "namespace" in meta:
            meta["namespace"] = namespace
        for subject in document.get("subjects", []):
            subject["namespace"] = namespace
        if document["kind"] == "PersistentVolume":
            meta["name"], spec["claimRef"]["namespace"] = namespace, namespace
        if document["kind"] == "PersistentVolumeClaim" and "volumeName" in spec:
            spec["volumeName"] = namespace
        if document["kind"] != "Namespace":  # that of a dry run would not be there for the rest
            yield document


def knows(cluster: Cluster, api_version: str) -> bool:
    try:
        cluster.request("GET", f"/{'apis' if '/' in api_version else 'api'}/{api_version}")
    except ApiError:
        return False
    return True


@overlays
def test_the_api_server_takes_every_object(cluster: Cluster, namespace: str, name: str) -> None:
    # A cluster may be without the Prometheus operator; test_overlays.py looks at what it would be told.
    documents = [d for d in moved(overlay(name), namespace) if knows(cluster, d["apiVersion"])]
    assert len(documents) >= len(overlay(name)) - 2
    done = subprocess.run(
        ["kubectl", "apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict", "-f", "-"],
        input=yaml.safe_dump_all(documents), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("serverside-applied (server dry run)") == len(documents)


def start(cluster: Cluster, namespace: str, name: str, template: Object) -> None:
    body = {"metadata": {"name": name, "labels": template["metadata"]["labels"]}, "spec": template["spec"]}
    client.CoreV1Api(cluster.client).create_namespaced_pod(namespace, body, dry_run="All")


@overlays
def test_a_restricted_namespace_admits_the_pods(cluster: Cluster, namespace: str, name: str) -> None:
    for pod, template in pod_templates(overlay(name)):
        if pod == ROOTLY:
            with pytest.raises(ApiException) as error:
                start(cluster, namespace, pod, template)
            assert "violates PodSecurity" in error.value.body
        else:
            start(cluster, namespace, pod, template)


def test_a_namespace_as_kfp_makes_its_own_admits_the_pod_that_runs_as_root_too(cluster: Cluster) -> None:
    with enforcing(cluster, "baseline") as namespace:
        start(cluster, namespace, ROOTLY, dict(pod_templates(overlay("dev")))[ROOTLY])
