"""The legacy way to INT8, for TensorRT up to 10 and for DLAs: ranges from a calibration cache, no calibration data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fcos_deploy.core.errors import ConfigError

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["cache_only_calibrator", "check_calibration_cache"]

_HEADER = re.compile(r"TRT-(\d+)-(EntropyCalibration2|MinMaxCalibration)\s*")
_ENTRY = re.compile(r".+: [0-9a-fA-F]{1,8}\s*")


def check_calibration_cache(path: Path, *, version: tuple[int, ...]) -> None:
    """Refuse a cache that TensorRT would silently ignore: another version's, or one that is not in its format.

    Line 1 is ``TRT-<number>-EntropyCalibration2``; the number is 1000 major + 100 minor + patch up to 8, and
    10000 major + 100 minor + patch from 10.

    Raises:
        ConfigError: naming the line.
    """
    lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    header = _HEADER.fullmatch(lines[0]) if lines else None
    if header is None:
        raise ConfigError(f"'{path}' is not a TensorRT calibration cache: its first line is not 'TRT-...'.")
    major, minor, patch = (*version, 0, 0)[:3]
    expected = (10000 if major >= 10 else 1000) * major + 100 * minor + patch
    if int(header.group(1)) != expected:
        raise ConfigError(
            f"'{path}' was written for version {header.group(1)}, this TensorRT is {expected} and would ignore it.",
            hint="write the cache again for this version with 'fcos-deploy calibrate'",
        )
    for number, line in enumerate(lines[1:], start=2):
        if line and not _ENTRY.fullmatch(line):
            raise ConfigError(f"Line {number} of '{path}' is not 'tensor: scale in hexadecimal': '{line[:60]}'.")


def cache_only_calibrator(library: Any, path: Path) -> trt.IInt8EntropyCalibrator2:  # Any: gone in the stubs of 11
    """A calibrator that has a cache and no data, so that ranges are ours or the build fails."""
    content = path.read_bytes()

    class CacheOnly(library.IInt8EntropyCalibrator2):  # type: ignore[misc]  # its base is known at run time only
        def __init__(self) -> None:
            library.IInt8EntropyCalibrator2.__init__(self)

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, names: list[str]) -> None:
            del names

        def read_calibration_cache(self) -> bytes:
            return content

        def write_calibration_cache(self, cache: bytes) -> None:
            del cache

    return CacheOnly()
