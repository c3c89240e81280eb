"""How long it takes to identify features, next to Spark's `describe` of the same columns.

    PYTHONPATH=. python benchmarks/normalization.py --rows 1000000 --features 1000 --repeats 2

The features are of all sorts: normal, log-normal, few integers, 0 or 1, probabilities, mixtures; all miss some values.
`describe` is stopped when it takes longer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import measure


def generate(path: str, rows: int, features: int) -> None:
    from pyspark.sql import functions as F

    from components.spark import spark_session
    from contracts.stage import RECORD

    def values(i: int):  # type: ignore[no-untyped-def]
        sorts = [
            F.randn(i) * (i + 1) + i,
            F.exp(F.randn(i)),
            F.floor(F.rand(i) * 7),
            F.floor(F.rand(i) * 2),
            F.rand(i),
            F.randn(i) + F.when(F.rand(i + 1) < 0.5, -6.0).otherwise(6.0),
        ]
        value = sorts[i % len(sorts)].cast("double")
        return F.when(F.rand(i + 2) < 0.98, value).alias(f"state_x{i}")

    with spark_session("generate") as spark:
        keys = [F.col("id").cast("string").alias("mdp_id"), F.lit(1).alias("ordinal")]
        data = spark.range(0, rows, 1, max(2, rows // 20_000)).select(*keys, *map(values, range(features)))
        data.write.parquet(f"{path}/training")
    names = [f"x{i}" for i in range(features)]
    (Path(path) / RECORD).write_text(json.dumps({"stage": "features", "features": names}))


def describe(path: str, _: str) -> None:
    from components.spark import spark_session

    with spark_session("describe") as spark:
        spark.read.parquet(f"{path}/training").drop("mdp_id", "ordinal").describe().collect()


def identify(path: str, output: str) -> None:
    from components.normalization.identify import identify_features
    from contracts.job import JobSpec

    identify_features(JobSpec.model_validate({"actions": ["a", "b"]}), path, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        what, *paths = arguments.measure
        {"describe": describe, "identify": identify}[what](*paths)
        return
    with tempfile.TemporaryDirectory() as directory:
        data, output = str(Path(directory) / "features"), str(Path(directory) / "output")
        code = (
            f"from benchmarks.normalization import generate; generate({data!r}, {arguments.rows}, {arguments.features})"
        )
        subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
        ratios, slower = [], 0
        for _ in range(arguments.repeats):
            command = [sys.executable, __file__, "--measure"]
            ours = measure([*command, "identify", data, output])
            if ours is None:
                sys.exit(1)
            print(f"  identify   {ours.seconds:7.1f} s  {ours.gibibytes:.1f} GiB", flush=True)
            theirs = measure([*command, "describe", data, output], limit=ours.seconds)
            if theirs is None:
                slower += 1
                print(f"  describe   had not ended after {ours.seconds:.1f} s", flush=True)
                continue
            print(f"  describe   {theirs.seconds:7.1f} s  {theirs.gibibytes:.1f} GiB", flush=True)
            ratios.append(ours.seconds / theirs.seconds)
    print(f"{arguments.rows:,} rows x {arguments.features:,} features: identify / describe")
    if ratios:
        print(f"  ratio {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")
    print(f"  below 1 in {slower + sum(ratio < 1 for ratio in ratios)} of {arguments.repeats}")


if __name__ == "__main__":
    main()
