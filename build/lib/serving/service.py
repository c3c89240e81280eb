"""A policy service on this machine: Triton, Prometheus, the rollout's state and the decision log, in one directory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from components.export.repository import read_policies
from contracts.job import Canary
from serving.processes import ServerError
from serving.prometheus import PrometheusServer
from serving.triton import TritonServer, assemble_repository, write_state

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
    if not path.is_file():
        raise ServerError(f"{directory}: no service runs here; start one with `bluewhale serve`")
    return Endpoints(**json.loads(path.read_text()))


@contextmanager
def serve(directory: Path, stable: Path, candidate: Path, canary: Canary, salt: str) -> Iterator[Endpoints]:
    """Serve two exported repositories, each with one policy: all traffic to stable until a rollout moves it."""
    directory.mkdir(parents=True, exist_ok=True)
    state_file, log = directory / "state.json", directory / "log"
    arms = {}
    for arm, exported in {"stable": stable, "candidate": candidate}.items():
        (policy,) = read_policies(exported).values()
        arms[arm] = {"version": policy["version"], "digest": policy["digest"]}
    write_state(state_file, {**arms, "weight": 0.0, "salt": salt, "deadline_ms": canary.deadline_ms})
    for name in ("decisions.jsonl", "outcomes.jsonl"):
        (log / name).unlink(missing_ok=True)
    repository = directory / "model_repository"
    assemble_repository(repository, [stable, candidate], state_file, log)
    triton = TritonServer(repository, directory / "triton.log")
    try:
        triton.wait_until_ready()
        prometheus = PrometheusServer(directory / "prometheus", triton.metrics_address, directory / "prometheus.log")
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
