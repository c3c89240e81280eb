"""A job's verbs over the runs that `bluewhale run` leaves on this machine."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from contracts.job import load_job
from contracts.stage import RECORD, compact
from contracts.status import (
    LAST_VERDICTS,
    CheckStatus,
    Condition,
    JobStatus,
    LookStatus,
    Reason,
    RolloutStatus,
    StageStatus,
)
from pipelines import reaper
from pipelines.client.protocol import Asked, Client, ClientError, Job, NotApplicableError, NotFoundError, unknown

# What pipelines.pipeline calls STAGES; that module brings KFP along, which a look at a run has no need of.
PIPELINE = ("timeline", "features", "normalization", "understanding", "training", "evaluation", "export")
SIMULATED = ("log", *PIPELINE, "rollout")
OUTCOMES: dict[str, tuple[Any, Reason]] = {
    "promoted": ("Succeeded", Reason.PROMOTED),
    "exported": ("Succeeded", Reason.GATE_PASSED),
    "stopped_by_gate": ("StoppedByGate", Reason.STOPPED_BY_GATE),
    "rolled_back": ("RolledBack", Reason.ROLLED_BACK),
    "failed": ("Failed", Reason.STAGE_FAILED),
}
OUTPUT = "run.log"
START_SECONDS = 30.0
LOOK_SECONDS = 0.5


class LocalClient(Client):
    """The runs below a directory."""

    def __init__(self, runs: str | Path = "runs") -> None:
        self.runs = Path(runs)

    def jobs(self) -> list[Job]:
        names = sorted(p.name for p in self.runs.iterdir() if p.is_dir()) if self.runs.is_dir() else []
        return [self.get(name) for name in names]

    def get(self, name: str) -> Job:
        directory = self._directory(name)
        status = _at_work(directory) if _locked(directory) else _ended(directory)
        created = _time(min(p.stat().st_mtime for p in (directory, *directory.iterdir())))
        return Job(name=name, place=str(directory), created=created, status=status)

    def watch(self, name: str) -> Iterator[Job]:
        last = None
        while True:
            at_work = _locked(self._directory(name))
            job = self.get(name)
            if job != last:
                yield job
            if job.ended or not at_work:
                return
            last = job
            time.sleep(LOOK_SECONDS)

    def logs(self, name: str, stage: str, follow: bool = False, worker: int | None = None) -> Iterator[str]:
        directory = self._directory(name)
        if stage not in _stages(directory):
            raise unknown("stage", stage, _stages(directory), f"run {name}")
        path = directory / "logs" / f"{stage}.log"
        if stage == "rollout":
            path = directory / stage / "triton.log"
        if worker is not None:
            raise NotApplicableError(f"logs: the workers of {name} write into one log here; leave --worker out")
        if not path.exists():
            raise NotFoundError(f"{path}: stage {stage} has logged nothing: it was not run, or came from the cache")
        with path.open(errors="replace") as stream:
            while True:
                at_work = follow and _locked(directory)
                yield from (line.rstrip("\n") for line in stream)
                if not at_work:
                    return
                time.sleep(LOOK_SECONDS)

    def promote(self, name: str) -> Asked:
        self._refuse("promote", "its canary decides by itself, and ends with the run")

    def abort(self, name: str) -> Asked:
        self._refuse("abort", "end it by Ctrl-C where it was started")

    def pause(self, name: str) -> Asked:
        self._refuse("pause", "end it by Ctrl-C where it was started; the same command goes on from there")

    def resume(self, name: str) -> Asked:
        self._refuse("resume", "`bluewhale run` goes on from the stages that are finished")

    def retry(self, name: str) -> Asked:
        self._refuse("retry", "`bluewhale run` goes on from the stages that are finished")

    def submit(self, file: str | Path) -> Job:
        """Start `bluewhale run` in the background; what it says is in the run's `run.log`."""
        name = load_job(file).metadata.name
        directory = self.runs / name
        if _locked(directory):
            raise ClientError(f"{directory}: another command is at work here; wait for it, or end it")
        directory.mkdir(parents=True, exist_ok=True)
        # It outlives this process, and watches over its own children.
        environment = {k: v for k, v in os.environ.items() if k != reaper.MARK}
        with (directory / OUTPUT).open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "pipelines.cli", "run", str(Path(file)), "--runs", str(self.runs)],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while not _locked(directory) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.get(name)

    def delete(self, name: str) -> None:
        directory = self._directory(name)
        if _locked(directory):
            raise ClientError(f"{directory}: a command is at work here; end it first")
        shutil.rmtree(directory)

    def _directory(self, name: str) -> Path:
        if not (self.runs / name).is_dir():
            names = [p.name for p in self.runs.iterdir() if p.is_dir()] if self.runs.is_dir() else []
            raise unknown("run", name, names, str(self.runs))
        return self.runs / name

    def _refuse(self, verb: str, instead: str) -> NoReturn:
        raise NotApplicableError(f"{verb} is for jobs in a cluster; a run on this machine has no controller: {instead}")


def _locked(directory: Path) -> bool:
    """Whether a command holds the run, as `contracts.stage.alone` has it."""
    try:
        with (directory / ".lock").open() as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _stages(directory: Path) -> tuple[str, ...]:
    """Only a simulation makes a log, and plays the traffic of a rollout."""
    return SIMULATED if (directory / "log").exists() else PIPELINE


def _at_work(directory: Path) -> JobStatus:
    """The stages' directories appear when the pipeline is over; until then the logs tell how far it is."""
    logged = [stage for stage in PIPELINE if (directory / "logs" / f"{stage}.log").exists()]
    if "rollout" in _stages(directory) and (directory / "export" / RECORD).exists():
        now = "rollout"
    elif (directory / "log").exists() and not (directory / "log" / RECORD).exists():
        now = "log"
    else:
        now = logged[-1] if logged else "timeline"
    names = _stages(directory)
    before, after = names[: names.index(now)], names[names.index(now) + 1 :]
    stages = [_finished(directory, name) or StageStatus(name=name, state="Succeeded") for name in before]
    stages += [StageStatus(name=now, state="Running"), *(StageStatus(name=name) for name in after)]
    status = JobStatus(phase="Running", stage=now, stages=stages)
    state = directory / "rollout" / "state.json"
    if now == "rollout" and state.exists():
        status.phase, status.reason = "RollingOut", Reason.IN_PROGRESS
        weight = json.loads(state.read_text()).get("weight", 0.0)
        status.rollout = RolloutStatus(service=directory.name, weight=f"{weight:.0%}")
    return status


def _ended(directory: Path) -> JobStatus:
    path = directory / "result.json"
    result = json.loads(path.read_text()) if path.exists() else {"stages": {}}
    stages = []
    for stage in _stages(directory):
        told = result["stages"].get(stage, {})
        if told.get("status") == "failed":
            stages.append(StageStatus(name=stage, state="Failed", message=told["error"][:4096]))
        elif told.get("status") == "skipped":
            stages.append(StageStatus(name=stage, state="Skipped"))
        else:
            stages.append(_finished(directory, stage) or StageStatus(name=stage))
    done = [s.name for s in stages if s.state not in ("Pending", "Skipped")]
    status = JobStatus(stages=stages, stage=done[-1] if done else "")
    if "verdict" not in result:
        return status
    status.phase, reason = OUTCOMES[result["verdict"]]
    status.reason, status.completion_time = reason, _time(path.stat().st_mtime)

    def condition(type: str, value: bool, reason: Reason, message: str, since: str | None = None) -> None:
        status.conditions.append(
            Condition(
                type=type, status="True" if value else "False", reason=reason, message=message,
                last_transition_time=since or status.completion_time or "",
            )
        )  # fmt: skip

    message = _last_words(directory) if reason == Reason.STAGE_FAILED else ""
    if gate := result.get("gate"):
        verdicts = {"pass": Reason.GATE_PASSED, "disabled": Reason.GATE_DISABLED}
        message = message or gate["reason"]
        condition(
            "Evaluated", gate["verdict"] in verdicts, verdicts.get(gate["verdict"], Reason.STOPPED_BY_GATE),
            gate["reason"],
        )  # fmt: skip
    if outcome := result.get("rollout"):
        message = outcome["reason"]
        condition("RolledOut", status.phase == "Succeeded", reason, message, stages[-1].completion_time)
        status.rollout = _rollout(directory.name, outcome)
    condition("Complete" if status.phase == "Succeeded" else "Failed", True, reason, message)
    return status


def _finished(directory: Path, stage: str) -> StageStatus | None:
    path = directory / stage / RECORD
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    end = path.stat().st_mtime
    # The job in a cluster has a simulation where a run has its log.
    told = compact({**record, "stage": "simulation" if stage == "log" else stage}, path.parent)
    return StageStatus(
        name=stage, state="Succeeded", attempts=1, message=told["message"],
        start_time=_time(end - record["seconds"]), completion_time=_time(end),
    )  # fmt: skip


def _rollout(name: str, outcome: dict[str, Any]) -> RolloutStatus:
    looks = [
        LookStatus(
            time=f"{look['time']:.0f} s",
            weight=f"{step['weight']:.0%}",
            checks=[CheckStatus.model_validate(check) for check in look["checks"]],
        )
        for step in outcome["steps"]
        for look in step["looks"]
    ]
    weight = "100%" if outcome["verdict"] == "promoted" else "0%"
    step = max(0, len(outcome["steps"]) - 1)
    return RolloutStatus(service=name, weight=weight, step=step, verdicts=looks[-LAST_VERDICTS:])


def _last_words(directory: Path) -> str:
    """Why the run failed, from whoever wrote it down."""
    error = directory / "error.json"
    if error.exists():
        told = json.loads(error.read_text())
        return f"{told['stage']}: {told['error']}"
    output = directory / OUTPUT
    text = output.read_text(errors="replace") if output.exists() else ""
    return text.rpartition("error: ")[2].strip() or "interrupted, or failed before its first stage"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
