"""Policies that can play an environment: the behaviour policy, and any exported one."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from components.export.policy import write_version
from components.training.actions import Actions
from components.training.network import LogisticPolicy
from contracts.job import BehaviourPolicy, JobError, JobSpec, PolicyHead
from simulation.cartpole import ACTIONS, FEATURES, Policy


def check_job(spec: JobSpec) -> None:
    """Raise `JobError` when actions or features of the job are not those of the environment."""
    if tuple(spec.actions) != ACTIONS:
        raise JobError(f"spec.actions: the environment has {list(ACTIONS)}, found {spec.actions}")
    assert spec.simulation is not None
    if unknown := set(spec.simulation.behaviour_policy.weights) - set(FEATURES):
        raise JobError(
            f"spec.simulation.behaviourPolicy.weights.{sorted(unknown)[0]}: no such feature; "
            f"the environment has {', '.join(FEATURES)}"
        )


def behaviour_network(policy: BehaviourPolicy) -> LogisticPolicy:
    return LogisticPolicy([policy.weights.get(name, 0.0) for name in FEATURES], policy.exploration).eval()


def behaviour_digest(policy: BehaviourPolicy) -> str:
    return hashlib.sha256(policy.model_dump_json().encode()).hexdigest()


def behaviour_policy(policy: BehaviourPolicy) -> Policy:
    network = behaviour_network(policy)

    def act(state: np.ndarray, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            second = network(torch.from_numpy(state)).exp()[:, 1].double().numpy()
        action = (uniform >= 1 - second).astype(np.int64)
        return action, np.where(action == 1, second, 1 - second)

    return act


def export_behaviour(policy: BehaviourPolicy, repository: Path, backend: str = "python") -> dict[str, Any]:
    """Add the behaviour policy to a Triton model repository, as any other policy."""
    states = np.random.default_rng(0).normal(size=(1000, len(FEATURES))).astype(np.float32)
    return write_version(
        repository,
        behaviour_network(policy),
        PolicyHead(),
        features=list(FEATURES),
        actions=Actions(list(ACTIONS)),
        digest=behaviour_digest(policy),
        states=states,
        backend=backend,
    )


def exported_policy(version: Path) -> Policy:
    """The policy in a version directory of a model repository, run by onnxruntime; acts by its sampled action."""
    session = onnxruntime.InferenceSession(str(version / "model.onnx"), providers=["CPUExecutionProvider"])

    def act(state: np.ndarray, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        possible = np.ones((len(state), len(ACTIONS)), bool)
        inputs = {"state": state, "uniform": uniform[:, None], "possible": possible}
        propensities, sampled = session.run(["propensities", "sampled_action"], inputs)
        action = sampled[:, 0]
        return action, propensities[np.arange(len(action)), action].astype(np.float64)

    return act
