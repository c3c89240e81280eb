"""The Spark session of a stage. Configuration alone (SPARK_MASTER, spark-defaults) decides where it runs."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pyspark.sql import SparkSession

CLASSES = Path(sys.prefix) / "spark.jsa"
"""What Spark loads at its start, for the JVM to map: `scripts/spark_classes.py` makes it, another JVM ignores it."""
USER = 65532
DRIVER_PORT, BLOCK_MANAGER_PORT = 7078, 7079


@contextmanager
def spark_session(name: str) -> Iterator[SparkSession]:
    """A session in UTC that ends with the block; within the block of another, that one, which does not."""
    running = SparkSession.getActiveSession()
    # Feast and Spark both turn timestamps into local time on the way through Python: keep every clock in UTC.
    os.environ["TZ"] = "UTC"
    time.tzset()
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    master = os.environ.get("SPARK_MASTER", "local[*]")
    settings = {
        "spark.sql.session.timeZone": "UTC",
        # A partition's value is what its directory says: 01 is not 1.
        "spark.sql.sources.partitionColumnTypeInference.enabled": "false",
        # A value that is none of its type costs a row that value, not those after it.
        "spark.sql.json.enablePartialResults": "true",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.driver.memory": os.environ.get("SPARK_DRIVER_MEMORY", "2g"),
        "spark.driver.extraJavaOptions": " ".join(["-Duser.timezone=UTC", *_mapped_classes()]),
        # A column of continuous numbers is no dictionary, and Parquet should see that soon: it tries one for each of
        # hundreds of columns, by default up to a mebibyte.
        "spark.hadoop.parquet.dictionary.page.size": str(64 * 1024),
        # A window's rows of one giant MDP go to disk, as a sort's do: in memory, they leave none for the sort after it.
        "spark.sql.windowExec.buffer.spill.size.threshold": "64m",
        # What Spark generates for operators in a row is one method, some lines for each column. The JVM takes long to
        # compile a large one, and beyond 8,000 bytes never does: above this, each operator by itself has short ones.
        "spark.sql.codegen.hugeMethodLimit": "4000",
        # What is cached is joined into as few partitions as other results are.
        "spark.sql.optimizer.canChangeCachedPlanOutputPartitioning": "true",
    }
    if master.startswith("k8s://"):
        settings |= executor_settings(os.environ, Path(tempfile.mkdtemp(prefix="spark-")) / "executor.yaml")
    else:
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    if master.startswith("local"):
        # On few cores a collector that stops the work costs less than one that runs beside it.
        os.environ.setdefault("SPARK_SUBMIT_OPTS", "-XX:+UseParallelGC")
        # Partitions that fit into memory when rows are many; Spark joins them again when rows are few.
        settings["spark.sql.shuffle.partitions"] = "64"
        # No listening on outside addresses.
        settings["spark.driver.bindAddress"] = "127.0.0.1"
        settings["spark.driver.host"] = "127.0.0.1"
    builder = SparkSession.builder.appName(f"bluewhale-{name}").master(master)
    for key, value in settings.items():
        builder = builder.config(key, value)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    try:
        yield session
    finally:
        if not running:
            session.stop()


def _mapped_classes() -> list[str]:
    """JVM options; what it says of an archive that it cannot use must not come among a command's output."""
    if not CLASSES.exists():
        return []
    return [f"'-XX:SharedArchiveFile={CLASSES}'", "-Xlog:all=off:stdout", "-Xlog:all=warning:stderr"]


def executor_settings(environment: Mapping[str, str], template: Path) -> dict[str, str]:
    """Settings for executors as pods, from the environment of the stage's pod; writes their template to `template`.

    Executors mount what the driver mounts, and go when the driver's pod goes, which is their owner.
    """
    template.write_text(yaml.safe_dump(executor_template(environment), sort_keys=False))
    kubernetes = "spark.kubernetes"
    settings = {
        f"{kubernetes}.namespace": environment["BLUEWHALE_NAMESPACE"],
        f"{kubernetes}.driver.pod.name": environment["POD_NAME"],
        f"{kubernetes}.executor.podTemplateFile": str(template),
        f"{kubernetes}.executor.container.image": environment["BLUEWHALE_SPARK_IMAGE"],
        f"{kubernetes}.container.image.pullPolicy": environment.get("BLUEWHALE_PULL_POLICY", "IfNotPresent"),
        f"{kubernetes}.executor.label.bluewhale.io/job": environment["BLUEWHALE_JOB"],
        f"{kubernetes}.executor.label.bluewhale.io/role": "executor",
        "spark.executor.instances": environment["BLUEWHALE_SPARK_EXECUTORS"],
        "spark.executor.cores": environment["BLUEWHALE_SPARK_EXECUTOR_CORES"],
        "spark.executor.memory": environment["BLUEWHALE_SPARK_EXECUTOR_MEMORY"],
        "spark.executor.extraJavaOptions": "-Duser.timezone=UTC",
        "spark.executorEnv.TZ": "UTC",
        # Executors call the driver back; fixed ports can be let through by a network policy.
        "spark.driver.host": environment["POD_IP"],
        "spark.driver.bindAddress": environment["POD_IP"],
        "spark.driver.port": str(DRIVER_PORT),
        "spark.driver.blockManager.port": str(BLOCK_MANAGER_PORT),
        # Executors have no Services or claims of their own: Spark need not ask to delete any.
        f"{kubernetes}.driver.service.deleteOnTermination": "false",
        f"{kubernetes}.driver.ownPersistentVolumeClaim": "false",
    }
    if secrets := json.loads(environment.get("BLUEWHALE_PULL_SECRETS", "[]")):
        settings[f"{kubernetes}.container.image.pullSecrets"] = ",".join(secrets)
    return settings


def executor_template(environment: Mapping[str, str]) -> dict[str, Any]:
    """An executor's pod, as far as Spark does not fill it in itself; it meets the restricted Pod Security Standard."""
    mounts = json.loads(environment.get("BLUEWHALE_VOLUMES", "[]"))
    claims = {claim: f"claim-{i}" for i, claim in enumerate(dict.fromkeys(m["claimName"] for m in mounts))}
    container = {
        "name": "executor",
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [
            {"name": claims[m["claimName"]]} | {k: v for k, v in m.items() if k != "claimName"} for m in mounts
        ],
    }
    user = {"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "seccompProfile": {"type": "RuntimeDefault"}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "spec": {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": user,
            "containers": [container],
            "volumes": [
                {"name": name, "persistentVolumeClaim": {"claimName": claim}} for claim, name in claims.items()
            ],
        },
    }
