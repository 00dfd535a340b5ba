"""How long the host's share of one detection takes: preprocessing, and decoding with suppression.

    python benchmarks/host_path.py

Prints medians of one thread in milliseconds. Head outputs are synthetic: `scene` has the logits of a trained detector
(background far below the threshold, a dense cluster of positives around each object); in `crowded` there are 150
objects; in `adversarial` every pair passes the gate, so that each level is cut at its top 1000.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import cv2
import numpy as np

from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.decode import HeadOutputs, decode
from fcos_deploy.core.decode_spec import PROFILES, DecodeSpec
from fcos_deploy.core.locations import location_centers, location_strides
from fcos_deploy.core.postprocess import postprocess
from fcos_deploy.core.preprocess import Letterbox, preprocess
from fcos_deploy.core.preprocess_spec import (
    InputDtype,
    PreprocessSpec,
    ResizeFilter,
    ResizeOrder,
    SizeRule,
)

SIZE = (640, 640)
CLASSES = 80
STRIDES = (8, 16, 32, 64, 128)
THRESHOLDS = {"torchvision": 0.2, "detectron2": 0.2}  # the others': 0.05
ROUNDS = 60
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def median_ms(call: Callable[[], object]) -> tuple[float, float]:
    """Median and 10th percentile of single calls, after warming up."""
    for _ in range(5):
        call()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times), sorted(times)[ROUNDS // 10]


def scene_head(objects: int, *, seed: int = 0) -> HeadOutputs:
    """Logits and distances as a trained detector gives them for this many objects of mixed sizes and classes."""
    rng = np.random.default_rng(seed)
    centers = location_centers(*SIZE, strides=STRIDES, mode=PROFILES["detectron2"].centers)
    strides = location_strides(*SIZE, strides=STRIDES)
    cls_logits = rng.normal(-7.0, 1.2, (len(centers), CLASSES)).astype(np.float32)
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
        cls_logits[inside, rng.integers(CLASSES)] = rng.normal(0.5, 1.0, len(inside))
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


def row(name: str, call: Callable[[], object], note: str = "") -> None:
    median, low = median_ms(call)
    print(f"  {name:<46} {median:8.3f} {low:8.3f}   {note}")


def time_decoding() -> None:
    box = Letterbox(720, 1280, 360, 640)
    heads = {"scene of 20": scene_head(20), "crowded, 150": scene_head(150), "adversarial": adversarial_head()}
    print(f"\ndecode + NMS, {SIZE[0]}x{SIZE[1]}, {CLASSES} classes                     median      p10 ms")
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
            outputs = {
                "cls_logits": head.cls_logits[None],
                "distances": head.distances[None],
                "centerness": head.centerness[None],
            }
            found = len(decode(head, spec, input_size=SIZE).scores)
            row(
                f"{profile.name}, {name}",
                lambda o=outputs, c=contract: postprocess(o, c, index=0, input_size=SIZE, letterbox=box),
                f"{found} candidates",
            )


def time_half_precision() -> None:
    print("\ndecode only, detectron2, scene of 20                     median      p10 ms")
    spec = DecodeSpec(profile=PROFILES["detectron2"], score_threshold=0.2, iou_threshold=0.6)
    head = scene_head(20)
    half = HeadOutputs(*(a.astype(np.float16) for a in (head.cls_logits, head.distances, head.centerness)))
    row("float32", lambda: decode(head, spec, input_size=SIZE))
    row("float16", lambda: decode(half, spec, input_size=SIZE))


def time_preprocessing() -> None:
    rng = np.random.default_rng(0)
    canvas = PreprocessSpec(mean=MEAN, std=STD, height=640, width=640)
    floats = PreprocessSpec(mean=MEAN, std=STD, height=640, width=640, input_dtype=InputDtype.FLOAT32)
    torchvision = PreprocessSpec(
        mean=MEAN,
        std=STD,
        shortest=800,
        longest=1333,
        size_rule=SizeRule.TORCHVISION,
        resize_filter=ResizeFilter.TORCH,
        resize_order=ResizeOrder.NORMALIZE_FIRST,
        input_dtype=InputDtype.FLOAT32,
    )
    detectron2 = PreprocessSpec(
        mean=MEAN,
        std=STD,
        shortest=800,
        longest=1333,
        size_rule=SizeRule.DETECTRON2,
        resize_filter=ResizeFilter.PIL,
        input_dtype=InputDtype.FLOAT32,
    )
    print("\npreprocess                                               median      p10 ms")
    for height, width in ((480, 640), (720, 1280), (1080, 1920)):
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        out = np.empty((3, 640, 640), np.uint8)
        out32 = np.empty((3, 640, 640), np.float32)
        row(f"{width}x{height} -> 640x640 uint8, into a batch", lambda i=image, o=out: preprocess(i, canvas, out=o))
        row(f"{width}x{height} -> 640x640 float32", lambda i=image, o=out32: preprocess(i, floats, out=o))
        row(f"{width}x{height} -> 800/1333 torchvision", lambda i=image: preprocess(i, torchvision))
        row(f"{width}x{height} -> 800/1333 detectron2 (Pillow)", lambda i=image: preprocess(i, detectron2))


def main() -> None:
    cv2.setNumThreads(1)
    print(f"NumPy {np.__version__}, OpenCV {cv2.__version__}, one thread")
    time_preprocessing()
    time_decoding()
    time_half_precision()


if __name__ == "__main__":
    main()
