"""Smallest, usual and largest of a size, as text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from fcos_deploy.core.enums import ArtifactKind, Precision
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.progress import ProgressFn, no_progress

__all__ = ["BatchRange", "BuildOptions", "BuildRequest", "BuildResult", "Exporter", "optional_range", "size_range"]


def size_range(text: str) -> tuple[int, int, int]:
    """``"4"`` -> (4, 4, 4), ``"1,4,8"`` -> (1, 4, 8).

    Raises:
        ConfigError: anything else, or sizes that are not in order.
    """
    parts = text.split(",")
    sizes = [int(part) for part in parts if part.strip().isdecimal()]
    if len(sizes) != len(parts) or len(sizes) not in (1, 3):
        raise ConfigError(f"A size is 'N' or 'SMALLEST,USUAL,LARGEST', got '{text}'.", hint="for example 1,4,8")
    smallest, usual, largest = sizes * 3 if len(sizes) == 1 else sizes
    if not 1 <= smallest <= usual <= largest:
        raise ConfigError(f"Sizes must be at least 1 and in order, got '{text}'.")
    return smallest, usual, largest


def optional_range(text: str) -> tuple[int, int, int] | None:
    """As ``size_range``; None for empty text."""
    return size_range(text) if text else None


@dataclass(frozen=True, slots=True)
class BatchRange:
    """Smallest, most usual and largest batch of an engine; all equal for a fixed one."""

    minimum: int = 1
    optimal: int = 1
    maximum: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What a builder may be told; a builder refuses what it cannot honour."""

    batch: BatchRange = field(default_factory=BatchRange)
    workspace_mib: int | None = None
    optimization_level: int | None = None
    compute_capabilities: tuple[str, ...] = ()  # such as "8.6"; TensorRT-RTX only
    timing_cache: Path | None = None
    builds: int = 1
    dla_core: int | None = None
    dla_strict: bool = False  # refuse a build with layers that fall back to the GPU
    tf32: bool = False  # let fp32 convolutions round their inputs to 10 bits of mantissa, as TensorRT does by itself
    version_compatible: bool = False
    hardware_compatible: bool = False
    calibration_cache: Path | None = None
    height_range: tuple[int, int, int] | None = None  # smallest, usual, largest input height, for dynamic sizes
    width_range: tuple[int, int, int] | None = None
    precision: Precision | None = None  # of what is float in the source; None keeps it. For builders that convert

    def refuse_all_but(self, *honoured: str, builder: str) -> None:
        """Raise ConfigError when an option other than these was set.

        Raises:
            ConfigError: naming the first such option.
        """
        default = BuildOptions()
        for option in fields(self):
            if option.name not in honoured and getattr(self, option.name) != getattr(default, option.name):
                raise ConfigError(
                    f"'{builder}' has no option '{option.name}'.",
                    hint=f"it has: {', '.join(honoured)}" if honoured else "leave it out",
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """One artifact to make: ``source`` is read, ``output`` is written atomically, with its sidecar beside it."""

    source: Path
    output: Path
    options: BuildOptions = field(default_factory=BuildOptions)
    progress: ProgressFn = no_progress


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildResult:
    """What was made: all its files, the main one first.

    ``record`` goes into the manifest: versions, seconds, flags, figures measured.
    """

    files: tuple[Path, ...]
    record: Mapping[str, str]


class Exporter(ABC):
    """Makes one kind of artifact from another. A module in ``exporters/`` that defines ``EXPORTER`` registers one."""

    name: str
    source: ArtifactKind
    produces: ArtifactKind
    extra: str

    @abstractmethod
    def build(self, request: BuildRequest) -> BuildResult:
        """Make the artifact.

        Raises:
            MissingDependencyError: the builder is not installed.
            BuildError: the builder failed; the message ends with the last lines of its log.
        """
