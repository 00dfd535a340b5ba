"""Measures that a step left the numbers alone: outputs before and after, on inputs made to provoke differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.errors import StepCheckError
from runtimes.onnxruntime import GraphOptimization, open_model

__all__ = [
    "ROW_OUTPUTS",
    "Feeds",
    "Runner",
    "StepCheck",
    "compare",
    "feed_of",
    "onnx_runner",
    "provoking_feed",
    "remembering",
]

Feeds = dict[str, NDArray[Any]]
Runner = Callable[[Feeds], Feeds]

ROW_OUTPUTS = ("boxes", "scores", "labels")  # of the candidates and nms tails: rows that may swap when scores tie


@dataclass(frozen=True, slots=True)
class StepCheck:
    """What a comparison found.

    largest: the largest difference, as a share of what is allowed at that place (at most 1 when the check holds).
    difference: the same, in the tensor's own unit. where: tensor and index. unmatched: rows without a partner, of all.
    """

    step: str
    largest: float
    difference: float
    where: str
    unmatched: int = 0
    rows: int = 0

    def __str__(self) -> str:
        rows = f", {self.unmatched} of {self.rows} rows without a partner" if self.rows else ""
        return f"{self.step}: largest difference {self.difference:.3g} at {self.where}{rows}"


def compare(
    expected: Runner, actual: Runner, feeds: Iterable[Feeds], *, step: str, tolerance: float, row_share: float = 0.01
) -> StepCheck:
    """Run both on every feed and compare all outputs.

    Elements may differ by ``tolerance * (1 + |expected|)``, and by a tenth of ``tolerance`` of the tensor's largest
    value. Rows of ready candidates are matched by label, score and box, because near-ties may swap them; up to
    ``row_share`` of them may lack a partner.

    Raises:
        StepCheckError: with the largest difference and where it is.
    """
    worst = StepCheck(step, 0.0, 0.0, "none")
    unmatched = rows = 0
    for feed in feeds:
        left, right = expected(feed), actual(feed)
        found = [_compare_tensor(name, left[name], right[name], tolerance, step) for name in _elementwise(left)]
        worst = max([worst, *found], key=lambda check: check.largest)
        missing, total = _match_rows(left, right, tolerance=tolerance)
        unmatched, rows = unmatched + missing, rows + total
    result = StepCheck(step, worst.largest, worst.difference, worst.where, unmatched, rows)
    if worst.largest > 1 or unmatched > max(1.0, row_share * rows):
        raise StepCheckError(
            f"The result of '{step}' differs from its source ({result}).",
            hint="this is a bug of a step or of the runtime that checks it: please report it with the checkpoint",
        )
    return result


def _elementwise(outputs: Mapping[str, Any]) -> list[str]:
    rows = set(ROW_OUTPUTS) | {"num_detections"} if set(ROW_OUTPUTS) <= set(outputs) else set()
    return [name for name in outputs if name not in rows]


def _compare_tensor(name: str, expected: NDArray[Any], actual: NDArray[Any], tolerance: float, step: str) -> StepCheck:
    if expected.shape != actual.shape:
        raise StepCheckError(f"'{step}' changed '{name}' from shape {expected.shape} to {actual.shape}.")
    left, right = expected.astype(np.float64), actual.astype(np.float64)
    finite = np.isfinite(left) & np.isfinite(right)
    same = (left == right) | (np.isnan(left) & np.isnan(right))
    peak = float(np.abs(left[finite]).max(initial=0.0))
    allowed = tolerance * (1.0 + np.abs(np.where(finite, left, 0.0))) + 0.1 * tolerance * min(peak, 1e3)
    difference = np.where(same, 0.0, math.inf)
    difference[finite] = np.abs(left[finite] - right[finite])
    if not difference.size:
        return StepCheck(step, 0.0, 0.0, name)
    ratio = difference / allowed
    place = np.unravel_index(int(ratio.argmax()), ratio.shape)
    where = f"{name}[{', '.join(map(str, map(int, place)))}]"
    return StepCheck(step, float(ratio[place]), float(difference[place]), where)


def _match_rows(expected: Feeds, actual: Feeds, *, tolerance: float) -> tuple[int, int]:
    """(rows of ``expected`` without a partner in ``actual``, rows), over all images."""
    if not set(ROW_OUTPUTS) <= set(expected):
        return 0, 0
    missing = total = 0
    for image in range(len(expected["scores"])):
        left, right = (_rows(outputs, image) for outputs in (expected, actual))
        total += max(len(left), len(right))
        missing += abs(len(left) - len(right)) + _unpartnered(left, right, tolerance=tolerance)
    return missing, total


def _rows(outputs: Feeds, image: int) -> NDArray[np.float64]:
    """(r, 6): label, score and box of the rows that say something."""
    labels, scores = outputs["labels"][image], outputs["scores"][image]
    rows = np.concatenate([labels[:, None], scores[:, None], outputs["boxes"][image]], 1).astype(np.float64)
    used: NDArray[np.float64] = rows[(labels >= 0) & (scores >= 0)]
    return used


def _unpartnered(left: NDArray[np.float64], right: NDArray[np.float64], *, tolerance: float) -> int:
    missing = 0
    order = np.argsort(right[:, 1])
    sorted_scores = right[order, 1]
    for row in left:
        first, last = np.searchsorted(sorted_scores, [row[1] - tolerance, row[1] + tolerance])
        near = right[order[first:last]]
        allowed = tolerance * (1.0 + np.abs(row[2:]).max()) * 4
        fits = (near[:, 0] == row[0]) & (np.abs(near[:, 2:] - row[2:]) <= allowed).all(1)
        missing += not fits.any()
    return missing


def onnx_runner(model: Any) -> Runner:  # Any: onnx.ModelProto, whose package ships no types
    """Run a graph in ONNX Runtime on the CPU, without changes of ONNX Runtime's own.

    Raises:
        BackendLoadError: ONNX Runtime cannot load the graph.
    """
    return open_model(model.SerializeToString(), optimization=GraphOptimization.DISABLED).run


def remembering(run: Runner) -> Runner:
    """``run``, but only once on each feed; feeds are told apart by identity and must not change."""
    known: dict[int, tuple[Feeds, Feeds]] = {}  # with the feed, whose identity is then not given to another

    def remembered(feeds: Feeds) -> Feeds:
        if id(feeds) not in known:
            known[id(feeds)] = feeds, run(feeds)
        return known[id(feeds)][1]

    return remembered


def provoking_feed(images: tuple[int, int, int, int], *, dtype: str, image_sizes: bool, seed: int = 0) -> Feeds:
    """One picture of what provokes differences: noise, black and white areas, stripes, (float) values far outside.

    The areas are not quite flat: on flat ones neighbouring locations score the same to the last digit, and which of
    their boxes suppresses which is then left to rounding. images: (n, 3, H, W) of the input.
    """
    generator = np.random.default_rng(seed)
    batch, _, height, width = images
    if dtype == "uint8":
        picture = generator.integers(0, 256, images, np.uint8)
        low, high = picture % 8, 255 - picture % 8
    else:
        picture = generator.standard_normal(images, np.float32)
        low, high = picture - 20, picture + 20
    areas, stripes = slice(height // 3, 2 * height // 3), slice(2 * height // 3, height)
    for rows, bright in ((areas, slice(width // 2, width)), (stripes, slice(0, width, 2))):
        picture[..., rows, :] = low[..., rows, :]
        picture[..., rows, bright] = high[..., rows, bright]
    if not image_sizes:
        return {"images": picture}
    sizes = np.array([[height - 1, width - 3, 2 * height, 3 * width]], np.float32).repeat(batch, 0)
    return {"images": picture, "image_sizes": sizes}


def feed_of(contract: ModelContract, shapes: Mapping[str, tuple[int | None, ...]]) -> Feeds:
    """A feed that provokes differences; ``shapes`` are those of the graph's inputs, None is a dynamic axis.

    Dynamic axes become a batch of 1, and the canvas or, without one, twice the coarsest stride.
    """
    side = 2 * max(contract.decode.strides)
    height, width = contract.preprocess.canvas or (side, side)
    n, _, h, w = shapes["images"]
    return provoking_feed(
        (n or 1, 3, h or height, w or width),
        dtype=str(contract.preprocess.input_dtype),
        image_sizes="image_sizes" in shapes,
    )
