"""Measures that a step changed no numbers: outputs before and after it, on inputs made to provoke differences."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.backend import Session, Tensors
from fcos_deploy.core.contract import SOURCE_OUTPUTS, TAIL_OUTPUTS, ModelContract
from fcos_deploy.core.decode import HeadOutputs, decode
from fcos_deploy.core.detections import postprocess
from fcos_deploy.core.enums import Tail
from fcos_deploy.core.errors import StepCheckError
from fcos_deploy.core.onnx_file import fits_one_file, save_onnx
from fcos_deploy.core.preprocess import Letterbox
from runtimes.onnxruntime import GraphOptimization, open_model

__all__ = [
    "Runner",
    "StepCheck",
    "compare",
    "compare_sessions",
    "feed_of",
    "onnx_runner",
    "provoking_feed",
    "recorded",
]

Runner = Callable[[Tensors], Tensors]

# Of the candidates and nms tails, whose rows may swap when scores tie.
_ROW_OUTPUTS = TAIL_OUTPUTS[Tail.CANDIDATES]
_CANDIDATE_OUTPUTS = SOURCE_OUTPUTS[Tail.NMS][: len(_ROW_OUTPUTS)]


@dataclass(frozen=True, slots=True)
class StepCheck:
    """Result of a comparison.

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
    expected: Runner,
    actual: Runner,
    feeds: Iterable[Tensors],
    *,
    step: str,
    tolerance: float,
    row_share: float = 0.01,
    contract: ModelContract | None = None,
) -> StepCheck:
    """Run both on every feed and compare all outputs.

    Elements may differ by ``tolerance * (1 + |expected|)``, and by a tenth of ``tolerance`` of the tensor's largest
    value. Candidates and detections are rows, matched by label, score and box. Where ``actual`` shows what they are
    made from (``SOURCE_OUTPUTS`` of ``contract``), they are held against what the host makes of the same: a rounding
    that swaps two scores and so lets another box win is then no difference. Elsewhere they are held against those of
    ``expected``. Up to ``row_share`` of them may lack a partner.

    Raises:
        StepCheckError: with the largest difference and where it is, or that no image could be checked.
    """
    worst = StepCheck(step, 0.0, 0.0, "none")
    unmatched = rows = 0
    for feed in feeds:
        left, right = expected(feed), actual(feed)
        has_rows = set(_ROW_OUTPUTS) <= set(left)
        matched = {*_ROW_OUTPUTS, *_CANDIDATE_OUTPUTS, "num_detections", "settled"} if has_rows else set()
        for name in left:
            _require_finite(name, left[name], right[name], step=step)
        checks = [_compare_tensor(n, left[n], right[n], tolerance, step) for n in left if n not in matched]
        worst = max([worst, *checks], key=lambda check: check.largest)
        if has_rows:
            if contract is not None and set(SOURCE_OUTPUTS[contract.tail]) <= set(right):
                missing, total = _unlike_the_host(right, feed, contract=contract, tolerance=tolerance)
            else:
                missing, total = _match_rows(left, right, tolerance=tolerance)
            unmatched, rows = unmatched + missing, rows + total
    result = StepCheck(step, worst.largest, worst.difference, worst.where, unmatched, rows)
    if worst.largest > 1 or unmatched > max(1.0, row_share * rows):
        raise StepCheckError(
            f"The result of '{step}' differs from its source ({result}).",
            hint="this is a bug of a step or of the runtime that checks it: please report it with the checkpoint",
        )
    return result


def compare_sessions(
    source: Session, result: Session, contract: ModelContract, *, step: str, tolerance: float
) -> StepCheck:
    """As ``compare``, on one feed that provokes differences."""
    feeds = [feed_of(contract, {spec.name: spec.shape for spec in source.inputs})]
    return compare(source.run, result.run, feeds, step=step, tolerance=tolerance)


def _require_finite(name: str, expected: NDArray[Any], actual: NDArray[Any], *, step: str) -> None:
    """Two NaN agree about nothing."""
    for array, when in ((expected, "before"), (actual, "after")):
        broken = ~np.isfinite(array)
        if broken.any():
            place = np.argwhere(broken)[0].tolist()
            where = f"{name}[{', '.join(map(str, place))}]"
            raise StepCheckError(
                f"{where} is {array[tuple(place)]} {when} the step '{step}': only finite outputs can be compared.",
                hint="the weights are damaged, or the model overflows in this precision: check the checkpoint",
            )


def _unlike_the_host(outputs: Tensors, feed: Tensors, *, contract: ModelContract, tolerance: float) -> tuple[int, int]:
    """(rows without a partner, rows) of a graph that shows what its rows are made from.

    Its candidates are held against the host's from the graph's own head outputs, its detections against the host's from
    the graph's own candidates; those of images on which a static suppression did not settle are left out.

    Raises:
        StepCheckError: it settled on none.
    """
    missing = total = 0
    size = (int(feed["images"].shape[2]), int(feed["images"].shape[3]))
    names = _ROW_OUTPUTS if contract.tail is Tail.CANDIDATES else _CANDIDATE_OUTPUTS
    chosen = dict(zip(_ROW_OUTPUTS, (outputs[name] for name in names), strict=True))
    settled = outputs["settled"].ravel() if "settled" in outputs else np.ones(len(chosen["scores"]))
    if not settled.any():
        raise StepCheckError(
            "The static NMS settled on no image of the check, so that its detections could not be checked.",
            hint="--nms-boxes with a larger number, or --nms-form onnx",
        )
    for image in range(len(chosen["scores"])):
        head = HeadOutputs(*(outputs[name][image] for name in TAIL_OUTPUTS[Tail.RAW]))
        candidates = decode(head, contract.decode, input_size=size)
        host, graph = _rows(candidates.channels, candidates.scores, candidates.boxes), _used_rows(chosen, image)
        total += max(len(host), len(graph))
        missing += _without_partner(graph, host, tolerance=tolerance)
        if contract.decode.profile.rank_per_location:  # Only here a graph may have fewer (docs/export.md).
            missing -= max(0, len(host) - len(graph))
        if contract.tail is Tail.NMS and settled[image]:
            sizes = feed["image_sizes"][image] if "image_sizes" in feed else np.array([*size, *size])
            letterbox = Letterbox(int(sizes[2]), int(sizes[3]), int(sizes[0]), int(sizes[1]))
            host, graph = (
                _detection_rows(tensors, replace(contract, tail=tail), image, size=size, letterbox=letterbox)
                for tensors, tail in ((chosen, Tail.CANDIDATES), (outputs, Tail.NMS))
            )
            total += max(len(host), len(graph))
            missing += _without_partner(host, graph, tolerance=tolerance)
    return missing, total


def _detection_rows(
    outputs: Tensors, contract: ModelContract, image: int, *, size: tuple[int, int], letterbox: Letterbox
) -> NDArray[np.float64]:
    """(d, 6), best first; no more than ``max_detections``, where ties with the last one have no room in a tail."""
    detections = postprocess(outputs, contract, index=image, input_size=size, letterbox=letterbox)
    best = np.argsort(-detections.scores, kind="stable")[: contract.decode.max_detections]
    return _rows(detections.labels, detections.scores, detections.boxes)[best]


def _compare_tensor(name: str, expected: NDArray[Any], actual: NDArray[Any], tolerance: float, step: str) -> StepCheck:
    if expected.shape != actual.shape:
        raise StepCheckError(f"'{step}' changed '{name}' from shape {expected.shape} to {actual.shape}.")
    left, right = expected.astype(np.float64), actual.astype(np.float64)
    # The peak counts up to 1000 only: an output that runs away must not excuse errors of any size elsewhere.
    peak = float(np.abs(left).max(initial=0.0))
    allowed = tolerance * (1.0 + np.abs(left)) + 0.1 * tolerance * min(peak, 1e3)
    difference = np.abs(left - right)
    if not difference.size:
        return StepCheck(step, 0.0, 0.0, name)
    ratio = difference / allowed
    place = np.unravel_index(int(ratio.argmax()), ratio.shape)
    where = f"{name}[{', '.join(map(str, map(int, place)))}]"
    return StepCheck(step, float(ratio[place]), float(difference[place]), where)


def _match_rows(expected: Tensors, actual: Tensors, *, tolerance: float) -> tuple[int, int]:
    """(rows without a partner on the other side, rows), over all images."""
    missing = total = 0
    for image in range(len(expected["scores"])):
        left, right = (_used_rows(outputs, image) for outputs in (expected, actual))
        total += max(len(left), len(right))
        missing += _without_partner(left, right, tolerance=tolerance)
    return missing, total


def _without_partner(left: NDArray[np.float64], right: NDArray[np.float64], *, tolerance: float) -> int:
    """How many rows of ``left`` are not in ``right``, and how many more or fewer it has."""
    missing = abs(len(left) - len(right))
    right = right[np.argsort(right[:, 1])]
    for row in left:
        first, last = np.searchsorted(right[:, 1], [row[1] - tolerance, row[1] + tolerance])
        near = right[first:last]
        # Boxes are decoded from several outputs of the network, whose errors add up: four times the tolerance.
        allowed = tolerance * (1.0 + np.abs(row[2:]).max()) * 4
        fits = (near[:, 0] == row[0]) & (np.abs(near[:, 2:] - row[2:]) <= allowed).all(1)
        missing += not fits.any()
    return missing


def _rows(labels: NDArray[Any], scores: NDArray[Any], boxes: NDArray[Any]) -> NDArray[np.float64]:
    """(r, 6): label, score and box."""
    return np.concatenate([labels[:, None], scores[:, None], boxes], 1).astype(np.float64)


def _used_rows(outputs: Tensors, image: int) -> NDArray[np.float64]:
    """(r, 6): label, score and box of the rows that are not padding."""
    rows = _rows(*(outputs[name][image] for name in ("labels", "scores", "boxes")))
    used: NDArray[np.float64] = rows[(rows[:, 0] >= 0) & (rows[:, 1] >= 0)]  # padding has label -1 or score -1
    return used


def onnx_runner(model: Any, *, folder: Path | None = None) -> Runner:  # Any: onnx.ModelProto, without types
    """Run a graph in ONNX Runtime on the CPU, without changes of ONNX Runtime's own.

    ``folder``: where the file of weights lies that the model refers to, if it does; ONNX Runtime maps it.

    Raises:
        BackendLoadError: ONNX Runtime cannot load the graph.
    """
    if folder is not None:
        # Beside the weights: a model refers to them relative to its own folder.
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".onnx") as file:
            file.write(model.SerializeToString())
            file.flush()
            return open_model(Path(file.name), optimization=GraphOptimization.DISABLED).run
    if fits_one_file(model):
        return open_model(model.SerializeToString(), optimization=GraphOptimization.DISABLED).run
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.onnx"
        save_onnx(model, path)
        return open_model(path, optimization=GraphOptimization.DISABLED).run


def recorded(run: Runner, feeds: Iterable[Tensors]) -> Runner:
    """What ``run`` gave for each of ``feeds``, told apart by identity; ``run`` and its weights are not kept."""
    results = [(feed, run(feed)) for feed in feeds]
    return lambda feeds: next(outputs for feed, outputs in results if feed is feeds)


def provoking_feed(images: tuple[int, int, int, int], *, dtype: str, image_sizes: bool, seed: int = 0) -> Tensors:
    """Images of what provokes differences: noise, black and white areas, stripes, (float) values far outside.

    The areas are not quite flat: on flat ones neighbouring locations score the same to the last digit, and which of
    their boxes suppresses which is then left to rounding. images: (n, c, H, W) of the input.
    """
    generator = np.random.default_rng(seed)
    batch, _, height, width = images
    if dtype == "uint8":
        pixels = generator.integers(0, 256, images, np.uint8)
        low, high = pixels % 8, 255 - pixels % 8
    else:
        pixels = generator.standard_normal(images, np.float32)
        low, high = pixels - 20, pixels + 20
    areas, stripes = slice(height // 3, 2 * height // 3), slice(2 * height // 3, height)
    for rows, bright in ((areas, slice(width // 2, width)), (stripes, slice(0, width, 2))):
        pixels[..., rows, :] = low[..., rows, :]
        pixels[..., rows, bright] = high[..., rows, bright]
    if not image_sizes:
        return {"images": pixels}
    sizes = np.array([[height - 1, width - 3, 2 * height, 3 * width]], np.float32).repeat(batch, 0)
    return {"images": pixels, "image_sizes": sizes}


def feed_of(contract: ModelContract, shapes: Mapping[str, tuple[int | None, ...]]) -> Tensors:
    """A feed that provokes differences; ``shapes`` are those of the graph's inputs, None is a dynamic axis.

    Dynamic axes become a batch of 1, and the canvas or, without one, twice the coarsest stride.
    """
    side = 2 * max(contract.decode.strides)
    height, width = contract.preprocess.canvas or (side, side)
    n, _, h, w = shapes["images"]
    return provoking_feed(
        (n or 1, contract.preprocess.channels, h or height, w or width),
        dtype=str(contract.preprocess.input_dtype),
        image_sizes="image_sizes" in shapes,
    )
