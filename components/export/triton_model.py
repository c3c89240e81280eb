"""Triton model that runs this version's ONNX graph with onnxruntime, for servers without that backend of their own."""

import os

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    def initialize(self, args):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # a policy's network is small: threads cost more than they bring
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = [each.name for each in self.session.get_inputs()]
        self.outputs = [each.name for each in self.session.get_outputs()]

    def execute(self, requests):
        sizes = []
        columns = {name: [] for name in self.inputs}
        for request in requests:
            for name in self.inputs:
                columns[name].append(triton.get_input_tensor_by_name(request, name).as_numpy())
            sizes.append(len(columns["state"][-1]))
        outputs = self.session.run(self.outputs, {name: np.concatenate(parts) for name, parts in columns.items()})
        # A graph that takes one decision at a time is never asked for several: its outputs stay whole.
        ends = np.cumsum(sizes)[:-1]
        split = [np.split(output, ends) for output in outputs]
        return [
            triton.InferenceResponse(
                [triton.Tensor(name, np.ascontiguousarray(parts[i])) for name, parts in zip(self.outputs, split)]
            )
            for i in range(len(requests))
        ]
