"""A Triton model repository: one immutable version directory per policy.

Serving reads it too, and has no torch: nothing here may need it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from contracts.stage import StageError

MODEL = "arm"
DESCRIPTION = "policy.json"


def version_of(digest: str) -> int:
    """The version number, which Triton wants to be a positive integer, of the policy with this digest."""
    return int(digest[:7], 16) + 1


def read_policies(repository: Path) -> dict[int, dict[str, Any]]:
    """The description of every version in the repository."""
    files = (repository / MODEL).glob(f"[0-9]*/{DESCRIPTION}")
    return {int(f.parent.name): json.loads(f.read_text()) for f in sorted(files)}


def write_config(repository: Path, backend: str = "python") -> None:
    """Write the model's config.pbtxt for the versions that are there, which must share features and actions."""
    policies = read_policies(repository)
    check_alike(repository, list(policies.values()))
    first = next(iter(policies.values()))
    inputs, outputs, batched = signature(first)
    columns = [
        f"{side} [\n"
        + ",\n".join(
            f'  {{ name: "{name}" data_type: TYPE_{kind} dims: [ {", ".join(map(str, dims))} ] }}'
            for name, (kind, dims) in tensors.items()
        )
        + "\n]"
        for side, tensors in (("input", inputs), ("output", outputs))
    ]
    threads = 'parameters { key: "intra_op_thread_count" value { string_value: "1" } }\n'
    (repository / MODEL / "config.pbtxt").write_text(
        f"""name: "{MODEL}"
backend: "{backend}"
max_batch_size: {64 if batched else 0}
{columns[0]}
{columns[1]}
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
{"dynamic_batching { }" if batched else ""}
version_policy {{ specific {{ versions: [ {", ".join(map(str, policies))} ] }} }}
{threads if backend == "onnxruntime" else ""}"""
    )


Tensors = dict[str, tuple[str, list[int]]]
"""By name the type, as Triton calls it, and the shape without the batch."""


def signature(policy: dict[str, Any]) -> tuple[Tensors, Tensors, bool]:
    """Inputs and outputs of a policy's graph, and whether requests can be batched.

    A request for described actions, or for a slate, is one decision: its state, and as many rows as there are items to
    choose among.
    """
    state = {"state": ("FP32", [len(policy["features"])])}
    match policy.get("action_space"):
        case "continuous":
            return state, {"action": ("FP32", [len(policy["actions"])])}, True
        case "parametric":
            inputs = {
                "state": ("FP32", [1, len(policy["features"])]),
                "action": ("FP32", [-1, len(policy["action_features"])]),
                "uniform": ("FP32", [1, 1]),
            }
            return inputs, _chosen([-1]), False
        case "slate":
            size = policy["slate"]
            inputs = {
                "state": ("FP32", [1, len(policy["features"])]),
                "action": ("FP32", [-1, len(policy["action_features"])]),
                "uniform": ("FP32", [size + 1]),
            }
            outputs = {
                "q_values": ("FP32", [-1]),
                "gains": ("FP32", [-1]),
                "greedy_action": ("INT64", [size]),
                "propensity": ("FP32", [1]),
                "sampled_action": ("INT64", [size]),
            }
            return inputs, outputs, False
    actions = [len(policy["actions"])]
    return state | {"uniform": ("FP32", [1]), "possible": ("BOOL", actions)}, _chosen(actions), True


def _chosen(actions: list[int]) -> Tensors:
    return {
        "q_values": ("FP32", actions),
        "greedy_action": ("INT64", [1]),
        "propensities": ("FP32", actions),
        "sampled_action": ("INT64", [1]),
    }


def check_alike(repository: Path, policies: list[dict[str, Any]]) -> None:
    """Raise `StageError` unless all policies have the same features and actions."""
    for other in policies[1:]:
        for name in ("features", "actions", "action_features", "slate"):
            if other.get(name) != policies[0].get(name):
                raise StageError(
                    f"{repository}: policies that differ in features or actions cannot share a service: {name} "
                    f"{policies[0].get(name)} and {other.get(name)}"
                )
