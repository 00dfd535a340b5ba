"""Why a stage diverges: what differs in the contracts, and which known mistake reproduces the candidate's numbers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.matching import MatchOptions, compare_detections
from fcos_deploy.accuracy.stages import LevelSlice, level_slices, network_input, split_levels
from fcos_deploy.core.backend import ComputeType, SessionOptions, Tensors
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.decode import location_strides
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.network import BoxActivation
from fcos_deploy.core.postprocess import postprocess
from fcos_deploy.core.preprocess import InputDtype, Letterbox, PreprocessSpec, ResizeFilter, ResizeOrder, preprocess
from fcos_deploy.detector import Detector

if TYPE_CHECKING:
    from fcos_deploy.model.fcos import Fcos

__all__ = [
    "Cause",
    "Evidence",
    "activation_causes",
    "class_causes",
    "contract_causes",
    "explained",
    "find_causes",
    "level_causes",
    "outputs_explained",
    "picture_place_causes",
    "pixel_causes",
    "rounded_networks",
    "shifted",
    "tried_mistakes",
    "tried_resizing",
]

_FAR = 4  # pixels from which on a picture is elsewhere, rather than shifted
_BORDER = 4  # pixels at the edges that a shifted image cannot tell


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """A mistake by name, in a sentence, and how much of the squared difference it explains (1 is all of it).

    Rounding cannot be repeated number by number: there ``explained`` is the ratio of its power to what is expected.
    """

    name: str
    sentence: str
    explained: float


def explained(reference: NDArray[Any], candidate: NDArray[Any], guess: NDArray[Any]) -> float:
    """Share of the squared difference that is gone when ``guess`` takes the reference's place; can be negative."""
    before = float(((reference.astype(np.float64) - candidate) ** 2).sum())
    after = float(((guess.astype(np.float64) - candidate) ** 2).sum())
    return 1.0 - after / before if before else 0.0


def outputs_explained(reference: Tensors, candidate: Tensors, guess: Tensors) -> float:
    """The least of ``explained`` over all outputs that differ at all."""
    shares = [
        explained(reference[name], candidate[name], guess[name])
        for name in reference
        if not np.allclose(reference[name], candidate[name], rtol=1e-5, atol=1e-6)
    ]
    return min(shares, default=0.0)


def contract_causes(reference: ModelContract, candidate: ModelContract, *, part: str) -> list[Cause]:
    """What the two contracts say differently of ``preprocess`` or ``decode``, field by field."""
    return [
        Cause(
            name=f"{part}.{name}",
            sentence=f"{_words(name)} is {_value(theirs)} in place of {_value(mine)}",
            explained=1.0,
        )
        for name, mine, theirs in _differing_fields(getattr(reference, part), getattr(candidate, part))
    ]


def _differing_fields(mine: Any, theirs: Any) -> Iterator[tuple[str, Any, Any]]:  # Any: two dataclasses of one type
    for spec_field in dataclasses.fields(mine):
        first, second = getattr(mine, spec_field.name), getattr(theirs, spec_field.name)
        if dataclasses.is_dataclass(first):
            for name, a, b in _differing_fields(first, second):
                if name != "name":
                    yield f"{spec_field.name}.{name}", a, b
        elif first != second:
            yield spec_field.name, first, second


def _words(name: str) -> str:
    return "the " + name.rpartition(".")[2].replace("_", " ").replace("iou", "IoU")


def _value(value: Any) -> str:  # Any: whatever a contract's field holds
    return str(value.value).upper() if isinstance(value, Enum) and len(value.value) == 3 else str(value)


def pixel_causes(reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> list[Cause]:
    """Known mistakes in a normalised image (3, H, W) that turn the reference into the candidate."""
    guesses = [
        ("channel-order", "the colour channels are swapped (RGB/BGR)", _refit(reference[::-1], candidate)),
        ("normalisation", _normalisation_words(reference, candidate), _refit(reference, candidate)),
    ]
    dx, dy = _estimate_shift(reference, candidate)
    moved = f"the image is shifted by {dx:+.2f} pixels to the right and {dy:+.2f} down"
    guesses.append(("shift", moved, shifted(reference, dx, dy)))
    inner = (slice(None), slice(_BORDER, -_BORDER), slice(_BORDER, -_BORDER))
    causes = [
        Cause(name=name, sentence=text, explained=explained(reference[inner], candidate[inner], guess[inner]))
        for name, text, guess in guesses
    ]
    return sorted((c for c in causes if c.explained > 0.5), key=lambda c: -c.explained)


def _refit(guess: NDArray[np.float32], candidate: NDArray[np.float32]) -> NDArray[np.float32]:
    """``guess`` with the scale and offset of each channel that come nearest to the candidate."""
    planes = [scale * g + offset for g, (scale, offset) in zip(guess, _fit(guess, candidate), strict=True)]
    return np.stack(planes)


def _fit(guess: NDArray[np.float32], candidate: NDArray[np.float32]) -> list[tuple[float, float]]:
    pairs = []
    for mine, theirs in zip(guess, candidate, strict=True):
        spread = float(mine.std())
        scale = float(((mine - mine.mean()) * (theirs - theirs.mean())).mean()) / spread**2 if spread else 1.0
        pairs.append((scale, float(theirs.mean() - scale * mine.mean())))
    return pairs


def _normalisation_words(reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> str:
    fitted = _fit(reference, candidate)
    scales, offsets = ", ".join(f"{s:.3f}" for s, _ in fitted), ", ".join(f"{o:+.3f}" for _, o in fitted)
    return f"mean or std differ: channels are scaled by {scales} and moved by {offsets} standard deviations"


def picture_place_causes(reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> list[Cause]:
    """Whether the whole picture lies elsewhere on the canvas (3, H, W), as when it is padded on another side."""
    spectra = [np.fft.rfft2(image.mean(0) - image.mean()) for image in (reference, candidate)]
    cross = spectra[1] * np.conj(spectra[0])
    size = reference.shape[1:]
    peak = np.fft.irfft2(cross / np.maximum(np.abs(cross), 1e-9), s=size).argmax()
    down, right = (
        int(at - length if at > length // 2 else at)
        for at, length in zip(np.unravel_index(peak, size), size, strict=True)
    )
    if max(abs(down), abs(right)) < _FAR:
        return []
    # What leaves the canvas on one side is padding, and comes back on the other.
    share = explained(reference, candidate, np.roll(reference, (down, right), axis=(1, 2)))
    text = f"the picture lies {right:+d} pixels to the right and {down:+d} down: it is padded on another side"
    return [Cause(name="padding", sentence=text, explained=share)] if share > 0.5 else []


def _estimate_shift(reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> tuple[float, float]:
    """Move (right, down) in pixels by least squares on the image's slopes, refined twice."""
    dx = dy = 0.0
    for _ in range(3):
        moved = shifted(reference, dx, dy)
        inner = (slice(None), slice(_BORDER, -_BORDER), slice(_BORDER, -_BORDER))
        slope_y, slope_x = np.gradient(moved, axis=1), np.gradient(moved, axis=2)
        columns = np.stack([-slope_x[inner].ravel(), -slope_y[inner].ravel()], 1).astype(np.float64)
        step, *_ = np.linalg.lstsq(columns, (candidate - moved)[inner].ravel().astype(np.float64), rcond=None)
        dx, dy = float(np.clip(dx + step[0], -3, 3)), float(np.clip(dy + step[1], -3, 3))
    return dx, dy


def shifted(image: NDArray[np.float32], dx: float, dy: float) -> NDArray[np.float32]:
    """(c, H, W) moved by (right, down) pixels, bilinearly; the edge is repeated."""
    rows = np.clip(np.arange(image.shape[1]) - dy, 0, image.shape[1] - 1)
    columns = np.clip(np.arange(image.shape[2]) - dx, 0, image.shape[2] - 1)
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    bottom, right = np.minimum(top + 1, image.shape[1] - 1), np.minimum(left + 1, image.shape[2] - 1)
    down = (rows - top).astype(np.float32)[None, :, None]
    across = (columns - left).astype(np.float32)[None, None, :]
    lines = image[:, top] * (1 - down) + image[:, bottom] * down
    moved: NDArray[np.float32] = lines[:, :, left] * (1 - across) + lines[:, :, right] * across
    return moved


def level_causes(reference: Tensors, candidate: Tensors, levels: Sequence[LevelSlice]) -> list[Cause]:
    """Whether the candidate's outputs are the reference's with pyramid levels in another order."""
    causes = []
    for order in itertools.permutations(range(len(levels))):
        if list(order) == list(range(len(levels))):
            continue
        index = np.concatenate([np.arange(levels[i].start, levels[i].stop) for i in order])
        guess = {name: array[:, index] for name, array in reference.items()}
        moved = [levels[i].name for position, i in enumerate(order) if i != position]
        share = outputs_explained(reference, candidate, guess)
        causes.append(Cause(name="levels", sentence=f"the levels {_and(moved)} are swapped", explained=share))
    return sorted((c for c in causes if c.explained > 0.9), key=lambda c: -c.explained)[:1]


def class_causes(reference: NDArray[Any], candidate: NDArray[Any], names: Sequence[str]) -> list[Cause]:
    """Whether the candidate's class logits (n, L, C) are the reference's with the classes in another order."""
    mine, theirs = (logits.reshape(-1, len(names)).astype(np.float64) for logits in (reference, candidate))
    # Squared distance of every pair of columns.
    distance = (mine * mine).sum(0)[:, None] + (theirs * theirs).sum(0)[None] - 2 * mine.T @ theirs
    order = distance.argmin(0)  # which of the reference's columns each of the candidate's is nearest to
    if len(set(order.tolist())) < len(names) or np.array_equal(order, np.arange(len(names))):
        return []
    share = explained(mine, theirs, mine[:, order])
    moved = [f"'{names[mine_at]}' in place of '{names[at]}'" for at, mine_at in enumerate(order) if at != mine_at]
    some = ", ".join(moved[:4]) + (" ..." if len(moved) > 4 else "")
    text = f"the classes are in another order: the channels give {some}"
    return [Cause(name="classes", sentence=text, explained=share)] if share > 0.9 else []


_ACTIVATIONS: dict[str, Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]] = {
    # From one activation's distances and the stride to what the other would have given, where that can be known.
    "exp in place of relu": lambda distances, stride: np.exp(distances / stride),
    "exp in place of relu (times the stride)": lambda distances, stride: np.exp(distances / stride) * stride,
    "relu in place of exp": lambda distances, stride: np.maximum(np.log(np.maximum(distances, 1e-9)), 0) * stride,
    "relu in place of exp (without the stride)": lambda distances, _: np.maximum(
        np.log(np.maximum(distances, 1e-9)), 0
    ),
}


def activation_causes(reference: NDArray[Any], candidate: NDArray[Any], strides: NDArray[np.float32]) -> list[Cause]:
    """Whether the candidate's distances (n, L, 4) have another activation; ``strides`` (L,) of the locations."""
    stride = strides[None, :, None].astype(np.float64)
    # Where relu gave 0, its argument is lost.
    known = np.broadcast_to(reference > 0, reference.shape) & (candidate > 0)
    causes = []
    for name, turn in _ACTIVATIONS.items():
        with np.errstate(over="ignore"):
            guess = turn(reference.astype(np.float64), stride)
        usable = known & np.isfinite(guess)
        if usable.any():
            share = explained(reference[usable], candidate[usable], guess[usable])
            causes.append(Cause(name="activation", sentence=f"the box activation is {name}", explained=share))
    return sorted((c for c in causes if c.explained > 0.9), key=lambda c: -c.explained)


def _and(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


# (pixel scale, mean, std) as people use them, beside those of the model itself.
_NORMALISATIONS: dict[str, tuple[float, tuple[float, float, float], tuple[float, float, float]]] = {
    "does not normalise": (1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "only scales to 0..1": (255.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "scales to -1..1": (255.0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "normalises with torchvision's mean and std": (255.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "normalises with Caffe's mean": (1.0, (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0)),
    "normalises with detectron2's mean": (1.0, (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)),
    "normalises with mmdetection's mean and std": (1.0, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evidence:
    """One image as both detectors saw it, and the reference itself, to try mistakes on.

    ``pixels``: the picture, (h, w, 3) uint8 RGB. ``network``: the reference's PyTorch network, where there is one;
    with it mistakes inside the network can be tried.
    """

    reference: Detector
    candidate: Detector
    pixels: NDArray[np.uint8]
    reference_feeds: Tensors
    candidate_feeds: Tensors
    reference_outputs: Tensors
    candidate_outputs: Tensors
    letterbox: Letterbox
    candidate_found: Detections
    network: Fcos | None = None

    @property
    def input_size(self) -> tuple[int, int]:
        """Padded (H, W)."""
        height, width = self.reference_feeds["images"].shape[2:]
        return int(height), int(width)


def tried_resizing(evidence: Evidence) -> Iterator[tuple[str, str, NDArray[Any]]]:
    """Other interpolations of the same picture: name, sentence, and the input tensor (3, H, W)."""
    spec = evidence.reference.contract.preprocess
    for other in (ResizeFilter.CV2, ResizeFilter.PIL):
        if other is not spec.resize_filter and _can_resize(spec, other):
            tensor, _ = preprocess(evidence.pixels, replace(spec, resize_filter=other))
            yield "resize-filter", f"the picture is resized as by '{other}' in place of '{spec.resize_filter}'", tensor


def _can_resize(spec: PreprocessSpec, other: ResizeFilter) -> bool:
    return spec.resize_order is ResizeOrder.RESIZE_FIRST or other is not ResizeFilter.PIL


def tried_mistakes(evidence: Evidence) -> Iterator[tuple[str, str, Tensors]]:
    """Mistakes behind the input tensor: name, sentence, and the head's outputs."""
    images = evidence.reference_feeds["images"]
    run = evidence.reference.infer
    swapped = np.ascontiguousarray(images[:, ::-1])
    yield "channel-order", "the graph swaps the colour channels (RGB/BGR)", run({"images": swapped})
    for dx, dy in ((0.5, 0.5), (-0.5, -0.5)):
        moved = _moved(images, dx, dy)
        text = f"the graph shifts the image by {dx:+.1f} pixels to the right and {dy:+.1f} down"
        yield "shift", text, run({"images": moved})
    if evidence.network is not None:
        yield from _normalisations(evidence.network, evidence)
        yield from _variants(evidence.network, evidence)


def _moved(images: NDArray[np.generic], dx: float, dy: float) -> NDArray[np.generic]:
    moved = np.stack([shifted(image.astype(np.float32), dx, dy) for image in images])
    return moved.round().astype(images.dtype) if images.dtype == np.dtype(InputDtype.UINT8.value) else moved


def _normalisations(network: Fcos, evidence: Evidence) -> Iterator[tuple[str, str, Tensors]]:
    """Other constants in the graph that normalises; for float input the host does it, and the input shows it."""
    contract = evidence.reference.contract
    if contract.preprocess.input_dtype is not InputDtype.UINT8:
        return
    mine = contract.preprocess
    reversed_order = (mine.pixel_scale, mine.mean[::-1], mine.std[::-1])
    options = {**_NORMALISATIONS, "has mean and std in the opposite order of the channels": reversed_order}
    as_float = contract.with_preprocess(replace(mine, input_dtype=InputDtype.FLOAT32))
    with Detector.of_network(network, as_float, options=_options(evidence)) as detector:
        for text, (scale, mean, std) in options.items():
            other = replace(mine, pixel_scale=scale, mean=mean, std=std)
            if other != mine:
                images = network_input(evidence.reference_feeds["images"], other)
                yield "normalisation", f"the graph {text}", detector.infer({"images": images})


def _variants(network: Fcos, evidence: Evidence) -> Iterator[tuple[str, str, Tensors]]:
    """The reference's weights in networks that load them as well, and are silently wrong."""
    from fcos_deploy.model.fcos import Fcos

    config = network.config
    other = BoxActivation.EXP if config.box_activation is BoxActivation.RELU else BoxActivation.RELU
    places = {True: "first 1x1", False: "3x3"}
    variants = (
        (
            "stride-placement",
            f"the bottlenecks' stride is on the {places[not config.stride_in_1x1]} convolution (stride_in_1x1 differs)",
            replace(config, stride_in_1x1=not config.stride_in_1x1),
        ),
        (
            "activation",
            f"the box activation is {other} in place of {config.box_activation}",
            replace(config, box_activation=other),
        ),
        (
            "centerness-branch",
            "the centerness comes from the other tower",
            replace(config, centerness_on_reg=not config.centerness_on_reg),
        ),
    )
    for name, text, changed in variants:
        variant = Fcos(changed)
        variant.load_state_dict(network.state_dict())
        with Detector.of_network(variant.eval(), evidence.reference.contract, options=_options(evidence)) as detector:
            yield name, text, detector.infer(evidence.reference_feeds)


def rounded_networks(evidence: Evidence) -> Iterator[tuple[ComputeType, Tensors]]:
    """The head's outputs when the reference computes in a smaller float type."""
    if evidence.network is None:
        return
    for compute in (ComputeType.BF16, ComputeType.F16):
        options = replace(_options(evidence), compute=compute)
        with Detector.of_network(evidence.network, evidence.reference.contract, options=options) as detector:
            yield compute, detector.infer(evidence.reference_feeds)


def _options(evidence: Evidence) -> SessionOptions:
    threads = evidence.reference.session.description.get("threads", "")
    return SessionOptions(threads=int(threads) if threads.isdigit() else None)


_CONVINCING = 0.9
# Least ratio of two powers of rounding noise: in the median 3 dB, in each output 10 dB.
_SAME_NOISE, _SIMILAR_NOISE = 0.5, 0.1


def find_causes(stage: str, evidence: Evidence) -> list[Cause]:
    """What explains that ``stage`` is the first to diverge, the most likely first; empty when nothing known does."""
    finders = {"preprocess": _preprocess_causes, "decode": _contract_decode, "nms": _contract_decode}
    found = finders.get(stage, _final_causes if stage == "detections" else _head_causes)(evidence)
    return sorted(found, key=lambda cause: -cause.explained)


def _preprocess_causes(evidence: Evidence) -> list[Cause]:
    causes = contract_causes(evidence.reference.contract, evidence.candidate.contract, part="preprocess")
    mine, theirs = evidence.reference.contract.preprocess, evidence.candidate.contract.preprocess
    first = network_input(evidence.reference_feeds["images"], mine)[0]
    second = network_input(evidence.candidate_feeds["images"], theirs)[0]
    if first.shape != second.shape:
        return causes
    # Padding is not part of the picture, and follows another rule.
    height, width = evidence.letterbox.resized_height, evidence.letterbox.resized_width
    mine_seen, theirs_seen = first[:, :height, :width], second[:, :height, :width]
    causes += pixel_causes(mine_seen, theirs_seen) + picture_place_causes(first, second)
    for name, sentence, tensor in tried_resizing(evidence):
        share = explained(mine_seen, theirs_seen, network_input(tensor[None], mine)[0, :, :height, :width])
        if share > _CONVINCING:
            causes.append(Cause(name=name, sentence=sentence, explained=share))
    return causes


def _contract_decode(evidence: Evidence) -> list[Cause]:
    mine, theirs = evidence.reference.contract, evidence.candidate.contract
    causes = contract_causes(mine, theirs, part="decode")
    if mine.class_names != theirs.class_names:
        text = f"the class names are {', '.join(theirs.class_names)} in place of {', '.join(mine.class_names)}"
        causes.append(Cause(name="class_names", sentence=text, explained=1.0))
    return causes


def _head_causes(evidence: Evidence) -> list[Cause]:
    mine, theirs = evidence.reference_outputs, evidence.candidate_outputs
    strides = evidence.reference.contract.decode.strides
    causes = _declared_compute(evidence)
    if mine["cls_logits"].shape == theirs["cls_logits"].shape:
        causes += level_causes(mine, theirs, level_slices(evidence.input_size, strides))
        per_location = location_strides(*evidence.input_size, strides=strides)
        causes += activation_causes(mine["distances"], theirs["distances"], per_location)
        causes += class_causes(mine["cls_logits"], theirs["cls_logits"], evidence.reference.contract.channel_names)
        for name, sentence, outputs in tried_mistakes(evidence):
            share = outputs_explained(mine, theirs, outputs)
            if share > _CONVINCING:
                causes.append(Cause(name=name, sentence=sentence, explained=share))
    return causes or _rounding_causes(evidence)


def _declared_compute(evidence: Evidence) -> list[Cause]:
    mine = evidence.reference.session.description.get("compute", "")
    theirs = evidence.candidate.session.description.get("compute", "")
    if not theirs or mine == theirs:
        return []
    return [
        Cause(
            name="compute-type",
            sentence=f"the candidate computes in {theirs} in place of {mine}",
            explained=1.0,
        )
    ]


def _rounding_causes(evidence: Evidence) -> list[Cause]:
    """Whether the differences are as large, in every level and output, as those of a smaller float type."""
    noise = _noise(evidence, evidence.candidate_outputs)
    causes = []
    for compute, outputs in rounded_networks(evidence):
        expected = _noise(evidence, outputs)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.nan_to_num(np.minimum(noise / expected, expected / noise))
        if ratio.min() >= _SIMILAR_NOISE and np.median(ratio) >= _SAME_NOISE:
            text = (
                f"the differences are as large as those of rounding to {compute} in place of f32: "
                f"{_decibels(noise)} dB below the values in the median, {_decibels(expected)} dB with {compute}"
            )
            causes.append(Cause(name="compute-type", sentence=text, explained=float(np.median(ratio))))
    return causes


def _noise(evidence: Evidence, outputs: Tensors) -> NDArray[np.float64]:
    """Power of the difference over that of the reference, of each level and output."""
    levels = level_slices(evidence.input_size, evidence.reference.contract.decode.strides)
    pairs = zip(split_levels(evidence.reference_outputs, levels), split_levels(outputs, levels), strict=True)
    powers = []
    for (_, name, mine), (_, _, theirs) in pairs:
        whole = float((evidence.reference_outputs[name].astype(np.float64) ** 2).mean())
        difference = mine.astype(np.float64) - theirs
        powers.append(float((difference * difference).mean()) / max(whole, 1e-30))
    return np.array(powers)


def _decibels(noise: NDArray[np.float64]) -> str:
    return f"{-10 * np.log10(max(float(np.median(noise)), 1e-30)):.0f}"


def _final_causes(evidence: Evidence) -> list[Cause]:
    """Whether another overlap threshold of the suppression reproduces the candidate's detections."""
    contract = evidence.reference.contract
    causes = []
    before = _agreement(evidence, contract)
    for threshold in np.arange(0.3, 0.95, 0.05):
        spec = replace(contract.decode, iou_threshold=round(float(threshold), 2))
        share = _agreement(evidence, replace(contract, decode=spec))
        if share > max(before, _CONVINCING):
            text = (
                f"the suppression in the graph behaves as with an IoU threshold of {spec.iou_threshold}, "
                f"the contract says {contract.decode.iou_threshold}"
            )
            causes.append(Cause(name="decode.iou_threshold", sentence=text, explained=share))
    return causes + _contract_decode(evidence)


def _agreement(evidence: Evidence, contract: ModelContract) -> float:
    found = postprocess(
        evidence.reference_outputs, contract, index=0, input_size=evidence.input_size, letterbox=evidence.letterbox
    )
    options = MatchOptions(iou_threshold=0.9, min_score=0.0)
    return compare_detections({0: found}, {0: evidence.candidate_found}, options=options).match_rate
