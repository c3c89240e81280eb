"""A log to learn from and the policy that made it, where a cluster's other stages find them."""

import hashlib
import json
import shutil
import uuid
from pathlib import Path

from components.export.repository import MODEL
from contracts.job import JobSpec
from contracts.stage import stage
from simulation.log import write_log
from simulation.policies import export_behaviour


def write_simulation(spec: JobSpec, output: str | Path, directory: str | Path) -> tuple[Path, Path]:
    """Write the log and the behaviour policy to `output`, and copy them to a directory below `directory`.

    The copy is named after the simulation's settings: a log never changes once a timeline may have read its path.
    Returns the copied log and the copied policy's version directory.
    """
    assert spec.simulation is not None
    with stage("simulation", output) as (made, facts):
        write_log(spec, made / "log")
        facts |= json.loads((made / "log" / "stage.json").read_text())
        policy = export_behaviour(spec.simulation.behaviour_policy, made / "model_repository", spec.export.backend)
        facts |= {"stage": "simulation", "behaviour_digest": policy["digest"]}
        copy = Path(directory) / hashlib.sha256(spec.only("simulation", "export").encode()).hexdigest()[:12]
        if not copy.exists():
            unfinished = copy.with_name(f".{copy.name}-{uuid.uuid4().hex[:8]}")
            shutil.copytree(made, unfinished)
            unfinished.rename(copy)
    return copy / "log" / "decisions.parquet", copy / "model_repository" / MODEL / str(policy["version"])
