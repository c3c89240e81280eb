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
    f, a = len(first["features"]), len(first["actions"])
    threads = 'parameters { key: "intra_op_thread_count" value { string_value: "1" } }\n'
    (repository / MODEL / "config.pbtxt").write_text(
        f"""name: "{MODEL}"
backend: "{backend}"
max_batch_size: 64
input [
  {{ name: "state" data_type: TYPE_FP32 dims: [ {f} ] }},
  {{ name: "uniform" data_type: TYPE_FP32 dims: [ 1 ] }},
  {{ name: "possible" data_type: TYPE_BOOL dims: [ {a} ] }}
]
output [
  {{ name: "q_values" data_type: TYPE_FP32 dims: [ {a} ] }},
  {{ name: "greedy_action" data_type: TYPE_INT64 dims: [ 1 ] }},
  {{ name: "propensities" data_type: TYPE_FP32 dims: [ {a} ] }},
  {{ name: "sampled_action" data_type: TYPE_INT64 dims: [ 1 ] }}
]
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
dynamic_batching {{ }}
version_policy {{ specific {{ versions: [ {", ".join(map(str, policies))} ] }} }}
{threads if backend == "onnxruntime" else ""}"""
    )


def check_alike(repository: Path, policies: list[dict[str, Any]]) -> None:
    """Raise `StageError` unless all policies have the same features and actions."""
    for other in policies[1:]:
        for name in ("features", "actions"):
            if other[name] != policies[0][name]:
                raise StageError(
                    f"{repository}: policies that differ in features or actions cannot share a service: {name} "
                    f"{policies[0][name]} and {other[name]}"
                )
