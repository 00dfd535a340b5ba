"""Optimisation profiles: the smallest, usual and largest shape of every dynamic input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.exporter import BatchRange, BuildOptions

__all__ = ["ProfileShapes", "profile_shapes"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ProfileShapes:
    """Shapes of one input; all equal where the input is static."""

    minimum: Shape
    optimal: Shape
    maximum: Shape

    @property
    def dynamic(self) -> bool:
        """Whether the input has an axis that may vary in the graph."""
        return self.minimum != self.maximum or self.minimum != self.optimal

    def __str__(self) -> str:
        return "/".join("x".join(map(str, shape)) for shape in (self.minimum, self.optimal, self.maximum))


def profile_shapes(
    inputs: Mapping[str, tuple[int | None, ...]], *, options: BuildOptions, size_divisor: int
) -> dict[str, ProfileShapes]:
    """Shapes of every input of the graph, ``None`` in ``inputs`` being a dynamic axis.

    Axis 0 is the batch; axes 2 and 3 of an image tensor are its height and width.

    Raises:
        ConfigError: a range is empty, missing, given for a fixed axis, or not a multiple of ``size_divisor``.
    """
    batch = _batch(options.batch)
    height = _size("height", options.height_range, size_divisor=size_divisor)
    width = _size("width", options.width_range, size_divisor=size_divisor)
    ranges = {0: ("batch", batch), 2: ("height", height), 3: ("width", width)}
    return {name: _input_shapes(name, shape, ranges=ranges) for name, shape in inputs.items()}


def _input_shapes(
    name: str, shape: tuple[int | None, ...], *, ranges: Mapping[int, tuple[str, Shape | None]]
) -> ProfileShapes:
    axes = [_axis(name, size, what=ranges.get(axis, (f"axis {axis}", None))) for axis, size in enumerate(shape)]
    minimum, optimal, maximum = zip(*axes, strict=True)
    return ProfileShapes(minimum, optimal, maximum)


def _axis(name: str, size: int | None, *, what: tuple[str, Shape | None]) -> Shape:
    label, wanted = what
    if size is None and wanted is None:
        raise ConfigError(
            f"The {label} of input '{name}' is dynamic in the ONNX file, and no range was given for it.",
            hint=f"give the smallest, usual and largest {label}, or export with a fixed input size",
        )
    if size is None:
        return wanted or ()
    if wanted is not None and set(wanted) != {size}:
        raise ConfigError(
            f"The {label} of input '{name}' is fixed to {size} in the ONNX file, the build asks for "
            f"{'/'.join(map(str, wanted))}.",
            hint=f"ask for {size}, or export with a dynamic {label}",
        )
    return size, size, size


def _batch(batch: BatchRange) -> Shape:
    return _ordered("batch", (batch.minimum, batch.optimal, batch.maximum))


def _size(label: str, wanted: Shape | None, *, size_divisor: int) -> Shape | None:
    if wanted is None:
        return None
    if any(size % size_divisor for size in wanted):
        raise ConfigError(f"The {label} range {wanted} must hold multiples of {size_divisor}.")
    return _ordered(label, wanted)


def _ordered(label: str, wanted: Shape) -> Shape:
    minimum, optimal, maximum = wanted
    if not 1 <= minimum <= optimal <= maximum:
        raise ConfigError(
            f"The {label} range must be 1 <= smallest <= usual <= largest, got {minimum}/{optimal}/{maximum}."
        )
    return wanted
