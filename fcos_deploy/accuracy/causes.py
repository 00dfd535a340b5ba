"""Why a stage departs: what differs in the contracts, and which known mistake reproduces the candidate's numbers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.matching import assign
from fcos_deploy.accuracy.stages import LevelSlice
from fcos_deploy.core.backend import Tensors
from fcos_deploy.core.contract import ModelContract

__all__ = [
    "Cause",
    "activation_causes",
    "class_causes",
    "contract_causes",
    "explained",
    "level_causes",
    "outputs_explained",
    "picture_place_causes",
    "pixel_causes",
    "shifted",
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
    rows, columns = assign(distance.max() - distance + 1e-12)
    order = rows[np.argsort(columns)]
    if len(order) < len(names) or np.array_equal(order, np.arange(len(names))):
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
