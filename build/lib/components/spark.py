"""The Spark session of a stage. Configuration alone (SPARK_MASTER, spark-defaults) decides where it runs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pyspark.sql import SparkSession


@contextmanager
def spark_session(name: str) -> Iterator[SparkSession]:
    """A session in UTC that ends with the block, its JVM with it."""
    # Feast and Spark both turn timestamps into local time on the way through Python: keep every clock in UTC.
    os.environ["TZ"] = "UTC"
    time.tzset()
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    master = os.environ.get("SPARK_MASTER", "local[*]")
    builder = SparkSession.builder.appName(f"bluewhale-{name}").master(master)
    settings = {
        "spark.sql.session.timeZone": "UTC",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.driver.memory": os.environ.get("SPARK_DRIVER_MEMORY", "2g"),
        "spark.driver.extraJavaOptions": "-Duser.timezone=UTC",
    }
    if master.startswith("local"):
        # Small jobs on one machine: as many partitions as cores, no listening on outside addresses.
        settings["spark.sql.shuffle.partitions"] = str(os.cpu_count())
        settings["spark.driver.bindAddress"] = "127.0.0.1"
        settings["spark.driver.host"] = "127.0.0.1"
    for key, value in settings.items():
        builder = builder.config(key, value)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    try:
        yield session
    finally:
        session.stop()
