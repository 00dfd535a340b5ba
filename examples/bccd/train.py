"""Train the demo detector: a small FCOS on the BCCD blood-cell images, from random weights.

    python examples/bccd/train.py --data DIR -o fcos_bccd.safetensors

DIR holds ``train/``, ``val/`` and ``instances_{train,val}.json``. The first phase runs at a reduced image size.
A killed run continues from OUT.state.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from losses import Targets, assign_targets, fcos_losses  # beside this file
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fcos_deploy.core.decode import location_centers, location_strides
from fcos_deploy.core.enums import CenterMode
from fcos_deploy.core.network import BackboneType, DeformableLayer, FcosConfig, resnet_config
from fcos_deploy.model.fcos import DeformConv2d, Fcos, flatten_levels

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Of the demo's network: the last stage but for its first convolution, and the last layer of both towers.
DEFORMABLE = tuple(
    DeformableLayer(name, groups=1, modulated=True)
    for name in (
        *("backbone.body.layer4.0.conv2", "backbone.body.layer4.1.conv1", "backbone.body.layer4.1.conv2"),
        *("head.classification_head.conv.9", "head.regression_head.conv.9"),
    )
)
BACKBONES: dict[str, Callable[[int], FcosConfig]] = {
    "demo": lambda classes: resnet_config(18, num_classes=classes, stem_channels=32, fpn_channels=96),
    "demo-deformable": lambda classes: replace(BACKBONES["demo"](classes), deformable=DEFORMABLE),
    "resnet50": lambda classes: resnet_config(50, num_classes=classes),
    "mobilenet-v2": lambda classes: FcosConfig(
        num_classes=classes, backbone=BackboneType.MOBILENET_V2, fpn_channels=96
    ),
}


class Sample(NamedTuple):
    """image: (h, w, 3) uint8 RGB. boxes: (g, 4) float32 xyxy, image pixels. labels: (g,) int64."""

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]


def load_samples(data: Path, split: str) -> tuple[list[Sample], list[str]]:
    """All images of a split in memory, and the class names in category order."""
    coco = json.loads((data / f"instances_{split}.json").read_text())
    classes = sorted(coco["categories"], key=lambda c: c["id"])
    index = {category["id"]: i for i, category in enumerate(classes)}
    samples = []
    for entry in sorted(coco["images"], key=lambda i: i["id"]):
        found = [a for a in coco["annotations"] if a["image_id"] == entry["id"] and not a.get("iscrowd")]
        xywh = np.array([a["bbox"] for a in found], np.float32).reshape(-1, 4)
        boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
        labels = np.array([index[a["category_id"]] for a in found], np.int64)
        image = cv2.cvtColor(cv2.imread(str(data / split / entry["file_name"])), cv2.COLOR_BGR2RGB)
        samples.append(Sample(image, boxes, labels))
    return samples, [category["name"] for category in classes]


def augment(sample: Sample, rng: np.random.Generator, *, canvas: tuple[int, int]) -> Sample:
    """Random flips, quarter turn, scale, place and colour, onto a canvas padded with the mean colour."""
    height, width = sample.image.shape[:2]
    canvas_height, canvas_width = canvas
    scale = min(canvas_height / height, canvas_width / width) * math.exp(rng.uniform(math.log(0.7), math.log(1.5)))
    angle = rng.choice([0.0, 0.0, 90.0]) + rng.uniform(-4, 4)
    aspect = math.exp(rng.uniform(-0.1, 0.1))
    turn = math.radians(angle)
    matrix = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]) * scale
    matrix = np.diag([aspect * rng.choice([-1, 1]), 1 / aspect * rng.choice([-1, 1])]) @ matrix
    reach = np.abs(matrix) @ np.array([width / 2, height / 2])
    slack = np.abs(np.array([canvas_width / 2, canvas_height / 2]) - reach)
    center = np.array([canvas_width / 2, canvas_height / 2]) + rng.uniform(-1, 1, 2) * slack
    affine = np.concatenate([matrix, (center - matrix @ [width / 2, height / 2])[:, None]], 1)
    fill = tuple(round(255 * m) for m in MEAN)
    image = cv2.warpAffine(sample.image, affine, (canvas_width, canvas_height), flags=cv2.INTER_AREA, borderValue=fill)
    # The ellipse inside a turned box, not its corners, bounds a round cell.
    middle = (sample.boxes[:, :2] + sample.boxes[:, 2:]) / 2 @ matrix.T + affine[:, 2]
    half = (sample.boxes[:, 2:] - sample.boxes[:, :2]) / 2
    half = np.sqrt((half**2) @ (matrix**2).T)
    boxes = np.concatenate([middle - half, middle + half], 1)
    clipped = boxes.clip(0, [canvas_width, canvas_height, canvas_width, canvas_height])
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    keep = ((clipped[:, 2:] - clipped[:, :2]).prod(1) > 0.25 * area) & (clipped[:, 2:] - clipped[:, :2] > 2).all(1)
    return Sample(_recolour(image, rng), clipped[keep].astype(np.float32), sample.labels[keep])


def _recolour(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    pixels = image.astype(np.float32)
    grey = pixels.mean(2, keepdims=True)
    pixels = grey + (pixels - grey) * rng.uniform(0.7, 1.3)
    pixels = (pixels - 128) * rng.uniform(0.8, 1.2) + 128 + rng.uniform(-20, 20) + rng.uniform(-8, 8, 3)
    return pixels.clip(0, 255).astype(np.uint8)


def normalise(images: list[NDArray[np.uint8]], device: torch.device) -> Tensor:
    """Canvases -> (n, 3, h, w) float32, torchvision's mean and standard deviation."""
    pixels = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (pixels - mean) / std


def batch_targets(samples: list[Sample], *, strides: tuple[int, ...], canvas: tuple[int, int]) -> list[Targets]:
    """Targets of a batch, at torchvision's locations."""
    centers = torch.from_numpy(location_centers(*canvas, strides=strides, mode=CenterMode.TORCHVISION))
    steps = torch.from_numpy(location_strides(*canvas, strides=strides))
    return [
        assign_targets(torch.from_numpy(s.boxes), torch.from_numpy(s.labels), centers=centers, strides=steps)
        for s in samples
    ]


class Ema:
    """Exponential moving average of weights and buffers."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).eval()
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move a step towards ``model``; the decay grows towards 0.998."""
        self.updates += 1
        decay = 0.998 * (1 - math.exp(-self.updates / 300))
        for mine, theirs in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.lerp_(theirs, 1 - decay)
            else:
                mine.copy_(theirs)


def learning_rate(progress: float, *, peak: float) -> float:
    """Linear warm-up over the first 3 %, then a cosine down to 1 % of the peak."""
    return peak * min(progress / 0.03, 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


def epoch_canvas(epoch: int, options: argparse.Namespace) -> tuple[int, int]:
    """The reduced size for the first epochs, then the deployed one."""
    reduced = epoch < (1 - options.full_size_share) * options.epochs
    return tuple(options.reduced_size if reduced else options.size)


def save(model: nn.Module, classes: list[str], path: Path, *, size: tuple[int, int]) -> None:
    """fp16 safetensors, with what shapes do not tell in the metadata."""
    tensors = {k: v.half().cpu().contiguous() for k, v in model.state_dict().items() if v.is_floating_point()}
    metadata = {
        "ecosystem": "torchvision",
        "classes": json.dumps(classes),
        "input_size": f"{size[0]}x{size[1]}",
        "score_threshold": "0.05",
    }
    temporary = path.with_suffix(".partial")
    save_file(tensors, temporary, metadata={"fcos_deploy": json.dumps(metadata)})
    temporary.replace(path)


def begin_with(model: nn.Module, path: Path) -> None:
    """Take the weights of a detector without deformable layers; the new network then computes what that one does."""
    weights = load_file(path)
    for name, layer in model.named_modules():
        if isinstance(layer, DeformConv2d):
            weights |= {f"{name}.offset.{part}": tensor for part, tensor in layer.offset.state_dict().items()}
            if layer.modulated:  # Its mask begins as sigmoid(0) = 1/2.
                weights[f"{name}.weight"] = 2 * weights[f"{name}.weight"]
    missing = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("num_batches_tracked")}
    model.load_state_dict({**missing, **weights})


def train(options: argparse.Namespace) -> None:
    """Run all epochs that are still to do."""
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    samples, classes = load_samples(options.data, "train")
    config = BACKBONES[options.backbone](len(classes))
    model = Fcos(config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if options.begin_with:
        begin_with(model, options.begin_with)
    ema = Ema(model)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr)
    state_path, first = options.output.with_suffix(".state"), 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        ema.model.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        first, ema.updates = state["epoch"], state["updates"]
    steps = len(samples) // options.batch
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=options.epochs * steps, completed=first * steps)
        for epoch in range(first, options.epochs):
            canvas, rng = epoch_canvas(epoch, options), np.random.default_rng([options.seed, epoch])
            order = rng.permutation(len(samples))
            total = 0.0
            for step in range(steps):
                done = (epoch * steps + step + 1) / (options.epochs * steps)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(done, peak=options.lr)
                chosen = order[step * options.batch : (step + 1) * options.batch]
                batch = [augment(samples[i], rng, canvas=canvas) for i in chosen]
                targets = batch_targets(batch, strides=config.strides, canvas=canvas)
                images = normalise([s.image for s in batch], device)
                with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
                    outputs = [head.float() for head in flatten_levels(model(images))]
                losses = fcos_losses(*outputs, targets=[Targets(*(t.to(device) for t in item)) for item in targets])
                loss = sum(losses, torch.zeros((), device=device))
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
                ema.update(model)
                total += loss.item()
                progress.update(task, advance=1, description=f"epoch {epoch + 1} loss {total / (step + 1):.3f}")
            progress.console.print(f"epoch {epoch + 1}: loss {total / steps:.4f}")
            state = {"model": model.state_dict(), "ema": ema.model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "epoch": epoch + 1, "updates": ema.updates}, state_path.with_suffix(".tmp"))
            state_path.with_suffix(".tmp").replace(state_path)
            save(ema.model, classes, options.output, size=options.size)


def deployable(text: str) -> int:
    """An edge that the deployed network can have: its strides divide it."""
    edge = int(text)
    if edge < 32 or edge % 32:
        raise argparse.ArgumentTypeError(f"must be a multiple of 32, got {edge}")
    return edge


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument(
        "--backbone", choices=sorted(BACKBONES), default="demo", help="resnet50 and mobilenet-v2: for benchmarks"
    )
    parser.add_argument("--begin-with", type=Path, help="the same network without deformable layers")
    parser.add_argument("--epochs", type=int, default=100)
    size_help = "multiples of 32; the default is BCCD's 480 x 640 at 0.65, padded to them"
    parser.add_argument(
        "--size", type=deployable, nargs=2, default=(320, 416), metavar=("HEIGHT", "WIDTH"), help=size_help
    )
    parser.add_argument("--reduced-size", type=int, nargs=2, default=(192, 256), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--full-size-share", type=float, default=0.4, help="share of the epochs at the deployed size")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--bf16", action="store_true", help="compute convolutions in bfloat16: half the time on a CPU with it"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
