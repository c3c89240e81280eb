"""A policy -> ONNX -> a Triton model repository."""
