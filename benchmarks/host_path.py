"""How long the host's share of one detection takes: preprocessing, and decoding with suppression.

    python benchmarks/host_path.py
    python benchmarks/host_path.py --stages --work runs/host_path [--only demo] [--bundle fcos-demo]

The first prints medians and minima in milliseconds of CPU time of one thread, so that other programs on the machine
disturb little, and how many times longer the plain way takes: Pillow and NumPy for an image; every logit through the
sigmoid, sorted, and a loop over classes and boxes for detections. Head outputs are synthetic: `scene` has the logits of
a trained detector (background far below the threshold, a dense cluster of positives around each object), `one class`
the same with a single class, `crowded` 150 objects; in `adversarial` every pair of location and class passes, so that
each level is cut at its best 1000. Decoding is measured compiled and in NumPy, in turns.

The second exports the demo detector and a ResNet-50 at 640x640 and 800x1344 to ``--work`` and prints the stages of a
detection on both runtimes, and those of a bundle in both precisions: the network (fastest, wall clock), and CPU time of
the calling thread for preprocessing and for decoding with suppression, repeated, and for everything but the network in
one ``detect``, in a ``detect_batch`` of four and in two threads that detect at a time, each per image and in turn with
the network, which leaves cold caches. The network is the runtime's own call on arrays that are there, which a bare
script pays as well; the clocks around it are ours. The share is that of the largest of the three in the network.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from contestants import DEMO, Subject, demo_subject, ours_export, resnet_subject
from PIL import Image

from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.decode import (
    PROFILES,
    DecodeSpec,
    HeadOutputs,
    decode,
    level_sizes,
    location_centers,
    location_strides,
)
from fcos_deploy.core.detections import Postprocessor, postprocess
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.image import list_images, read_image
from fcos_deploy.core.native import SWITCH, library_problem
from fcos_deploy.core.preprocess import (
    ImageWriter,
    InputDtype,
    Letterbox,
    PreprocessSpec,
    ResizeFilter,
    ResizeOrder,
    SizeRule,
    preprocess,
)
from fcos_deploy.detector import Detector

SIZE = (640, 640)
CLASSES = 80
STRIDES = (8, 16, 32, 64, 128)
THRESHOLDS = {"torchvision": 0.2, "detectron2": 0.2}  # the others': 0.05
ROUNDS = 40
LOOPS = {"NumPy": "0"} if library_problem() else {"compiled": "1", "NumPy": "0"}
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def milliseconds(call: Callable[[], object], *, rounds: int = ROUNDS) -> tuple[float, float]:
    """Median and least CPU time of single calls, after warming up."""
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        call()
        times.append((time.thread_time() - start) * 1e3)
    return statistics.median(times), min(times)


def plain_detections(head: HeadOutputs, spec: DecodeSpec) -> list[int]:
    """Gate, rank and score sqrt(p * q), written down without a thought for time; indices of what stays."""
    p, q = (1 / (1 + np.exp(-x)) for x in (head.cls_logits, head.centerness))
    scores = np.sqrt(p * q)
    centers = location_centers(*SIZE, strides=STRIDES, mode=spec.profile.centers)
    boxes, kept, start = [], [], 0
    for height, width in level_sizes(*SIZE, strides=STRIDES):
        of_level = scores[start : start + height * width]
        location, channel = np.nonzero(of_level > spec.score_threshold)
        value = of_level[location, channel]
        best = np.argsort(-value)[: spec.pre_nms_top_k]
        at = location[best] + start
        corners = np.concatenate((centers[at] - head.distances[at, :2], centers[at] + head.distances[at, 2:]), axis=1)
        boxes.append(np.column_stack((corners, value[best], channel[best])))
        start += height * width
    rows = np.concatenate(boxes)
    for label in np.unique(rows[:, 5]):
        rest = np.flatnonzero(rows[:, 5] == label)
        rest = rest[np.argsort(-rows[rest, 4])]
        while len(rest):
            first, rest = rest[0], rest[1:]
            kept.append(int(first))
            sides = np.minimum(rows[first, 2:4], rows[rest, 2:4]) - np.maximum(rows[first, :2], rows[rest, :2])
            inter = np.maximum(sides, 0).prod(axis=1)
            areas = (rows[:, 2:4] - rows[:, :2]).prod(axis=1)
            rest = rest[inter / (areas[first] + areas[rest] - inter) <= spec.iou_threshold]
    return sorted(kept, key=lambda i: -rows[i, 4])[: spec.max_detections]


def plain_input(image: np.ndarray) -> np.ndarray:
    """Resize, copy to a canvas, transpose: uint8."""
    scale = min(SIZE[0] / image.shape[0], SIZE[1] / image.shape[1])
    size = round(image.shape[1] * scale), round(image.shape[0] * scale)
    canvas = np.full((*SIZE, 3), 114, np.uint8)
    canvas[: size[1], : size[0]] = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    return np.ascontiguousarray(canvas.transpose(2, 0, 1))


def scene_head(objects: int, *, classes: int = CLASSES, seed: int = 0) -> HeadOutputs:
    """Logits and distances as a trained detector gives them for this many objects of mixed sizes and classes."""
    rng = np.random.default_rng(seed)
    centers = location_centers(*SIZE, strides=STRIDES, mode=PROFILES["detectron2"].centers)
    strides = location_strides(*SIZE, strides=STRIDES)
    cls_logits = rng.normal(-7.0, 1.2, (len(centers), classes)).astype(np.float32)
    centerness = rng.normal(-1.0, 1.0, (len(centers), 1)).astype(np.float32)
    distances = (np.abs(rng.normal(2.0, 1.0, (len(centers), 4))) * strides[:, None]).astype(np.float32)
    for _ in range(objects):
        sides = np.exp(rng.uniform(np.log(16), np.log(400), 2))
        middle = rng.uniform(0, SIZE[0], 2)
        low, high = middle - sides / 2, middle + sides / 2
        to_edges = np.concatenate((centers - low, high - centers), axis=1)
        largest = to_edges.max(axis=1)
        near = np.abs(centers - middle).max(axis=1) < 1.5 * strides
        on_level = (largest > 2 * strides) & (largest < 10 * strides)
        inside = np.flatnonzero((to_edges.min(axis=1) > 0) & near & on_level)
        cls_logits[inside, rng.integers(classes)] = rng.normal(0.5, 1.0, len(inside))
        centerness[inside, 0] = rng.normal(1.0, 0.5, len(inside))
        distances[inside] = to_edges[inside] + rng.normal(0, 1.5, (len(inside), 4))
    return HeadOutputs(cls_logits, np.maximum(distances, 0), centerness)


def adversarial_head(*, seed: int = 0) -> HeadOutputs:
    """Every pair of location and class passes the gate."""
    rng = np.random.default_rng(seed)
    strides = location_strides(*SIZE, strides=STRIDES)
    count = len(strides)
    return HeadOutputs(
        rng.normal(2.0, 0.7, (count, CLASSES)).astype(np.float32),
        (rng.uniform(0.5, 6.0, (count, 4)) * strides[:, None]).astype(np.float32),
        rng.normal(1.0, 0.5, (count, 1)).astype(np.float32),
    )


def row(name: str, call: Callable[[], object], *, plain: Callable[[], object] | None = None, note: str = "") -> None:
    """Measure and print one line."""
    median, least = milliseconds(call)
    ratio = f"{milliseconds(plain, rounds=7)[0] / median:6.1f}x" if plain else " " * 7
    print(f"  {name:<46} {median:8.3f} ms  {least:8.3f} ms  {ratio}  {note}")


def with_loops(switch: str, call: Callable[[], object]) -> Callable[[], object]:
    """The call with compiled loops (1) or NumPy's (0)."""

    def run() -> object:
        os.environ[SWITCH] = switch
        return call()

    return run


def time_decoding() -> None:
    """Each profile on each kind of head output."""
    box = Letterbox(720, 1280, 360, 640)
    heads = {
        "scene of 20": scene_head(20),
        "scene of 20, one class": scene_head(20, classes=1),
        "crowded": scene_head(150),
        "adversarial": adversarial_head(),
    }
    print(f"\ndecode + NMS, {SIZE[0]}x{SIZE[1]}, {CLASSES} classes")
    for profile in PROFILES.values():
        spec = DecodeSpec(
            profile=profile, score_threshold=THRESHOLDS.get(profile.name, 0.05), iou_threshold=0.6, strides=STRIDES
        )
        contract = ModelContract(
            class_names=tuple(map(str, range(CLASSES))),
            preprocess=PreprocessSpec(mean=MEAN, std=STD, height=SIZE[0], width=SIZE[1]),
            decode=spec,
        )
        for name, head in heads.items():
            tensors = (head.cls_logits[None], head.distances[None], head.centerness[None])
            outputs = dict(zip(("cls_logits", "distances", "centerness"), tensors, strict=True))
            found = len(decode(head, spec, input_size=SIZE).scores)
            plain = (lambda h=head, d=spec: plain_detections(h, d)) if profile.name == "detectron2" else None
            for title, switch in LOOPS.items():
                row(
                    f"{profile.name}, {name}, {title}",
                    with_loops(
                        switch, lambda o=outputs, c=contract: postprocess(o, c, index=0, input_size=SIZE, letterbox=box)
                    ),
                    plain=plain,
                    note=f"{found} candidates",
                )


def time_half_precision() -> None:
    """Outputs in float16, as half-precision engines give them."""
    print("\ndecode only, detectron2, scene of 20")
    spec = DecodeSpec(profile=PROFILES["detectron2"], score_threshold=0.2, iou_threshold=0.6)
    head = scene_head(20)
    half = HeadOutputs(*(a.astype(np.float16) for a in (head.cls_logits, head.distances, head.centerness)))
    for title, switch in LOOPS.items():
        row(f"float32, {title}", with_loops(switch, lambda: decode(head, spec, input_size=SIZE)))
        row(f"float16, {title}", with_loops(switch, lambda: decode(half, spec, input_size=SIZE)))


def time_preprocessing() -> None:
    """Deployment's uint8 canvas, the same in float32, and two ecosystems' own arithmetic."""
    rng = np.random.default_rng(0)
    canvas = PreprocessSpec(mean=MEAN, std=STD, height=SIZE[0], width=SIZE[1])
    floats = replace(canvas, input_dtype=InputDtype.FLOAT32)
    edges = replace(floats, height=None, width=None, shortest=800, longest=1333, size_rule=SizeRule.DETECTRON2)
    detectron2 = replace(edges, resize_filter=ResizeFilter.PIL)
    torchvision = replace(
        edges,
        size_rule=SizeRule.TORCHVISION,
        resize_filter=ResizeFilter.TORCH,
        resize_order=ResizeOrder.NORMALIZE_FIRST,
    )
    print("\npreprocess")
    for height, width in ((480, 640), (720, 1280), (1080, 1920)):
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        out, out32 = np.empty((3, *SIZE), np.uint8), np.empty((3, *SIZE), np.float32)
        source = f"{width}x{height}"
        row(
            f"{source} -> 640x640 uint8",
            lambda i=image, o=out: preprocess(i, canvas, out=o),
            plain=lambda i=image: plain_input(i),
        )
        row(f"{source} -> 640x640 float32", lambda i=image, o=out32: preprocess(i, floats, out=o))
        row(f"{source} -> 800/1333 as torchvision", lambda i=image: preprocess(i, torchvision))
        row(f"{source} -> 800/1333 as detectron2", lambda i=image: preprocess(i, detectron2))


class NetworkClock:
    """Knows what the runtime's own calls of an open session take: wall clock, and CPU of the calling thread."""

    def __init__(self, session: Any) -> None:
        self.walls: list[float] = []
        self._thread = threading.local()
        bound = session._bound
        session._bound = lambda feeds: self._timed(bound(feeds))
        session._run_many = self._timed(session._run_many)

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            outputs = call(*arguments)
            self._thread.cpu += time.thread_time() - cpu
            self.walls.append((time.perf_counter() - wall) * 1e3)
            return outputs

        return timed

    def beside(self, call: Callable[[], object], *, images: int) -> float:
        """CPU milliseconds of the calling thread, per image, outside the network."""
        self._thread.cpu, started = 0.0, time.thread_time()
        call()
        return (time.thread_time() - started - self._thread.cpu) * 1e3 / images

    def beside_in_threads(self, call: Callable[[], object], *, count: int, rounds: int) -> float:
        """The median of calls in ``count`` threads at a time."""

        def work(_: int) -> list[float]:
            times = [self.beside(call, images=1) for _ in range(rounds + 2)]
            return times[2:]  # without those that lay out what is kept

        with ThreadPoolExecutor(count) as pool:
            return statistics.median(itertools.chain(*pool.map(work, range(count))))


def stage_row(opened: Detector, images: Sequence[np.ndarray], *, rounds: int) -> str:
    """One row of the table of stages; two figures are those of compiled loops and of NumPy's."""
    image, batch, session, contract = images[0], list(images[:4]), opened.session, opened.contract
    feeds, (letterbox,) = opened.prepare([image])
    outputs, size = opened.infer(feeds), (feeds["images"].shape[2], feeds["images"].shape[3])
    clock, columns = NetworkClock(session), []
    for switch in LOOPS.values():
        os.environ[SWITCH] = switch
        detector = Detector(session, contract)  # which keeps the loops of its first image
        finish = Postprocessor(outputs, contract, index=0, input_size=size, letterbox=letterbox)
        for _ in range(2):
            clock.beside(lambda detector=detector: detector.detect(image), images=1)
            clock.beside(lambda detector=detector: detector.detect_batch(batch), images=len(batch))
        singles = [clock.beside(lambda detector=detector: detector.detect(image), images=1) for _ in range(rounds)]
        batches = [
            clock.beside(lambda detector=detector: detector.detect_batch(batch), images=len(batch))
            for _ in range(-(-rounds // 2))
        ]
        pairs = clock.beside_in_threads(lambda detector=detector: detector.detect(image), count=2, rounds=rounds)
        columns.append((milliseconds(finish)[0], statistics.median(singles), statistics.median(batches), pairs))
    os.environ[SWITCH] = next(iter(LOOPS.values()))
    network, writer = min(clock.walls), ImageWriter(image.shape, contract.preprocess)
    preprocessing = milliseconds(lambda: writer.write(image))[0]
    cells = [" / ".join(f"{of_loops[stage]:.2f}" for of_loops in columns) for stage in range(4)]
    return f"{network:.1f} | {preprocessing:.2f} | {' | '.join(cells)} | {max(columns[0][1:]) / network:.1%}"


def print_stages(work: Path, *, only: str, bundle: Path | None, threads: int) -> None:
    """Stages of each model on each runtime, and of the bundle's in each precision."""
    subjects: dict[str, tuple[Callable[[], Subject], int]] = {
        "demo": (lambda: demo_subject(threads), 60),
        "ResNet-50 640x640": (lambda: resnet_subject(threads, size=(640, 640), classes=80), 6),
        "ResNet-50 800x1344": (lambda: resnet_subject(threads, size=(800, 1344), classes=91), 4),
    }
    loops = " / ".join(LOOPS)
    print(f"ms per image; {loops}\n")
    print("| | network | preprocess | decode, NMS | all but the network | in a batch of 4 | 2 callers | share |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, (make, rounds) in subjects.items():
        if only not in ("", name):
            continue
        folder = work / name.replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        subject = make()
        images = [read_image(path) for path in list_images(subject.images)[:4]]
        model = ours_export(subject, folder)
        for backend in ("onnxruntime", "openvino"):
            with Detector.open(model, backend=backend, options=subject.options()) as detector:
                print(f"| {name}, {backend} | {stage_row(detector, images, rounds=rounds)} |", flush=True)
    images = [read_image(path) for path in list_images(DEMO / "evaluation")[:4]]
    for backend, precision in itertools.product(("onnxruntime", "openvino"), ("fp32", "int8") if bundle else ()):
        with Detector.open(
            bundle, backend=backend, precision=Precision(precision), options=SessionOptions(threads=threads)
        ) as detector:
            print(f"| {bundle} {precision}, {backend} | {stage_row(detector, images, rounds=60)} |", flush=True)


def main() -> None:
    """Print all tables, or that of the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", action="store_true", help="the stages of a detection, by model and runtime")
    parser.add_argument("--work", type=Path, default=Path("runs/host_path"), help="where exported models are kept")
    parser.add_argument("--only", default="", help="one of the models of --stages")
    parser.add_argument("--bundle", type=Path, help="a bundle for --stages, in both precisions")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    print(f"NumPy {np.__version__}, OpenCV {cv2.__version__}, {platform.machine()}, one thread")
    if options.stages:
        print_stages(options.work, only=options.only, bundle=options.bundle, threads=options.threads)
        return
    time_preprocessing()
    time_decoding()
    time_half_precision()


if __name__ == "__main__":
    main()
