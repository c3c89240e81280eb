"""Keep the classes that Spark loads in a file that the JVM maps at its next starts: a dynamic CDS archive (JEP 350).

python scripts/spark_classes.py     # part of `make install`: write components.spark.CLASSES
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pyspark import SparkContext

from components.spark import CLASSES, spark_session
from components.timeline.build import build_timeline
from contracts.job import load_job
from simulation.log import write_log

EXAMPLE = Path(__file__).parents[1] / "manifests" / "examples" / "cartpole.yaml"


def main() -> None:
    spec = load_job(EXAMPLE).spec
    # A JVM that maps half of a file crashes: it has its name when it is whole.
    unfinished = CLASSES.with_name(f".{CLASSES.name}.{os.getpid()}")
    CLASSES.unlink(missing_ok=True)
    # Java keeps no classes where there are directories among its class path.
    for variable in ("SPARK_CONF_DIR", "HADOOP_CONF_DIR", "YARN_CONF_DIR"):
        os.environ.pop(variable, None)
    os.environ["SPARK_MASTER"] = "local[*]"
    quiet = "-Xlog:disable -Xlog:all=error:stderr"  # some classes cannot be kept, which it would tell one by one
    os.environ["SPARK_SUBMIT_OPTS"] = f"-XX:TieredStopAtLevel=1 '-XX:ArchiveClassesAtExit={unfinished}' {quiet}"
    with tempfile.TemporaryDirectory() as work:
        place = Path(work)
        write_log(spec, place / "log")
        with spark_session("classes"):
            build_timeline(spec, str(place / "log" / "decisions.parquet"), None, place / "timeline")
            assert SparkContext._gateway
            jvm = SparkContext._gateway.proc
        jvm.stdin.close()
        whole = jvm.wait() == 0 and unfinished.exists()
    if whole:
        unfinished.rename(CLASSES)
    else:
        unfinished.unlink(missing_ok=True)
        print("This Java keeps no classes; stages start without.")


if __name__ == "__main__":
    main()
