"""A deformable 3x3 convolution in several exported forms: who takes it, how fast, and how far from DeformConv.

    python benchmarks/deformable_forms.py -o deformable_forms.md

64 channels at 40x52, one thread. Forms are timed in turns, so that ratios hold on a busy machine; the fastest of the
rounds counts.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import openvino as ov
import torch
from torch import Tensor, nn

from exporters.torch_onnx import _deform_conv
from fcos_deploy.model.fcos import DeformConv2d

CHANNELS, HEIGHT, WIDTH, ROUNDS = 64, 40, 52, 30


class Sampled(nn.Module):
    """The layer with its samples taken by ``sample`` as (n, c, 9, h, w), and a 1x1 convolution over them."""

    def __init__(self, layer: DeformConv2d, sample: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.sample = layer, sample
        self.weight = nn.Parameter(layer.weight.detach().flatten(1)[..., None, None])

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, c, h, w)."""
        learned = self.layer.offset(x)
        points = learned[:, :18].reshape(-1, 9, 2, HEIGHT, WIDTH) + base_points()
        samples = self.sample(x, points) * learned[:, 18:].sigmoid()[:, None]
        return nn.functional.conv2d(samples.reshape(-1, 9 * CHANNELS, HEIGHT, WIDTH), self.weight, self.layer.bias)


def base_points() -> Tensor:
    """(9, 2, h, w): the row and column that each tap reads without an offset."""
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    taps = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return torch.stack([torch.stack((rows + dy, columns + dx)) for dy, dx in taps]).float()


def grid_of(points: Tensor) -> Tensor:
    """(n, taps, 2, h, w) pixels -> (n, taps * h, w, 2) of grid_sample without aligned corners."""
    x, y = (2 * points[:, :, 1] + 1) / WIDTH - 1, (2 * points[:, :, 0] + 1) / HEIGHT - 1
    return torch.stack((x, y), -1).flatten(1, 2)


sample_map = functools.partial(nn.functional.grid_sample, align_corners=False)


def at_once(x: Tensor, points: Tensor) -> Tensor:
    """One GridSample for all nine taps, one below the other."""
    return sample_map(x, grid_of(points)).reshape(-1, CHANNELS, 9, HEIGHT, WIDTH)


def tap_by_tap(x: Tensor, points: Tensor) -> Tensor:
    """Nine GridSamples."""
    return torch.stack([sample_map(x, grid_of(points[:, tap : tap + 1])) for tap in range(9)], 2)


def gathered(x: Tensor, points: Tensor) -> Tensor:
    """Four Gathers of the neighbours, weighed by hand."""
    low = points.floor()
    share = points - low
    total = torch.zeros(())
    for dy in (0, 1):
        for dx in (0, 1):
            row, column = low[:, :, 0] + dy, low[:, :, 1] + dx
            inside = (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
            weight = (share[:, :, 0] if dy else 1 - share[:, :, 0]) * (share[:, :, 1] if dx else 1 - share[:, :, 1])
            index = row.clamp(0, HEIGHT - 1).long() * WIDTH + column.clamp(0, WIDTH - 1).long()
            values = torch.gather(x.flatten(2), 2, index.flatten(1)[:, None].expand(-1, CHANNELS, -1))
            total = total + values.reshape(-1, CHANNELS, 9, HEIGHT, WIDTH) * (weight * inside)[:, None]
    return total


def export(module: nn.Module, path: Path, *, opset: int) -> Path:
    """The module alone as an ONNX file."""
    table: dict[Any, Any] = {torch.ops.fcos_deploy.deform_conv.default: _deform_conv}
    example = (torch.zeros(1, CHANNELS, HEIGHT, WIDTH),)
    program = torch.onnx.export(
        module.eval(), example, dynamo=True, opset_version=opset, custom_translation_table=table, verbose=False
    )
    assert program is not None
    program.save(path)
    return path


def open_in(runtime: str, path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A function that runs the graph on one thread."""
    if runtime == "ONNX Runtime":
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda x: session.run(None, {session.get_inputs()[0].name: x})[0]
    compiled = ov.Core().compile_model(
        str(path), "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    )
    return lambda x: compiled([x])[0]


def main() -> None:
    """Measure, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    layer = DeformConv2d(nn.Conv2d(CHANNELS, CHANNELS, 3, 1, 1), deform_groups=1, modulated=True)
    nn.init.normal_(layer.offset.weight, std=0.03)
    nn.init.normal_(layer.offset.bias, std=0.5)
    operator = DeformConv2d(nn.Conv2d(CHANNELS, CHANNELS, 3, 1, 1), deform_groups=1, modulated=True)
    operator.load_state_dict(layer.state_dict())
    operator.as_operator = True
    forms: dict[str, tuple[nn.Module, int]] = {
        "DeformConv": (operator, 19),
        "one GridSample in blocks of a kernel, 3x3 convolution of stride 3 (`grid-sample`)": (layer, 18),
        "one GridSample, taps one below the other, 1x1 convolution": (Sampled(layer, at_once), 18),
        "nine GridSamples, 1x1 convolution": (Sampled(layer, tap_by_tap), 18),
        "four Gathers, 1x1 convolution": (Sampled(layer, gathered), 18),
    }
    image = np.random.default_rng(0).standard_normal((1, CHANNELS, HEIGHT, WIDTH)).astype(np.float32)
    runs: dict[tuple[str, str], Callable[[np.ndarray], np.ndarray]] = {}
    refused: dict[tuple[str, str], str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (form, (module, opset)) in enumerate(forms.items()):
            path = export(module, Path(folder) / f"{number}.onnx", opset=opset)
            for runtime in ("ONNX Runtime", "OpenVINO"):
                try:
                    runs[form, runtime] = open_in(runtime, path)
                except RuntimeError as error:
                    refused[form, runtime] = type(error).__name__
        reference = runs["DeformConv", "ONNX Runtime"](image)
        times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
        for _ in range(ROUNDS):
            for key, run in runs.items():
                started = time.perf_counter()
                run(image)
                times[key].append((time.perf_counter() - started) * 1e3)
    lines = ["| form | runtime | ms | largest difference |", "|---|---|---|---|"]
    for form in forms:
        for runtime in ("ONNX Runtime", "OpenVINO"):
            key = (form, runtime)
            if key in refused:
                lines.append(f"| {form} | {runtime} | not read | |")
                continue
            difference = float(np.abs(runs[key](image) - reference).max())
            lines.append(f"| {form} | {runtime} | {min(times[key]):.1f} | {difference:.1e} |")
    arguments.output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
