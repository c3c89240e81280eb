"""Whole jobs, with every engine real: the example, its harmful twin, a log with broken rows, and a killed run."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from contracts.decision_log import SCHEMA
from contracts.job import ESTIMATORS

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "manifests" / "examples"
ENGINES = ("java", "tritonserver", "triton_python_backend_stub", "prometheus", "torchrun", "components.training.worker")

pytestmark = pytest.mark.timeout(3600)


def begin(*arguments: str | Path, cwd: Path, **how: Any) -> subprocess.Popen[Any]:
    command = [sys.executable, "-m", "pipelines.cli", *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k != "BLUEWHALE_COMMAND_ID"}
    return subprocess.Popen(command, cwd=cwd, env=environment | {"PYTHONPATH": str(ROOT)}, **how)


def bluewhale(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    process = begin(*arguments, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, errors = process.communicate(timeout=1800)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def result(cwd: Path, name: str) -> dict:
    return json.loads((cwd / "runs" / name / "result.json").read_text())


def engines_under(directory: Path) -> list[str]:
    """Command lines of Spark, torchrun, Triton and Prometheus processes that work in `directory`."""
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            if any(e in line for e in ENGINES) and (str(directory) in line or process.cwd().startswith(str(directory))):
                found.append(line)
        except psutil.Error:
            continue
    return found


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.2)
    return False


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("end-to-end")


@pytest.fixture(scope="module")
def promoted(workplace) -> dict:
    done = bluewhale("run", EXAMPLES / "cartpole.yaml", cwd=workplace)
    assert done.returncode == 0, done.stderr
    return result(workplace, "cartpole")


def test_the_example_ends_in_a_promoted_policy_that_is_truly_better(promoted):
    truth = promoted["evaluation"]["truth"]
    assert truth["policy"]["value"] >= 150
    assert truth["policy"]["value"] >= 3 * truth["behaviour"]["value"]
    assert promoted["verdict"] == "promoted"
    rollout = promoted["rollout"]
    assert rollout["verdict"] == "promoted"
    assert rollout["failed_requests"] == 0
    assert [step["weight"] for step in rollout["steps"]] == [0.1, 0.5, 1.0]
    assert all(step["outcome"] == "passed" for step in rollout["steps"])
    assert rollout["requests_after_verdict"] >= 100


def test_the_result_says_for_programs_what_the_report_says_for_people(promoted, workplace):
    for stage in (
        "log",
        "timeline",
        "features",
        "normalization",
        "understanding",
        "training",
        "evaluation",
        "export",
        "rollout",
    ):
        assert promoted["stages"][stage]["status"] == "succeeded"
        assert promoted["stages"][stage]["seconds"] > 0
    counts = promoted["timeline"]
    assert counts["rows_in"] == counts["rows_out"] + counts["rows_quarantined"]
    for estimator in ESTIMATORS:
        for metric in ("balanced", "fell", "tilt_degrees", "drift"):
            estimate = promoted["evaluation"][estimator][metric]
            assert estimate["low"] <= estimate["value"] <= estimate["high"]
    assert promoted["seed"] == 7
    assert promoted["versions"]["torch"].startswith("2.13")
    report = (workplace / "runs" / "cartpole" / "report.html").read_text()
    assert report.count("<svg") == 5
    assert "http://" not in report.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    for word in ("promoted", "cart_position", "Weighted sequential doubly robust", "candidate p99"):
        assert word in report


def test_nothing_is_left_running(promoted, workplace):
    assert wait_until(lambda: not engines_under(workplace), 10), engines_under(workplace)

    def forgotten():
        owners = {path.name: int(path.name.split("_")[1]) for path in Path("/dev/shm").glob("bluewhale_*")}
        return [name for name, owner in owners.items() if not psutil.pid_exists(owner)]

    assert wait_until(lambda: not forgotten(), 10), forgotten()


def test_the_log_that_serving_wrote_trains_the_next_policy(promoted, workplace):
    log = workplace / "runs" / "cartpole" / "rollout" / "log"
    job = yaml.safe_load((EXAMPLES / "cartpole.yaml").read_text())
    job["metadata"]["name"] = "next-day"
    del job["spec"]["simulation"]
    job["spec"]["data"] |= {"decisionLog": str(log / "decisions.jsonl"), "outcomes": str(log / "outcomes.jsonl")}
    path = workplace / "next-day.yaml"
    path.write_text(yaml.safe_dump(job))
    done = bluewhale("timeline", path, cwd=workplace)
    assert done.returncode == 0, done.stderr
    record = json.loads((workplace / "runs" / "next-day" / "timeline" / "stage.json").read_text())
    assert record["rows_out"] == promoted["rollout"]["requests"]
    # A call that its connection's end overtakes is sent again, and logged again.
    assert set(record["reasons"]) <= {"duplicate_step"}
    rows = pq.read_table(workplace / "runs" / "next-day" / "timeline" / "transitions").to_pandas()
    ended = rows[rows.terminal]
    assert all(dict(metrics)["fell"] == 1.0 for metrics in ended[ended.metrics.map(len) > 0].metrics)


def test_the_same_seed_gives_the_same_weights_and_finished_stages_are_not_redone(promoted, workplace):
    again = bluewhale("run", EXAMPLES / "cartpole.yaml", cwd=workplace)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("finished before") == 9
    fresh = workplace / "fresh"
    for stage in ("features", "normalization"):
        (fresh / "cartpole").mkdir(parents=True, exist_ok=True)
        (fresh / "cartpole" / stage).symlink_to((workplace / "runs" / "cartpole" / stage).resolve())
    trained = bluewhale("train", EXAMPLES / "cartpole.yaml", "--runs", fresh, cwd=workplace)
    assert trained.returncode == 0, trained.stderr
    record = json.loads((fresh / "cartpole" / "training" / "stage.json").read_text())
    assert record["weights_digest"] == promoted["training"]["weights_digest"]


def test_a_job_that_now_rewards_harm_is_stopped_by_the_gate_and_without_it_rolled_back(promoted, workplace):
    # Harm is told by rough values, too.
    changes = ("name: cartpole-harmful", "name: cartpole"), ("  evaluation:\n", "  evaluation:\n    fittedQSteps: 50\n")
    text = (EXAMPLES / "cartpole-harmful.yaml").read_text()
    harmful = functools.reduce(lambda text, change: text.replace(*change), changes, text)
    path = workplace / "harmful.yaml"
    path.write_text(harmful)
    stopped = bluewhale("run", path, cwd=workplace)
    assert stopped.returncode == 3, stopped.stderr
    assert "Stopped by the gate" in stopped.stderr
    assert stopped.stderr.count("finished before") == 4, "up to normalization, nothing hangs on what is rewarded"
    assert result(workplace, "cartpole")["verdict"] == "stopped_by_gate"
    assert "rollout" not in result(workplace, "cartpole")

    path.write_text(harmful.replace("enabled: true", "enabled: false"))
    rolled_back = bluewhale("run", path, cwd=workplace)
    assert rolled_back.returncode == 4, rolled_back.stderr
    rollout = result(workplace, "cartpole")["rollout"]
    assert rollout["verdict"] == "rolled_back"
    assert rollout["steps"][-1]["outcome"] == "failed"
    assert rollout["failed_requests"] == 0
    assert rollout["requests_after_verdict"] >= 100, "stable keeps serving"


def small_job(workplace: Path, name: str, **data: object) -> Path:
    job = yaml.safe_load((EXAMPLES / "cartpole.yaml").read_text())
    job["metadata"]["name"] = name
    job["spec"]["training"] |= {"epochs": 2, "stepsPerEpoch": 50}
    # Too little training for a good policy: what is asked here is whether the run comes to its end.
    job["spec"]["evaluation"] |= {"fittedQSteps": 50, "gate": {"enabled": False, "metric": "balanced"}}
    # Values that reach less far are fitted in a tenth of the steps.
    job["spec"]["reward"]["discount"] = 0.9
    job["spec"]["deploy"]["canary"]["weights"] = [0.5, 1.0]
    if data:
        del job["spec"]["simulation"]
        job["spec"]["data"] |= data
    path = workplace / f"{name}.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


BROKEN = {
    "missing_action": {"action": None},
    "probability_out_of_range": {"action_probability": 1.5},
    "non_finite_feature": {"state_features": [("pole_angle", float("nan"))]},
    "action_not_possible": {"possible_actions": ["left"], "action": "right"},
    "unknown_action": {"action": "jump"},
}


def test_a_log_with_broken_rows_runs_and_a_killed_run_carries_on(workplace):
    from contracts.job import load_job
    from simulation.log import write_log

    write_log(load_job(EXAMPLES / "cartpole.yaml").spec, workplace / "broken-log")
    table = pq.read_table(workplace / "broken-log" / "decisions.parquet")
    rows = table.slice(0, 10).to_pylist()
    broken = [rows[i] | change for i, change in enumerate(BROKEN.values())]
    broken.append(rows[6] | {"action_probability": 0.0})
    bad = pa.Table.from_pylist([*broken, rows[7]], schema=SCHEMA)  # the last is a duplicate step
    kept = table.filter(pa.array([i not in range(7) for i in range(len(table))]))
    log = workplace / "broken.parquet"
    pq.write_table(pa.concat_tables([kept, bad]), log)
    path = small_job(workplace, "broken", decisionLog=str(log))
    slow = ("epochs: 2", "epochs: 3"), ("stepsPerEpoch: 50", "stepsPerEpoch: 1000")
    path.write_text(functools.reduce(lambda text, change: text.replace(*change), slow, path.read_text()))

    run = workplace / "runs" / "broken"
    seen = {
        "features": lambda: "Executing task 'features'" in _read(run / "logs" / "features.log"),
        "training": lambda: list(run.glob("pipeline/*/training/policy/checkpoints/[0-9]*")),
    }
    kills = []
    for begun in seen.values():
        killed = begin("run", path, cwd=workplace, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        assert wait_until(begun, 600)
        assert wait_until(lambda: engines_under(workplace), 240)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        kills.append(time.time())
        assert wait_until(lambda: not engines_under(workplace), 90), engines_under(workplace)

    done = bluewhale("run", path, cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("finished before") == 4, "all before training was finished at the second kill"
    assert (run / "timeline" / "stage.json").stat().st_mtime < kills[0], "and the timeline at the first"
    first, last = (run / "training" / "epochs" / f"{epoch:03d}" / "bundle.json" for epoch in (1, 3))
    assert first.stat().st_mtime < kills[1] < last.stat().st_mtime, "training goes on from its last checkpoint"
    counts = result(workplace, "broken")["timeline"]
    assert counts["rows_in"] == len(table)
    assert counts["rows_in"] == counts["rows_out"] + counts["rows_quarantined"]
    expected = dict.fromkeys(BROKEN, 1) | {"probability_out_of_range": 2, "duplicate_step": 1}
    assert counts["reasons"] == expected
    quarantine = pq.read_table(run / "timeline" / "quarantine").to_pylist()
    assert sorted(row["quarantine_reason"] for row in quarantine) == sorted([*expected, "probability_out_of_range"])


def test_an_interrupt_leaves_nothing_behind_and_says_how_to_carry_on(workplace):
    path = small_job(workplace, "interrupted")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A shell that starts the tests in the background has them, and what they start, ignore interrupts.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    running = begin("run", path, cwd=workplace, start_new_session=True, preexec_fn=heard, **pipes)
    assert wait_until(lambda: engines_under(workplace), 240)
    os.killpg(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=90)
    assert running.returncode == 130
    assert b"carries on from the finished stages" in errors
    assert wait_until(lambda: not engines_under(workplace), 90), engines_under(workplace)


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
