"""The pipeline in a cluster: each stage's pod, and the body of a run for the KFP API."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict  # type: ignore[import-untyped]
from kfp import compiler, dsl, kubernetes
from kubernetes.utils.quantity import parse_quantity

from components.image import SPARK_IMAGE, TRAINING_IMAGE
from contracts.job import JobError, JobSpec, Resources, RLTrainingJob
from contracts.stage import EARLIER_VARIABLE, code_version
from pipelines.pipeline import build_pipeline, parameters

SERVICE_ACCOUNT = "bluewhale-pipeline"
USER = 65532
SPARK_STAGES = ("timeline", "features", "normalization")
TITLES = {
    "simulation": "Simulated decisions",
    "timeline": "Timeline",
    "features": "Point-in-time features",
    "normalization": "Normalization",
    "understanding": "Data understanding",
    "training": "Training",
    "evaluation": "Counterfactual evaluation",
    "export": "ONNX export",
    "rollout": "Rollout request",
}
ARTIFACT_ROOTS = {"minio": "/minio", "s3": "/s3", "gs": "/gcs"}
"""Where KFP's launcher keeps artifacts in a stage's pod, by the scheme of the pipeline root."""
FIXED = {
    "simulation": Resources(cpu="250m", memory="2Gi"),
    "understanding": Resources(cpu="250m", memory="4Gi"),
    "evaluation": Resources(cpu="250m", memory="4Gi"),
    "export": Resources(cpu="250m", memory="2Gi"),
    "rollout": Resources(cpu="250m", memory="1Gi"),
}
BURST = "2"
"""Cores that a stage of fixed resources may use where the node has them to spare."""
LAUNCHER = Resources(cpu="250m", memory="1Gi")
"""At least, of the pod that lays out the data for several workers and starts them; with a sweep it evaluates, too."""
HEAP = 0.6  # of the pod's memory is Spark's; Python and what else the JVM needs live in the rest
QUEUE_PREFIXES = ("kueue.x-k8s.io/", "volcano.sh/")
DATA_VERSION, SCHEDULED_AT = "bluewhale.io/data-version", "bluewhale.io/scheduled-at"


def _pipeline_root() -> str:
    return os.environ.get("BLUEWHALE_PIPELINE_ROOT", "minio://mlpipeline/v2/artifacts")


@dataclass(frozen=True)
class Cluster:
    """A job's place in a cluster. Without a namespace its pods take their own; without a uid it is no object there."""

    job: RLTrainingJob
    uid: str = ""
    namespace: str = ""
    pipeline_root: str = field(default_factory=_pipeline_root)

    @property
    def logs(self) -> str:
        """Where the simulation puts logs."""
        return f"{self.job.spec.storage.mount_path}/logs/{self.job.metadata.name}"

    @property
    def volumes(self) -> list[dict[str, str]]:
        """What every pod of the job mounts, pods of Spark and of training too.

        The artifacts of a run lie on the shared volume, at the very paths where KFP's launcher puts them, so that all
        pods see what a stage's own pod sees.
        """
        scheme = self.pipeline_root.partition("://")[0]
        if scheme not in ARTIFACT_ROOTS:
            raise JobError(f"pipeline root {self.pipeline_root}: must begin with {', '.join(ARTIFACT_ROOTS)} and ://")
        storage = self.job.spec.storage
        run = f"runs/{self.uid or self.job.metadata.name}"
        return [
            {"claimName": storage.claim_name, "mountPath": storage.mount_path},
            {"claimName": storage.claim_name, "mountPath": ARTIFACT_ROOTS[scheme], "subPath": run},
        ]

    @property
    def queue_labels(self) -> dict[str, str]:
        """Kueue's and Volcano's labels of the job: the training workers wait in its queue."""
        return {k: v for k, v in self.job.metadata.labels.items() if k.startswith(QUEUE_PREFIXES)}

    def place(self, task: dsl.PipelineTask, stage: str) -> dsl.PipelineTask:
        """Give a stage's pod its image, resources, volumes, identity and environment."""
        spec, name = self.job.spec, self.job.metadata.name
        task.set_display_name(TITLES[stage])
        task.set_container_image(_image(spec, stage))
        kubernetes.set_image_pull_policy(task, spec.images.pull_policy)
        if spec.images.pull_secrets:
            kubernetes.set_image_pull_secrets(task, spec.images.pull_secrets)
        kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
        kubernetes.add_pod_label(task, "bluewhale.io/job", name)
        kubernetes.add_pod_label(task, "bluewhale.io/stage", stage)

        asked = _resources(spec, stage)
        cpu, memory = f"{int(parse_quantity(asked.cpu) * 1000)}m", f"{_mebibytes(asked.memory)}Mi"
        task.set_cpu_request(cpu).set_cpu_limit(BURST if stage in FIXED else cpu)
        task.set_memory_request(memory).set_memory_limit(memory)
        if asked.gpus:
            task.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(asked.gpus)

        volumes = self.volumes
        if stage == "training":
            volumes += [v.model_dump(by_alias=True, exclude_unset=True) for v in spec.training.volumes]
            if spec.training.workers.max == 1:
                for key, value in spec.training.node_selector.items():
                    kubernetes.add_node_selector(task, key, value)
                for toleration in spec.training.tolerations:
                    kubernetes.add_toleration(task, **toleration.model_dump(exclude_none=True))
        for volume in volumes:
            kubernetes.mount_pvc(task, volume["claimName"], volume["mountPath"], volume.get("subPath", ""))

        environment = {
            "BLUEWHALE_JOB": name,
            "BLUEWHALE_TERMINATION_LOG": "/dev/termination-log",
            "BLUEWHALE_SPARK_IMAGE": _image(spec, "timeline"),
            "BLUEWHALE_TRAINING_IMAGE": _image(spec, "training"),
            "BLUEWHALE_PULL_POLICY": spec.images.pull_policy,
            "BLUEWHALE_PULL_SECRETS": json.dumps(spec.images.pull_secrets),
            "BLUEWHALE_VOLUMES": json.dumps(volumes),
            "BLUEWHALE_QUEUE_LABELS": json.dumps(self.queue_labels),
            # The user has no home directory of its own.
            "HOME": "/tmp",
            "PYTHONUNBUFFERED": "1",
            # Runs of one object follow each other. Of any two others, one may be at work while the other looks for it.
            **({EARLIER_VARIABLE: ""} if stage == "training" and not self.uid else {}),
            **_engine(spec, stage),
        }
        if self.namespace:
            environment["BLUEWHALE_NAMESPACE"] = self.namespace
        else:
            kubernetes.use_field_path_as_env(task, "BLUEWHALE_NAMESPACE", "metadata.namespace")
        # Not by `set_env_variable`, which looks for who calls it in all modules: 50 ms for each variable.
        assert task.container_spec is not None
        task.container_spec.env = environment
        kubernetes.use_field_path_as_env(task, "POD_NAME", "metadata.name")
        kubernetes.use_field_path_as_env(task, "POD_UID", "metadata.uid")
        kubernetes.use_field_path_as_env(task, "POD_IP", "status.podIP")
        return task


def run_spec(job: RLTrainingJob, uid: str, namespace: str, warm_start: str | None) -> dict[str, Any]:
    """What a KFP v2beta1 run of the job needs beside its name: `pipeline_spec`, `runtime_config`, `service_account`."""
    cluster = Cluster(job, uid, namespace)
    pipeline: Any = build_pipeline(job.metadata.name, cluster=cluster)
    return {
        "pipeline_spec": {
            "pipeline_spec": MessageToDict(pipeline.pipeline_spec),
            "platform_spec": MessageToDict(pipeline.platform_spec),
        },
        "runtime_config": {"parameters": _arguments(cluster, warm_start or ""), "pipeline_root": cluster.pipeline_root},
        "service_account": SERVICE_ACCOUNT,
    }


def compile_pipeline(job: RLTrainingJob, path: Path) -> None:
    """Write the pipeline's IR YAML with the job's own parameters as defaults."""
    cluster = Cluster(job, namespace=job.metadata.namespace or "")
    pipeline = build_pipeline(job.metadata.name, _arguments(cluster), cluster)
    compiler.Compiler().compile(pipeline, str(path))


def _arguments(cluster: Cluster, warm_start: str = "") -> dict[str, str]:
    spec, annotations = cluster.job.spec, cluster.job.metadata.annotations
    # A relative path is one on the shared volume.
    data = spec.data.placed(spec.storage.mount_path)
    spec = spec.model_copy(update={"data": data})
    # Nothing of the data can be read from here, so its path stands for it. A log that grows under its path is seen as
    # new by the time that a scheduled run was due at, or by the version that the job's annotation gives it.
    known = (data.decision_log, data.outcomes, annotations.get(DATA_VERSION), annotations.get(SCHEDULED_AT))
    version = f"{code_version()}-{hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]}"
    return parameters(spec, data.decision_log or "", version, cluster, warm_start)


def _image(spec: JobSpec, stage: str) -> str:
    if stage in SPARK_STAGES:
        return spec.images.spark or SPARK_IMAGE
    return spec.images.training or TRAINING_IMAGE


def _resources(spec: JobSpec, stage: str) -> Resources:
    if stage in SPARK_STAGES:
        return spec.spark.driver
    if stage == "training":
        asked = spec.training.resources
        if spec.training.workers.max == 1:
            return asked
        launcher = FIXED["evaluation"] if spec.sweep else LAUNCHER
        return launcher.model_copy(update={"memory": max(asked.memory, launcher.memory, key=parse_quantity)})
    return FIXED[stage]


def _engine(spec: JobSpec, stage: str) -> dict[str, str]:
    """What Spark or TorchX is told by the environment."""
    if stage == "training" and spec.training.workers.max > 1:
        return {"BLUEWHALE_TRAINING_SCHEDULER": spec.training.scheduler}
    if stage not in SPARK_STAGES:
        return {}
    spark = spec.spark
    driver = {"SPARK_DRIVER_MEMORY": f"{int(_mebibytes(spark.driver.memory) * HEAP)}m"}
    if not spark.executors:
        return driver
    return driver | {
        "SPARK_MASTER": "k8s://https://kubernetes.default.svc",
        "BLUEWHALE_SPARK_EXECUTORS": str(spark.executors),
        "BLUEWHALE_SPARK_EXECUTOR_CORES": str(spark.executor_cores),
        "BLUEWHALE_SPARK_EXECUTOR_MEMORY": f"{_mebibytes(spark.executor_memory)}m",
    }


def _mebibytes(quantity: str) -> int:
    return int(parse_quantity(quantity)) >> 20
