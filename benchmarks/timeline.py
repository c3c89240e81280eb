"""How long the timeline takes, next to the bare Spark job that reads, shuffles by MDP, sorts and writes the same rows.

    export PYTHONPATH=.
    python benchmarks/timeline.py --rows 1000000 --features 50 --repeats 3
    python benchmarks/timeline.py --rows 1000000 --format json --ours bare timeline
    python benchmarks/timeline.py --rows 1000000 10000000 --against duckdb polars --python .venv-bench/bin/python

Each measurement is a process of its own, JVM and imports included; they take turns. Printed are seconds, the most
memory, and the ratio of seconds to the bare job of the same turn, as median and range.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import Measured, measure

LENGTH = 50  # decisions of an MDP, on average
COLUMNS = (
    "mdp_id string, sequence_number bigint, event_time timestamp, state_features map<string,double>, action string, "
    "action_probability double, metrics map<string,double>"
)
OURS = ("bare", "timeline", "full rows")
OTHERS = {name: Path(__file__).with_name(f"timeline_{name}.py") for name in ("duckdb", "polars")}


def generate(path: str, rows: int, features: int, skew: float, form: str) -> None:
    """A log of normal features, two metrics and two actions; one MDP holds the share `skew` of all rows."""
    from pyspark.sql import functions as F

    from components.spark import spark_session

    with spark_session("generate") as spark:
        log = spark.range(0, rows, 1, max(2, rows // 500_000))
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
        ).write.format(form).save(path)


def bare(log: str, output: str) -> None:
    from components.spark import spark_session

    with spark_session("bare") as spark:
        # Not given the columns, Spark would read all JSON lines to find them.
        rows = spark.read.schema(COLUMNS).json(log) if any(Path(log).glob("*.json")) else spark.read.parquet(log)
        rows.repartition("mdp_id").sortWithinPartitions("mdp_id", "sequence_number").write.parquet(output)


def timeline(log: str, output: str, full: bool = False) -> None:
    from components.timeline.build import build_timeline
    from contracts.job import JobSpec

    job = {"actions": ["left", "right"], "data": {"fullRows": full}}
    build_timeline(JobSpec.model_validate(job), log, None, output)


def run(what: str, log: str, output: str) -> None:
    """One measurement's work."""
    if what == "bare":
        bare(log, output)
    else:
        timeline(log, output, full=what == "full rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--features", type=int, default=50)
    parser.add_argument("--format", choices=("parquet", "json"), default="parquet", help="of the log")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skew", type=float, default=0.0, help="share of all rows that one MDP holds")
    parser.add_argument("--ours", nargs="*", choices=OURS, default=list(OURS))
    parser.add_argument("--against", nargs="*", choices=sorted(OTHERS), default=[])
    parser.add_argument("--python", default=sys.executable, help="interpreter that has duckdb and polars")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.format != "parquet" and arguments.against:
        parser.error("the other engines are measured on Parquet")
    if arguments.measure:
        run(*arguments.measure)
        return
    everything: list[dict[str, Any]] = []
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as directory:
            log, output = str(Path(directory) / "log"), str(Path(directory) / "output")
            # In a process of its own: a JVM that is there already would be warm.
            call = f"generate({log!r}, {rows}, {arguments.features}, {arguments.skew}, {arguments.format!r})"
            code = f"from benchmarks.timeline import generate; {call}"
            subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
            found: dict[str, list[Measured | None]] = {}
            for _ in range(arguments.repeats):
                for what in (*arguments.ours, *arguments.against):
                    command = [sys.executable, __file__, "--measure", what, log, output]
                    if what in OTHERS:
                        command = [arguments.python, str(OTHERS[what]), log, output]
                    found.setdefault(what, []).append(measure(command))
                    remove(output)
        everything += report(rows, arguments.features, arguments.skew, found)
    report_growth(everything)
    if arguments.json:
        arguments.json.write_text(json.dumps(everything, indent=2))


def remove(path: str) -> None:
    shutil.rmtree(path, ignore_errors=True)
    Path(path).unlink(missing_ok=True)


def report(rows: int, features: int, skew: float, found: dict[str, list[Measured | None]]) -> list[dict[str, Any]]:
    """Print and return the figures of one log."""
    print(f"{rows:,} rows x {features} features" + (f", one MDP with {skew:.0%} of the rows" if skew else ""))
    figures = []
    for what, runs in found.items():
        finished = [m for m in runs if m]
        if not finished:
            print(f"  {what:10} did not finish")
            continue
        seconds = sorted(m.seconds for m in finished)
        memory = max(m.gibibytes for m in finished)
        ratios = [m.seconds / b.seconds for m, b in zip(runs, found.get("bare", []), strict=False) if m and b]
        ratio = f"{statistics.median(ratios):5.2f} [{min(ratios):.2f}, {max(ratios):.2f}]" if ratios else ""
        median = statistics.median(seconds)
        print(
            f"  {what:10} {median:7.1f} s [{seconds[0]:.1f}, {seconds[-1]:.1f}]  {memory:5.1f} GiB  "
            f"{1e6 * median / rows:6.1f} us a row  {ratio}",
            flush=True,
        )
        figures.append(
            {"rows": rows, "skew": skew, "what": what, "seconds": seconds, "gibibytes": memory, "ratios": ratios}
        )
    return figures


def report_growth(figures: list[dict[str, Any]]) -> None:
    """Print what each further row takes from one size to the next: start-up, the same for all sizes, is not in it."""
    for what in dict.fromkeys(figure["what"] for figure in figures):
        medians = sorted((f["rows"], statistics.median(f["seconds"])) for f in figures if f["what"] == what)
        for (fewer, shorter), (more, longer) in itertools.pairwise(medians):
            each = 1e6 * (longer - shorter) / (more - fewer)
            print(f"  {what:10} {each:6.1f} us for each row from {fewer:,} to {more:,}")


if __name__ == "__main__":
    main()
