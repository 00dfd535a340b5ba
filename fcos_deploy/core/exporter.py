"""What an exporter is: it makes one kind of artifact from another, as ``BuildOptions`` say."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

from fcos_deploy.core.enums import ArtifactKind, Precision
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.libraries import discover, get_plugin
from fcos_deploy.core.progress import ProgressFn, no_progress

__all__ = ["BuildOptions", "BuildRequest", "BuildResult", "Exporter", "SizeRange", "all_exporters", "get_exporter"]


class SizeRange(NamedTuple):
    """Min, opt and max of one axis, as in an optimization profile of TensorRT; all equal for a fixed size."""

    minimum: int = 1
    opt: int = 1
    maximum: int = 1

    @classmethod
    def parse(cls, text: str) -> SizeRange:
        """``"4"`` -> (4, 4, 4), ``"1,4,8"`` -> (1, 4, 8).

        Raises:
            ConfigError: anything else, or sizes that are not in order.
        """
        parts = text.split(",")
        sizes = [int(part) for part in parts if part.strip().isdecimal()]
        if len(sizes) != len(parts) or len(sizes) not in (1, 3):
            raise ConfigError(f"A size is 'N' or 'MIN,OPT,MAX', got '{text}'.", hint="for example 1,4,8")
        size_range = cls(*(sizes * 3 if len(sizes) == 1 else sizes))
        if not 1 <= size_range.minimum <= size_range.opt <= size_range.maximum:
            raise ConfigError(f"Sizes must be at least 1 and in order, got '{text}'.")
        return size_range


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What a builder may be told; a builder refuses what it cannot honour."""

    batch: SizeRange = field(default_factory=SizeRange)
    workspace_mib: int | None = None
    optimization_level: int | None = None
    compute_capabilities: tuple[str, ...] = ()  # such as "8.6"; TensorRT-RTX only
    timing_cache: Path | None = None
    dla_core: int | None = None
    dla_strict: bool = False  # refuse a build with layers that fall back to the GPU
    tf32: bool = False  # let fp32 convolutions round their inputs to 10 bits of mantissa, as TensorRT does by itself
    version_compatible: bool = False
    hardware_compatible: bool = False
    calibration_cache: Path | None = None
    height_range: SizeRange | None = None  # of a dynamic input height
    width_range: SizeRange | None = None
    precision: Precision | None = None  # for builders that convert what is float in the source; None keeps it

    @property
    def changed(self) -> dict[str, str]:
        """Options that differ from their defaults, as text."""
        default = BuildOptions()
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        return {name: str(value) for name, value in values.items() if value != getattr(default, name)}

    def refuse_all_but(self, *honoured: str, builder: str) -> None:
        """Raise ConfigError when an option other than these was set."""
        for name in self.changed:
            if name not in honoured:
                hint = f"it has: {', '.join(honoured)}" if honoured else "leave it out"
                raise ConfigError(f"'{builder}' has no option '{name}'.", hint=hint)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """One artifact to make: ``source`` is read, ``output`` is written atomically, with its sidecar beside it."""

    source: Path
    output: Path
    options: BuildOptions = field(default_factory=BuildOptions)
    progress: ProgressFn = no_progress


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildResult:
    """The files of the artifact, the main one first; ``record`` goes into the manifest: versions, flags, seconds."""

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


@functools.cache
def all_exporters() -> dict[str, Exporter]:
    """All makers of artifacts by name."""
    return discover("exporters", marker="EXPORTER", kind=Exporter)  # type: ignore[type-abstract]  # for isinstance only


def get_exporter(name: str) -> Exporter:
    """One maker of artifacts; ConfigError names those that exist."""
    return get_plugin(all_exporters(), name, role="exporter")
