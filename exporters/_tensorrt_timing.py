"""Timing caches: one file per device and version in a folder, merged with what others wrote meanwhile."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fcos_deploy.core.atomic import atomic_file

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["read_timing_cache", "save_timing_cache", "timing_cache_file"]


def timing_cache_file(place: Path, *, version: str, devices: Sequence[str]) -> Path:
    """``place`` if it names a file; in a folder the file of this device and TensorRT, to whom timings belong."""
    if place.suffix or place.is_file():
        return place
    device = re.sub(r"[^A-Za-z0-9.]+", "-", devices[0] if devices else "unknown-gpu").strip("-")
    return place / f"{device}.tensorrt-{version}.timing"


def read_timing_cache(path: Path) -> bytes:
    """The file's contents; empty, which starts a new cache, where there is none yet."""
    return path.read_bytes() if path.is_file() else b""


def save_timing_cache(path: Path, *, config: trt.IBuilderConfig) -> None:
    """Write what the build measured, together with what another build wrote in the meantime."""
    measured = config.get_timing_cache()
    others = read_timing_cache(path)
    if others:
        # False: another device's timings are refused, which leaves ours as they are.
        measured.combine(config.create_timing_cache(others), False)
    with atomic_file(path) as temporary:
        temporary.write_bytes(bytes(memoryview(measured.serialize())))
