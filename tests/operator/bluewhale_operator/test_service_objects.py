"""The objects of a PolicyService: what the cluster's own rules and a safe update ask of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bluewhale_operator.outcome import Object
from bluewhale_operator.service_objects import STATE_ANNOTATION, make_objects
from contracts.policy_service import PolicyServiceSpec
from tests.operator.bluewhale_operator.worlds import make_service

STATE = {"stable": {"version": 3, "digest": "ab"}, "candidate": None, "weight": 0.0}


def made(
    servers: list[Object] | None = None, service_monitors: bool = False, state: Any = None, **spec: Any
) -> dict[str, Object]:
    """The objects by kind and name."""
    service = make_service(**{"candidate": None, **spec})
    typed = PolicyServiceSpec.model_validate(service["spec"])
    objects = make_objects(service, typed, state or STATE, typed.replicas, servers or [], service_monitors)
    return {f"{o['kind']}/{o['metadata']['name']}": o for o in objects}


def pod_of(deployment: Object) -> dict[str, Any]:
    found: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return found


def test_everything_belongs_to_the_service() -> None:
    objects = made(service_monitors=True, autoscaling={"maxReplicas": 3})
    assert set(objects) == {
        "ConfigMap/shop-state", "Deployment/shop", "Deployment/shop-analyst", "Service/shop", "Service/shop-analyst",
        "PodDisruptionBudget/shop", "HorizontalPodAutoscaler/shop", "ServiceMonitor/shop",
    }  # fmt: skip
    for document in objects.values():
        (owner,) = document["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["uid"], owner["controller"]) == ("PolicyService", "s" * 32, True)
        assert document["metadata"]["namespace"] == "team"
        assert document["metadata"]["labels"]["bluewhale.io/service"] == "shop"


def test_what_is_not_asked_for_is_not_made() -> None:
    assert {"ServiceMonitor/shop", "HorizontalPodAutoscaler/shop"}.isdisjoint(made())


@pytest.mark.parametrize("name", ["Deployment/shop", "Deployment/shop-analyst"])
def test_pods_obey_the_restricted_pod_security_standard(name: str) -> None:
    pod = pod_of(made()[name])
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 65532
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert "hostNetwork" not in pod
    allowed = {"emptyDir", "persistentVolumeClaim", "configMap"}
    assert {kind for volume in pod["volumes"] for kind in volume if kind != "name"} <= allowed
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        assert set(container["resources"]) == {"requests", "limits"}
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()


@pytest.mark.parametrize("name", ["Deployment/shop", "Deployment/shop-analyst"])
def test_every_mount_has_its_volume(name: str) -> None:
    pod = pod_of(made()[name])
    mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_a_pod_is_ready_when_its_model_is() -> None:
    (container,) = pod_of(made()["Deployment/shop"])["containers"]
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/v2/models/policy/ready", "port": "http"}
    assert container["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"
    assert "http" in {port["name"] for port in container["ports"]}


def test_an_update_takes_no_pod_away_before_another_is_ready() -> None:
    objects = made(replicas=2)
    spec = objects["Deployment/shop"]["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > 30
    assert objects["PodDisruptionBudget/shop"]["spec"]["maxUnavailable"] == 1


def test_services_and_budgets_select_the_pods_of_their_role() -> None:
    objects = made()
    for name in ("shop", "shop-analyst"):
        labels = objects[f"Deployment/{name}"]["spec"]["template"]["metadata"]["labels"]
        assert objects[f"Deployment/{name}"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert objects[f"Service/{name}"]["spec"]["selector"].items() <= labels.items()
    budget = objects["PodDisruptionBudget/shop"]["spec"]["selector"]["matchLabels"]
    assert not budget.items() <= objects["Deployment/shop-analyst"]["spec"]["template"]["metadata"]["labels"].items()


def test_prometheus_finds_both_kinds_of_pods() -> None:
    objects = made(service_monitors=True, monitoring={"scrapeInterval": "7s"})
    for name in ("shop", "shop-analyst"):
        template = objects[f"Deployment/{name}"]["spec"]["template"]
        (container,) = template["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert template["metadata"]["annotations"] == {
            "prometheus.io/scrape": "true", "prometheus.io/port": str(ports["metrics"]),
        }  # fmt: skip
        assert "metrics" in {port["name"] for port in objects[f"Service/{name}"]["spec"]["ports"]}
    monitor = objects["ServiceMonitor/shop"]["spec"]
    assert monitor["endpoints"] == [{"port": "metrics", "interval": "7s"}]


def test_the_spec_reaches_the_pods() -> None:
    objects = made(
        image="registry/serving:2", imagePullPolicy="Always", imagePullSecrets=["key"], nodeSelector={"pool": "gpu"},
        tolerations=[{"key": "gpu", "operator": "Exists"}], sharedMemory="1Gi", replicas=3,
        resources={"cpu": "500m", "memory": "1Gi", "gpus": 1}, storage={"claimName": "data", "mountPath": "/data"},
        decisionLog={"path": "logs/shop"}, canary={"metric": "clicks"}, metricWeights={"clicks": 2.0},
    )  # fmt: skip
    deployment, analyst = objects["Deployment/shop"], objects["Deployment/shop-analyst"]
    pod = pod_of(deployment)
    (container,) = pod["containers"]
    assert deployment["spec"]["replicas"] == 3
    assert (container["image"], container["imagePullPolicy"]) == ("registry/serving:2", "Always")
    assert container["resources"]["limits"] == {"cpu": "500m", "memory": "1Gi", "nvidia.com/gpu": 1}
    assert pod["imagePullSecrets"] == [{"name": "key"}]
    assert (pod["nodeSelector"], pod["tolerations"]) == ({"pool": "gpu"}, [{"key": "gpu", "operator": "Exists"}])
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
    assert volumes["storage"]["persistentVolumeClaim"] == {"claimName": "data"}
    assert "--repository=/data/services/shop/model_repository" in container["command"]
    for command in (container["command"], pod_of(analyst)["containers"][0]["command"]):
        assert "--log=/data/logs/shop" in command
        assert "--service=team/shop" in command
    assert {"--metric=clicks", '--metric-weights={"clicks": 2.0}'} <= set(pod_of(analyst)["containers"][0]["command"])


def test_a_change_of_state_marks_the_pods_once_so_that_kubelet_syncs_them() -> None:
    def pod(name: str, **meta: Any) -> Object:
        return {"metadata": {"name": name, "namespace": "team", "uid": name, **meta}}

    marked = made([pod("shop-0"), pod("shop-1", deletionTimestamp="2026-05-04T12:00:00Z")])
    assert "Pod/shop-1" not in marked
    document = marked["Pod/shop-0"]
    assert document["metadata"]["uid"] == "shop-0"
    assert "spec" not in document
    again = [pod("shop-0", annotations=document["metadata"]["annotations"])]
    assert "Pod/shop-0" not in made(again)
    other = made(again, state=STATE | {"weight": 0.5})
    assert other["Pod/shop-0"]["metadata"]["annotations"] != document["metadata"]["annotations"]
    assert list(document["metadata"]["annotations"]) == [STATE_ANNOTATION]
    assert json.loads(other["ConfigMap/shop-state"]["data"]["state.json"])["weight"] == 0.5
