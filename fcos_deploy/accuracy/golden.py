"""Golden images: chosen and written where a bundle is made, and their detections compared where it is verified.

Detections are counted against the reference's, and compared value by value: with the reference's, and with the
artifact's own when it was certified. A single box of an INT8 engine may lie a pixel elsewhere and say nothing. A shift
that all boxes share says that the engine is another one, even if it is a third of a pixel. So every quantity is tested
over all pairs of detections, and over those of each image, each class and each size: what one level of the pyramid
computes is seen in objects of its size alone. Medians are used throughout: where two boxes nearly tie, suppression
keeps the other one, and such a pair differs by tens of pixels.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.bundle.manifest import Artifact, GoldenDetections, GoldenImage, Manifest, TensorFingerprint
from fcos_deploy.core.annotations import MEDIUM_AREAS
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.decode import DecodeSpec
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import ComputeType, Precision
from fcos_deploy.core.errors import BundleError, ImageError, InconclusiveError
from fcos_deploy.core.gate import (
    DetectionMatch,
    Gate,
    MatchOptions,
    Outcome,
    interval_outcome,
    match_detections,
    overall_outcome,
)
from fcos_deploy.core.image import decode_image
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.core.preprocess import ChannelOrder, InputDtype, PreprocessSpec, preprocess

__all__ = [
    "MIN_EVIDENCE",
    "GoldenCheck",
    "GoldenResult",
    "GoldenStandard",
    "PreprocessingResult",
    "check_golden",
    "check_preprocessing",
    "choose_golden",
    "compare_golden",
    "detection_errors",
    "fingerprint",
    "fingerprint_difference",
    "golden_standard",
    "image_scale",
    "make_golden",
    "match_rate",
    "read_golden_image",
]

cv2 = lazy_import("cv2")

_FOLDER = "golden"
_GRID = 8  # cells per side of a fingerprint
_PNG_HEADER = struct.Struct(">8sI4sII")  # signature, chunk length, chunk name, width, height
# In levels of an 8-bit image, over cells of at least 64 pixels: other versions of OpenCV and Pillow round single
# pixels differently by one level; a wrong channel order, mean or offset moves a cell by several.
_MAX_CELL_DIFFERENCE = 0.5

_FEWEST_IMAGES, _MOST_IMAGES = 4, 8  # golden images
_PER_CELL = 3  # detections of a class and size after which more of them add less than others
_PLENTY = 40  # detections after which further golden images must show what the others don't

# Pairs below which nothing is concluded: the 99 % interval of a median needs eight (2 * 0.5 ** 8 < 0.01).
MIN_EVIDENCE = 8
_CONFIDENCE = 0.99
_GROUP_CONFIDENCE = 0.999  # of an image, a class or a size: there are so many that one lies outside by chance
_END = 12  # of the smallest and of the largest boxes: eleven are needed for that confidence (2 * 0.5 ** 11 < 0.001)
# The rate at which detections that were certified on one machine are found again on another one. INT8 in other kernels
# finds 98 to 99.5 % of them (benchmarks/golden_faults.py).
_FOUND_AGAIN = 0.97
_CHANCE = 0.001  # A group that finds as few as this rarely happens by chance is a fault.
_SCORE_MARGIN = 0.05  # Scores nearer than this to the threshold may come and go between machines.

# How far the median may lie from the baseline's. INT8 in other kernels: 0.03 pixels, 0.1 % of a size, 0.1 % of a score.
_PIXEL_LIMITS = {"shift in x": 0.2, "shift in y": 0.2, "stretch in x": 0.2, "stretch in y": 0.2}
_LIMITS = {**_PIXEL_LIMITS, "width": 0.015, "height": 0.015, "score": 0.03}
# Errors that count as none, in input pixels and scores, whatever the baseline shows: rounding.
_SAME_EDGE, _SAME_SCORE = 0.05, 0.002
_BEYOND = 0.2  # Share of detections that may have twice the error that nine of ten had.


# The images.


def image_scale(contract: ModelContract, size: tuple[int, int]) -> float:
    """Image pixels per network-input pixel, at least 1, of an image of ``size`` (height, width)."""
    height, width = contract.preprocess.canvas or size
    return max(1.0, size[0] / height, size[1] / width)


def choose_golden(detections: Sequence[Detections], *, decode: DecodeSpec) -> list[int]:
    """Positions of the images whose detections carry most evidence, sorted.

    Greedily up to eight, at least four: every class in several sizes first, three detections of each, then as many
    detections as there are.

    Raises:
        InconclusiveError: they carry too little to prove anything.
    """
    held = [d.above(floor) for d, floor in zip(detections, _match_floors(decode, detections, detections), strict=True)]
    counts = [Counter(zip(d.labels.tolist(), _size_bins(d.boxes), strict=True)) for d in held]
    chosen: list[int] = []
    total: Counter[tuple[int, int]] = Counter()

    def gain(index: int) -> tuple[int, int, int]:
        cells = sum(min(total[c] + n, _PER_CELL) - min(total[c], _PER_CELL) for c, n in counts[index].items())
        return cells, len(held[index]), -index

    while len(chosen) < min(_MOST_IMAGES, len(held)):
        best = max((i for i in range(len(held)) if i not in chosen), key=gain)
        if len(chosen) >= _FEWEST_IMAGES and total.total() >= _PLENTY and not gain(best)[0]:
            break
        chosen.append(best)
        total += counts[best]
    if total.total() < MIN_EVIDENCE:
        raise InconclusiveError(
            f"The reference detects {total.total()} objects in the images that show most, too few to verify an engine "
            f"by; {MIN_EVIDENCE} are needed.",
            hint="give --images that show more objects, or lower --score-threshold",
        )
    return sorted(chosen)


def _size_bins(boxes: NDArray[np.float32]) -> list[int]:
    """0, 1 or 2 for each of (n, 4) boxes: small, medium or large, by COCO's areas of 32 and 96 pixels squared."""
    areas = np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)
    bins: list[int] = np.digitize(areas, MEDIUM_AREAS).tolist()
    return bins


def make_golden(
    images: Sequence[NDArray[np.uint8]], detections: Sequence[Detections], *, folder: Path, contract: ModelContract
) -> tuple[GoldenImage, ...]:
    """Write ``images`` ((h, w, 3) uint8 RGB) losslessly under ``folder``/golden, with the reference's detections.

    Returned paths are relative to ``folder``.

    Raises:
        BundleError: the reference detects nothing on any of them.
        ImageError: an image cannot be written as PNG.
    """
    golden = []
    (folder / _FOLDER).mkdir(parents=True, exist_ok=True)
    for index, (image, detected) in enumerate(zip(images, detections, strict=True)):
        path = f"{_FOLDER}/{index:03d}.png"
        encoded, content = cv2.imencode(".png", np.ascontiguousarray(image[:, :, ::-1]))
        if not encoded:
            raise ImageError(f"Cannot write '{folder / path}' as PNG.")
        (folder / path).write_bytes(content.tobytes())
        golden.append(
            GoldenImage(
                path=path,
                height=image.shape[0],
                width=image.shape[1],
                fingerprint=fingerprint(preprocess(image, contract.preprocess)[0]),
                detections=GoldenDetections.from_detections(detected),
            )
        )
    if not any(image.detections.scores for image in golden):
        raise BundleError(
            "The reference detects nothing on the golden images, so they would prove nothing.",
            hint="choose images with objects, or lower the score threshold",
        )
    return tuple(golden)


def read_golden_image(content: bytes, golden: GoldenImage) -> NDArray[np.uint8]:
    """(h, w, 3) uint8 RGB of a PNG file; the size in its header must be the manifest's before anything is decoded.

    Raises:
        ImageError: the file is not a PNG of the recorded size.
    """
    path, header = Path(golden.path), content[: _PNG_HEADER.size]
    if len(header) < _PNG_HEADER.size or not header.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ImageError(f"Golden image '{path}' is not a PNG file.")
    *_, width, height = _PNG_HEADER.unpack(header)
    if (height, width) != (golden.height, golden.width):
        raise ImageError(f"Golden image '{path}' must be {golden.height}x{golden.width}, got {height}x{width}.")
    return decode_image(content, path=path)


# What preprocessing makes of them.


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessingResult:
    """Preprocessed tensors against their fingerprints: ``exact`` of ``images`` have the same bytes.

    ``difference``, of the worst image, and ``allowed`` are in levels of an 8-bit image. ``problem`` names the fault.
    """

    exact: int
    images: int
    difference: float
    passed: bool
    problem: str = ""
    allowed: float = _MAX_CELL_DIFFERENCE


def fingerprint(tensor: NDArray[Any]) -> TensorFingerprint:
    """Summarise a preprocessed tensor (c, H, W), uint8 or float32; H and W at least 8."""
    rows = np.array_split(np.arange(tensor.shape[1]), _GRID)
    columns = np.array_split(np.arange(tensor.shape[2]), _GRID)
    cells = [
        float(channel[r[0] : r[-1] + 1, c[0] : c[-1] + 1].mean())
        for channel in tensor.astype(np.float64)
        for r in rows
        for c in columns
    ]
    return TensorFingerprint(
        sha256=hashlib.sha256(np.ascontiguousarray(tensor).tobytes()).hexdigest(),
        dtype=tensor.dtype.name,
        shape=tuple(tensor.shape),
        cells=tuple(round(cell, 6) for cell in cells),
    )


def fingerprint_difference(actual: TensorFingerprint, expected: TensorFingerprint, *, spec: PreprocessSpec) -> float:
    """Largest difference of two cells, in levels of an 8-bit image; infinite when dtype or shape differ."""
    if actual == expected:
        return 0.0
    if (actual.dtype, actual.shape, len(actual.cells)) != (expected.dtype, expected.shape, len(expected.cells)):
        return float("inf")
    difference = np.abs(np.subtract(actual.cells, expected.cells)).reshape(len(spec.std), -1).max(1)
    if spec.input_dtype is InputDtype.FLOAT32:
        # A float tensor is (pixel / pixel_scale - mean) / std: a level of a pixel is 1 / (pixel_scale * std) in it.
        difference = difference * np.asarray(spec.std) * spec.pixel_scale
    return float(difference.max())


def check_preprocessing(manifest: Manifest, images: Sequence[NDArray[np.uint8]]) -> PreprocessingResult:
    """Prepare every golden image and compare the tensors with their fingerprints; the largest fault is named."""
    spec = manifest.contract.preprocess
    exact, largest, problem = 0, 0.0, ""
    for golden, image in zip(manifest.golden, images, strict=True):
        actual = fingerprint(preprocess(image, spec)[0])
        difference = fingerprint_difference(actual, golden.fingerprint, spec=spec)
        exact += actual.sha256 == golden.fingerprint.sha256
        if difference > largest:
            largest = difference
            problem = f"'{golden.path}': {_preprocessing_fault(image, actual, golden.fingerprint, spec=spec)}"
    passed = largest <= _MAX_CELL_DIFFERENCE
    # JSON has no infinity: another shape or dtype is more than any difference of levels.
    return PreprocessingResult(
        exact=exact,
        images=len(images),
        difference=round(min(largest, 1e9), 4),
        passed=passed,
        problem="" if passed else problem,
    )


def _preprocessing_fault(
    image: NDArray[np.uint8], actual: TensorFingerprint, expected: TensorFingerprint, *, spec: PreprocessSpec
) -> str:
    """Say what is wrong with a tensor: its shape or type, swapped colour channels, or else how much differs."""
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        return f"the tensor must be {expected.dtype}{list(expected.shape)}, it is {actual.dtype}{list(actual.shape)}"
    swapped = {ChannelOrder.RGB: ChannelOrder.BGR, ChannelOrder.BGR: ChannelOrder.RGB}.get(spec.channel_order)
    tensor, _ = preprocess(image, replace(spec, channel_order=swapped or spec.channel_order))
    if swapped and fingerprint_difference(fingerprint(tensor), expected, spec=spec) <= _MAX_CELL_DIFFERENCE:
        return f"the colour channels are swapped: they are {spec.channel_order}, they must be {swapped}"
    difference = fingerprint_difference(actual, expected, spec=spec)
    return f"a region differs by {difference:.2f} of 255 levels (allowed: {_MAX_CELL_DIFFERENCE})"


# What their detections are judged by.


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GoldenStandard:
    """What an artifact's golden detections are judged by; lists are in the order of the golden images.

    ``expected``: the reference's detections. ``certified``: those of the same artifact where the bundle was made
    (``same_artifact``, also for the graph that it was built from), or of its nearest relative; None without one.
    ``contract``: the bundle's. ``scales``: image pixels per network-input pixel.
    """

    gate: Gate
    contract: ModelContract
    expected: list[Detections]
    certified: list[Detections] | None
    same_artifact: bool
    paths: list[str]
    scales: list[float]

    @property
    def rule(self) -> MatchOptions:
        """When two detections are the same."""
        return MatchOptions.of_gate(self.gate)


def golden_standard(manifest: Manifest, artifact: Artifact, *, backend: str, compute: ComputeType) -> GoldenStandard:
    """What ``verify_bundle`` holds ``artifact`` to, in ``backend`` with this compute type.

    Raises:
        BundleError: the bundle has no gate for the precision.
    """
    run = manifest.golden_run(artifact, backend=backend, compute=compute)
    parents = {record.path for record in manifest.artifacts if record.sha256 == artifact.parent}
    # bf16 has eight bits of mantissa, as many as int8 has in all.
    by_compute = {ComputeType.F16: Precision.FP16, ComputeType.BF16: Precision.INT8}
    precision = artifact.precision
    if precision is not Precision.INT8:
        precision = by_compute.get(compute, precision)
    standard = GoldenStandard(
        gate=manifest.gate(precision),
        contract=manifest.contract,
        expected=[golden.detections.to_detections() for golden in manifest.golden],
        certified=None if run is None else [detections.to_detections() for detections in run.detections],
        same_artifact=run is not None and run.artifact in {artifact.path, *parents},
        paths=[golden.path for golden in manifest.golden],
        scales=[image_scale(manifest.contract, (golden.height, golden.width)) for golden in manifest.golden],
    )
    if run is not None and standard.certified is not None and run.artifact == artifact.path:
        # Whether that accuracy is enough was judged where the bundle was made, by the limits of the deployment; here it
        # must be the same.
        rate, needed = match_rate(compare_golden(standard, standard.certified)), standard.gate.min_match_rate or 0.0
        if rate is not None and rate < needed:
            return replace(standard, gate=replace(standard.gate, min_match_rate=round(rate * _FOUND_AGAIN, 6)))
    return standard


def _judged_floor(decode: DecodeSpec, lists: Sequence[Detections], *, margin: float) -> float:
    """The score from which a detection must be in every one of ``lists``, which are of one image.

    ``margin`` above the score threshold, and above the lowest score of a list that ``max_detections`` cut off: whoever
    scores less may be on either side of it.
    """
    cuts = [float(d.scores.min()) for d in lists if len(d) >= decode.max_detections]
    return min(max(decode.score_threshold, *cuts, 0.0) + margin, 1.0)


def _match_floors(decode: DecodeSpec, baseline: Sequence[Detections], detected: Sequence[Detections]) -> list[float]:
    """For each image the score from which detections of the same artifact are held.

    Where that leaves too few, the better half of each image's detections is held by rank, whatever they score.
    """
    floors = [_judged_floor(decode, pair, margin=_SCORE_MARGIN) for pair in zip(baseline, detected, strict=True)]
    if sum(int((b.scores >= floor).sum()) for b, floor in zip(baseline, floors, strict=True)) >= MIN_EVIDENCE:
        return floors
    return [
        min(floor, float(np.median(b.scores))) if len(b) else floor for b, floor in zip(baseline, floors, strict=True)
    ]


# How many detections are the reference's.


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenResult:
    """One golden image: how many detections were ``expected`` and ``detected``, and how far apart the pairs are.

    Only detections that score high enough to be judged count: where the gate's score difference cannot decide whether
    they are there at all.
    """

    path: str
    expected: int
    detected: int
    missed: int
    extra: int
    lowest_iou: float
    largest_score_difference: float


def compare_golden(standard: GoldenStandard, detected: Sequence[Detections]) -> tuple[GoldenResult, ...]:
    """Pair the ``detected`` of every golden image with the reference's, both in image pixels."""
    rule, results = standard.rule, []
    for expected, detections, path in zip(standard.expected, detected, standard.paths, strict=True):
        floor = _judged_floor(standard.contract.decode, (expected, detections), margin=rule.max_score_delta)
        match = match_detections(expected, detections, options=replace(rule, min_score=floor))
        score = np.abs(expected.scores[match.reference] - detections.scores[match.candidate])
        judged_expected, judged = expected.scores >= floor, detections.scores >= floor
        counted = judged_expected[match.reference] | judged[match.candidate]
        results.append(
            GoldenResult(
                path=path,
                expected=int(judged_expected.sum()),
                detected=int(judged.sum()),
                missed=len(match.missed),
                extra=len(match.extra),
                lowest_iou=round(float(match.iou[counted].min(initial=1.0)), 6),
                largest_score_difference=round(float(score[counted].max(initial=0.0)), 6),
            )
        )
    return tuple(results)


def match_rate(results: Sequence[GoldenResult]) -> float | None:
    """The share of the judged detections that match; None when there are none."""
    judged = sum(result.expected + result.detected for result in results)
    return 1.0 - sum(result.missed + result.extra for result in results) / judged if judged else None


# Whether their values are those of the same artifact.


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueTest:
    """One quantity over ``pairs`` detections: its ``median`` difference, between ``low`` and ``high`` (99 %).

    ``group``: "all", an image's path, a class or a size. ``unit``: "px" of the image, or "" for a ratio. ``limit``:
    what the whole interval must keep, to either side.
    """

    quantity: str
    group: str
    unit: str
    pairs: int
    median: float
    low: float
    high: float
    limit: float
    outcome: Outcome

    def __str__(self) -> str:
        value, limit = (f"{v:+.2f} px" if self.unit else f"{v:+.1%}" for v in (self.median, self.limit))
        where = "" if self.group == "all" else f" in '{self.group}'"
        return f"{self.quantity}{where} differs by {value} over {self.pairs} detections (allowed: {limit[1:]})"


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenCheck:
    """What the values say. ``evidence``: pairs behind it. ``problems``: sentences, the plainest first.

    ``baseline`` says what the values were compared with: "artifact", "precision" or "reference".
    """

    outcome: Outcome
    evidence: int
    baseline: str
    problems: tuple[str, ...] = ()
    tests: tuple[ValueTest, ...] = ()

    @property
    def summary(self) -> str:
        """One sentence."""
        if self.problems:
            return "; ".join(self.problems)
        than = "the reference's" if self.baseline == "reference" else f"those of the same {self.baseline}"
        return f"{self.evidence} detections have the boxes and scores of {than}"


# Pairs of detections: boxes xyxy in image pixels, the scores of both, the image's position, the label, and the image
# pixels per network-input pixel, at least 1.
_PAIR = np.dtype(
    [
        ("before", np.float64, 4),
        ("after", np.float64, 4),
        ("scores", np.float64, 2),
        ("image", np.int64),
        ("label", np.int64),
        ("scale", np.float64),
    ]
)


def check_golden(standard: GoldenStandard, detected: Sequence[Detections]) -> GoldenCheck:
    """Compare ``detected``, image by image, with the certified detections, or the reference's where there are none."""
    decode, rule = standard.contract.decode, standard.rule
    if standard.certified is None:
        expected, baseline, margin = standard.expected, "reference", standard.rule.max_score_delta
        floors = [_judged_floor(decode, pair, margin=margin) for pair in zip(expected, detected, strict=True)]
    else:
        expected, baseline = standard.certified, "artifact" if standard.same_artifact else "precision"
        floors = _match_floors(decode, expected, detected)
    matches = [
        match_detections(e, d, options=replace(rule, min_score=floor))
        for e, d, floor in zip(expected, detected, floors, strict=True)
    ]
    tables = [np.empty(0, _PAIR)]
    for index, (e, d, match, floor) in enumerate(zip(expected, detected, matches, floors, strict=True)):
        held = np.maximum(e.scores[match.reference], d.scores[match.candidate]) >= floor
        rows, partners = match.reference[held], match.candidate[held]
        table = np.empty(len(rows), _PAIR)
        table["before"], table["after"] = e.boxes[rows], d.boxes[partners]
        table["scores"] = np.stack([e.scores[rows], d.scores[partners]], 1)
        table["image"], table["label"], table["scale"] = index, e.labels[rows], max(1.0, standard.scales[index])
        tables.append(table)
    tests = _value_tests(np.concatenate(tables), names=standard.contract.class_names, paths=standard.paths)
    evidence = sum(map(len, tables))
    problems = [
        *_missing(standard, expected, detected, matches=matches, floors=floors),
        *(str(test) for test in tests if test.outcome is Outcome.FAILED),
        *_scatter(standard, detected),
    ]
    undecided = [test for test in tests if test.group == "all" and test.outcome is Outcome.INCONCLUSIVE]
    outcome = Outcome.FAILED if problems else Outcome.PASSED
    if not problems and evidence < MIN_EVIDENCE:
        outcome = Outcome.INCONCLUSIVE
        problems = [f"only {evidence} detections could be compared, {MIN_EVIDENCE} are needed"]
    elif not problems and undecided:
        outcome = Outcome.INCONCLUSIVE
        problems = [f"{test}, but the {test.pairs} detections differ too much to decide" for test in undecided]
    return GoldenCheck(
        outcome=outcome, evidence=evidence, baseline=baseline, problems=tuple(problems), tests=tuple(tests)
    )


def _missing(
    standard: GoldenStandard,
    expected: Sequence[Detections],
    detected: Sequence[Detections],
    *,
    matches: Sequence[DetectionMatch],
    floors: Sequence[float],
) -> Iterator[str]:
    """Images, classes and sizes of which far fewer are found, or far more are extra, than happens by chance."""
    decode, names = standard.contract.decode, standard.contract.class_names
    rate = _FOUND_AGAIN if standard.same_artifact else min(_FOUND_AGAIN, standard.gate.min_match_rate or 0.0)
    held: dict[str, NDArray[np.int64]] = {}  # of each group how many are due, lost, detected and extra
    for e, d, match, floor, path in zip(expected, detected, matches, floors, standard.paths, strict=True):
        chosen = ((e, e.scores >= floor), (e, match.missed), (d, d.scores >= floor), (d, match.extra))
        labels = [detections.labels[rows].tolist() for detections, rows in chosen]
        sizes = [_octaves(detections.boxes[rows]).tolist() for detections, rows in chosen]
        if labels[0] and not len(d):
            yield f"nothing is detected in '{path}', where {len(labels[0])} detections are certified"
        # A list that was cut off at its limit, clear of the score threshold, is shorter for no other reason.
        clear = e.scores >= decode.score_threshold + _SCORE_MARGIN
        cut_off = len(e) >= decode.max_detections and bool(clear.all())
        if cut_off and len(d) and _chance_of_more(len(e) - len(d), len(e), 1.0 - rate) < _CHANCE:
            yield f"{len(d)} detections in '{path}', where {len(e)} are certified"
        counts = {f"'{path}'": [len(column) for column in labels]}
        counts |= {f"class '{names[k]}'": [c.count(k) for c in labels] for k in sorted({*labels[0], *labels[2]})}
        counts |= {_size_name(k): [c.count(k) for c in sizes] for k in sorted({*sizes[0], *sizes[2]})}
        for group, columns in counts.items():
            held[group] = held.get(group, 0) + np.array(columns)
    for group, (due_count, lost_count, came_count, extra_count) in held.items():
        if _chance_of_more(int(lost_count), int(due_count), 1.0 - rate) < _CHANCE:
            yield f"{lost_count} of {due_count} detections of {group} are missing"
        elif _chance_of_more(int(extra_count), int(came_count), 1.0 - rate) < _CHANCE:
            yield f"{extra_count} of {came_count} detections of {group} are extra"


def _octaves(boxes: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """(n,) of (n, 4) boxes: 6 where the longer side has 64 to 128 pixels; a level of the pyramid sees about as much."""
    return np.frexp(_longer_sides(boxes))[1].astype(np.int64) - 1


def _longer_sides(boxes: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    sides: NDArray[np.float64] = (boxes[:, 2:].astype(np.float64) - boxes[:, :2]).max(1, initial=1.0)
    return sides


def _size_name(octave: int) -> str:
    return f"boxes of {2**octave} to {2 ** (octave + 1)} px"


def _chance_of_more(count: int, of: int, rate: float) -> float:
    """P(X >= count) for X binomial in ``of`` trials of probability ``rate``."""
    if count <= 0 or rate >= 1.0:
        return 1.0
    if rate <= 0.0:
        return 0.0
    # By logarithms: the number of combinations is beyond a float from about a thousand trials on.
    whole = math.lgamma(of + 1)
    return sum(
        math.exp(
            whole - math.lgamma(k + 1) - math.lgamma(of - k + 1) + k * math.log(rate) + (of - k) * math.log1p(-rate)
        )
        for k in range(count, of + 1)
    )


def _value_tests(pairs: NDArray[Any], *, names: Sequence[str], paths: Sequence[str]) -> list[ValueTest]:
    """Every quantity over all ``pairs`` (of ``_PAIR``); images, classes and sizes only where they show a fault.

    Shifts are of centres, in image pixels divided by ``scale``; stretch is the shift away from the middle of all boxes.
    Width, height and score are logarithms of ratios: 0.01 is one percent.
    """
    centres = [(boxes[:, :2] + boxes[:, 2:]) / 2 for boxes in (pairs["before"], pairs["after"])]
    sizes = [np.maximum(boxes[:, 2:] - boxes[:, :2], 1e-3) for boxes in (pairs["before"], pairs["after"])]
    moves = (centres[1] - centres[0]) / pairs["scale"][:, None]
    middle = np.median(centres[0], axis=0) if len(moves) else np.zeros(2)
    # A stretch moves boxes away from the middle, to the left on its left side: its sign is that of the position.
    outward = moves * np.sign(centres[0] - middle)
    # Logarithms: twice as wide and half as wide are equally far, so that the median of noise is 0.
    ratios = np.log(sizes[1] / sizes[0])
    scores = np.log(np.maximum(pairs["scores"][:, 1], 1e-6) / np.maximum(pairs["scores"][:, 0], 1e-6))
    values = dict(zip(_LIMITS, (*moves.T, *outward.T, *ratios.T, scores), strict=True))
    tests = [_test(name, differences, group="all", confidence=_CONFIDENCE) for name, differences in values.items()]
    parts = [(paths[k], pairs["image"] == k) for k in np.unique(pairs["image"])]
    parts += [(names[k], pairs["label"] == k) for k in np.unique(pairs["label"])]
    octaves = _octaves(pairs["before"])
    parts += [(_size_name(k), octaves == k) for k in np.unique(octaves)]
    # An octave may hold few of the objects that a coarse level sees, and many that a finer one does.
    rank = np.argsort(np.argsort(_longer_sides(pairs["before"]), kind="stable"), kind="stable")
    ends = (("smallest", rank), ("largest", len(rank) - 1 - rank))
    parts += [(f"the {_END} {name} boxes", places < _END) for name, places in ends]
    for group, chosen in parts:
        in_group = [_test(name, v[chosen], group=group, confidence=_GROUP_CONFIDENCE) for name, v in values.items()]
        tests += [test for test in in_group if test.outcome is Outcome.FAILED]
    return tests


def _test(quantity: str, differences: NDArray[np.float64], *, group: str, confidence: float) -> ValueTest:
    limit = _LIMITS[quantity]
    low, high = _median_interval(differences, confidence=confidence)
    # Failed only when the whole interval lies beyond one of the two limits.
    sides = (interval_outcome(low, high, at_most=limit), interval_outcome(-high, -low, at_most=limit))
    return ValueTest(
        quantity=quantity,
        group=group,
        unit="px" if quantity in _PIXEL_LIMITS else "",
        pairs=len(differences),
        median=round(float(np.median(differences)), 6) if len(differences) else 0.0,
        low=round(max(low, -1e6), 6),
        high=round(min(high, 1e6), 6),
        limit=limit,
        outcome=overall_outcome(sides) or Outcome.INCONCLUSIVE,
    )


def _median_interval(values: NDArray[np.float64], *, confidence: float) -> tuple[float, float]:
    """Bounds of the median without an assumption on the distribution; infinite when there are too few values."""
    # Between the k-th smallest and the k-th largest of n values the median lies unless fewer than k values are on one
    # side of it. How many are is binomial with probability one half: exactly k on one of the two sides has the
    # probability 2 C(n, k) / 2^n. The largest k whose sum stays below what the confidence leaves is taken.
    count, outside, k = len(values), 0.0, 0
    while k < count // 2:
        outside += 2 * math.comb(count, k) / 2**count
        if outside > 1.0 - confidence:
            break
        k += 1
    if k == 0:
        return -math.inf, math.inf
    ordered = np.sort(values)
    return float(ordered[k - 1]), float(ordered[count - k])


def detection_errors(
    reference: Sequence[Detections], detected: Sequence[Detections], *, scales: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of the better half of each image's detections: how far an edge is from the reference's, and how far the score.

    Returns (n,) largest edge error in image pixels divided by the scale, and (n,) absolute difference of scores; both
    infinite for a detection without a partner of its class.
    """
    edges, scores = [np.zeros(0)], [np.zeros(0)]
    for r, d, scale in zip(reference, detected, scales, strict=True):
        match = match_detections(r, d, options=MatchOptions(min_score=0.0))
        edge, score = np.full(len(r), np.inf), np.full(len(r), np.inf)
        moved = np.abs(r.boxes[match.reference].astype(np.float64) - d.boxes[match.candidate])
        edge[match.reference] = moved.max(1, initial=0.0) / max(1.0, scale)
        score[match.reference] = np.abs(r.scores[match.reference].astype(np.float64) - d.scores[match.candidate])
        best = np.argsort(-r.scores, kind="stable")[: (len(r) + 1) // 2]
        edges.append(edge[best])
        scores.append(score[best])
    return np.concatenate(edges), np.concatenate(scores)


def _scatter(standard: GoldenStandard, detected: Sequence[Detections]) -> Iterator[str]:
    """Whether far more detections are far from the reference's than when the artifact was certified."""
    if standard.certified is None:
        return
    before, after = (
        detection_errors(standard.expected, d, scales=standard.scales) for d in (standard.certified, detected)
    )
    for what, unit, base, now, same in zip(
        ("box edges", "scores"), (" px", ""), before, after, (_SAME_EDGE, _SAME_SCORE), strict=True
    ):
        if len(now) < MIN_EVIDENCE:
            continue
        typical = max(float(np.quantile(base, 0.9, method="lower")), same)
        beyond = int((now > 2 * typical).sum())
        if math.isfinite(typical) and _chance_of_more(beyond, len(now), _BEYOND) < _CHANCE:
            yield f"{beyond} of {len(now)} {what} are more than {2 * typical:.3g}{unit} from the reference's"
