"""The client over runs on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from contracts.stage import alone
from pipelines import pipeline
from pipelines.client import ClientError, LocalClient, NotApplicableError, NotFoundError
from pipelines.client.local import PIPELINE

JOB = """\
apiVersion: bluewhale.io/v1alpha1
kind: RLTrainingJob
metadata: {name: shop}
spec: {actions: [left, right], data: {decisionLog: /nowhere.parquet}}
"""
RECORDS: dict[str, dict[str, Any]] = {
    "log": {"rows": 100, "episodes": 4},
    "timeline": {"rows_out": 100, "mdps": 4, "rows_quarantined": 0},
    "features": {"rows": 100, "features": ["x"]},
    "normalization": {"types": {"x": "continuous"}, "dropped": {}},
    "understanding": {"checks": {"markov": {"verdict": "pass", "reason": "no"}}},
    "training": {"epochs": 2, "transitions": 96, "digest": "ab" * 32},
    "evaluation": {"gate": {"verdict": "pass", "reason": "lower bound 1.2"}},
    "export": {"version": 17, "largest_difference": 1e-6, "digest": "ab" * 32},
    "rollout": {"reason": "every check of every step passed", "verdict": "promoted"},
}
CHECK = {"name": "reward", "verdict": "pass", "message": "better", "value": 2.0}
PROMOTED = {
    "verdict": "promoted",
    "stages": {},
    "gate": {"verdict": "pass", "reason": "lower bound 1.2"},
    "rollout": {
        "verdict": "promoted",
        "reason": "every check of every step passed",
        "steps": [{"weight": 0.1, "looks": [{"time": 1.0, "checks": [CHECK]}]}],
    },
}


def finish(directory: Path, *stages: str) -> None:
    for stage in stages:
        (directory / stage).mkdir(parents=True)
        record = {"stage": stage, "status": "succeeded", "seconds": 65.0, **RECORDS[stage]}
        (directory / stage / "stage.json").write_text(json.dumps(record))


@pytest.fixture
def client(tmp_path: Path) -> LocalClient:
    return LocalClient(tmp_path)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "shop"
    directory.mkdir()
    return directory


def end(run: Path, **result: Any) -> None:
    (run / "result.json").write_text(json.dumps(PROMOTED | result))


def test_the_stages_are_those_of_the_pipeline() -> None:
    assert tuple(pipeline.STAGES) == PIPELINE


def test_a_run_that_has_promoted(client: LocalClient, run: Path) -> None:
    finish(run, *RECORDS)
    end(run)
    status = client.get("shop").status
    assert (status.phase, status.reason) == ("Succeeded", "Promoted")
    assert {s.state for s in status.stages} == {"Succeeded"}
    assert status.stages[1].message == "100 transitions of 4 MDPs, 0 quarantined"
    assert status.rollout is not None
    assert status.rollout.weight == "100%"
    assert status.rollout.verdicts[-1].checks[0].message == "better"
    assert [job.name for job in client.jobs()] == ["shop"]


def test_a_run_of_a_log_of_its_own_has_neither_simulation_nor_rollout(client: LocalClient, run: Path) -> None:
    finish(run, *PIPELINE)
    end(run, verdict="exported", rollout=None)
    status = client.get("shop").status
    assert (status.phase, [s.name for s in status.stages]) == ("Succeeded", list(PIPELINE))


def test_a_run_that_was_stopped_by_the_gate(client: LocalClient, run: Path) -> None:
    finish(run, *list(RECORDS)[:-1])
    gate = {"verdict": "fail", "reason": "lower bound 0.4"}
    end(run, verdict="stopped_by_gate", gate=gate, rollout=None, stages={"rollout": {"status": "skipped"}})
    status = client.get("shop").status
    assert (status.phase, status.stages[-1].state) == ("StoppedByGate", "Skipped")
    assert [c.message for c in status.conditions if c.type == "Failed"] == ["lower bound 0.4"]


def test_a_run_that_failed_says_where_and_why(client: LocalClient, run: Path) -> None:
    finish(run, "log")
    (run / "error.json").write_text(json.dumps({"stage": "timeline", "error": "no column action"}))
    failed = {"timeline": {"status": "failed", "error": "no column action"}}
    end(run, verdict="failed", gate=None, rollout=None, stages=failed)
    status = client.get("shop").status
    assert (status.phase, status.stage, status.stages[1].state) == ("Failed", "timeline", "Failed")
    assert status.conditions[-1].message == "timeline: no column action"


def test_a_run_at_work_is_where_its_logs_are(client: LocalClient, run: Path) -> None:
    finish(run, "log")
    end(run)  # of the run before
    (run / "logs").mkdir()
    for stage in ("timeline", "training"):  # features came from the cache
        (run / "logs" / f"{stage}.log").write_text("at work\n")
    with alone(run):
        status = client.get("shop").status
    states = [s.state for s in status.stages]
    assert (status.phase, status.stage) == ("Running", "training")
    assert states == ["Succeeded"] * 5 + ["Running"] + ["Pending"] * 3


def test_a_canary_at_work(client: LocalClient, run: Path) -> None:
    finish(run, *list(RECORDS)[:-1])
    (run / "rollout").mkdir()
    (run / "rollout" / "state.json").write_text(json.dumps({"weight": 0.25}))
    with alone(run):
        status = client.get("shop").status
    assert status.phase == "RollingOut"
    assert status.rollout is not None
    assert status.rollout.weight == "25%"


def test_logs(client: LocalClient, run: Path) -> None:
    (run / "logs").mkdir()
    (run / "logs" / "training.log").write_text("epoch 1\nepoch 2\n")
    assert list(client.logs("shop", "training")) == ["epoch 1", "epoch 2"]
    assert list(client.logs("shop", "training", follow=True)) == ["epoch 1", "epoch 2"]
    with pytest.raises(NotFoundError, match="came from the cache"):
        list(client.logs("shop", "timeline"))
    with pytest.raises(NotFoundError, match="did you mean training"):
        list(client.logs("shop", "trainin"))


@pytest.mark.parametrize("verb", ["promote", "abort", "pause", "resume", "retry"])
def test_what_only_a_controller_does_is_refused(client: LocalClient, run: Path, verb: str) -> None:
    with pytest.raises(NotApplicableError, match=f"{verb} is for jobs in a cluster"):
        getattr(client, verb)("shop")


def test_a_run_that_is_not_there_brings_the_near_ones(client: LocalClient, run: Path) -> None:
    with pytest.raises(NotFoundError, match="did you mean shop"):
        client.get("shopp")


def test_submit_starts_a_run_that_watch_follows(client: LocalClient, tmp_path: Path) -> None:
    """The job's log is not there, so that the run ends soon."""
    job = tmp_path / "job.yaml"
    job.write_text(JOB)
    client.submit(job)
    *_, last = client.watch("shop")
    assert last.status.phase == "Failed"
    assert last.status.conditions[-1].message == "spec.data.decisionLog /nowhere.parquet: no such file or directory"


def test_a_run_at_work_is_neither_started_again_nor_deleted(client: LocalClient, run: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(JOB)
    with alone(run):
        with pytest.raises(ClientError, match="at work"):
            client.submit(job)
        with pytest.raises(ClientError, match="at work"):
            client.delete("shop")
    client.delete("shop")
    assert not run.exists()
