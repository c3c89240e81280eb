"""The overlays: complete, of pods that a restricted namespace admits, that ask for resources and can be probed."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from bluewhale_operator import crd
from bluewhale_operator.outcome import GROUP
from bluewhale_operator.service_objects import make_objects
from components.image import SPARK_IMAGE, TRAINING_IMAGE
from contracts.policy_service import PolicyServiceSpec
from pipelines.cluster import SERVICE_ACCOUNT
from tests.manifests.pod_security import containers, violations
from tests.manifests.rendering import MANIFESTS, OVERLAYS, ROOT, Object, of_kind, overlay, pod_templates, render
from tests.operator.bluewhale_operator.worlds import make_service

ROOTLY = "bluewhale-storage"
"""A directory of the node belongs to root: the overlay dev gives it to the pods' user, by a pod that runs once."""
MUST_BE_BY_DIGEST = ("quay.io", "docker.io")
CLUSTERWIDE = {"CustomResourceDefinition", "ClusterRole", "Namespace", "PersistentVolume"}

overlays = pytest.mark.parametrize("name", OVERLAYS)


@overlays
def test_one_apply_installs_everything_into_one_namespace(name: str) -> None:
    objects = overlay(name)
    assert set(of_kind(objects, "CustomResourceDefinition")) == {f"{k.plural}.{GROUP}" for k in crd.KINDS}
    assert {"bluewhale-operator", SERVICE_ACCOUNT} <= set(of_kind(objects, "ServiceAccount"))
    assert "bluewhale" in of_kind(objects, "PersistentVolumeClaim")
    namespaces = {o["metadata"].get("namespace") for o in objects if o["kind"] not in CLUSTERWIDE}
    assert namespaces == {{"dev": "kubeflow", "prod": "bluewhale"}[name]}
    assert all(o["metadata"]["labels"]["app.kubernetes.io/part-of"] == "bluewhale" for o in objects)


@overlays
def test_an_object_is_there_once(name: str) -> None:
    keys = [(o["kind"], o["metadata"]["name"]) for o in overlay(name)]
    assert sorted(keys) == sorted(set(keys))


@overlays
def test_pods_pass_the_restricted_standard(name: str) -> None:
    for pod, template in pod_templates(overlay(name)):
        if pod != ROOTLY:
            assert violations(template) == [], pod


def test_the_one_pod_that_runs_as_root_can_only_give_the_volume_away() -> None:
    template = dict(pod_templates(overlay("dev")))[ROOTLY]
    assert ROOTLY not in dict(pod_templates(overlay("prod")))
    assert violations(template) == [
        "chown: capabilities ['CHOWN']",
        "chown: runAsNonRoot is not true",
        "chown: runAsUser 0",
    ]


@pytest.mark.parametrize("replicas", [1, 3])
def test_pods_of_a_service_pass_the_restricted_standard(replicas: int) -> None:
    service = make_service()
    spec = PolicyServiceSpec.model_validate(service["spec"])
    made = make_objects(service, spec, {}, replicas, [], True)
    found = list(pod_templates(tuple(made)))
    assert found
    for pod, template in found:
        assert violations(template) == [], pod


@pytest.mark.parametrize(
    ("where", "change", "found"),
    [
        ("pod", {"hostNetwork": True}, "hostNetwork"),
        ("pod", {"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}, "volume v is a hostPath"),
        ("pod", {"securityContext": {"runAsNonRoot": True}}, "main: seccompProfile is not RuntimeDefault or Localhost"),
        ("container", {"privileged": True}, "main: privileged"),
        ("container", {"runAsUser": 0}, "main: runAsUser 0"),
        ("container", {"runAsNonRoot": False}, "main: runAsNonRoot is not true"),
        ("container", {"capabilities": {}}, "main: capabilities are not dropped"),
        ("container", {"capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]}}, "main: capabilities ['SYS_ADMIN']"),
        ("container", {"allowPrivilegeEscalation": True}, "main: allowPrivilegeEscalation is not false"),
    ],
)  # fmt: skip
def test_the_standard_s_check_finds_a_violation(where: str, change: Object, found: str) -> None:
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    pod: Object = {
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [{"name": "main", "securityContext": security}],
    }
    assert violations({"spec": pod}) == []
    (pod if where == "pod" else security).update(copy.deepcopy(change))
    assert violations({"spec": pod}) == [found]


@overlays
def test_every_container_asks_for_resources_and_is_limited(name: str) -> None:
    for pod, template in pod_templates(overlay(name)):
        for container in containers(template["spec"]):
            for kind in ("requests", "limits"):
                assert {"cpu", "memory"} <= set(container["resources"][kind]), (pod, container["name"], kind)


@overlays
def test_every_pod_that_stays_can_be_probed_and_keeps_its_root_read_only(name: str) -> None:
    for pod in of_kind(overlay(name), "Deployment").values():
        for container in containers(pod["spec"]["template"]["spec"]):
            assert {"livenessProbe", "readinessProbe"} <= set(container)
            ports = {port["name"] for port in container["ports"]}
            for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
                for handler in ("httpGet", "tcpSocket"):
                    assert container.get(probe, {}).get(handler, {"port": next(iter(ports))})["port"] in ports
            assert container["securityContext"]["readOnlyRootFilesystem"] is True


@overlays
def test_a_token_is_mounted_only_where_one_is_needed(name: str) -> None:
    accounts = {"bluewhale-operator", "bluewhale-prometheus"}
    for pod, template in pod_templates(overlay(name)):
        spec = template["spec"]
        assert spec.get("serviceAccountName") in accounts or spec["automountServiceAccountToken"] is False, pod


@overlays
def test_volcano_is_an_option(name: str, tmp_path: Path) -> None:
    # kustomize takes relative paths only.
    resource, component = (
        os.path.relpath(MANIFESTS / path, tmp_path.resolve()) for path in (f"overlays/{name}", "volcano")
    )
    text = f"namespace: there\nresources: [{resource}]\ncomponents: [{component}]\n"
    (tmp_path / "kustomization.yaml").write_text(text)
    assert "bluewhale-pipeline-volcano" in of_kind(render(str(tmp_path)), "Role")


# -- network ---------------------------------------------------------------------------------------------------------


def labels_of_pods(name: str) -> list[dict[str, str]]:
    """Of the overlay's own, of a service's, and of a job's."""
    service = make_service()
    spec = PolicyServiceSpec.model_validate(service["spec"])
    served = tuple(make_objects(service, spec, {}, 1, [], False))
    found = [t["metadata"]["labels"] for o in (overlay(name), served) for _, t in pod_templates(o)]
    return [*found, {"bluewhale.io/job": "shop", "bluewhale.io/role": "worker"}]


def selects(selector: Object, labels: dict[str, str]) -> bool:
    exact = selector.get("matchLabels", {}).items() <= labels.items()
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "Exists"
        exact = exact and expression["key"] in labels
    return exact


@overlays
def test_every_policy_selects_pods_and_lets_in_only_through_ports_that_they_have(name: str) -> None:
    objects = overlay(name)
    for policy in of_kind(objects, "NetworkPolicy").values():
        spec = policy["spec"]
        assert any(selects(spec["podSelector"], labels) for labels in labels_of_pods(name)), policy["metadata"]["name"]
        assert "Ingress" in spec["policyTypes"]
        for rule in spec.get("ingress", []):
            assert rule["from"], "an empty rule lets everybody in"
    ports = {p["name"] for _, t in pod_templates(objects) for c in containers(t["spec"]) for p in c.get("ports", [])}
    named = {
        p["port"]
        for o in of_kind(objects, "NetworkPolicy").values()
        for r in o["spec"].get("ingress", [])
        for p in r.get("ports", [])
    }
    assert named <= ports | {"grpc", "http"}


@overlays
def test_every_pod_of_ours_that_listens_is_guarded(name: str) -> None:
    policies = [p["spec"]["podSelector"] for p in of_kind(overlay(name), "NetworkPolicy").values()]
    for labels in labels_of_pods(name):
        if labels.get("app.kubernetes.io/name") not in ("prometheus", ROOTLY):
            assert any(selects(selector, labels) for selector in policies), labels


def test_in_a_namespace_of_its_own_nothing_is_reached_that_is_not_let_in() -> None:
    deny = of_kind(overlay("prod"), "NetworkPolicy")["bluewhale-default-deny"]["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress"]}
    # In KFP's own namespace that would cut off KFP.
    assert "bluewhale-default-deny" not in of_kind(overlay("dev"), "NetworkPolicy")
    (namespace,) = of_kind(overlay("prod"), "Namespace").values()
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@overlays
def test_every_service_finds_its_pods(name: str) -> None:
    objects = overlay(name)
    for service in of_kind(objects, "Service").values():
        matching = [
            t
            for _, t in pod_templates(objects)
            if selects({"matchLabels": service["spec"]["selector"]}, t["metadata"]["labels"])
        ]
        assert len(matching) == 1, service["metadata"]["name"]
        ports = {p["name"] for c in containers(matching[0]["spec"]) for p in c["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


# -- images and environment ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images() -> dict[str, Any]:
    component: Object = yaml.safe_load((MANIFESTS / "images" / "kustomization.yaml").read_text())
    return {i["name"]: i for i in component["images"]}


@overlays
def test_every_image_is_named_in_one_place(name: str, images: dict[str, Any]) -> None:
    for pod, template in pod_templates(overlay(name)):
        for container in containers(template["spec"]):
            bare = re.sub(r"(:[^:/@]+)?(@.*)?$", "", container["image"])
            assert bare in images, (pod, container["image"])
            if bare.startswith(MUST_BE_BY_DIGEST):
                assert re.search("@sha256:[0-9a-f]{64}$", container["image"]), container["image"]


def environment(name: str) -> dict[str, Any]:
    (container,) = of_kind(overlay(name), "Deployment")["bluewhale-operator"]["spec"]["template"]["spec"]["containers"]
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in container["env"]}


@overlays
def test_the_operator_starts_pods_of_the_images_that_the_code_expects(name: str, images: dict[str, Any]) -> None:
    found = environment(name)
    assert found["BLUEWHALE_SPARK_IMAGE"] == SPARK_IMAGE
    assert found["BLUEWHALE_TRAINING_IMAGE"] == TRAINING_IMAGE
    for variable in ("SPARK", "TRAINING", "SERVING"):
        bare, _, tag = found[f"BLUEWHALE_{variable}_IMAGE"].rpartition(":")
        assert images[bare]["newTag"] == tag


@overlays
def test_every_variable_that_the_operator_is_given_is_read_somewhere_and_told_in_the_docs(name: str) -> None:
    read = "".join(
        p.read_text() for room in ("operator", "components", "pipelines") for p in (ROOT / room).rglob("*.py")
    )
    docs = (ROOT / "docs" / "install.md").read_text()
    for variable in environment(name):
        assert f'"{variable}"' in read, variable
        assert f"`{variable}`" in docs, variable
