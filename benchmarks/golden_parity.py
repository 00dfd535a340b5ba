"""The detections of the original libraries, reproduced from checkpoints in their own keys, tail by tail.

    python benchmarks/golden_parity.py -o golden_parity.md

Rebuilds each reference of ``tests/golden/data`` as the file that its library would have saved, exports it with every
tail, and predicts the reference's images on every backend, with the commands a user would type. PyTorch runs
the checkpoint itself, behind each tail. Exit code 1 when a bound does not hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from typer.testing import CliRunner

from fcos_deploy.checkpoints.load import load_checkpoint
from fcos_deploy.cli.app import build_app
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.checkpoint_options import CheckpointOptions, format_checkpoint_options
from fcos_deploy.core.decode import BoxFilter
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import DeformForm, Tail
from fcos_deploy.core.preprocess import ChannelOrder
from fcos_deploy.detector import Detector

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
EDGES = {"shortest": 256, "longest": 426}  # the references' own; at these a 256x320 picture keeps its size
# Their batch norm statistics are random, which says nothing of where an MSRA backbone has its stride and of its pixels.
MSRA: dict[str, Any] = {
    "stride_in_1x1": True,
    "mean": (103.53, 116.28, 123.675),
    "std": (1.0, 1.0, 1.0),
    "channel_order": ChannelOrder.BGR,
}


def checkpoint_options(name: str, *, score_threshold: float | None = None) -> CheckpointOptions:
    """What the file of a reference leaves open."""
    msra = MSRA if name.startswith(("adelaidet_R_50", "detectron2")) else {}
    return CheckpointOptions(**EDGES, **msra, score_threshold=score_threshold)


BOUNDS = {"pytorch": (1e-5, 0.01), "onnxruntime": (1e-3, 0.1), "openvino": (1e-3, 0.1)}  # score, pixels


@dataclass(frozen=True, slots=True)
class Reference:
    """What a library found. ``images`` are files, ``wanted`` their detections in image pixels, in its order."""

    name: str
    checkpoint: Path
    score_threshold: float | None
    images: tuple[Path, ...]
    wanted: tuple[Detections, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """Largest differences over all detections; ``swapped`` of them stand elsewhere among equal scores."""

    detections: int
    score: float
    pixels: float
    swapped: int


def references(folder: Path, *, part: str = "") -> Iterator[Reference]:
    """Every reference with ``part`` in its name, its checkpoint and pictures written to ``folder``."""
    for path in sorted((GOLDEN / "data").glob(f"*{part}*.json")):
        said = json.loads(path.read_text())
        with np.load(path.with_suffix(".npz")) as arrays:
            golden = dict(arrays)
        threshold = said["meta"]["score_thresh"] if "score_thresh" in said.get("meta", {}) else None
        checkpoint = write_checkpoint(path.stem, said, folder=folder)
        images, wanted = _pictures(path.stem, said, golden, folder=folder)
        yield Reference(path.stem, checkpoint, threshold, images, wanted)


def write_checkpoint(name: str, said: dict[str, Any], *, folder: Path) -> Path:
    """The file as the library saves it."""
    import torch

    fill = _fill_weights()
    weights = {key: torch.from_numpy(np.asarray(fill(key, tuple(shape)))) for key, shape in said["state_dict"].items()}
    content: dict[str, Any] = {"model": weights}
    if name.startswith("mmdet"):
        content = {"state_dict": weights, "meta": said["meta"]}
    elif name.startswith("torchvision"):
        content = weights
    torch.save(content, folder / f"{name}.pth")
    return folder / f"{name}.pth"


def _fill_weights() -> Any:
    spec = importlib.util.spec_from_file_location("fill_weights", GOLDEN / "_fill_weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fill


def _pictures(
    name: str, said: dict[str, Any], golden: dict[str, Any], *, folder: Path
) -> tuple[tuple[Path, ...], tuple[Detections, ...]]:
    if "images" in said:
        names = [[f"det{i}_{what}" for what in ("boxes", "scores", "labels")] for i in range(len(said["images"]))]
        wanted = tuple(Detections(*(golden[one] for one in three)) for three in names)
        return tuple(GOLDEN / "data" / "images" / image for image in said["images"]), wanted
    path = folder / f"{name}.png"
    cv2.imwrite(str(path), cv2.cvtColor(golden["image"], cv2.COLOR_RGB2BGR))
    return (path,), (Detections(golden["boxes"], golden["scores"], golden["labels"]),)


def compare(found: Detections, wanted: Detections, *, tie: float) -> Difference:
    """Pair each wanted detection with the nearest of its label whose score is within ``tie``.

    Raises:
        AssertionError: one has no partner, or stands elsewhere than among scores within ``tie`` of its own.
    """
    assert len(found) == len(wanted), f"{len(found)} detections, {len(wanted)} wanted"
    free = np.ones(len(found), np.bool_)
    pixels = [0.0]
    swapped = 0
    for place, (box, score, label) in enumerate(zip(wanted.boxes, wanted.scores, wanted.labels, strict=True)):
        partners = np.flatnonzero(free & (found.labels == label) & (np.abs(found.scores - score) <= tie))
        assert len(partners), f"detection {place} (label {label}, score {score:.6f}) is missing"
        distances = np.abs(found.boxes[partners] - box).max(1)
        chosen = int(partners[distances.argmin()])
        assert abs(wanted.scores[chosen] - score) <= tie, f"detection {place} stands at {chosen}"
        free[chosen] = False
        pixels.append(float(distances.min()))
        swapped += chosen != place
    return Difference(len(wanted), float(np.abs(found.scores - wanted.scores).max()), max(pixels), swapped)


def with_final_clip(wanted: Detections, checkpoint: Path, image: Path) -> Detections:
    """AdelaiDet's and detectron2's boxes were recorded before the library's own last clip to the image."""
    decode = load_checkpoint(checkpoint, options=checkpoint_options(checkpoint.stem)).contract.decode
    if decode.profile.box_filter is not BoxFilter.AFTER_FINAL_CLIP:
        return wanted
    height, width = cv2.imread(str(image)).shape[:2]
    return Detections(wanted.boxes.clip(0, np.float32([width, height, width, height])), wanted.scores, wanted.labels)


def _command(*arguments: str | Path) -> str:
    done = CliRunner().invoke(build_app(), [str(argument) for argument in arguments])
    assert done.exit_code == 0, f"{arguments}: {done.stderr} {done.exception}"
    return done.stdout


def _options(reference: Reference) -> list[str]:
    """The reference's sizes and threshold as a file of options, which every command takes."""
    options = checkpoint_options(reference.checkpoint.stem, score_threshold=reference.score_threshold)
    file = reference.checkpoint.with_suffix(".toml")
    file.write_text(format_checkpoint_options(options))
    return ["--checkpoint-options", str(file)]


def export(reference: Reference, tail: Tail, form: DeformForm) -> Path:
    """``fcos-deploy export`` with the reference's sizes; ``form`` is of deformable convolutions, if there are any."""
    target = reference.checkpoint.with_name(f"{reference.name}.{tail}.{form}.onnx")
    _command("export", reference.checkpoint, "-o", target, "--tail", tail, "--deform-form", form, *_options(reference))
    return target


def predict(model: Path, image: Path, *, backend: str, options: list[str] | None = None) -> Detections:
    """``fcos-deploy predict --json``, read back."""
    (document,) = json.loads(_command("predict", model, image, "--backend", backend, "--json", *(options or [])))
    found = document["detections"]
    return Detections(
        np.array([one["box"] for one in found], np.float32).reshape(-1, 4),
        np.array([one["score"] for one in found], np.float32),
        np.array([one["label"] for one in found], np.int64),
    )


def predict_with_tail(reference: Reference, tail: Tail) -> list[Detections]:
    """PyTorch, which runs checkpoints; the command puts the raw tail behind them, the library any."""
    if tail is Tail.RAW:
        options = _options(reference)
        return [predict(reference.checkpoint, image, backend="pytorch", options=options) for image in reference.images]
    chosen = checkpoint_options(reference.checkpoint.stem, score_threshold=reference.score_threshold)
    contract = dataclasses.replace(load_checkpoint(reference.checkpoint, options=chosen).contract, tail=tail)
    options = SessionOptions(contract=contract, checkpoint=chosen)
    with Detector.open(reference.checkpoint, backend="pytorch", options=options) as detector:
        return [detector.detect(image) for image in reference.images]


def measure(reference: Reference, tail: Tail) -> Iterator[tuple[str, Difference]]:
    """(backend, largest differences over the images) for PyTorch and every backend that runs exported graphs."""
    yield "pytorch", largest(predict_with_tail(reference, tail), wanted_of(reference), backend="pytorch")
    yield from measure_exported(reference, tail)


def measure_exported(reference: Reference, tail: Tail) -> Iterator[tuple[str, Difference]]:
    """As ``measure``, without PyTorch. ONNX Runtime runs both forms of deformable convolutions."""
    wanted = wanted_of(reference)
    forms = list(DeformForm) if "dcn" in reference.name else [DeformForm.GRID_SAMPLE]
    for form in forms:
        model = export(reference, tail, form)
        for backend in ("onnxruntime", "openvino") if form is DeformForm.GRID_SAMPLE else ("onnxruntime",):
            found = [predict(model, image, backend=backend) for image in reference.images]
            yield backend, largest(found, wanted, backend=backend)
        model.unlink()


def wanted_of(reference: Reference) -> list[Detections]:
    """The library's detections, all of them after its last step."""
    pairs = zip(reference.wanted, reference.images, strict=True)
    return [with_final_clip(wanted, reference.checkpoint, image) for wanted, image in pairs]


def largest(found: list[Detections], wanted: list[Detections], *, backend: str) -> Difference:
    """Over all images; scores within the backend's own bound count as equal."""
    tie, _ = BOUNDS[backend]
    each = [compare(f, w, tie=tie) for f, w in zip(found, wanted, strict=True)]
    return Difference(
        detections=sum(one.detections for one in each),
        score=max(one.score for one in each),
        pixels=max(one.pixels for one in each),
        swapped=sum(one.swapped for one in each),
    )


def main() -> int:
    """Measure all, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", default="", help="part of a reference's name")
    parser.add_argument("--tail", type=Tail, action="append", help="only this one; may be repeated")
    arguments = parser.parse_args()
    lines = [
        "| reference | tail | backend | detections | score | box, px | in another order |",
        "|---|---|---|---|---|---|---|",
    ]
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for reference in references(Path(folder), part=arguments.only):
            for tail in arguments.tail or list(Tail):
                for backend, found in measure(reference, tail):
                    score, pixels = BOUNDS[backend]
                    failed += found.score > score or found.pixels > pixels
                    row = (
                        *(reference.name, tail, backend, found.detections),
                        *(f"{found.score:.1e}", f"{found.pixels:.1e}", found.swapped),
                    )
                    lines.append("| " + " | ".join(map(str, row)) + " |")
                    print(lines[-1], flush=True)
                    arguments.output.write_text("\n".join(lines) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
