"""The builder's own words, and what to do about the ones that are known."""

from __future__ import annotations

import re

from fcos_deploy.core.errors import BuildError
from fcos_deploy.core.tensorrt_library import LibraryLog

__all__ = ["build_error"]

_NOISE = re.compile(r"^\[?(?:checkMacros\.cpp|.*catchCudaError)")
_SOURCE = re.compile(r"\s*\(?In [\w:~<>]+ at /_src/[^)]*\)?$")

# What the log says, and what mends it. The first that fits is shown.
_HINTS: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"(?i)nms\S* has no runners|NonMaxSuppression"),
        "this library has no NMS operator: export with '--tail candidates', or with the nms tail in its static form",
    ),
    (re.compile(r"Plugin not found|NonZero plugin"), "the graph has an operator that this library does not know"),
    (re.compile(r"K exceeds the maximum"), "lower pre_nms_top_k to 3840 or less per level"),
    (
        re.compile(r"(?i)out of memory|OutOfMemory"),
        "lower the workspace and the optimisation level, close other programs",
    ),
    (re.compile(r"Failed to parse the ONNX model|ParseFromCodedStream"), "the ONNX file is damaged: export it again"),
    (re.compile(r"Non-zero zero point"), "TensorRT takes symmetric int8 only: quantize with the 'portable' placement"),
    (re.compile(r"has type Int32 but must have type"), "biases must not be quantized: use the 'portable' placement"),
    (re.compile(r"HW-specific datatypes"), "the graph has a type that this GPU does not compute in"),
    (re.compile(r"libnvinfer_lean"), "a version-compatible engine needs the lean runtime library beside TensorRT"),
    (
        re.compile(r"driver version is insufficient|no CUDA-capable device"),
        "building needs a GPU here: 'fcos-deploy doctor'",
    ),
)


def build_error(what: str, *, log: LibraryLog, extra_lines: tuple[str, ...] = ()) -> BuildError:
    """An error that ends with the builder's last lines, the cause first."""
    lines = [_SOURCE.sub("", line) for line in (*extra_lines, *log.last_lines()) if not _NOISE.match(line)]
    text = "\n  ".join(dict.fromkeys(lines)) or "it gave no reason"
    hint = next((hint for pattern, hint in _HINTS if pattern.search(text)), "")
    return BuildError(f"{what}:\n  {text}", hint=hint)
