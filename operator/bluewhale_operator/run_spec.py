"""The body of a pipeline run for a job."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from bluewhale_operator.outcome import Object
from bluewhale_operator.training_job import parse
from pipelines.cluster import run_spec

# KFP's SDK keeps the pipeline that it compiles in a global variable.
_COMPILING = threading.Lock()


def build_run(job: Object, warm_start: str | None) -> Mapping[str, Any]:
    """Compile the job's pipeline; raises `JobError` when it cannot be."""
    meta = job["metadata"]
    told = {name: meta.get(name) or {} for name in ("annotations", "labels")}
    typed = parse(job)
    typed = typed.model_copy(update={"metadata": typed.metadata.model_copy(update=told)})
    with _COMPILING:
        return run_spec(typed, meta["uid"], meta["namespace"], warm_start)
