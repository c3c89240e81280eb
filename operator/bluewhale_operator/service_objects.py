"""The objects that a PolicyService owns: pods that serve, their state, and one that adds up what the arms earn."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import PurePosixPath
from typing import Any

from bluewhale_operator.outcome import GROUP, SERVICE_LABEL, Object, owner_reference
from bluewhale_operator.pods import ROLE_LABEL
from contracts.job import Storage
from contracts.policy_service import PolicyServiceSpec

SERVER, ANALYST = "server", "analyst"
"""Roles: Triton's pods, and the one that reads the logs of all of them."""
IMAGE = os.environ.get("BLUEWHALE_SERVING_IMAGE", "ghcr.io/bluewhale-rl/serving:0.1.0")
STATE_ANNOTATION = f"{GROUP}/state"
STATE_DIRECTORY = "/etc/bluewhale"
USER = 65532
GRPC, HTTP, METRICS, ANALYST_METRICS = 8001, 8000, 8002, 9102
GRACE_SECONDS = 40
"""serving.pod drains for 15 s, then grants Triton 15 s."""


def make_objects(
    service: Object,
    spec: PolicyServiceSpec,
    state: dict[str, Any],
    replicas: int | None,
    servers: list[Object],
    service_monitors: bool,
) -> list[Object]:
    """Everything that is to be applied, in order; `servers` are Triton's pods as they are.

    Without `replicas`, their number is left to whoever has set it.
    """
    text = json.dumps(state, indent=2)
    return [
        _config_map(service, text),
        *_marks(servers, text),
        _deployment(service, spec, replicas),
        _analyst(service, spec),
        _service(service, SERVER, {"grpc": GRPC, "http": HTTP, "metrics": METRICS}),
        _service(service, ANALYST, {"metrics": ANALYST_METRICS}),
        _disruption_budget(service),
        *([_autoscaler(service, spec)] if spec.autoscaling else []),
        *([_service_monitor(service, spec)] if service_monitors else []),
    ]


def endpoint(service: Object) -> str:
    """The gRPC address inside the cluster."""
    return f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc:{GRPC}"


def service_label(service: Object) -> str:
    """What tells this service's series in Prometheus, as PromQL writes it."""
    return f"policy_service={json.dumps(_full_name(service))}"


# -- Triton's pods ---------------------------------------------------------------------------------------------------


def _config_map(service: Object, state: str) -> Object:
    return _owned(service, "v1", "ConfigMap", f"{_name(service)}-state", SERVER) | {"data": {"state.json": state}}


def _marks(pods: list[Object], state: str) -> list[Object]:
    """An annotation for each pod that does not have the state's mark: kubelet then brings its mount up to date at once,
    which else takes it a minute."""
    mark = hashlib.sha256(state.encode()).hexdigest()[:16]
    return [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            # With the uid, a pod that has gone meanwhile is a conflict, and not one to be made.
            "metadata": {k: p["metadata"][k] for k in ("name", "namespace", "uid")}
            | {"annotations": {STATE_ANNOTATION: mark}},
        }
        for p in pods
        if (p["metadata"].get("annotations") or {}).get(STATE_ANNOTATION) != mark
        and not p["metadata"].get("deletionTimestamp")
    ]


def _deployment(service: Object, spec: PolicyServiceSpec, replicas: int | None) -> Object:
    resources: dict[str, Any] = {"cpu": spec.resources.cpu, "memory": spec.resources.memory}
    if spec.resources.gpus:
        resources["nvidia.com/gpu"] = spec.resources.gpus
    command = [
        "python", "-m", "serving.pod", f"--state={STATE_DIRECTORY}/state.json",
        f"--repository={_directory(service, spec.storage, spec.model_repository.path, 'model_repository')}",
        f"--log={_log(service, spec)}", f"--service={_full_name(service)}", "--replica=$(POD_NAME)",
    ]  # fmt: skip
    # The pod is ready when the model is that answers, and not before: the server is long before that.
    model = {"path": "/v2/models/policy/ready", "port": "http"}
    container = _container(spec, SERVER, command, {"grpc": GRPC, "http": HTTP, "metrics": METRICS}) | {
        "env": [{"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
        "resources": {"requests": resources, "limits": resources},
        "startupProbe": {"httpGet": model, "periodSeconds": 2, "timeoutSeconds": 2, "failureThreshold": 90},
        "readinessProbe": {"httpGet": model, "periodSeconds": 5, "timeoutSeconds": 2, "failureThreshold": 2},
        "livenessProbe": {
            "httpGet": {"path": "/v2/health/live", "port": "http"},
            "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 6,
        },
    }  # fmt: skip
    container["volumeMounts"] += [
        {"name": "state", "mountPath": STATE_DIRECTORY, "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    volumes = [
        {"name": "state", "configMap": {"name": f"{_name(service)}-state"}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": spec.shared_memory}},
    ]
    made = _pods(service, spec, _name(service), SERVER, container, volumes, METRICS)
    if replicas is not None:
        made["spec"]["replicas"] = replicas
    made["spec"]["template"]["spec"]["topologySpreadConstraints"] = [
        {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": _selector(service, SERVER)},
        }
    ]
    return made


# -- the analyst -----------------------------------------------------------------------------------------------------


def _analyst(service: Object, spec: PolicyServiceSpec) -> Object:
    command = [
        "python", "-m", "serving.analyst", f"--log={_log(service, spec)}", f"--metric={spec.canary.metric}",
        f"--metric-weights={json.dumps(spec.metric_weights)}", f"--service={_full_name(service)}",
    ]  # fmt: skip
    probe = {"httpGet": {"path": "/metrics", "port": "metrics"}, "timeoutSeconds": 5}
    container = _container(spec, ANALYST, command, {"metrics": ANALYST_METRICS}) | {
        # It has a page to show once it has read the whole log, which may be long.
        "startupProbe": probe | {"periodSeconds": 5, "failureThreshold": 360},
        "readinessProbe": probe | {"periodSeconds": 10},
        "livenessProbe": probe | {"periodSeconds": 30, "failureThreshold": 6},
        "resources": {"requests": {"cpu": "50m", "memory": "128Mi"}, "limits": {"cpu": "1", "memory": "2Gi"}},
    }
    made = _pods(service, spec, f"{_name(service)}-analyst", ANALYST, container, [], ANALYST_METRICS)
    made["spec"]["replicas"] = 1
    return made


# -- what both are made of -------------------------------------------------------------------------------------------


def _container(spec: PolicyServiceSpec, name: str, command: list[str], ports: dict[str, int]) -> Object:
    return {
        "name": name,
        "image": spec.image or IMAGE,
        "imagePullPolicy": spec.image_pull_policy,
        "command": command,
        "ports": [{"name": port, "containerPort": number} for port, number in ports.items()],
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "storage", "mountPath": spec.storage.mount_path},
        ],
    }


def _pods(
    service: Object,
    spec: PolicyServiceSpec,
    name: str,
    role: str,
    container: Object,
    volumes: list[Object],
    metrics: int,
) -> Object:
    """A Deployment without `replicas`, whose pods obey the restricted Pod Security Standard."""
    pod = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            # The volume is shared and may be large: its files are not all looked at for every pod.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {"name": "tmp", "emptyDir": {"sizeLimit": "4Gi"}},
            {"name": "storage", "persistentVolumeClaim": {"claimName": spec.storage.claim_name}},
            *volumes,
        ],
        "nodeSelector": spec.node_selector,
        "tolerations": [t.model_dump(by_alias=True, exclude_none=True) for t in spec.tolerations],
        "imagePullSecrets": [{"name": secret} for secret in spec.image_pull_secrets],
    }
    annotations = {"prometheus.io/scrape": "true", "prometheus.io/port": str(metrics)}
    return _owned(service, "apps/v1", "Deployment", name, role) | {
        "spec": {
            "selector": {"matchLabels": _selector(service, role)},
            # Somebody always answers, and has its models loaded.
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "revisionHistoryLimit": 2,
            "template": {"metadata": {"labels": _selector(service, role), "annotations": annotations}, "spec": pod},
        }
    }


# -- beside the pods -------------------------------------------------------------------------------------------------


def _service(service: Object, role: str, ports: dict[str, int]) -> Object:
    name = _name(service) if role == SERVER else f"{_name(service)}-{role}"
    return _owned(service, "v1", "Service", name, role) | {
        "spec": {
            "selector": _selector(service, role),
            "ports": [{"name": port, "port": number, "targetPort": port} for port, number in ports.items()],
        }
    }


def _disruption_budget(service: Object) -> Object:
    # One at a time, and not "one must stay": of a single replica that would keep its node from ever being drained.
    return _owned(service, "policy/v1", "PodDisruptionBudget", _name(service), SERVER) | {
        "spec": {
            "selector": {"matchLabels": _selector(service, SERVER)},
            "maxUnavailable": 1,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        }
    }


def _autoscaler(service: Object, spec: PolicyServiceSpec) -> Object:
    assert spec.autoscaling
    target = {"type": "Utilization", "averageUtilization": spec.autoscaling.target_cpu_percent}
    return _owned(service, "autoscaling/v2", "HorizontalPodAutoscaler", _name(service), SERVER) | {
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": _name(service)},
            "minReplicas": spec.replicas,
            "maxReplicas": spec.autoscaling.max_replicas,
            "metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": target}}],
        }
    }


def _service_monitor(service: Object, spec: PolicyServiceSpec) -> Object:
    return _owned(service, "monitoring.coreos.com/v1", "ServiceMonitor", _name(service), SERVER) | {
        "spec": {
            "selector": {"matchLabels": {SERVICE_LABEL: _name(service)}},
            "endpoints": [{"port": "metrics", "interval": spec.monitoring.scrape_interval}],
        }
    }


def _owned(service: Object, api_version: str, kind: str, name: str, role: str) -> Object:
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": service["metadata"]["namespace"],
            "labels": {"app.kubernetes.io/managed-by": "bluewhale-operator", **_selector(service, role)},
            "ownerReferences": [owner_reference(service)],
        },
    }


def _selector(service: Object, role: str) -> dict[str, str]:
    return {SERVICE_LABEL: _name(service), ROLE_LABEL: role}


def _name(service: Object) -> str:
    name: str = service["metadata"]["name"]
    return name


def _full_name(service: Object) -> str:
    return f"{service['metadata']['namespace']}/{_name(service)}"


def _log(service: Object, spec: PolicyServiceSpec) -> PurePosixPath:
    return _directory(service, spec.storage, spec.decision_log.path, "log")


def _directory(service: Object, storage: Storage, path: str | None, default: str) -> PurePosixPath:
    return PurePosixPath(storage.mount_path) / (path or f"services/{_name(service)}/{default}")
