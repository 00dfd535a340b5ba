"""Runs ``model.onnx`` of a Triton repository with ONNX Runtime, in place of Triton's own backend of that name.

Triton's core reads ``config.pbtxt``, checks requests against it, warms up, joins batches and keeps the instances; only
the inference itself is done here. Triton calls it a Python-based backend.
"""

import json
import os
import time
from pathlib import Path

import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    def initialize(self, arguments: dict) -> None:
        config = json.loads(arguments["model_config"])
        path = Path(arguments["model_repository"], arguments["model_version"], config["default_model_filename"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]
        self.pause = Path(os.environ["PAUSE_FILE"])

    def execute(self, requests: list) -> list:
        return [self.answer(request) for request in requests]

    def answer(self, request: object) -> object:
        if self.pause.exists():
            time.sleep(float(self.pause.read_text()))
        feeds = {name: triton.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
        found = zip(self.outputs, self.session.run(self.outputs, feeds), strict=True)
        return triton.InferenceResponse([triton.Tensor(name, array) for name, array in found])
