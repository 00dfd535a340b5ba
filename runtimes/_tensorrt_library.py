"""Imports TensorRT or TensorRT-RTX and keeps its log: what builder and runtime share.

The bindings of all versions agree on the names in ``TensorRT``; what only some have is asked for where it is used.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from fcos_deploy.core.errors import ConfigError, MissingDependencyError
from fcos_deploy.core.libraries import parse_version, require
from fcos_deploy.core.machine import is_jetson

if TYPE_CHECKING:
    import tensorrt as trt

OLDEST = (8, 6)  # 8.5 is JetPack 5's, whose Python 3.8 this package does not support


class TensorRT(Protocol):
    """The names that every supported version has, seen through the stubs of 10.13."""

    __version__: str
    Builder: type[trt.Builder]
    BuilderFlag: type[trt.BuilderFlag]
    DataType: type[trt.DataType]
    DeviceType: type[trt.DeviceType]
    Dims: type[trt.Dims]
    ILogger: type[trt.ILogger]
    IOutputAllocator: type[trt.IOutputAllocator]
    LayerType: type[trt.LayerType]
    MemoryPoolType: type[trt.MemoryPoolType]
    NetworkDefinitionCreationFlag: type[trt.NetworkDefinitionCreationFlag]
    OnnxParser: type[trt.OnnxParser]
    ProfilingVerbosity: type[trt.ProfilingVerbosity]
    Runtime: type[trt.Runtime]
    TensorIOMode: type[trt.TensorIOMode]


def load_tensorrt(*import_names: str, extra: str) -> TensorRT:
    """The first of these bindings that is installed: ``tensorrt``, ``tensorrt_lean``, ``tensorrt_rtx``, ...

    Raises:
        MissingDependencyError: none is; the message is about the first. Or only type stubs are installed.
        ConfigError: older than 8.6.
    """
    first, *others = import_names
    try:
        module = require(first, extra=extra)
        if not hasattr(module, "Runtime"):
            raise MissingDependencyError(f"Only the type stubs of '{first}' are installed, not the library.")
    except MissingDependencyError as error:
        for name in others:
            with suppress(MissingDependencyError):
                return load_tensorrt(name, extra=extra)
        raise MissingDependencyError(error.message, hint=install_hint(extra)) from None
    library = cast(TensorRT, module)
    if first != "tensorrt_rtx" and parse_version(library.__version__) < OLDEST:
        raise ConfigError(
            f"TensorRT {library.__version__} is too old, 8.6 or later is needed.",
            hint="build with the trtexec line that 'fcos-deploy deploy --dry-run' prints",
        )
    return library


def install_hint(extra: str, *, root: Path = Path("/")) -> str:
    """How to get the library of an extra. A Jetson has TensorRT from JetPack; the one of PyPI does not run there."""
    if not is_jetson(root):
        return f"pip install 'fcos-deploy[{extra}]'"
    if extra != "tensorrt":
        return "none on a Jetson, whose GPU TensorRT-RTX does not know: take --backend tensorrt"
    environment = "make the environment with 'python3 -m venv --system-site-packages'"
    if (root / "var/lib/dpkg/info/python3-libnvinfer.list").is_file():
        return f"JetPack's TensorRT is installed, and this environment does not see it: {environment}"
    return f"sudo apt install python3-libnvinfer, and {environment}, which sees it"


def calibration_cache_number(version: str) -> int:
    """The number in a calibration cache's first line, such as 100300 in ``TRT-100300-EntropyCalibration2`` of 10.3.0.

    It is NV_TENSORRT_VERSION of NvInferVersion.h: 1000 major + 100 minor + patch up to 8, 10000 major + ... from 10 on.

    Raises:
        ConfigError: not a version, or one without calibration caches (11 and later).
    """
    major, minor, patch = (*parse_version(version), 0, 0)[:3]  # a version may have two numbers or four
    if not 7 <= major <= 10:
        raise ConfigError(
            f"TensorRT {version} takes no calibration cache.", hint="build from the portable INT8 graph instead"
        )
    return major * (10000 if major >= 10 else 1000) + minor * 100 + patch


def shape_tuple(dims: trt.Dims) -> tuple[int, ...]:
    """The library's shape as a tuple; -1 is a dynamic axis."""
    return tuple(int(dims[index]) for index in range(len(dims)))


@dataclass(slots=True, eq=False)
class LibraryLog:
    """What the library said while a ``library_log`` was open: each error and warning once, the last lines, layer lists.

    ``errors`` and ``warnings`` are in order of appearance; their values say nothing.
    """

    errors: dict[str, None] = field(default_factory=dict)
    warnings: dict[str, None] = field(default_factory=dict)
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=200))
    layer_lists: list[str] = field(default_factory=list)

    def add(self, severity: str, text: str) -> None:
        """Keep one message; ``severity``: INTERNAL_ERROR, ERROR, WARNING, INFO or VERBOSE."""
        self.tail.append(text.strip())
        if severity in ("INTERNAL_ERROR", "ERROR"):
            self.errors[text.strip()] = None
        elif severity == "WARNING":
            self.warnings[text.strip()] = None
        elif text.startswith("Layers:"):
            self.layer_lists.append(text)

    def last_lines(self, count: int = 4) -> list[str]:
        """The last errors, or the last messages of any kind where there is no error."""
        return list(self.errors or self.tail)[-count:]


def _make_logger(library: TensorRT, listeners: list[LibraryLog]) -> trt.ILogger:
    class Logger(library.ILogger):  # type: ignore[misc, name-defined]  # its base is known at run time only
        def __init__(self) -> None:
            library.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:  # Any: the parameter's class differs between versions
            for listener in listeners:
                listener.add(severity.name, msg)

    return Logger()


# The library keeps the first logger of a process and ignores later ones: one for each library, and who listens to it.
_LOGGERS: dict[str, tuple[trt.ILogger, list[LibraryLog]]] = {}
_LOCK = threading.Lock()


@contextmanager
def library_log(library: TensorRT) -> Iterator[tuple[trt.ILogger, LibraryLog]]:
    """The logger to hand to builders, parsers and runtimes, and what it hears while the block runs."""
    name = cast(Any, library).__name__  # Any: a protocol for a module does not tell the module's name
    log = LibraryLog()
    with _LOCK:
        if name not in _LOGGERS:
            listeners: list[LibraryLog] = []
            _LOGGERS[name] = _make_logger(library, listeners), listeners
        logger, listeners = _LOGGERS[name]
        listeners.append(log)
    try:
        yield logger, log
    finally:
        with _LOCK:
            listeners.remove(log)
