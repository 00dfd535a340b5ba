"""Serves an ONNX file with NVIDIA Triton (through nvidia-pytriton) until it is killed.

Usage: triton_server.py MODEL.onnx NAME HTTP_PORT GRPC_PORT [SECONDS_TO_SLEEP_PER_REQUEST]
Runs in an environment of its own, with nvidia-pytriton and onnxruntime; nothing of fcos-deploy is needed there.
"""

import sys
import time

import numpy as np
import onnxruntime
from pytriton.decorators import batch
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

TYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(int32)": np.int32}


def main() -> None:
    path, name, http_port, grpc_port = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    pause = float(sys.argv[5]) if len(sys.argv) > 5 else 0.0
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]

    @batch
    def infer(**feeds: np.ndarray) -> dict[str, np.ndarray]:
        time.sleep(pause)
        # Triton joins requests; the model may have a fixed batch of one.
        count = len(next(iter(feeds.values())))
        single = [session.run(outputs, {name: feed[i : i + 1] for name, feed in feeds.items()}) for i in range(count)]
        return {name: np.concatenate(parts) for name, parts in zip(outputs, zip(*single, strict=True), strict=True)}

    def tensors(nodes: list) -> list[Tensor]:
        return [Tensor(name=node.name, dtype=TYPES[node.type], shape=tuple(node.shape[1:])) for node in nodes]

    config = TritonConfig(http_port=http_port, grpc_port=grpc_port, allow_metrics=False, http_address="127.0.0.1")
    with Triton(config=config) as triton:
        triton.bind(
            model_name=name,
            infer_func=infer,
            inputs=tensors(session.get_inputs()),
            outputs=tensors(session.get_outputs()),
            config=ModelConfig(max_batch_size=4),
        )
        triton.serve()


main()
