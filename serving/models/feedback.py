"""Triton model `feedback`: what decisions brought, appended to the outcomes that the timeline joins to the log."""

import datetime
import json
import math
import os

import numpy as np
import triton_python_backend_utils as triton


class TritonPythonModel:
    def initialize(self, args):
        parameters = {k: v["string_value"] for k, v in json.loads(args["model_config"])["parameters"].items()}
        self.log = os.open(parameters["outcomes"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        family = triton.MetricFamily
        self.family = family("bluewhale_mdps_ended_total", "MDPs whose end was reported", family.COUNTER)
        self.ended = self.family.Metric(labels=json.loads(parameters["labels"]))

    def finalize(self):
        os.close(self.log)

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        try:
            outcome = json.loads(triton.get_input_tensor_by_name(request, "outcome").as_numpy()[0])
            lines = list(self.rows(outcome))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"outcome: {type(error).__name__} {error}; send mdp_id, first_sequence_number, metrics, ended"
            return triton.InferenceResponse(error=triton.TritonError(message, triton.TritonError.INVALID_ARG))
        os.write(self.log, "".join(f"{json.dumps(line)}\n" for line in lines).encode())
        if outcome["ended"]:
            self.ended.increment(1)
        return triton.InferenceResponse([triton.Tensor("rows", np.array([len(lines)], np.int64))])

    def rows(self, outcome):
        if not outcome["metrics"]:
            raise ValueError("no metrics: report one mapping for each decision, empty where it brought nothing")
        first, last = int(outcome["first_sequence_number"]), len(outcome["metrics"]) - 1
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        for i, metrics in enumerate(outcome["metrics"]):
            values = {str(name): float(value) for name, value in metrics.items()}
            if not all(map(math.isfinite, values.values())):
                raise ValueError("a metric is not finite")
            yield {
                "mdp_id": str(outcome["mdp_id"]),
                "sequence_number": first + i,
                "event_time": now,
                "metrics": values,
                "ended": bool(outcome["ended"]) and i == last,
                "truncated": bool(outcome["truncated"]) and i == last,
            }
