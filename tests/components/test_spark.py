"""How Spark is told to run its executors as pods."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.spark import CLASSES, executor_settings

ENVIRONMENT = {
    "BLUEWHALE_NAMESPACE": "rl",
    "BLUEWHALE_JOB": "shop",
    "BLUEWHALE_SPARK_IMAGE": "spark:1",
    "BLUEWHALE_SPARK_EXECUTORS": "3",
    "BLUEWHALE_SPARK_EXECUTOR_CORES": "2",
    "BLUEWHALE_SPARK_EXECUTOR_MEMORY": "4096m",
    "BLUEWHALE_PULL_SECRETS": '["a", "b"]',
    "BLUEWHALE_VOLUMES": json.dumps(
        [
            {"claimName": "bluewhale", "mountPath": "/var/bluewhale"},
            {"claimName": "bluewhale", "mountPath": "/minio", "subPath": "runs/u"},
            {"claimName": "scratch", "mountPath": "/scratch"},
        ]
    ),
    "POD_NAME": "driver-1",
    "POD_IP": "10.0.0.7",
}


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, str]:
    return executor_settings(ENVIRONMENT, tmp_path / "executor.yaml")


@pytest.fixture
def template(settings: dict[str, str]) -> dict[str, Any]:
    return yaml.safe_load(Path(settings["spark.kubernetes.executor.podTemplateFile"]).read_text())


@pytest.mark.skipif(not CLASSES.exists(), reason="`make install` has kept no classes")
def test_a_local_jvm_maps_the_classes_that_were_kept() -> None:
    maps = "from components.spark import *; from pyspark import SparkContext\nwith spark_session('x'):\n"
    maps += " print(open(f'/proc/{SparkContext._gateway.proc.pid}/maps').read())"
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_CONF_DIR")}
    done = subprocess.run([sys.executable, "-c", maps], capture_output=True, text=True, check=True, env=environment)
    if "shared archive" in done.stderr:
        pytest.skip(f"another Java has kept them: {done.stderr.splitlines()[0]}")
    assert str(CLASSES.resolve()) in done.stdout


def test_executors_are_the_stage_s_pod_s_own(settings: dict[str, str]) -> None:
    assert settings["spark.kubernetes.namespace"] == "rl"
    assert settings["spark.kubernetes.driver.pod.name"] == "driver-1", "who goes takes its executors along"
    assert settings["spark.kubernetes.executor.label.bluewhale.io/job"] == "shop"
    assert settings["spark.kubernetes.executor.label.bluewhale.io/role"] == "executor"


def test_they_find_the_driver_by_its_address_at_known_ports(settings: dict[str, str]) -> None:
    assert settings["spark.driver.host"] == settings["spark.driver.bindAddress"] == "10.0.0.7"
    assert (settings["spark.driver.port"], settings["spark.driver.blockManager.port"]) == ("7078", "7079")


def test_they_are_as_many_and_as_large_as_the_job_says(settings: dict[str, str]) -> None:
    assert settings["spark.executor.instances"] == "3"
    assert (settings["spark.executor.cores"], settings["spark.executor.memory"]) == ("2", "4096m")


def test_their_image_is_the_job_s(settings: dict[str, str]) -> None:
    assert settings["spark.kubernetes.executor.container.image"] == "spark:1"
    assert settings["spark.kubernetes.container.image.pullPolicy"] == "IfNotPresent"
    assert settings["spark.kubernetes.container.image.pullSecrets"] == "a,b"


def test_they_mount_what_the_driver_mounts(template: dict[str, Any]) -> None:
    (container,) = template["spec"]["containers"]
    assert container["volumeMounts"] == [
        {"name": "claim-0", "mountPath": "/var/bluewhale"},
        {"name": "claim-0", "mountPath": "/minio", "subPath": "runs/u"},
        {"name": "claim-1", "mountPath": "/scratch"},
    ]
    claims = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in template["spec"]["volumes"]}
    assert claims == {"claim-0": "bluewhale", "claim-1": "scratch"}


def test_they_pass_the_restricted_pod_security_standard_and_hold_no_token(template: dict[str, Any]) -> None:
    (container,) = template["spec"]["containers"]
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert template["spec"]["securityContext"]["runAsNonRoot"] is True
    assert template["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert template["spec"]["automountServiceAccountToken"] is False


def test_they_need_no_secret(tmp_path: Path) -> None:
    plain = {k: v for k, v in ENVIRONMENT.items() if k not in ("BLUEWHALE_PULL_SECRETS", "BLUEWHALE_VOLUMES")}
    settings = executor_settings(plain, tmp_path / "executor.yaml")
    assert "spark.kubernetes.container.image.pullSecrets" not in settings
