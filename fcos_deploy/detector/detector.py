"""From what the user calls a model to a file and the backend that opens it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, Union
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.backend import Backend, PerThread, Session, SessionOptions, Tensors
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.contract import ModelContract, read_contract
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import ArtifactKind, PerformanceHint, Precision, Tail
from fcos_deploy.core.errors import BackendError, BackendLoadError, ConfigError, DeviceError, SignatureError
from fcos_deploy.core.image import read_image
from fcos_deploy.core.machine import usable_cpus
from fcos_deploy.core.model_files import kinds_of
from fcos_deploy.core.postprocess import image_sizes_row, postprocess
from fcos_deploy.core.preprocess import Letterbox, padded_size, preprocess
from fcos_deploy.core.registry import all_backends, backends_for, get_backend
from fcos_deploy.core.tensor_spec import TensorSpec

if TYPE_CHECKING:
    from fcos_deploy.bundle.preflight import Fallback
    from fcos_deploy.model.fcos import Fcos

__all__ = ["AsyncGate", "Detector", "FeedMaker", "Image", "ModelSource", "Prepared", "find_model"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model file, the runtime that is to open it, and those of the bundle that were passed over for it."""

    path: Path
    backend: Backend
    fallbacks: tuple[Fallback, ...] = ()


def find_model(
    model: Path, *, backend: str = "", precision: Precision | None = None, options: SessionOptions | None = None
) -> ModelSource:
    """A checkpoint, ONNX file, IR or engine as it is; of a bundle the artifact for this backend and precision.

    Raises:
        ConfigError: no such backend, or one that does not open this kind of file, or a bundle without such an artifact.
        BackendLoadError: nothing is there.
        BundleError: the bundle is damaged.
        SignatureError: a signature is asked for, and this is not a bundle that one of the keys signed.
        DeviceError: the bundle's artifact does not fit this machine.
    """
    options = options or SessionOptions()
    if not model.exists():
        raise BackendLoadError(
            f"'{model}' is not there.", hint="give a checkpoint, an ONNX file, an engine or a bundle"
        )
    if model.is_dir() or model.suffix == ".tar":
        return _of_bundle(model, backend=backend, precision=precision, options=options)
    if options.public_keys:
        raise SignatureError(
            f"'{model}' is not a bundle, so nobody has signed it.", hint="give the signed bundle that it belongs to"
        )
    kinds = kinds_of(model)
    return ModelSource(model, _named(backend, model, kinds=kinds) if backend else _default(model, kinds=kinds))


def _of_bundle(model: Path, *, backend: str, precision: Precision | None, options: SessionOptions) -> ModelSource:
    from fcos_deploy.bundle import open_bundle
    from fcos_deploy.bundle.preflight import select_runnable

    bundle = open_bundle(model, public_keys=options.public_keys)
    selection, fallbacks = select_runnable(
        bundle, backend=backend, precision=precision, allow_fallback=options.allow_fallback
    )
    for fallback in fallbacks:
        _LOG.warning("'%s' falls back from '%s': %s", model, fallback.backend, fallback.reason)
    return ModelSource(bundle.path(selection.artifact.path), get_backend(selection.backend), fallbacks)


def _named(name: str, model: Path, *, kinds: tuple[ArtifactKind, ...]) -> Backend:
    backend = get_backend(name)
    if backend.accepts.isdisjoint(kinds):
        fitting = [other.name for other in all_backends().values() if not other.accepts.isdisjoint(kinds)]
        raise ConfigError(
            f"Backend '{name}' does not open '{model.name}' ({' or '.join(kinds)}).",
            hint=f"it opens {', '.join(sorted(backend.accepts))}; '{model.name}' is for {', '.join(fitting) or 'none'}",
        )
    return backend


def _default(model: Path, *, kinds: tuple[ArtifactKind, ...]) -> Backend:
    """The backend that is meant for the kind; if it is not installed, the only one that is.

    Raises:
        ConfigError: none is installed, or several and none is meant more than the others.
    """
    able = [backend for kind in kinds for backend in backends_for(kind)]
    meant = [backend for backend in able if not backend.preferred_for.isdisjoint(kinds)]
    others = [backend for backend in able if backend not in meant]
    # One after the other: probing imports the runtime, which the start of a program should not pay for in vain.
    installed = _installed(meant) or _installed(others)
    if len(installed) == 1:
        return installed[0]
    if installed:
        names = ", ".join(backend.name for backend in installed)
        raise ConfigError(f"Several backends open '{model.name}'.", hint=f"name one with --backend: {names}")
    for backend in able:
        probe = backend.probe()
        if probe.version:  # installed, but unable to run: that is what the user wants to know
            raise DeviceError(f"'{model.name}' cannot run here. {backend.name}: {probe.problem}", hint=probe.remedy)
    raise ConfigError(
        f"No backend is installed that opens '{model.name}'.",
        hint=" or ".join(f"pip install 'fcos-deploy[{backend.extra}]'" for backend in able),
    )


def _installed(candidates: list[Backend]) -> list[Backend]:
    return [backend for backend in candidates if backend.probe().available]


T = TypeVar("T")


class AsyncGate:
    """Threads for blocking calls, and a place for at most ``places`` calls that run or wait for a thread.

    Who comes when all places are taken waits in its own coroutine, so that a producer that awaits slows down and
    nothing piles up. A cancelled call that has not begun never begins; one that runs ends, and keeps its place until
    then. Usable from several event loops; each has ``places`` of its own.
    """

    def __init__(self, *, workers: int, places: int) -> None:
        self._places = places
        self._executor = ThreadPoolExecutor(workers, "fcos-deploy")
        self._semaphores: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()
        self._lock = threading.Lock()
        self._taken = 0

    async def call(self, function: Callable[[], T]) -> T:
        """``function()`` in a thread.

        Raises:
            BackendError: the gate was closed.
        """
        loop = asyncio.get_running_loop()
        semaphore = self._semaphore(loop)
        await semaphore.acquire()

        self._count(1)

        def free(_: object) -> None:
            self._count(-1)
            with contextlib.suppress(RuntimeError):  # The loop may have been closed meanwhile.
                loop.call_soon_threadsafe(semaphore.release)

        try:
            future = self._executor.submit(function)
        except RuntimeError as error:
            self._count(-1)
            semaphore.release()
            raise BackendError("The detector is closed.") from error
        future.add_done_callback(free)
        return await asyncio.wrap_future(future)

    @property
    def taken(self) -> int:
        """Calls that run or wait for a thread."""
        return self._taken

    def close(self) -> None:
        """Wait for the calls that run, drop those that wait; may be called twice."""
        self._executor.shutdown(cancel_futures=True)

    def _count(self, change: int) -> None:
        with self._lock:
            self._taken += change

    def _semaphore(self, loop: asyncio.AbstractEventLoop) -> asyncio.Semaphore:
        with self._lock:
            if loop not in self._semaphores:
                self._semaphores[loop] = asyncio.Semaphore(self._places)
            return self._semaphores[loop]


_IMAGES, _IMAGE_SIZES = "images", "image_sizes"
_LARGEST_BATCH = 8  # of a dynamic axis: beyond it memory grows and throughput hardly does


@dataclass(frozen=True, slots=True)
class Prepared:
    """The tensors of a request and one letterbox for each image; a fixed batch may have more rows than images."""

    feeds: Tensors
    letterboxes: tuple[Letterbox, ...]


class FeedMaker:
    """Preprocesses images as the contract says, into tensors of the shapes that the session takes."""

    def __init__(self, session: Session, contract: ModelContract) -> None:
        self._spec = contract.preprocess
        self._inputs = {spec.name: spec for spec in session.inputs}
        _check_interface(session, contract)
        self._fixed_batch = self._inputs[_IMAGES].shape[0]
        self._largest = self._fixed_batch or session.max_batch or _LARGEST_BATCH
        self._buffers: PerThread[dict[tuple[int, ...], NDArray[Any]]] = PerThread(dict)

    def make(self, images: Sequence[NDArray[np.uint8]]) -> Prepared:
        """New tensors for images (h, w, 3) uint8 RGB of one input size.

        Raises:
            ConfigError: no image, more than the batch takes, or of different input sizes.
            ImageError: not (h, w, 3) uint8.
        """
        return self._fill(np.empty(self._shape(images), self._spec.input_dtype.value), images)

    def make_reused(self, images: Sequence[NDArray[np.uint8]]) -> Prepared:
        """As ``make``, in tensors that the calling thread's next call overwrites."""
        shape = self._shape(images)
        buffers = self._buffers.get()
        if shape not in buffers:
            buffers.clear()  # One at a time: images of changing sizes must not pile up.
            buffers[shape] = np.empty(shape, self._spec.input_dtype.value)
        return self._fill(buffers[shape], images)

    def chunks(self, images: Sequence[NDArray[np.uint8]]) -> list[list[int]]:
        """Indices of images that can share a request, in order."""
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            by_size.setdefault(self._size(image), []).append(index)
        step = self._largest
        return [same[i : i + step] for same in by_size.values() for i in range(0, len(same), step)]

    def _shape(self, images: Sequence[NDArray[np.uint8]]) -> tuple[int, ...]:
        sizes = {self._size(image) for image in images}
        if not sizes:
            raise ConfigError("There is no image.")
        if len(sizes) > 1:
            raise ConfigError(f"Images of one request need one input size, got {sorted(sizes)}.")
        if self._fixed_batch and len(images) > self._fixed_batch:
            raise ConfigError(f"The model takes {self._fixed_batch} images at a time, got {len(images)}.")
        return (self._fixed_batch or len(images), 3, *sizes.pop())

    def _size(self, image: NDArray[np.uint8]) -> tuple[int, int]:
        return self._spec.canvas or padded_size(image.shape[0], image.shape[1], self._spec)

    def _fill(self, batch: NDArray[Any], images: Sequence[NDArray[np.uint8]]) -> Prepared:
        letterboxes = tuple(
            preprocess(image, self._spec, out=row)[1] for image, row in zip(images, batch, strict=False)
        )
        batch[len(images) :] = 0
        feeds: Tensors = {_IMAGES: batch}
        if _IMAGE_SIZES in self._inputs:
            rows = [image_sizes_row(letterbox) for letterbox in letterboxes]
            feeds[_IMAGE_SIZES] = np.stack(rows + rows[-1:] * (len(batch) - len(rows)))
        return Prepared(feeds, letterboxes)


def _check_interface(session: Session, contract: ModelContract) -> None:
    """Refuse an artifact whose tensors are not those of its contract.

    Raises:
        BackendLoadError: naming the first that differs.
    """
    inputs = {spec.name: spec for spec in session.inputs}
    outputs = {spec.name for spec in session.outputs}
    wanted = TensorSpec(
        _IMAGES, str(contract.preprocess.input_dtype), (None, 3, *(contract.preprocess.canvas or (None, None)))
    )
    if _IMAGES not in inputs or not inputs.keys() <= {_IMAGES, _IMAGE_SIZES}:
        raise BackendLoadError(f"The model must have the input '{_IMAGES}', it has {sorted(inputs)}.")
    if not _compatible(inputs[_IMAGES], wanted):
        raise BackendLoadError(f"The contract says that '{_IMAGES}' is {wanted}, the model has {inputs[_IMAGES]}.")
    missing = sorted(set(contract.outputs) - outputs)
    if missing:
        raise BackendLoadError(f"The contract's tail '{contract.tail}' has outputs {missing}, the model does not.")


def _compatible(has: TensorSpec, wanted: TensorSpec) -> bool:
    """Whether tensors of ``wanted`` can be fed to ``has``: a dynamic axis takes any size, a fixed one only its own."""
    sizes = zip(has.shape[1:], wanted.shape[1:], strict=False)
    return has.dtype == wanted.dtype and len(has.shape) == len(wanted.shape) and all(h in (None, w) for h, w in sizes)


Image = Union[NDArray[np.uint8], Path, str]  # noqa: UP007  (evaluated at run time; NDArray has no | on Python 3.10)

_WINDOW = 16  # images that ``detect_batch`` holds in memory at a time


class Detector:
    """A model on a runtime, with everything around it: images in, detections in image pixels out.

    An image is (h, w, 3) uint8 RGB, or the path of a file. All methods may be called from several threads at a time;
    a runtime that is not made for that is used by one thread after the other.
    """

    def __init__(
        self,
        session: Session,
        contract: ModelContract,
        *,
        score_threshold: float | None = None,
        fallbacks: tuple[Fallback, ...] = (),
    ) -> None:
        """Take over an open session; ``open`` is the usual way.

        ``score_threshold``: only detections with at least this score; None leaves the model's own choice.
        ``fallbacks``: the backends of the bundle that were passed over for this session.

        Raises:
            ConfigError: a score threshold below the one that the model's tail has built in.
            BackendLoadError: the session's tensors are not those of the contract.
        """
        self.session = session
        self.contract = _with_threshold(contract, score_threshold)
        self.fallbacks = fallbacks
        self._least_score = score_threshold
        self._feeds = FeedMaker(session, contract)
        self._turn = contextlib.nullcontext() if session.thread_safe else threading.Lock()
        self._gate: AsyncGate | None = None
        self._gate_lock = threading.Lock()
        self._closing = False

    @classmethod
    def open(
        cls,
        model: Path | str,
        *,
        backend: str = "",
        precision: Precision | None = None,
        options: SessionOptions | None = None,
        score_threshold: float | None = None,
    ) -> Detector:
        """Open a checkpoint, an ONNX file, an OpenVINO IR, an engine or a bundle.

        ``backend``: empty is the one that the kind of file, or the bundle, is meant for.

        Raises:
            ConfigError: an unknown backend, one that does not open such files, or a precision that the model is not in.
            BackendLoadError, CheckpointError, BundleError: a model that is missing, damaged or of a wrong kind.
            SignatureError: ``options.public_keys`` are given, and their owners did not sign the model.
            DeviceError: the device is not there; never another one in its place.
            MissingDependencyError: the runtime is not installed.
        """
        options = options or SessionOptions()
        source = find_model(Path(model), backend=backend, precision=precision, options=options)
        _check_checkpoint_options(source, options)
        session = source.backend.open(source.path, options)
        with _closing_on_error(session):
            contract = options.contract or session.contract or read_contract(source.path)
            source.backend.check_placement(contract)
            if precision is not None and contract.precision is not precision:
                raise ConfigError(f"'{source.path.name}' is {contract.precision}, {precision} was asked for.")
            return cls(session, contract, score_threshold=score_threshold, fallbacks=source.fallbacks)

    @classmethod
    def of_network(cls, network: Fcos, contract: ModelContract, *, options: SessionOptions | None = None) -> Detector:
        """A detector over a PyTorch network in memory, such as a checkpoint loaded with options of its own."""
        from runtimes.pytorch import open_model

        return cls(open_model(network, contract=contract, options=options), contract)

    @property
    def names(self) -> tuple[str, ...]:
        """Class names by label."""
        return self.contract.class_names

    def detect(self, image: Image) -> Detections:
        """Detections of one image, best first.

        Raises:
            ImageError: the file or array is not a usable image.
            BackendError: the detector is closed, or the runtime failed.
        """
        prepared = self._feeds.make_reused([_pixels(image)])
        with self._turn:
            return self.finish(self.session.borrow(prepared.feeds), prepared.letterboxes)[0]

    def detect_batch(self, images: Sequence[Image]) -> list[Detections]:
        """Detections of each image, in their order, with as many in a request and at a time as the model takes.

        Raises:
            ImageError, BackendError: as ``detect``.
        """
        windows = (images[start : start + _WINDOW] for start in range(0, len(images), _WINDOW))
        return [found for window in windows for found in self._detect_window([_pixels(image) for image in window])]

    async def async_detect(self, image: Image) -> Detections:
        """As ``detect``, for asyncio: waits while as many calls are under way as the machine can serve.

        Cancelling a call that has not begun frees its place; one that runs ends first.
        """
        return await self._opened_gate().call(lambda: self.detect(image))

    def prepare(self, images: Sequence[Image]) -> tuple[Tensors, tuple[Letterbox, ...]]:
        """Preprocess for one request, in new arrays.

        Raises:
            ConfigError: more images than the batch takes, or of different input sizes.
            ImageError: not a usable image.
        """
        prepared = self._feeds.make([_pixels(image) for image in images])
        return prepared.feeds, prepared.letterboxes

    def infer(self, feeds: Tensors) -> Tensors:
        """Run the network; the outputs are the caller's own."""
        with self._turn:
            return self.session.run(feeds)

    def finish(self, outputs: Tensors, letterboxes: Sequence[Letterbox]) -> list[Detections]:
        """Decode, suppress, and go back to image pixels: one result for each letterbox."""
        found = [
            postprocess(
                outputs, self.contract, index=index, input_size=self._input_size(letterbox), letterbox=letterbox
            )
            for index, letterbox in enumerate(letterboxes)
        ]
        return found if self._least_score is None else [one.above(self._least_score) for one in found]

    def close(self) -> None:
        """Release the runtime after the asynchronous calls that run; may be called twice."""
        with self._gate_lock:
            self._closing = True
        if self._gate is not None:
            self._gate.close()
        with self._turn:
            self.session.close()

    def __enter__(self) -> Detector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _detect_window(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        chunks = self._feeds.chunks(images)
        requests = [self._feeds.make([images[index] for index in chunk]) for chunk in chunks]
        with self._turn:
            outputs = self.session.run_many([request.feeds for request in requests])
            found = [self._finish_request(*pair) for pair in zip(outputs, requests, strict=True)]
        by_index = dict(zip((i for chunk in chunks for i in chunk), (d for one in found for d in one), strict=True))
        return [by_index[index] for index in range(len(images))]

    def _finish_request(self, outputs: Tensors, request: Prepared) -> list[Detections]:
        return self.finish(outputs, request.letterboxes)

    def _input_size(self, letterbox: Letterbox) -> tuple[int, int]:
        spec = self.contract.preprocess
        return spec.canvas or padded_size(letterbox.image_height, letterbox.image_width, spec)

    def _opened_gate(self) -> AsyncGate:
        with self._gate_lock:
            if self._closing:
                raise BackendError("The detector is closed.")
            if self._gate is None:
                # One more than cores, so that one prepares while the others compute; twice as many may wait.
                workers = usable_cpus() + 1
                self._gate = AsyncGate(workers=workers, places=2 * workers)
            return self._gate


def _pixels(image: Image) -> NDArray[np.uint8]:
    return read_image(Path(image)) if isinstance(image, (str, Path)) else image


def _check_checkpoint_options(source: ModelSource, options: SessionOptions) -> None:
    """Refuse to read as one pleases what carries a contract of its own.

    Raises:
        ConfigError: options for a checkpoint, and the model is none.
    """
    if options.checkpoint in (None, CheckpointOptions()) or ArtifactKind.CHECKPOINT in source.backend.accepts:
        return
    raise ConfigError(
        f"'{source.path.name}' carries its own contract; options such as --input-size say how a checkpoint is read.",
        hint="give them to 'fcos-deploy export'",
    )


def _with_threshold(contract: ModelContract, score_threshold: float | None) -> ModelContract:
    """Lower the gate if a lower score is asked for; a higher one is applied to the final scores.

    Raises:
        ConfigError: the gate is inside the graph.
    """
    built_in = contract.decode.score_threshold
    if score_threshold is None or score_threshold >= built_in:
        return contract
    if contract.tail is not Tail.RAW:
        raise ConfigError(
            f"The score threshold {score_threshold} is below the {built_in} built into the '{contract.tail}' tail.",
            hint="export with a lower --score-threshold, or with --tail raw",
        )
    return replace(contract, decode=replace(contract.decode, score_threshold=score_threshold))


@contextlib.contextmanager
def _closing_on_error(session: Session) -> Iterator[None]:
    try:
        yield
    except BaseException:
        session.close()
        raise


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorSpec:
    """A model on a backend at a precision: what ``Detector.open`` takes. Empty and None leave the choice to it."""

    model: Path
    backend: str = ""
    precision: Precision | None = None
    options: SessionOptions = field(default_factory=SessionOptions)

    def open(self, hint: PerformanceHint | None = None) -> Detector:
        """Load it, for ``hint`` in place of the options' own; the caller closes it."""
        options = self.options if hint is None else replace(self.options, hint=hint)
        return Detector.open(self.model, backend=self.backend, precision=self.precision, options=options)
