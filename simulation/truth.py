"""What a policy really earns: its return over fresh episodes, which only a simulation can tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from contracts.job import JobSpec
from simulation.cartpole import Policy, play
from simulation.policies import behaviour_policy, exported_policy

FRESH = 1_000_000
"""Added to the job's seed, so that no episode of the log is played again."""


def true_returns(spec: JobSpec, version: Path) -> dict[str, Any]:
    """Mean return, its standard error, and mean discounted return of the exported and of the behaviour policy."""
    assert spec.simulation is not None
    behaviour = behaviour_policy(spec.simulation.behaviour_policy)
    return {"policy": _returns(exported_policy(version), spec), "behaviour": _returns(behaviour, spec)}


def _returns(policy: Policy, spec: JobSpec) -> dict[str, Any]:
    assert spec.simulation is not None
    played = play(policy, spec.simulation.truth_episodes, spec.seed + FRESH)
    returns = played.returns
    discounted = np.bincount(played.episode, spec.reward.discount**played.step)
    return {
        "value": float(returns.mean()),
        "standard_error": float(returns.std(ddof=1) / np.sqrt(len(returns))),
        "discounted": float(discounted.mean()),
        "episodes": len(returns),
    }
