"""How long the timeline takes, next to the bare Spark job that reads, shuffles by MDP, sorts and writes the same rows.

    python benchmarks/timeline.py --rows 1000000 --features 50 --repeats 3

Each measurement is a process of its own, the two taking turns; printed are seconds and the ratio of each pair.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pyspark.sql import functions as F

from components.spark import spark_session
from components.timeline.build import build_timeline
from contracts.job import JobSpec

LENGTH = 50  # decisions of an MDP, on average


def generate(path: str, rows: int, features: int, skew: float) -> None:
    """A log of normal features, two metrics and two actions; one MDP holds the share `skew` of all rows."""
    with spark_session("generate") as spark:
        log = spark.range(rows)
        giant = F.rand(1) < skew
        mdp = F.when(giant, F.lit(-1)).otherwise(F.pmod(F.xxhash64("id"), F.lit(max(rows // LENGTH, 1))))
        pairs = [part for i in range(features) for part in (F.lit(f"f{i}"), F.randn(i))]
        log.select(
            mdp.cast("string").alias("mdp_id"),
            F.col("id").alias("sequence_number"),
            F.timestamp_micros(F.col("id")).alias("event_time"),
            F.create_map(*pairs).alias("state_features"),
            F.when(F.rand(2) < 0.5, "left").otherwise("right").alias("action"),
            F.lit(0.5).alias("action_probability"),
            F.create_map(F.lit("reward"), F.rand(3), F.lit("clicks"), F.rand(4)).alias("metrics"),
        ).write.parquet(path)


def bare(log: str, output: str) -> None:
    with spark_session("bare") as spark:
        rows = spark.read.parquet(log).repartition("mdp_id").sortWithinPartitions("mdp_id", "sequence_number")
        rows.write.parquet(output)


def timeline(log: str, output: str) -> None:
    build_timeline(JobSpec.model_validate({"actions": ["left", "right"]}), log, None, output)


def measure(what: str, log: str, output: str) -> None:
    started = time.perf_counter()
    {"bare": bare, "timeline": timeline}[what](log, output)
    print(json.dumps({"seconds": time.perf_counter() - started}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skew", type=float, default=0.0, help="share of all rows that one MDP holds")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
        return
    with tempfile.TemporaryDirectory() as directory:
        log = str(Path(directory) / "log")
        generate(log, arguments.rows, arguments.features, arguments.skew)
        seconds: dict[str, list[float]] = {"bare": [], "timeline": []}
        for _ in range(arguments.repeats):
            for what in seconds:
                output = str(Path(directory) / what)
                shutil.rmtree(output, ignore_errors=True)
                command = [sys.executable, __file__, "--measure", what, log, output]
                done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
                seconds[what].append(json.loads(done.stdout.splitlines()[-1])["seconds"])
        ratios = [a / b for a, b in zip(seconds["timeline"], seconds["bare"], strict=True)]
        print(f"{arguments.rows:,} rows x {arguments.features} features, skew {arguments.skew:g}")
        for what in seconds:
            median, least, most = statistics.median(seconds[what]), min(seconds[what]), max(seconds[what])
            print(f"  {what:9} {median:7.1f} s [{least:.1f}, {most:.1f}]")
        print(f"  ratio     {statistics.median(ratios):7.2f}   [{min(ratios):.2f}, {max(ratios):.2f}]")


if __name__ == "__main__":
    main()
