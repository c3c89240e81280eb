"""A policy service on this machine: Triton, Prometheus, the rollout's state and the decision log, in one directory."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from components.export.repository import read_policies
from contracts.job import Canary
from serving.processes import ServerError
from serving.prometheus import PrometheusServer
from serving.state import read_state, write_state
from serving.triton import TritonServer, assemble_repository

ENDPOINTS = "endpoints.json"


@dataclass(frozen=True)
class Endpoints:
    """Where a running service can be reached, and where it keeps its files."""

    grpc: str
    metrics: str
    prometheus: str
    state_file: str
    decision_log: str


def read_endpoints(directory: Path) -> Endpoints:
    """The endpoints of the service that runs in `directory`; raises `ServerError` when none does."""
    path = directory / ENDPOINTS
    if path.is_file():
        endpoints = Endpoints(**json.loads(path.read_text()))
        with contextlib.suppress(InferenceServerException), grpc.InferenceServerClient(endpoints.grpc) as client:
            if client.is_server_live(client_timeout=5):
                return endpoints
    raise ServerError(f"{directory}: no service runs here; start one with `bluewhale serve`")


@contextmanager
def serve(directory: Path, stable: Path, candidate: Path | None, canary: Canary, salt: str) -> Iterator[Endpoints]:
    """Serve exported repositories, each with one policy: all traffic to stable until a rollout moves it.

    Started again in the same directory, a candidate that was promoted there stays the stable policy, and decisions are
    appended to the log that is there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state_file, log = directory / "state.json", directory / "log"
    exported = [stable] if candidate is None else [stable, candidate]
    arms: list[dict[str, object] | None] = []
    for source in exported:
        (policy,) = read_policies(source).values()
        arms.append({"version": policy["version"], "digest": policy["digest"]})
    arms.append(None)
    if state_file.exists() and arms[1] and read_state(state_file)["stable"] == arms[1]:
        arms = arms[1:]
    state = {"stable": arms[0], "candidate": arms[1], "weight": 0.0, "salt": salt, "deadline_ms": canary.deadline_ms}
    write_state(state_file, state)
    repository = directory / "model_repository"
    assemble_repository(repository, exported, state_file, log)
    triton = TritonServer(repository, directory / "triton.log")
    try:
        triton.wait_until_ready()
        scrape = {"static_configs": [{"targets": [triton.metrics_address]}]}
        prometheus = PrometheusServer(directory / "prometheus", scrape, directory / "prometheus.log")
        try:
            prometheus.wait_until_ready()
            endpoints = Endpoints(
                triton.grpc_address, triton.metrics_address, prometheus.url, str(state_file), str(log)
            )
            (directory / ENDPOINTS).write_text(json.dumps(asdict(endpoints), indent=2))
            try:
                yield endpoints
            finally:
                (directory / ENDPOINTS).unlink()
        finally:
            prometheus.stop()
    finally:
        triton.stop()
