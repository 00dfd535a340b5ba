"""Scales, zero points and eight-bit weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.placement import ActivationFormat, WeightRange
from calibration.ranges import Range
from fcos_deploy.core.errors import CalibrationError

__all__ = [
    "ActivationScale",
    "WeightValues",
    "activation_scale",
    "bias_correction",
    "quantize_bias",
    "quantize_weight",
]

Floats = NDArray[np.float32]
# Smallest scale: a channel of zeros must not divide by zero.
_TINY = 1e-12
# Two products of an unsigned byte and weights of one sign whose sum fits sixteen bits: 128 * 255 = 32640.
_PAIR_SUM = 128


@dataclass(frozen=True, slots=True)
class ActivationScale:
    """``real = (integer - zero_point) * scale``; ``zero_point`` is int8 or uint8 and says which the tensor is."""

    scale: np.float32
    zero_point: np.int8 | np.uint8


def activation_scale(found: Range, kind: ActivationFormat) -> ActivationScale:
    """The scale that covers a range."""
    return _SCALES[kind](found)


def _symmetric(found: Range) -> ActivationScale:
    return ActivationScale(np.float32(max(found.amax / 127.0, _TINY)), np.int8(0))


def _asymmetric(found: Range) -> ActivationScale:
    scale = max((found.high - found.low) / 255.0, _TINY)
    return ActivationScale(np.float32(scale), np.uint8(np.clip(round(-found.low / scale), 0, 255)))


_SCALES: dict[ActivationFormat, Callable[[Range], ActivationScale]] = {
    ActivationFormat.S8_SYMMETRIC: _symmetric,
    ActivationFormat.U8_ASYMMETRIC: _asymmetric,
}


@dataclass(frozen=True, slots=True)
class WeightValues:
    """values: int8, shape of the weight. scales: (out,) float32, one per output channel."""

    values: NDArray[np.int8]
    scales: Floats

    def dequantized(self) -> Floats:
        """What the runtime computes with."""
        shape = (-1,) + (1,) * (self.values.ndim - 1)
        return self.values.astype(np.float32) * self.scales.reshape(shape)


def quantize_weight(weight: Floats, kind: WeightRange, *, least_scale: Floats | float = 0.0) -> WeightValues:
    """Symmetric, per output channel (axis 0) of ``weight`` (out, in, kh, kw)."""
    rows = weight.reshape(weight.shape[0], -1)
    scales = np.maximum(np.maximum(_WEIGHT_SCALES[kind](weight), least_scale), _TINY).astype(np.float32)
    limit = 64 if kind is WeightRange.REDUCED else 127
    values = np.clip(np.rint(rows / scales[:, None]), -limit, limit).astype(np.int8)
    return WeightValues(values.reshape(weight.shape), scales)


def _full(weight: Floats) -> Floats:
    return _largest(weight) / np.float32(127)


def _reduced(weight: Floats) -> Floats:
    return _largest(weight) / np.float32(64)


def _largest(weight: Floats) -> Floats:
    largest: Floats = np.abs(weight).reshape(weight.shape[0], -1).max(1)
    return largest


def _pairwise(weight: Floats) -> Floats:
    # Kernels walk the input channels innermost and add neighbours; which two meet depends on the kernel's blocking, so
    # both alignments of neighbours count.
    channels = np.moveaxis(weight, 1, -1).reshape(weight.shape[0], -1)
    if channels.shape[1] < 2:
        return _full(weight)
    positive, negative = np.maximum(channels, 0), np.maximum(-channels, 0)
    sums = np.maximum(positive[:, :-1] + positive[:, 1:], negative[:, :-1] + negative[:, 1:])
    scales: Floats = np.maximum(_full(weight), sums.max(1) / np.float32(_PAIR_SUM - 1))
    return scales


_WEIGHT_SCALES: dict[WeightRange, Callable[[Floats], Floats]] = {
    WeightRange.FULL: _full,
    WeightRange.REDUCED: _reduced,
    WeightRange.PAIRWISE: _pairwise,
}


def bias_correction(weight: Floats, values: WeightValues, *, means: Floats) -> Floats:
    """(out,) what the rounding of the weights takes from the mean of each output channel.

    ``means``: (in,) of the input's channels; without any there is nothing to correct. Padding is left out of account.

    Raises:
        CalibrationError: other means than the convolution has input channels.
    """
    out, per_group = weight.shape[:2]
    lost = (weight - values.dequantized()).reshape(out, per_group, -1).sum(2)
    if not means.size:
        return np.zeros(out, np.float32)
    if means.size % per_group or out % (means.size // per_group):
        raise CalibrationError(
            f"The calibration has the means of {means.size} channels for weights of shape {weight.shape}.",
            hint="calibrate again",
        )
    groups = means.reshape(-1, per_group)
    correction: Floats = (lost * np.repeat(groups, out // len(groups), axis=0)).sum(1)
    return correction


def quantize_bias(bias: Floats, *, input_scale: np.float32, weight_scales: Floats) -> tuple[NDArray[np.int32], Floats]:
    """(out,) int32 and its scales, the products of the input's and the weight's, as integer convolutions need them."""
    scales = (input_scale * weight_scales).astype(np.float32)
    return np.clip(np.rint(bias / scales), -(2**31) + 1, 2**31 - 1).astype(np.int32), scales
