"""Start the training workers with TorchX, follow them, and keep what they made."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

from torchx.components.dist import torchrun
from torchx.runner import Runner, get_runner
from torchx.specs import AppState

from components.training.bundle import DESCRIPTION
from contracts.job import JobSpec
from contracts.progress import VARIABLE, parse, report
from contracts.stage import StageError, read_record, stage

ROLE = "worker"


def train(spec: JobSpec, features: str | Path, normalization: str | Path, output: str | Path) -> None:
    """Train on `spec.training.workers` gloo workers under torchrun; raises `StageError` with the workers' own words."""
    read_record(features), read_record(normalization)
    with stage("training", output) as (directory, facts):
        (directory / "job.json").write_text(spec.model_dump_json(by_alias=True))
        app = torchrun(
            "--job", str(directory / "job.json"), "--features", str(Path(features).absolute()),
            "--normalization", str(Path(normalization).absolute()), "--output", str(directory),
            m=f"components.training.{ROLE}", j=f"1x{spec.training.workers}",
            env={"OMP_NUM_THREADS": "1", VARIABLE: "1", "PET_LOCAL_RANKS_FILTER": "0", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        )  # fmt: skip
        # torchrun is found through PATH, which need not name this interpreter's environment.
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        logs = directory / "logs"
        with get_runner() as runner:
            _follow(runner, runner.run(app, scheduler="local_cwd", cfg={"log_dir": str(logs)}), logs)
        bundle = json.loads((directory / "policy" / DESCRIPTION).read_text())
        facts |= {
            "digest": bundle["digest"],
            "weights_digest": bundle["weights_digest"],
            "epochs": spec.training.epochs,
            "workers": spec.training.workers,
            "transitions": bundle["provenance"]["transitions"],
        }


def _follow(runner: Runner, handle: str, logs: Path) -> None:
    for line in runner.log_lines(handle, ROLE, k=0, should_tail=True):
        if done := parse(line):
            report(*done)
        else:
            print(line.rstrip("\n"), file=sys.stderr, flush=True)
    status = runner.wait(handle, wait_interval=0.2)
    if status is None or status.state != AppState.SUCCEEDED:
        message = f"training: the workers ended as {status.state.name if status else 'unknown'}"
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            message += f": {json.loads(status.structured_error_msg)['message']['message']}"
        raise StageError(f"{message}\n  the workers' logs are in {logs}")
