"""A PolicyService on a real cluster: pods that serve under traffic, a canary that is promoted, and ones that are not.

Needs `KUBECONFIG`, `BLUEWHALE_TEST_IMAGE` (the serving image, on the cluster's one node) and `prometheus` on PATH. The
controller and Prometheus run beside the test; Prometheus scrapes the pods by way of the API server.
"""

from __future__ import annotations

import base64
import io
import json
import os
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client, config

from bluewhale_operator import crd
from bluewhale_operator.backend import KfpBackend
from bluewhale_operator.cluster import Cluster
from bluewhale_operator.controller import Controller, Key
from bluewhale_operator.outcome import API_VERSION
from components.export.repository import MODEL
from contracts.job import BehaviourPolicy
from serving.prometheus import PrometheusServer
from simulation.cartpole import ACTIONS, FEATURES
from simulation.policies import export_behaviour

Object = dict[str, Any]
IMAGE = os.environ.get("BLUEWHALE_TEST_IMAGE", "")
CANARY = {
    "weights": [0.3, 0.7], "minimumMdps": 30, "stepTimeoutSeconds": 120,
    # A node that is busy with other things must not decide the test.
    "deadlineMs": 900.0, "maxLatencyMs": 900.0, "maxErrorFraction": 0.2,
}  # fmt: skip

pytestmark = [
    pytest.mark.skipif(not os.environ.get("KUBECONFIG"), reason="KUBECONFIG names no cluster"),
    pytest.mark.skipif(not IMAGE, reason="BLUEWHALE_TEST_IMAGE names no serving image"),
]

TRAFFIC = """
import random, sys, time
from serving.client import PolicyClient, ServiceError
address, better = sys.argv[1:]
failures = number = 0
with PolicyClient(address) as client:
    while True:
        number += 1
        try:
            made = [client.decide(f"m{number}", step, {"pole_angle": 1.0}) for step in range(2)]
            rewards = [{"reward": (5.0 if d.action == better else 1.0) + random.gauss(0, 1)} for d in made]
            client.report(f"m{number}", rewards, ended=True)
        except ServiceError as error:
            failures += 1
            print("FAILED", error, flush=True)
        if number % 50 == 0:
            print(f"{number} MDPs, {failures} failures", flush=True)
        time.sleep(0.02)
"""
UNPACK = """
import os, tarfile
tarfile.open("/given/policies").extractall("/volume")
for directory, _, files in os.walk("/volume"):
    for name in [".", *files]:
        os.chown(os.path.join(directory, name), 65532, 65532)
"""


class World:
    """One service in a namespace of its own, its policies by name, and the pod that asks it for decisions."""

    def __init__(self, directory: Path) -> None:
        self.api = config.new_client_from_config(os.environ["KUBECONFIG"])
        self.core, self.cluster = client.CoreV1Api(self.api), Cluster(self.api)
        self.namespace = ""
        repository = directory / "services" / "shop" / "model_repository"
        pushes = {"even": 0.0, "right": 4.0, "left": -4.0, "missing": 1.0}
        self.policies = {
            name: export_behaviour(BehaviourPolicy(weights={"pole_angle": push}, exploration=0.1), repository)
            for name, push in pushes.items()
        }
        for file in (repository / MODEL / str(self.policies["missing"]["version"])).iterdir():
            file.unlink()
        self.directory = directory

    def reference(self, name: str, **more: Any) -> Object:
        policy = self.policies[name]
        return {"digest": policy["digest"], "version": str(policy["version"]), **more}

    def set_up(self) -> None:
        generated = client.V1ObjectMeta(generate_name="bluewhale-serving-")
        self.namespace = self.core.create_namespace(client.V1Namespace(metadata=generated)).metadata.name
        for name, text in crd.files().items():
            if name.startswith(crd.GROUP):
                path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
                document = yaml.safe_load(text)
                self.cluster.request(
                    "PATCH", f"{path}/{document['metadata']['name']}", {"fieldManager": "make-crds", "force": "true"},
                    document, "application/apply-patch+yaml",
                )  # fmt: skip
        self.fill_volume()
        labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
        self.core.patch_namespace(self.namespace, {"metadata": {"labels": labels}})

    def fill_volume(self) -> None:
        """A volume on the node, with the policies, that belongs to the pods' user."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            archive.add(self.directory / "services", "services")
        self.create("v1", "ConfigMap", "given", binaryData={"policies": base64.b64encode(packed.getvalue()).decode()})
        size, modes = {"storage": "1Gi"}, ["ReadWriteMany"]
        volume = {
            "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": self.namespace},
            "spec": {
                "capacity": size, "accessModes": modes, "storageClassName": "",
                "hostPath": {"path": f"/tmp/{self.namespace}", "type": "DirectoryOrCreate"},
            },
        }  # fmt: skip
        self.core.create_persistent_volume(volume)
        spec = {"accessModes": modes, "storageClassName": "", "volumeName": self.namespace}
        self.create("v1", "PersistentVolumeClaim", "bluewhale", spec=spec | {"resources": {"requests": size}})
        claim = {"persistentVolumeClaim": {"claimName": "bluewhale"}}
        volumes = {"given": {"configMap": {"name": "given"}}, "volume": claim}
        self.pod("fill", ["python", "-c", UNPACK], {"runAsUser": 0}, volumes)
        self.wait(lambda: self.core.read_namespaced_pod("fill", self.namespace).status.phase == "Succeeded", 120)

    def pod(self, name: str, command: list[str], security: Object, volumes: dict[str, Object]) -> None:
        container = {
            "name": "main", "image": IMAGE, "imagePullPolicy": "IfNotPresent", "command": command,
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            "volumeMounts": [{"name": volume, "mountPath": f"/{volume}"} for volume in volumes],
        }  # fmt: skip
        if security.get("runAsUser") == 0:
            container["securityContext"] = {}
        spec = {
            "restartPolicy": "Never", "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}, **security},
            "containers": [container], "volumes": [{"name": k, **v} for k, v in volumes.items()],
        }  # fmt: skip
        self.create("v1", "Pod", name, spec=spec)

    def create(self, api_version: str, kind: str, name: str, **content: Any) -> None:
        meta = {"name": name, "namespace": self.namespace}
        self.cluster.create({"apiVersion": api_version, "kind": kind, "metadata": meta, **content})

    def scrape(self) -> Object:
        """What Prometheus scrapes: through the API server's proxy, what `follow_pods` writes down."""
        held = self.api.configuration
        files = {"ca_file": held.ssl_ca_cert, "cert_file": held.cert_file, "key_file": held.key_file}
        access: Object = {"tls_config": {k: v for k, v in files.items() if v}}
        if token := held.get_api_key_with_prefix("authorization"):
            access["authorization"] = {"credentials": token.removeprefix("Bearer ")}
        return {"scheme": "https", "file_sd_configs": [{"files": [str(self.directory / "pods.json")]}], **access}

    def follow_pods(self, ending: threading.Event) -> None:
        """Write down the pods that want to be scraped. (Not every build of Prometheus can find them by itself.)"""
        host, file = self.api.configuration.host.split("://")[1], self.directory / "pods.json"
        while not ending.wait(1):
            targets = []
            for pod in self.core.list_namespaced_pod(self.namespace).items:
                port = (pod.metadata.annotations or {}).get("prometheus.io/port")
                if port and pod.status.phase == "Running" and pod.metadata.deletion_timestamp is None:
                    path = f"/api/v1/namespaces/{self.namespace}/pods/{pod.metadata.name}:{port}/proxy/metrics"
                    labels = {"__metrics_path__": path, "pod": pod.metadata.name}
                    targets.append({"targets": [host], "labels": labels})
            file.with_suffix(".new").write_text(json.dumps(targets))
            file.with_suffix(".new").rename(file)

    # -- the service --

    def look(self) -> Object:
        found = self.cluster.get(API_VERSION, "PolicyService", self.namespace, "shop")
        assert found
        return found

    @property
    def status(self) -> Object:
        found: Object = self.look().get("status") or {}
        return found

    def change(self, **spec: Any) -> None:
        self.cluster.patch(API_VERSION, "PolicyService", self.namespace, "shop", {"spec": spec})
        self.nudge()

    def nudge(self) -> None:
        """What a watch would do."""
        self.controller.queue.add(Key("PolicyService", self.namespace, "shop"))

    def condition(self, type: str) -> tuple[str, str, str]:
        found: Object = next((c for c in self.status.get("conditions", []) if c["type"] == type), {})
        return found.get("status", ""), found.get("reason", ""), found.get("message", "")

    def rolled_out(self, name: str, attempt: int = 0) -> str:
        """Ask for a candidate; the outcome, once there is one."""
        self.change(candidate=self.reference(name, attempt=attempt))
        began, seen = time.monotonic(), ""
        while True:
            status = self.status
            tried = status.get("tried") or {}
            if (tried.get("digest"), tried.get("attempt")) == (self.policies[name]["digest"], attempt):
                print(f"{time.monotonic() - began:5.1f} s {name}: {tried['outcome']} {tried['message']}")
                return str(tried["outcome"])
            if (words := self.condition("RolledOut")[2]) != seen:
                print(f"{time.monotonic() - began:5.1f} s {words}")
                seen = words
            assert time.monotonic() < began + 240, json.dumps(status, indent=2)
            time.sleep(0.5)

    def wait(self, what: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            services = self.cluster.list(API_VERSION, "PolicyService", self.namespace)
            assert time.monotonic() < deadline, json.dumps([s.get("status") for s in services], indent=2)
            if services:
                self.nudge()
            time.sleep(0.5)

    def deployment(self) -> Object:
        found = self.cluster.get("apps/v1", "Deployment", self.namespace, "shop")
        assert found
        return found

    def traffic(self) -> str:
        """What the pod that makes traffic has to say."""
        said: str = self.core.read_namespaced_pod_log("traffic", self.namespace)
        return said


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("serving")
    world = World(directory)
    prometheus, ending = None, threading.Event()
    try:
        world.set_up()
        threading.Thread(target=world.follow_pods, args=[ending], daemon=True).start()
        prometheus = PrometheusServer(directory / "prometheus", world.scrape(), directory / "prometheus.log")
        backend = KfpBackend("http://127.0.0.1:9")
        world.controller = Controller(world.cluster, backend, lambda *_: {}, prometheus.url)
        world.controller.start(2)
        world.create(
            API_VERSION, "PolicyService", "shop",
            spec={
                "features": list(FEATURES), "actions": list(ACTIONS), "stable": world.reference("even"), "image": IMAGE,
                "canary": CANARY, "resources": {"cpu": "600m", "memory": "2Gi"},
            },
        )  # fmt: skip
        world.wait(lambda: world.condition("Ready")[0] == "True", 180)
        prometheus.wait_until_ready()
        world.pod(
            "traffic", ["python", "-c", TRAFFIC, world.status["endpoint"], ACTIONS[1]],
            {"runAsNonRoot": True, "runAsUser": 65532}, {},
        )  # fmt: skip
        world.wait(lambda: world.core.read_namespaced_pod("traffic", world.namespace).status.phase == "Running", 60)
        yield world
    finally:
        ending.set()
        if hasattr(world, "controller"):
            world.controller.stop()
        if prometheus:
            prometheus.stop()
        if world.namespace:
            world.core.delete_namespace(world.namespace)
            world.core.delete_persistent_volume(world.namespace)


def test_a_better_candidate_is_promoted(world: World) -> None:
    assert world.status["stable"]["digest"] == world.policies["even"]["digest"]
    assert world.rolled_out("right") == "Promoted"
    assert world.status["stable"]["digest"] == world.policies["right"]["digest"]
    assert {look["weight"] for look in world.status["verdicts"]} >= {"30%", "70%"}


def test_a_harmful_candidate_is_rolled_back_and_can_be_tried_again(world: World) -> None:
    assert world.rolled_out("left") == "RolledBack"
    assert "the check of reward failed" in world.status["tried"]["message"]
    assert world.rolled_out("left", attempt=1) == "RolledBack"
    assert world.status["stable"]["digest"] == world.policies["right"]["digest"]


def test_a_candidate_that_cannot_be_loaded_gets_no_traffic(world: World) -> None:
    assert world.rolled_out("missing") == "RolledBack"
    assert "cannot load it" in world.status["tried"]["message"]


def test_an_image_that_cannot_be_pulled_leaves_the_old_pods_at_work(world: World) -> None:
    world.change(image="registry.invalid/none:1")
    world.wait(lambda: world.condition("Stalled")[:2] == ("True", "ImagePullFailed"), 60)
    assert world.status["phase"] == "Degraded"
    world.change(image=IMAGE)
    world.wait(lambda: world.condition("Stalled")[0] == "False", 60)


def test_more_replicas_can_be_left_to_an_autoscaler(world: World) -> None:
    world.change(replicas=2)
    world.wait(lambda: world.status["replicas"] == "2/2", 180)
    world.change(autoscaling={"maxReplicas": 3})
    world.wait(lambda: bool(world.cluster.list("autoscaling/v2", "HorizontalPodAutoscaler", world.namespace)), 30)
    until = time.monotonic() + 20
    while time.monotonic() < until:
        world.nudge()
        assert world.deployment()["spec"]["replicas"] == 2
        time.sleep(0.5)
    world.change(autoscaling=None)
    world.wait(lambda: not world.cluster.list("autoscaling/v2", "HorizontalPodAutoscaler", world.namespace), 30)


def test_pods_are_replaced_and_of_all_requests_none_has_failed(world: World) -> None:
    served = world.status["stable"]["digest"]
    world.change(resources={"cpu": "400m", "memory": "2Gi"})

    def updated() -> bool:
        found = world.deployment()
        (container,), status = found["spec"]["template"]["spec"]["containers"], found["status"]
        seen = status["observedGeneration"] == found["metadata"]["generation"]
        counts = {status.get(k) for k in ("updatedReplicas", "replicas", "readyReplicas")}
        return container["resources"]["limits"]["cpu"] == "400m" and seen and counts == {2}

    world.wait(updated, 240)
    time.sleep(10)
    assert world.status["stable"]["digest"] == served
    said = world.traffic()
    print(said[-300:])
    assert "FAILED" not in said
