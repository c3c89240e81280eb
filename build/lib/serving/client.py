"""How a product asks for decisions and reports what they brought, by gRPC."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

MODEL, FEEDBACK = "policy", "feedback"
OUTPUTS = ("action", "action_index", "action_probability", "policy_version", "arm", "fallback")


class ServiceError(RuntimeError):
    """The policy service refused a request or could not be reached; the message is the server's."""


@dataclass(frozen=True)
class Decision:
    action: str
    action_index: int
    action_probability: float
    policy_version: str
    arm: str
    fallback: bool
    """The candidate failed or was late, and stable answered in its place."""


class PolicyClient:
    """A connection to a policy service; features are sent in the order that the service asks for.

    >>> with PolicyClient("127.0.0.1:8001") as client:          # doctest: +SKIP
    ...     decision = client.decide("user-7", 0, {"age": 31.0})
    ...     client.report("user-7", [{"clicks": 1.0}], ended=True)
    """

    def __init__(self, address: str, timeout_seconds: float = 5.0) -> None:
        self._timeout = timeout_seconds
        self._client = grpc.InferenceServerClient(address)
        try:
            parameters = self._client.get_model_config(MODEL, as_json=True)["config"]["parameters"]
        except InferenceServerException as error:
            raise ServiceError(f"{address}: {error.message()}") from None
        self.features: list[str] = json.loads(parameters["features"]["string_value"])
        self.actions: list[str] = json.loads(parameters["actions"]["string_value"])

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def decide(
        self,
        mdp_id: str,
        sequence_number: int,
        features: dict[str, float],
        possible_actions: list[str] | None = None,
    ) -> Decision:
        """One decision for an MDP. Features left out are missing; the same request again gets the same answer."""
        if unknown := set(features).difference(self.features):
            raise ServiceError(f"feature {sorted(unknown)[0]!r}: not an input of this policy; it takes {self.features}")
        if possible_actions is None:
            possible = [True] * len(self.actions)
        else:
            if unknown := set(possible_actions).difference(self.actions):
                raise ServiceError(f"action {sorted(unknown)[0]!r}: not one of {self.actions}")
            possible = [action in possible_actions for action in self.actions]
        result = self._infer(
            MODEL,
            {
                "mdp_id": np.array([[mdp_id]], object),
                "sequence_number": np.array([[sequence_number]], np.int64),
                "state": np.array([[features.get(name, np.nan) for name in self.features]], np.float32),
                "possible": np.array([possible]),
            },
        )
        values = {name: result.as_numpy(name)[0, 0] for name in OUTPUTS}
        return Decision(
            values["action"].decode(),
            int(values["action_index"]),
            float(values["action_probability"]),
            values["policy_version"].decode(),
            values["arm"].decode(),
            bool(values["fallback"]),
        )

    def report(
        self,
        mdp_id: str,
        metrics: list[dict[str, float]],
        first_sequence_number: int = 0,
        ended: bool = False,
        truncated: bool = False,
    ) -> None:
        """Report what consecutive decisions of an MDP brought. `ended`: no more follow; `truncated`: it was cut off."""
        outcome = {
            "mdp_id": mdp_id,
            "first_sequence_number": first_sequence_number,
            "metrics": metrics,
            "ended": ended,
            "truncated": truncated,
        }
        self._infer(FEEDBACK, {"outcome": np.array([json.dumps(outcome)], object)})

    def _infer(self, model: str, arrays: dict[str, np.ndarray]) -> grpc.InferResult:
        kinds = {"O": "BYTES", "i": "INT64", "f": "FP32", "b": "BOOL"}
        inputs = []
        for name, array in arrays.items():
            tensor = grpc.InferInput(name, list(array.shape), kinds[array.dtype.kind])
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        try:
            return self._client.infer(model, inputs, client_timeout=self._timeout)
        except InferenceServerException as error:
            raise ServiceError(f"{model}: {error.message()}") from None
