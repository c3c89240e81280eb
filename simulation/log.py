"""`bluewhale log`: a decision log of the behaviour policy, with its exact propensities."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from contracts.decision_log import SCHEMA
from contracts.job import JobSpec
from contracts.stage import stage
from simulation.cartpole import ACTIONS, FEATURES, METRICS, play
from simulation.policies import behaviour_digest, behaviour_policy, check_job

START = datetime(2026, 1, 1, tzinfo=UTC)
STEP_MICROSECONDS = 20_000  # CartPole's time step is 0.02 s


def write_log(spec: JobSpec, output: str | Path) -> None:
    """Play `simulation.episodes` episodes and write `decisions.parquet` to `output`; the same seed, the same log."""
    check_job(spec)
    assert spec.simulation is not None
    with stage("log", output) as (directory, facts):
        simulation = spec.simulation
        played = play(behaviour_policy(simulation.behaviour_policy), simulation.episodes, spec.seed)
        n = len(played.action)
        start = np.datetime64(START.replace(tzinfo=None), "us")
        offset = (
            played.episode * int(timedelta(minutes=1) / timedelta(microseconds=1)) + played.step * STEP_MICROSECONDS
        )
        table = pa.table(
            {
                "mdp_id": [f"episode-{e:06d}" for e in played.episode],
                "sequence_number": played.step,
                "event_time": pa.array(start + offset.astype("timedelta64[us]")).cast(pa.timestamp("us", "UTC")),
                "state_features": _maps(FEATURES, played.state.astype(np.float64)),
                "action": np.array(ACTIONS)[played.action],
                "action_probability": played.probability,
                "possible_actions": [list(ACTIONS)] * n,
                "metrics": _maps(METRICS, played.metrics),
                "truncated": played.truncated,
                "policy_version": [behaviour_digest(simulation.behaviour_policy)] * n,
            },
            schema=SCHEMA,
        )
        pq.write_table(table, directory / "decisions.parquet")
        facts |= {
            "rows": n,
            "episodes": simulation.episodes,
            "mean_return": round(float(played.returns.mean()), 2),
            "environment": simulation.environment,
            "settings": simulation.model_dump(by_alias=True) | {"seed": spec.seed},
        }


def _maps(names: tuple[str, ...], values: np.ndarray) -> pa.MapArray:
    rows, width = values.shape
    offsets = pa.array(np.arange(0, rows * width + 1, width), pa.int32())
    return pa.MapArray.from_arrays(offsets, pa.array(list(names) * rows), pa.array(values.ravel()))
