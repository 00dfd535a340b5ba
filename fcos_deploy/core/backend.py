"""What a runtime is: a backend opens an artifact as a session, which runs it."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from numpy.typing import NDArray

from fcos_deploy.core.artifact import find_contract
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.contract import ModelContract, TensorSpec
from fcos_deploy.core.enums import ArtifactKind, ComputeType, DeformForm, PerformanceHint
from fcos_deploy.core.errors import (
    BackendError,
    BackendLoadError,
    ConfigError,
    MissingDependencyError,
    TensorMismatchError,
)
from fcos_deploy.core.libraries import discover, get_plugin
from fcos_deploy.core.onnx_file import onnx_interface
from fcos_deploy.core.progress import INFERENCES
from fcos_deploy.core.trust import Trust

__all__ = [
    "Backend",
    "BackendProbe",
    "PerThread",
    "Session",
    "SessionOptions",
    "Tensors",
    "all_backends",
    "backends_for",
    "get_backend",
]


Tensors = dict[str, NDArray[Any]]

# Options of a session: name, types, and how an error puts them.
_OPTION_TYPES: tuple[tuple[str, tuple[type, ...], str], ...] = (
    ("device", (str,), "text such as 'cpu' or 'GPU.0'"),
    ("cache_dir", (Path, type(None)), "a path or None"),
    ("contract", (ModelContract, type(None)), "a ModelContract or None"),
    ("checkpoint", (CheckpointOptions, type(None)), "CheckpointOptions or None"),
    ("public_keys", (tuple,), "a tuple of PEM texts or files"),
    ("expect_name", (str,), "text"),
    ("min_version", (int,), "a whole number"),
    ("trust_local_builds", (bool,), "True or False"),
    ("allow_engine_code", (bool,), "True or False"),
    ("allow_fallback", (bool,), "True or False"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """How a session runs. Empty and ``None`` leave it to the bundle, and then to the backend: its description says how.

    ``compute`` and ``hint`` also take their words as text, such as ``hint="throughput"``. ``threads``, ``streams`` and
    ``batch`` are at least 1; ``batch`` is the most images of a request where the model leaves that open. ``device`` is
    in the backend's own words (``cpu``, ``GPU.0``, ``cuda:0``); ``cache_dir`` holds compiled models; ``contract`` is
    needed where the artifact does not carry one, or is to be replaced. ``checkpoint``
    says how a checkpoint is read; None leaves that to its ecosystem.

    For bundles: with ``public_keys`` (PEM texts, or files of them) the bundle must be signed with one of these keys,
    and other files are refused; ``expect_name`` and ``min_version`` say which bundle it must be;
    ``trust_local_builds`` lets layers count that this user built here and nobody signed;
    ``allow_engine_code`` lets an unsigned engine run the library it contains; ``unsigned_checkpoints`` lets checkpoints
    pass, which are data and not executed;
    ``allow_fallback`` falls back along the chain of backends that it declares when its own does not fit this machine.
    """

    device: str = ""
    compute: ComputeType | None = None
    hint: PerformanceHint | None = None
    threads: int | None = None
    streams: int | None = None
    batch: int | None = None
    cache_dir: Path | None = None
    contract: ModelContract | None = None
    checkpoint: CheckpointOptions | None = None
    public_keys: tuple[str | Path, ...] = ()
    expect_name: str = ""
    min_version: int = 0
    trust_local_builds: bool = False
    allow_engine_code: bool = False
    unsigned_checkpoints: bool = False
    allow_fallback: bool = False

    def __post_init__(self) -> None:
        """Check every value here, where the mistake is, and not in a runtime that would read it its own way."""
        # A frozen dataclass sets its own fields this way only.
        if self.compute is not None:
            object.__setattr__(self, "compute", ComputeType.of(self.compute, option="compute"))
        if self.hint is not None:
            object.__setattr__(self, "hint", PerformanceHint.of(self.hint, option="hint"))
        if isinstance(self.cache_dir, (str, os.PathLike)):
            object.__setattr__(self, "cache_dir", Path(self.cache_dir))
        for name in ("threads", "streams", "batch"):
            count = getattr(self, name)
            whole = isinstance(count, int) and not isinstance(count, bool)
            if count is not None and not (whole and count >= 1):
                raise ConfigError(f"'{name}' must be a whole number of at least 1, or None, got {count!r}.")
        for name, kinds, expected in _OPTION_TYPES:
            value = getattr(self, name)
            if not isinstance(value, kinds):
                raise ConfigError(f"'{name}' must be {expected}, got {value!r}.")
        _ = self.trust  # which is checked when it is made

    @property
    def compute_type(self) -> ComputeType:
        """What a runtime computes float layers in: float32 where nothing else was asked for."""
        return self.compute or ComputeType.F32

    @property
    def goal(self) -> PerformanceHint:
        """What a runtime is tuned for: latency where nothing else was asked for."""
        return self.hint or PerformanceHint.LATENCY

    @property
    def trust(self) -> Trust:
        """What a bundle must be to be opened so."""
        return Trust(
            public_keys=self.public_keys,
            local_builds=self.trust_local_builds,
            name=self.expect_name,
            min_version=self.min_version,
        )

    def trusting(self, trust: Trust) -> SessionOptions:
        """The same with what ``trust`` asks of a bundle."""
        return replace(
            self,
            public_keys=trust.public_keys,
            trust_local_builds=trust.local_builds,
            expect_name=trust.name,
            min_version=trust.min_version,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendProbe:
    """What a backend finds on this machine: used by ``doctor`` and by errors."""

    available: bool
    version: str = ""
    devices: tuple[str, ...] = ()
    problem: str = ""
    remedy: str = ""

    @property
    def missing(self) -> bool:
        """It is not installed: what is, but cannot run, has told its version."""
        return not self.available and not self.version

    @staticmethod
    def of_library(name: str, look: Callable[[], tuple[str, Sequence[str]]]) -> BackendProbe:
        """What ``look`` sees, a library's version and devices, or why it cannot: it is missing, or broken."""
        try:
            version, devices = look()
        except MissingDependencyError as error:
            return BackendProbe(available=False, problem=error.message, remedy=error.hint)
        except (ImportError, OSError, RuntimeError) as error:
            return BackendProbe(available=False, problem=str(error), remedy=f"reinstall {name}")
        return BackendProbe(available=True, version=version, devices=tuple(devices))


class Session(ABC):
    """An opened artifact. ``run`` checks the feeds once; backends fill in ``_run``.

    ``thread_safe`` says whether ``run`` may be called from several threads at a time. ``contract`` is the artifact's
    own, where the backend knows it. ``max_batch`` is the largest batch that a dynamic first axis takes, None: any.
    With ``workers`` > 1, ``run_many`` has so many requests ``at_a_time``, each in a thread of its own.
    """

    thread_safe = True
    contract: ModelContract | None = None
    max_batch: int | None = None

    def __init__(
        self,
        *,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        description: Mapping[str, str],
        workers: int = 1,
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.description = dict(description)  # backend, version, device, compute type, ...: for records and reports
        self._closed = False
        self._process = os.getpid()
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers, self.description.get("backend", "")) if workers > 1 else None

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    @property
    def at_a_time(self) -> int:
        """How many requests ``run_many`` has at a time."""
        return self._workers

    def run(self, feeds: Tensors) -> Tensors:
        """One inference. Outputs may be views that the next call overwrites only if ``thread_safe`` is False.

        Raises:
            TensorMismatchError: a feed is missing, unknown, or of another dtype or shape.
            BackendError: the session is closed, or the runtime failed.
        """
        self._check(feeds)
        INFERENCES.add()
        return self._run(feeds)

    def borrow(self, feeds: Tensors) -> Tensors:
        """As ``run``, with its errors; the outputs may be views that the calling thread's next call overwrites."""
        self._check(feeds)
        INFERENCES.add()
        return self._borrow(feeds)

    def bound(self, feeds: Tensors) -> Callable[[], Tensors]:
        """Inferences of these very arrays, whose values may change in between: as ``borrow``, for the calling thread.

        Where the outputs of each one lie in the same memory, their dictionary is the same object. Whether this is the
        process that opened the session is the caller's to see to.

        Raises:
            TensorMismatchError: as ``run``; a call raises BackendError.
        """
        self._check(feeds)
        infer = self._bound(feeds)

        def count_and_infer() -> Tensors:
            if self._closed:
                raise BackendError("The session is closed.")
            INFERENCES.add()
            return infer()

        return count_and_infer

    def run_many(self, feeds: Sequence[Tensors]) -> list[Tensors]:
        """One inference for each of ``feeds``, results in their order; at a time as many as the runtime sees fit."""
        for request in feeds:
            self._check(request)
        INFERENCES.add(len(feeds))
        return self._run_many(feeds)

    @property
    def forked(self) -> bool:
        """Whether this process was forked from the one that opened the session."""
        return os.getpid() != self._process

    def check_process(self) -> None:
        """Refuse a process that was forked from the one that opened the session.

        The threads of a runtime do not survive a fork: OpenVINO and PyTorch would wait for theirs forever.

        Raises:
            BackendError: this is another process.
        """
        if os.getpid() != self._process:
            raise BackendError(
                f"The session was opened in process {self._process} and cannot run in process {os.getpid()}, which was "
                "forked from it.",
                hint="open the detector in each worker, after the fork (docs/runtimes.md)",
            )

    def _check(self, feeds: Tensors) -> None:
        self.check_process()
        if self._closed:
            raise BackendError("The session is closed.")
        names = {spec.name for spec in self.inputs}
        if feeds.keys() != names:
            raise TensorMismatchError(f"The inputs must be {sorted(names)}, got {sorted(feeds)}.")
        for spec in self.inputs:
            spec.check(feeds[spec.name])

    def close(self) -> None:
        """Release the runtime's resources; may be called twice. In a forked process there is nothing to release."""
        if not self._closed:
            self._closed = True
            if not self.forked:
                if self._pool:
                    self._pool.shutdown()
                self._close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def _run(self, feeds: Tensors) -> Tensors: ...

    def _borrow(self, feeds: Tensors) -> Tensors:
        return self._run(feeds)

    def _bound(self, feeds: Tensors) -> Callable[[], Tensors]:
        return functools.partial(self._borrow, feeds)

    def _run_many(self, feeds: Sequence[Tensors]) -> list[Tensors]:
        return list(self._pool.map(self._run, feeds) if self._pool else map(self._run, feeds))

    def _close(self) -> None:  # noqa: B027  (most runtimes release on deletion)
        pass


class Backend(ABC):
    """A runtime. A public module in ``runtimes/`` that defines ``BACKEND`` registers one."""

    name: str
    accepts: frozenset[ArtifactKind]
    extra: str  # the pip extra that installs it
    placements: tuple[str, ...] = ("portable",)  # Q/DQ placements that it reads as they were meant, the fastest first
    preferred_for: frozenset[ArtifactKind] = frozenset()  # kinds that it opens when the user names no backend
    deform_form: DeformForm = DeformForm.GRID_SAMPLE  # of deformable convolutions, the form that it runs fastest

    @abstractmethod
    def open(self, path: Path, options: SessionOptions) -> Session:
        """Open an artifact.

        Raises:
            MissingDependencyError: the runtime is not installed.
            BackendLoadError: the artifact is not one it can read.
            DeviceError: the device is not there; never another one in its place.
        """

    @abstractmethod
    def probe(self) -> BackendProbe:
        """Look at this machine without raising."""

    def keeping_models(self) -> contextlib.AbstractContextManager[None]:
        """Within it, what was compiled for a model stays in memory, for when the same bytes are opened alike again.

        A backend that compiles nothing, or opens it fast, has nothing to keep.
        """
        return contextlib.nullcontext()

    def contract_of(self, path: Path, options: SessionOptions) -> ModelContract | None:
        """The contract of an artifact, or the one that ``options`` put in its place, once its placement is checked.

        Raises:
            BackendLoadError: the file is damaged, its Q/DQ placement is for another runtime, or it has an operator that
                this runtime does not have.
        """
        contract = options.contract or find_contract(path)
        if path.suffix.lower() == ".onnx":
            self.check_operators(path)
        if contract:
            self.check_placement(contract)
        return contract

    def check_operators(self, graph: Path) -> None:
        """Refuse, with BackendLoadError, an ONNX file with DeformConv where this runtime does not have it."""
        if self.deform_form is DeformForm.GRID_SAMPLE and "DeformConv" in onnx_interface(graph).operators:
            raise BackendLoadError(
                f"'{graph}' computes deformable convolutions with the operator DeformConv, unknown to '{self.name}'.",
                hint=f"export it with --deform-form {DeformForm.GRID_SAMPLE}",
            )

    def check_placement(self, contract: ModelContract) -> None:
        """Refuse, with BackendLoadError, an INT8 graph whose Q/DQ nodes this runtime would interpret differently."""
        if contract.placement and contract.placement not in self.placements:
            raise BackendLoadError(
                f"The INT8 graph was quantized for '{contract.placement}', which '{self.name}' does not read as meant.",
                hint=f"quantize with --for {self.name} (it reads {', '.join(sorted(self.placements))})",
            )

    def placement_advice(self, placement: str) -> str:
        """What to say of an INT8 graph that runs here and was placed for another runtime; empty: nothing.

        Its results are right. Its speed may be below that of the float graph.
        """
        if not placement or placement == self.placements[0]:
            return ""
        return (
            f"INT8 of this graph is placed for '{placement}'; {self.name} runs it, but perhaps slower than the float "
            f"graph. Make one for {self.name}: fcos-deploy quantize MODEL --calibration FILE --for {self.name} -o FILE"
        )


T = TypeVar("T")


class PerThread(Generic[T]):
    """One value per thread: ``make`` is called once in every thread that asks.

    A thread's value goes when the thread or this object goes.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._local = threading.local()

    def get(self) -> T:
        """The calling thread's value."""
        try:
            value: T = self._local.value
        except AttributeError:
            value = self._local.value = self._make()
        return value


@functools.cache
def all_backends() -> dict[str, Backend]:
    """All runtimes by name, installed libraries or not."""
    return discover("runtimes", marker="BACKEND", kind=Backend)  # type: ignore[type-abstract]  # for isinstance only


def backends_for(kind: ArtifactKind) -> list[Backend]:
    """The runtimes that open this kind, by name."""
    return [backend for backend in all_backends().values() if kind in backend.accepts]


def get_backend(name: str) -> Backend:
    """One runtime; ConfigError names those that exist."""
    return get_plugin(all_backends(), name, role="backend")
