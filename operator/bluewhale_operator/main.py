"""`bluewhale-operator`: watches with kopf, and puts what changed into the controller's queue."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Any

import kopf
from kopf._core.intents.registries import SmartOperatorRegistry
from prometheus_client import start_http_server

from bluewhale_operator.backend import KfpBackend
from bluewhale_operator.cluster import ApiError, Cluster
from bluewhale_operator.controller import LOG, Controller, JsonLines, Key
from bluewhale_operator.outcome import API_VERSION, JOB_LABEL, SERVICE_LABEL
from bluewhale_operator.run_spec import build_run
from bluewhale_operator.schedule import SCHEDULE_LABEL


def handlers(controller: Controller) -> kopf.OperatorRegistry:
    """Every handler only says which object to look at: what to do is decided from its whole state."""
    registry = SmartOperatorRegistry()  # knows how to log in
    add = controller.queue.add

    @kopf.on.startup(registry=registry)
    def start(settings: kopf.OperatorSettings, **_: Any) -> None:
        settings.posting.enabled = False
        # The kinds are there when it starts, and its namespaces are named: it need not be allowed to list them.
        settings.scanning.disabled = True
        settings.watching.server_timeout = 300
        settings.watching.client_timeout = 330
        controller.start()

    @kopf.on.cleanup(registry=registry)
    def stop(**_: Any) -> None:
        controller.stop()

    @kopf.on.event(API_VERSION, "rltrainingjobs", registry=registry)
    def job(*, namespace: str | None, name: str, labels: kopf.Labels, **_: Any) -> None:
        add(Key("RLTrainingJob", namespace or "", name))
        if parent := labels.get(SCHEDULE_LABEL):
            add(Key("RLTrainingJob", namespace or "", parent))

    @kopf.on.event(API_VERSION, "policyservices", registry=registry)
    def service(*, namespace: str | None, name: str, spec: kopf.Spec, **_: Any) -> None:
        add(Key("PolicyService", namespace or "", name))
        if asking := (spec.get("candidate") or {}).get("job"):
            add(Key("RLTrainingJob", namespace or "", asking))

    @kopf.on.event("v1", "pods", labels={JOB_LABEL: kopf.PRESENT}, registry=registry)
    def job_pod(*, namespace: str | None, labels: kopf.Labels, **_: Any) -> None:
        add(Key("RLTrainingJob", namespace or "", labels[JOB_LABEL]))

    @kopf.on.event("v1", "pods", labels={SERVICE_LABEL: kopf.PRESENT}, registry=registry)
    @kopf.on.event("apps/v1", "deployments", labels={SERVICE_LABEL: kopf.PRESENT}, registry=registry)
    def service_child(*, namespace: str | None, labels: kopf.Labels, **_: Any) -> None:
        add(Key("PolicyService", namespace or "", labels[SERVICE_LABEL]))

    return registry


def wait_for_kinds(cluster: Cluster, sleep: Callable[[float], None] = time.sleep) -> None:
    """Until the API server knows the kinds of this API version: what is unknown at the start is never watched."""
    while True:
        try:
            cluster.request("GET", f"/apis/{API_VERSION}")
            return
        except ApiError as error:
            hint = ": kubectl apply -k manifests/crd" if error.code == 404 else ""
            LOG.warning("waiting for %s (%s)%s", API_VERSION, error, hint)
            sleep(5)


def main() -> None:
    """Run until a signal; configured by environment variables alone (see docs/install.md)."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=os.environ.get("BLUEWHALE_LOG_LEVEL", "INFO"), handlers=[handler], force=True)
    for noisy in ("kopf", "aiohttp.access"):
        logging.getLogger(noisy).setLevel("WARNING")
    backend = KfpBackend(
        os.environ.get("BLUEWHALE_KFP_URL", "http://ml-pipeline.kubeflow:8888"),
        multi_user=os.environ.get("BLUEWHALE_KFP_MULTI_USER") == "true",
        token_file=os.environ.get("BLUEWHALE_KFP_TOKEN_FILE"),
    )
    cluster = Cluster()
    wait_for_kinds(cluster)
    controller = Controller(cluster, backend, build_run, os.environ.get("BLUEWHALE_PROMETHEUS_URL"))
    start_http_server(int(os.environ.get("BLUEWHALE_METRICS_PORT", "9090")))
    namespaces = [n for n in os.environ.get("BLUEWHALE_NAMESPACES", "").split(",") if n]
    kopf.run(
        registry=handlers(controller),
        standalone=True,
        clusterwide=not namespaces,
        namespaces=namespaces,
        liveness_endpoint=os.environ.get("BLUEWHALE_LIVENESS", "http://0.0.0.0:8080/healthz"),
    )


if __name__ == "__main__":
    main()
