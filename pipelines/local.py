"""`bluewhale run`: a job from its log to a promoted policy on this machine, carrying on where it was stopped."""

from __future__ import annotations

import contextlib
import glob
import io
import itertools
import json
import logging
import os
import platform
import re
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version as version_of_package
from pathlib import Path
from typing import Any

from rich.markup import escape

from contracts import progress
from contracts.job import Data, RLTrainingJob, split_paths
from contracts.stage import EARLIER_VARIABLE, ERROR_FILE_VARIABLE, RECORD, StageError, code_version, digest_files
from pipelines.display import Display
from pipelines.pipeline import STAGES, build_pipeline, parameters

PACKAGES = (
    "torch", "kfp", "feast", "pyspark", "onnx", "onnxruntime", "torchx-nightly", "tritonclient", "gymnasium",
)  # fmt: skip
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_STARTED = re.compile(r"Executing task '([^']+)'")
_FINISHED = re.compile(r"Task '([^']+)' finished with status (\w+)")


@dataclass
class Run:
    """The directory of a job's run, and what is known of its stages."""

    job: RLTrainingJob
    directory: Path
    result: dict[str, Any] = field(default_factory=dict)

    def path(self, stage: str) -> Path:
        return self.directory / stage

    def record(self, stage: str) -> dict[str, Any] | None:
        path = self.path(stage) / RECORD
        return json.loads(path.read_text()) if path.is_file() else None

    @property
    def decision_log(self) -> str:
        """The job's decision log, or the one that its simulation makes."""
        given = self.job.spec.data.decision_log
        return given or str(self.path("log") / "decisions.parquet")


def run_job(run: Run, display: Display, warm_start: str = "") -> int:
    """Run every stage that is not finished; returns the exit code and leaves result.json and report.html.

    Training begins with the policy bundle at `warm_start`, if that is given.

    0: promoted. 1: a stage failed (raises `StageError`). 3: stopped by the gate. 4: rolled back by the canary.
    """
    from pipelines.report import write_report

    run.directory.mkdir(parents=True, exist_ok=True)
    spec = run.job.spec
    run.result = {
        "job": run.job.metadata.name,
        "verdict": "failed",
        "seed": spec.seed,
        "stages": {},
        "versions": _versions(),
    }
    # What an earlier run left is not this one's: stages that are still good come back from the cache.
    (run.directory / "report.html").unlink(missing_ok=True)
    for stage in STAGES:
        if run.path(stage).is_symlink():
            run.path(stage).unlink()
        else:
            shutil.rmtree(run.path(stage), ignore_errors=True)
    try:
        if spec.simulation:
            log(run, display)
        train_and_evaluate(run, display, warm_start)
        collect(run)
        for warning in run.result["warnings"]:
            display.say(f"[yellow]{escape(warning)}[/]")
        if spec.simulation:
            from simulation.truth import true_returns

            display.start("truth", "playing fresh episodes")
            started = time.time()
            run.result["evaluation"]["truth"] = true_returns(spec, policy_version(run))
            display.finish("truth", time.time() - started)
        gate = run.result["gate"]
        if gate["verdict"] not in ("pass", "disabled"):
            run.result["verdict"] = "stopped_by_gate"
            display.say(f"[bold red]Stopped by the gate[/]: {gate['reason']}")
            run.result["stages"]["rollout"] = {"status": "skipped", "seconds": 0.0}
            return 3
        if spec.simulation:
            rollout(run, display)
            run.result["verdict"] = run.result["rollout"]["verdict"]
            return 0 if run.result["verdict"] == "promoted" else 4
        run.result["verdict"] = "exported"
        how = "serve the exported policy with `bluewhale serve`"
        if spec.action_space != "discrete":
            how = f"{run.path('export') / 'model_repository'} is a model repository for Triton"
        display.say(f"No spec.simulation plays live traffic here: {how}.")
        return 0
    finally:
        collect(run)
        (run.directory / "result.json").write_text(json.dumps(run.result, indent=2))
        if run.result["verdict"] != "failed":
            write_report(run.job, run.result, run.directory)


def log(run: Run, display: Display) -> None:
    """Make the decision log, unless the same one is there."""
    from simulation.log import write_log

    simulation = run.job.spec.simulation
    assert simulation is not None
    record = run.record("log")
    if record and record["settings"] == simulation.model_dump(by_alias=True) | {"seed": run.job.spec.seed}:
        display.finish("log", record["seconds"], cached=True)
        return
    display.start("log", f"{simulation.episodes} episodes of {simulation.environment}")
    write_log(run.job.spec, run.path("log"))
    made = run.record("log")
    assert made is not None
    display.finish("log", made["seconds"], text=f"{made['rows']:,} decisions")


def _alternatives(pattern: str) -> list[str]:
    """A pattern with its `{a,b}`, which Spark knows and Python's glob does not, written out."""
    if not (braces := re.search(r"\{([^{}]*)\}", pattern)):
        return [pattern]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [one for part in braces[1].split(",") for one in _alternatives(before + part + after)]


def train_and_evaluate(run: Run, display: Display, warm_start: str = "") -> None:
    """Run the KFP pipeline with its cache, and link each stage's directory into the run's; raises `StageError`."""
    from kfp import local

    error_file = run.directory / "error.json"
    error_file.unlink(missing_ok=True)
    settings = run.job.spec.data.placed(Path.cwd())
    decision_log = settings.decision_log or str(Path(run.decision_log).absolute())
    data = features_of(settings)
    inputs = (
        ("decisionLog", settings.format, decision_log),
        ("outcomes", settings.outcome_format, settings.outcomes or ""),
    )
    for name, form, text in inputs:
        for path in split_paths(text) if form != "table" else []:
            # What lies elsewhere stands for itself by its name.
            found = (
                [] if "://" in path else sorted(Path(one) for each in _alternatives(path) for one in glob.glob(each))
            )
            if not found and "://" not in path:
                raise StageError(f"spec.data.{name} {path}: no such file or directory")
            data += found
    version = f"{code_version()}-{digest_files(*data)[:12]}"
    spec = run.job.spec.model_copy(update={"data": settings})
    arguments = parameters(spec, decision_log, version, warm_start=warm_start)
    temporary = run.directory / "tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    root = run.directory.absolute() / "pipeline"
    environment = {
        EARLIER_VARIABLE: os.pathsep.join(broken_off_trainings(root)),
        "TMPDIR": str(temporary.absolute()),
        ERROR_FILE_VARIABLE: str(error_file.absolute()),
        progress.VARIABLE: "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }
    output = _Output(run.directory / "logs", display)
    with _environment(environment), _quiet_kfp(output), contextlib.redirect_stdout(output):
        local.init(
            runner=local.SubprocessRunner(use_venv=False),
            pipeline_root=str(root),
            enable_caching=True,
            cache_root=str(root / "cache"),
            workspace_root=str(temporary.absolute() / "workspace"),
        )
        try:
            task = build_pipeline(run.job.metadata.name, sweep=bool(run.job.spec.sweep))(**arguments)
        except RuntimeError as error:
            if not error_file.is_file():
                raise StageError(f"{_ANSI.sub('', str(error))}\n  its output is in {run.directory / 'logs'}") from None
            failed = json.loads(error_file.read_text())
            display.fail(failed["stage"])
            run.result["stages"][failed["stage"]] = {"status": "failed", "error": failed["error"]}
            raise StageError(
                f"{failed['stage']}: {failed['error']}\n  its output is in {run.directory / 'logs'}"
            ) from None
    shutil.rmtree(temporary, ignore_errors=True)
    for stage in STAGES:
        link, target = run.path(stage), Path(task.outputs[stage].path)  # type: ignore[attr-defined]
        link.symlink_to(os.path.relpath(target, link.parent))
        record = run.record(stage)
        assert record is not None
        display.finish(stage, record["seconds"], cached=stage not in output.executed)


def kept_policy(run: Run, given: str) -> str:
    """A copy of a policy bundle in the run's directory, named by its digest: what is given may be what the run writes
    anew, or another policy tomorrow. Empty where nothing is given; raises `StageError` where no bundle is."""
    if not given:
        return ""
    from components.training.bundle import read_bundle

    place = run.directory.absolute() / "warm_start" / read_bundle(given).digest[:12]
    if not place.exists():
        draft = place.with_name(f".{place.name}")
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(given, draft)
        draft.rename(place)
    return str(place)


def broken_off_trainings(root: Path) -> list[str]:
    """Where the trainings since the last finished one are, the last first: KFP has a new place for each attempt."""
    attempts = sorted(root.glob("*/training"), reverse=True)
    # What KFP's executor writes last; before that, nothing is in the cache.
    return [str(place) for place in itertools.takewhile(lambda a: not (a / "executor_output.json").exists(), attempts)]


def features_of(data: Data) -> list[Path]:
    """The files of the job's feature repository, without the databases that Feast itself writes there."""
    if not data.features.repository:
        return []
    files = (p for p in Path(data.features.repository).rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return sorted(p for p in files if ".db" not in p.name and not p.name.startswith("."))


def policy_version(run: Run) -> Path:
    """The version directory that the export stage wrote."""
    from components.export.repository import MODEL

    record = run.record("export")
    if record is None:
        raise StageError(f"{run.path('export')}: nothing exported yet; run `bluewhale export` first")
    return run.path("export") / "model_repository" / MODEL / str(record["version"])


def rollout(run: Run, display: Display) -> None:
    """Serve the policy beside the behaviour policy, play live traffic, and move it over on evidence."""
    from serving.rollout import roll_out
    from serving.service import serve
    from simulation.traffic import Traffic

    spec = run.job.spec
    directory = run.path("rollout")
    canary = spec.deploy.canary
    exported = run.record("export")
    assert exported is not None
    settings = {"policy": exported["digest"], "seed": spec.seed, "canary": canary.model_dump(by_alias=True)}
    record = run.record("rollout")
    if record and record.get("settings") == settings and record["verdict"] == "promoted":
        run.result["rollout"] = {k: v for k, v in record.items() if k not in ("stage", "status", "seconds", "settings")}
        run.result["stages"]["rollout"] = {"status": "succeeded", "seconds": record["seconds"]}
        display.finish("rollout", record["seconds"], cached=True)
        return
    display.start("rollout", "starting Triton and Prometheus")
    started = time.time()
    shutil.rmtree(directory, ignore_errors=True)
    stable = export_stable(run)
    salt = f"{run.job.metadata.name}-{spec.seed}"
    candidate = run.path("export") / "model_repository"
    with serve(directory, stable, candidate, canary, salt) as endpoints:
        with Traffic(endpoints.grpc, spec.seed) as traffic:
            outcome = roll_out(
                canary,
                Path(endpoints.state_file),
                Path(endpoints.decision_log),
                endpoints.prometheus,
                spec.reward.metric_weights,
                progress=lambda share, text: display.progress("rollout", share, 1.0, text),
            )
            before = traffic.counts["requests"]
            deadline = time.monotonic() + 10
            # The traffic goes on under the new state: the service must still answer.
            while traffic.counts["requests"] < before + 100 and time.monotonic() < deadline:
                time.sleep(0.2)
        outcome |= {name: traffic.counts[name] for name in ("requests", "failed_requests", "fallbacks", "episodes")}
        outcome["last_error"] = traffic.last_error
        outcome["requests_after_verdict"] = traffic.counts["requests"] - before
    seconds = round(time.time() - started, 2)
    (directory / RECORD).write_text(
        json.dumps(
            {"stage": "rollout", "status": "succeeded", "seconds": seconds, "settings": settings} | outcome, indent=2
        )
    )
    run.result["rollout"] = outcome
    run.result["stages"]["rollout"] = {"status": "succeeded", "seconds": seconds}
    display.finish("rollout", seconds, text=outcome["verdict"].replace("_", " "))


def export_stable(run: Run) -> Path:
    """The behaviour policy as a model repository, the stable version that a first rollout starts from."""
    from simulation.policies import export_behaviour

    spec = run.job.spec
    if spec.simulation is None:
        raise StageError("no stable policy to serve beside the new one: this job has no spec.simulation")
    repository = run.path("stable") / "model_repository"
    if run.path("stable").exists():
        shutil.rmtree(run.path("stable"))
    export_behaviour(spec.simulation.behaviour_policy, repository, spec.export.backend)
    return repository


def collect(run: Run) -> None:
    """Put into the result what the finished stages left."""
    result = run.result
    result["warnings"] = [
        f"{stage}: {text}" for stage in STAGES for text in (run.record(stage) or {}).get("warnings", [])
    ]
    for stage in ("log", *STAGES):
        record = run.record(stage)
        if record and stage not in result["stages"]:
            result["stages"][stage] = {"status": record["status"], "seconds": record["seconds"]}
    if record := run.record("timeline"):
        result["timeline"] = {k: record[k] for k in ("rows_in", "rows_out", "rows_quarantined", "reasons", "mdps")}
    if record := run.record("training"):
        told = ("digest", "weights_digest", "transitions", "workers", "epochs", "warm_start")
        result["training"] = {k: record[k] for k in told}
    report = run.path("evaluation") / "report.json"
    if run.record("evaluation") and "evaluation" not in result:
        document = json.loads(report.read_text())
        result["evaluation"] = document["final"]
        result["gate"] = document["gate"]


class _Output(io.TextIOBase):
    """What KFP and its tasks print: a log file for each stage, and progress for the display."""

    def __init__(self, logs: Path, display: Display) -> None:
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir(parents=True)
        self.logs, self.display = logs, display
        self.executed: set[str] = set()
        self.stage, self.started = "pipeline", 0.0
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(_ANSI.sub("", line))
        return len(text)

    def _line(self, line: str) -> None:
        if done := progress.parse(line):
            self.display.progress(self.stage, *done)
            return
        if (match := _STARTED.search(line)) and match[1] in STAGES:
            self.stage = match[1]
            for earlier in STAGES[: STAGES.index(self.stage)]:
                if earlier not in self.executed:
                    self.display.finish(earlier, 0.0, cached=True)
            self.executed.add(self.stage)
            self.started = time.time()
            self.display.start(self.stage)
        with (self.logs / f"{self.stage}.log").open("a") as stream:
            stream.write(line.removeprefix("    ") + "\n")
        if (match := _FINISHED.search(line)) and match[1] == self.stage:
            if match[2] == "SUCCESS":
                self.display.finish(self.stage, time.time() - self.started)
            self.stage = "pipeline"


@contextlib.contextmanager
def _quiet_kfp(output: _Output) -> Iterator[None]:
    """Send KFP's own log lines where its tasks' output goes."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers, root.level = [logging.StreamHandler(output)], logging.INFO
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            root.handlers, root.level = handlers, level


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "bluewhale": code_version()} | {
        name: version_of_package(name) for name in PACKAGES
    }
