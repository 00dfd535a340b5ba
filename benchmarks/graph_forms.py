"""Which form of the FCOS graph is the fastest: each change against the exported graph, interleaved.

    python benchmarks/graph_forms.py --work runs/graph_forms --depth 18 --size 320x320 --rounds 30

Every variant is compared with the exported graph's outputs before it is timed. Prints medians, minima and ratios (above
1: faster than the exported graph) for ONNX Runtime and OpenVINO (float32) as a Markdown table.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from exporters.rewrite import simplified
from exporters.step_check import compare, onnx_runner, provoking_feed
from exporters.torch_onnx import trace
from fcos_deploy.core.artifact import OnnxGraph
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.decode import PROFILES, DecodeSpec
from fcos_deploy.core.enums import Tail
from fcos_deploy.core.network import resnet_config
from fcos_deploy.core.onnx_file import save_onnx
from fcos_deploy.core.preprocess import PreprocessSpec
from fcos_deploy.model.fcos import Fcos, LevelOutput
from fcos_deploy.model.tails import ExportableFcos


class MergedFirst(nn.Module):
    """The first convolution, norm and ReLU of both towers as one of twice the width, then split."""

    def __init__(self, model: Fcos) -> None:
        super().__init__()
        self.model = model
        cls, reg = model.head.classification_head.conv, model.head.regression_head.conv
        channels = cls[0].in_channels
        self.conv = nn.Conv2d(channels, 2 * channels, 3, 1, 1)
        self.norm = nn.GroupNorm(2 * cls[1].num_groups, 2 * channels)
        with torch.no_grad():
            for ours, left, right in ((self.conv, cls[0], reg[0]), (self.norm, cls[1], reg[1])):
                ours.weight.copy_(torch.cat((left.weight, right.weight)))
                ours.bias.copy_(torch.cat((left.bias, right.bias)))

    def forward(self, images: Tensor) -> list[LevelOutput]:
        """(n, 3, H, W) float32 -> one output a level."""
        head = self.model.head
        outputs = []
        for index, feature in enumerate(self.model.backbone(images)):
            both, half = torch.relu(self.norm(self.conv(feature))), feature.shape[1]
            cls, reg = both[:, :half], both[:, half:]
            for layer in head.classification_head.conv[3:]:
                cls = layer(cls)
            for layer in head.regression_head.conv[3:]:
                reg = layer(reg)
            outputs.append(_predict(self.model, cls, reg, index))
        return outputs


class FoldedStride(nn.Module):
    """``relu(conv(x)) * stride`` as ``relu(conv'(x))`` with the stride in the weights: five box convolutions."""

    def __init__(self, model: Fcos) -> None:
        super().__init__()
        self.model = model
        source = model.head.regression_head.bbox_reg
        self.convs = nn.ModuleList()
        for stride in model.config.strides:
            conv = nn.Conv2d(source.in_channels, 4, 3, 1, 1)
            with torch.no_grad():
                conv.weight.copy_(source.weight * stride)
                conv.bias.copy_(source.bias * stride)
            self.convs.append(conv)

    def forward(self, images: Tensor) -> list[LevelOutput]:
        """(n, 3, H, W) float32 -> one output a level."""
        head, outputs = self.model.head, []
        for index, feature in enumerate(self.model.backbone(images)):
            cls, reg = head.classification_head(feature, index), head.regression_head(feature, index)
            distances = torch.relu(self.convs[index](reg))
            outputs.append(
                LevelOutput(head.classification_head.cls_logits(cls), distances, head.regression_head.bbox_ctrness(reg))
            )
        return outputs


class SmallLevelsTogether(nn.Module):
    """P5, P6 and P7 side by side in one picture for the towers' convolutions, apart for their norms."""

    def __init__(self, model: Fcos) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> list[LevelOutput]:
        """(n, 3, H, W) float32 -> one output a level."""
        features = self.model.backbone(images)
        head = self.model.head
        cls = [head.classification_head(f, i) for i, f in enumerate(features[:2])]
        reg = [head.regression_head(f, i) for i, f in enumerate(features[:2])]
        cls += self._tower(features[2:], head.classification_head.conv)
        reg += self._tower(features[2:], head.regression_head.conv)
        return [_predict(self.model, c, r, i) for i, (c, r) in enumerate(zip(cls, reg, strict=True))]

    @staticmethod
    def _tower(levels: list[Tensor], layers: nn.Sequential) -> list[Tensor]:
        height = levels[0].shape[2]
        for conv, norm in zip(layers[0::3], layers[1::3], strict=True):
            # One column of zeros between neighbours is the padding that each convolution sees alone.
            padded = [_with_margin(x, height) for x in levels]
            together = conv(torch.cat(padded, 3))
            starts = np.cumsum([0] + [x.shape[3] for x in padded]).tolist()
            levels = [
                torch.relu(norm(together[:, :, : x.shape[2], s : s + x.shape[3]]))
                for x, s in zip(levels, starts[:-1], strict=True)
            ]
        return levels


def _with_margin(level: Tensor, height: int) -> Tensor:
    """Zeros below up to ``height``, and one column of them on the right."""
    count, channels, rows, columns = level.shape
    taller = torch.cat((level, level.new_zeros(count, channels, height - rows, columns)), 2) if rows < height else level
    return torch.cat((taller, level.new_zeros(count, channels, height, 1)), 3)


class ClassesFirst(nn.Module):
    """Outputs (n, C, L) instead of (n, L, C): without the last transpositions."""

    def __init__(self, exportable: ExportableFcos) -> None:
        super().__init__()
        self.inner = exportable
        self.input_names, self.output_names = exportable.input_names, exportable.output_names

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(n, 3, H, W) uint8 -> the raw outputs, each (n, C, L)."""
        levels = self.inner.model(self.inner.normalize(images))
        return tuple(torch.cat([m.flatten(2) for m in maps], 2) for maps in zip(*levels, strict=True))


def _predict(model: Fcos, cls: Tensor, reg: Tensor, index: int) -> LevelOutput:
    head = model.head
    distances = torch.relu(head.regression_head.bbox_reg(reg)) * model.config.strides[index]
    return LevelOutput(head.classification_head.cls_logits(cls), distances, head.regression_head.bbox_ctrness(reg))


def _network(depth: int, classes: int) -> Fcos:
    torch.manual_seed(0)
    model = Fcos(resnet_config(depth, num_classes=classes)).eval()
    with torch.no_grad():
        for module in model.head.modules():
            if isinstance(module, nn.GroupNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
            if isinstance(module, nn.Conv2d):
                module.weight.normal_(std=0.03)
    return model


def _export(module: nn.Module, contract: ModelContract, *, opset: int = 17) -> object:
    height, width = contract.preprocess.canvas or (0, 0)
    feeds = [provoking_feed((1, 3, height, width), dtype="uint8", image_sizes=False)]
    exportable = module if hasattr(module, "output_names") else ExportableFcos(module, contract)
    example = (torch.from_numpy(feeds[0]["images"]),)
    model = trace(exportable.eval(), example, opset=opset, dynamic_batch=False)
    return simplified(model, feeds)[0]


class CopiedHead(nn.Module):
    """A head of its own for every level, as exporters write it that do not see that weights are shared."""

    def __init__(self, model: Fcos) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.heads = nn.ModuleList(copy.deepcopy(model.head) for _ in model.config.strides)
        with torch.no_grad():  # Equal copies would be found and stored once.
            for index, head in enumerate(self.heads):
                for parameter in head.parameters():
                    parameter.mul_(1 + index * 1e-6)

    def forward(self, images: Tensor) -> list[LevelOutput]:
        """(n, 3, H, W) float32 -> one output a level."""
        features = self.backbone(images)
        return [head._level(feature, i) for i, (head, feature) in enumerate(zip(self.heads, features, strict=True))]


BASE = "as exported"


def _variants(model: Fcos, contract: ModelContract) -> dict[str, Callable[[], object]]:
    return {
        BASE: lambda: _export(model, contract),
        "native GroupNormalization (opset 21)": lambda: _export(model, contract, opset=21),
        "first tower convolutions merged": lambda: _export(MergedFirst(model), contract),
        "stride folded into the box convolution": lambda: _export(FoldedStride(model), contract),
        "P5 to P7 side by side": lambda: _export(SmallLevelsTogether(model), contract),
        "outputs (n, C, L)": lambda: _export(ClassesFirst(ExportableFcos(model, contract)), contract),
        "head weights stored for every level": lambda: _export(CopiedHead(model), contract),
    }


def _require_equal(name: str, path: Path, reference: Path, feeds: list[dict[str, np.ndarray]]) -> None:
    expected, run = (onnx_runner(OnnxGraph(p).model) for p in (reference, path))

    def turned(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        wanted = expected(feed)
        return {k: a if a.shape == wanted[k].shape else a.transpose(0, 2, 1) for k, a in run(feed).items()}

    print(f"# {compare(expected, turned, feeds, step=name, tolerance=1e-3)}", flush=True)


def _onnxruntime(path: Path, threads: int) -> Callable[[dict[str, np.ndarray]], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda feed: session.run(None, feed)


def _openvino(path: Path, threads: int) -> Callable[[dict[str, np.ndarray]], object]:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    return compiled.create_infer_request().infer


RUNTIMES = {"ONNX Runtime": _onnxruntime, "OpenVINO": _openvino}


def _time(runs: dict[str, Callable[[object], object]], feed: object, rounds: int) -> dict[str, list[float]]:
    """Milliseconds; one inference of every variant a round, in rotating order, so that all meet the same other load."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            runs[name](feed)  # caches are still another variant's
            started = time.perf_counter()
            runs[name](feed)
            taken[name].append((time.perf_counter() - started) * 1e3)
    return taken


def main() -> None:
    """Export, compare, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where graphs are kept")
    parser.add_argument("--build", action="store_true", help="export and compare what is missing, and stop")
    parser.add_argument("--depth", type=int, default=18)
    parser.add_argument("--size", default="320x320")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    height, width = map(int, arguments.size.split("x"))
    contract = ModelContract(
        class_names=tuple(map(str, range(arguments.classes))),
        preprocess=PreprocessSpec(
            mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), pixel_scale=255.0, height=height, width=width
        ),
        decode=DecodeSpec(profile=PROFILES["torchvision"], score_threshold=0.2, iou_threshold=0.6),
        tail=Tail.RAW,
    )
    feeds = [provoking_feed((1, 3, height, width), dtype="uint8", image_sizes=False)]
    arguments.work.mkdir(parents=True, exist_ok=True)
    paths = {}
    for index, (name, build) in enumerate(_variants(_network(arguments.depth, arguments.classes), contract).items()):
        paths[name] = arguments.work / f"{index}.onnx"
        if not paths[name].exists():
            save_onnx(build(), paths[name])
            _require_equal(name, paths[name], paths[BASE], feeds)
    if arguments.build:
        return
    for runtime, opened in RUNTIMES.items():
        runs = {name: opened(path, arguments.threads) for name, path in paths.items()}
        _print(runtime, _time(runs, feeds[0], arguments.rounds), paths)


def _print(runtime: str, taken: dict[str, list[float]], paths: dict[str, Path]) -> None:
    base = taken[BASE]
    print(f"\n| {runtime} | median ms | min ms | ratio of medians | ratio of minima | MB |\n|---|---|---|---|---|---|")
    for name, times in taken.items():
        ratio = statistics.median(b / t for b, t in zip(base, times, strict=True))
        print(
            f"| {name} | {statistics.median(times):.1f} | {min(times):.1f} | {ratio:.3f} "
            f"| {min(base) / min(times):.3f} | {paths[name].stat().st_size / 1e6:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
