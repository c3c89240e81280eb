"""The overlays as kubectl renders them."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

Object = dict[str, Any]
ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "manifests"
OVERLAYS = ("dev", "prod")


@functools.cache
def render(directory: str) -> tuple[Object, ...]:
    """The objects of a directory below manifests/, as `kubectl apply -k` would send them."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not on PATH")
    command = ["kubectl", "kustomize", str(MANIFESTS / directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def overlay(name: str) -> tuple[Object, ...]:
    return render(f"overlays/{name}")


def of_kind(objects: tuple[Object, ...], *kinds: str) -> dict[str, Object]:
    """Objects by name."""
    return {o["metadata"]["name"]: o for o in objects if o["kind"] in kinds}


def pod_templates(objects: tuple[Object, ...]) -> Iterator[tuple[str, Object]]:
    for name, found in of_kind(objects, "Deployment", "StatefulSet", "DaemonSet", "Job").items():
        yield name, found["spec"]["template"]
