"""The detector: from what the user calls a model, over a session, to detections of images, one by one or streamed."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, Union
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.artifact import files_of, is_checkpoint, kinds_of, read_contract
from fcos_deploy.core.backend import Backend, PerThread, Session, SessionOptions, Tensors, backends_for, get_backend
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.contract import ModelContract, TensorSpec
from fcos_deploy.core.detections import Detections, Postprocessor, image_sizes_row, postprocess
from fcos_deploy.core.enums import ArtifactKind, PerformanceHint, Precision, Tail
from fcos_deploy.core.errors import (
    BackendError,
    BackendLoadError,
    BundleReplacedError,
    ConfigError,
    DeviceError,
    FcosDeployError,
    MissingDependencyError,
    SignatureError,
)
from fcos_deploy.core.image import image_pixels, windows
from fcos_deploy.core.machine import usable_cpus
from fcos_deploy.core.preprocess import ImageWriter, Letterbox, padded_size

if TYPE_CHECKING:
    import asyncio

    import PIL.Image

    from fcos_deploy.bundle.selection import Fallback
    from fcos_deploy.bundle.store import Bundle
    from fcos_deploy.detector.sources import DetectionStream, StreamOptions
    from fcos_deploy.model.fcos import Fcos

__all__ = ["AsyncGate", "Detector", "DetectorSpec", "Image"]

_LOG = logging.getLogger(__name__)

T = TypeVar("T")


class AsyncGate:
    """Threads for blocking calls, and a place for at most ``places`` calls that run or wait for a thread.

    A caller that finds all places taken waits in its own coroutine, so that a producer that awaits slows down and
    nothing piles up. A cancelled call that has not begun never begins; one that runs ends, and keeps its place until
    then. Usable from several event loops; each has ``places`` of its own.
    """

    def __init__(self, *, workers: int, places: int) -> None:
        self._places = places
        self._executor = ThreadPoolExecutor(workers, "fcos-deploy")
        self._semaphores: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()
        self._lock = threading.Lock()

    async def call(self, function: Callable[[], T]) -> T:
        """``function()`` in a thread.

        Raises:
            BackendError: the gate was closed.
        """
        import asyncio  # here, because it slows down a program's start

        loop = asyncio.get_running_loop()
        with self._lock:
            semaphore = self._semaphores.setdefault(loop, asyncio.Semaphore(self._places))
        await semaphore.acquire()

        def free(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # The loop may have been closed meanwhile.
                loop.call_soon_threadsafe(semaphore.release)

        try:
            future = self._executor.submit(function)
        except RuntimeError as error:
            semaphore.release()
            raise BackendError("The detector is closed.") from error
        future.add_done_callback(free)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Wait for the calls that run, drop those that wait; may be called twice."""
        self._executor.shutdown(cancel_futures=True)


_REPLACED_TRIES = 5
_KEPT_REQUESTS = 2  # of a thread, with their arrays: of one image, and of a batch
_LARGEST_BATCH = 8  # of a dynamic axis: beyond it memory grows and throughput hardly does

Image = Union[NDArray[np.uint8], Path, str, bytes, "PIL.Image.Image"]


class Detector:
    """A model on a runtime, with everything around it: images in, detections in image pixels out.

    An image is (h, w, 3) uint8 RGB, the path or the bytes of a file, or an image of Pillow. All methods may be called
    from several threads at a time; a runtime that is not made for that is used by one thread after the other.
    """

    def __init__(
        self,
        session: Session,
        contract: ModelContract,
        *,
        score_threshold: float | None = None,
        fallbacks: tuple[Fallback, ...] = (),
        batch: int | None = None,
        class_scores: Mapping[str, float] | None = None,
    ) -> None:
        """Take over an open session; most callers use ``open``.

        ``score_threshold``: only detections with at least this score; None keeps the model's own threshold.
        ``fallbacks``: the backends of the bundle that were passed over for this session. ``batch``: the most images of
        a request where the session leaves that open. ``class_scores``: by class name, the score that a detection must
        exceed; those of other classes are left out.

        Raises:
            ConfigError: a score threshold below the one that the model's tail has built in.
            BackendLoadError: the session's tensors are not those of the contract.
        """
        self.session = session
        self.contract = _with_threshold(contract, score_threshold)
        self.fallbacks = fallbacks
        self.file_bytes: int | None = None  # of the model's files, of a bundle those that ran; None: not from a file
        self._min_score = score_threshold
        self._class_limits = None if class_scores is None else _class_limits(class_scores, contract.class_names)
        self._feeds = _Feeds(session, contract, batch=batch)
        self._requests: PerThread[dict[tuple[int, ...], _Request]] = PerThread(dict)
        self._turn = contextlib.nullcontext() if session.thread_safe else threading.Lock()
        # One more than cores, so that one prepares while the others compute; twice as many may wait.
        self._gate = AsyncGate(workers=usable_cpus() + 1, places=2 * usable_cpus() + 2)

    @classmethod
    def open(
        cls,
        model: Path | str,
        *,
        backend: str = "",
        precision: Precision | None = None,
        options: SessionOptions | None = None,
        score_threshold: float | None = None,
        operating_point: bool = False,
    ) -> Detector:
        """Open a checkpoint, an ONNX file, an OpenVINO IR, an engine or a bundle.

        ``backend``: empty takes the default for the kind of file, or of the bundle. ``operating_point``: each class has
        the score threshold that the bundle carries for what runs; a class without one has no detections.

        Raises:
            ConfigError: an unknown backend, one that does not open such files, a precision that the model is not in, or
                an operating point that it does not carry.
            BackendLoadError, CheckpointError, BundleError: a model that is missing, damaged or of a wrong kind.
            SignatureError: ``options.public_keys`` are given, and their owners did not sign the model.
            DeviceError: the device is not there; never another one in its place.
            MissingDependencyError: the runtime is not installed.
        """
        options = options or SessionOptions()
        precision = None if precision is None else Precision.of(precision, option="precision")
        for attempt in range(_REPLACED_TRIES):
            try:
                source = _find_model(Path(model), backend=backend, precision=precision, options=options)
                return cls._of_source(
                    source, precision=precision, score_threshold=score_threshold, operating_point=operating_point
                )
            except BundleReplacedError:  # A redeploy while it was read: what was read is of no use, the new one is.
                if attempt == _REPLACED_TRIES - 1:
                    raise
        raise AssertionError("unreachable")

    @classmethod
    def _of_source(
        cls,
        source: _ModelSource,
        *,
        precision: Precision | None,
        score_threshold: float | None,
        operating_point: bool,
    ) -> Detector:
        """Open what was found; of a bundle only if all that was read came from the one that was checked."""
        options = source.options
        has_options = options.checkpoint not in (None, CheckpointOptions())
        if has_options and ArtifactKind.CHECKPOINT not in source.backend.accepts:
            raise ConfigError(
                f"'{source.path.name}' carries its own contract; options such as --input-size say how a checkpoint is "
                "read.",
                hint="give them to 'fcos-deploy export'",
            )
        try:
            session = source.backend.open(source.path, options)
        except FcosDeployError:
            if source.bundle is not None:
                source.bundle.require_not_replaced()
            raise
        try:
            contract = options.contract or session.contract or read_contract(source.path)
            source.backend.check_placement(contract)
            if precision is not None and contract.precision is not precision:
                raise ConfigError(f"'{source.path.name}' is {contract.precision}, {precision} was asked for.")
            if contract.placement:
                session.description["placement"] = contract.placement
            if source.bundle is not None:
                source.bundle.require_not_replaced()
                session.description["artifact"] = source.artifact
            detector = cls(
                session,
                contract,
                score_threshold=score_threshold,
                fallbacks=source.fallbacks,
                batch=options.batch,
                class_scores=_carried(source, session, contract) if operating_point else None,
            )
            detector.file_bytes = sum(path.stat().st_size for path in files_of(source.path))
            return detector
        except BaseException:
            session.close()
            raise
        finally:
            if source.bundle is not None:
                source.bundle.release()

    @classmethod
    def of_network(cls, network: Fcos, contract: ModelContract, *, options: SessionOptions | None = None) -> Detector:
        """A detector over a PyTorch network in memory, such as a checkpoint loaded with options of its own."""
        from runtimes.pytorch import open_model

        return cls(open_model(network, contract=contract, options=options), contract)

    @property
    def names(self) -> tuple[str, ...]:
        """Class names by label."""
        return self.contract.class_names

    @property
    def batch(self) -> int:
        """The most images of one request."""
        return self._feeds.largest

    def read(self, image: Image) -> NDArray[np.uint8]:
        """The pixels, (h, w, 3) uint8 RGB, turned as the contract says; an array as it is.

        Raises:
            ImageError: the file is not a usable image, or the object is none of these.
        """
        return image_pixels(image, orientation=self.contract.preprocess.orientation)

    def detect(self, image: Image) -> Detections:
        """Detections of one image, best first.

        Raises:
            ImageError: the file or array is not a usable image.
            BackendError: the detector is closed, or the runtime failed.
        """
        return self.detect_timed(image)[0]

    def detect_timed(self, image: Image) -> tuple[Detections, tuple[float, float, float]]:
        """As ``detect``, and the seconds that preprocessing, the network and decoding took."""
        self.session.check_process()  # before the lock, which another thread may have held at the fork
        started = time.perf_counter()
        pixels = (self.read(image),)
        request = self._request(pixels)
        request.write(pixels)
        (detections,), prepared, ran = self._run(request)
        return detections, (prepared - started, ran - prepared, time.perf_counter() - ran)

    def detect_batch(self, images: Sequence[Image]) -> list[Detections]:
        """Detections of each image, in their order, with as many in a request and at a time as the model takes."""
        self.session.check_process()
        detections: list[Detections] = []
        for group in windows(enumerate(map(self.read, images))):
            window = [pixels for _, pixels in group]
            chunks = self._feeds.chunks(window)
            run = self._run_in_turn if self.session.at_a_time == 1 else self._run_many
            results = itertools.chain(*run([[window[index] for index in chunk] for chunk in chunks]))
            by_index = dict(zip(itertools.chain(*chunks), results, strict=True))
            detections += [by_index[index] for index in range(len(window))]
        return detections

    def _request(self, images: Sequence[NDArray[np.uint8]]) -> _Request:
        """The calling thread's arrays for so many images of one input size."""
        requests, key = self._requests.get(), (len(images), *self._feeds.size(images[0].shape))
        request = requests.get(key)
        if request is None:
            if len(requests) >= _KEPT_REQUESTS:  # Images of changing sizes must not pile up.
                requests.clear()
            request = requests[key] = _Request(self._feeds, self.session, self.contract, count=key[0], size=key[1:])
        return request

    def _run(self, request: _Request) -> tuple[list[Detections], float, float]:
        """As ``_Request.run``, in this session's turn, without detections of low scores."""
        with self._turn:
            detections, prepared, ran = request.run()
        return self._reported(detections), prepared, ran

    def _run_in_turn(self, chunks: Sequence[Sequence[NDArray[np.uint8]]]) -> list[list[Detections]]:
        results = []
        for chunk in chunks:
            request = self._request(chunk)
            request.write(chunk)
            results.append(self._run(request)[0])
        return results

    def _run_many(self, chunks: Sequence[Sequence[NDArray[np.uint8]]]) -> list[list[Detections]]:
        requests = [self._feeds.make(chunk) for chunk in chunks]
        with self._turn:
            outputs = self.session.run_many([feeds for feeds, _ in requests])
            return [
                self.finish(output, letterboxes) for output, (_, letterboxes) in zip(outputs, requests, strict=True)
            ]

    async def async_detect(self, image: Image) -> Detections:
        """As ``detect``, for asyncio: waits while as many calls are under way as the machine can serve.

        Cancelling a call that has not begun frees its place; one that runs ends first.
        """
        self.session.check_process()
        return await self._gate.call(lambda: self.detect(image))

    def stream(self, source: str | Path, *, options: StreamOptions | None = None) -> DetectionStream:
        """Detections of a camera, a network stream or a folder that grows, the newest frame first; use it in ``with``.

        ``source``: a URL (``rtsp://``, ``http://`` with MJPEG, ...), ``/dev/video0`` or a camera's number, a GStreamer
        pipeline, a folder.

        Raises:
            ConfigError: it is no stream.
        """
        from fcos_deploy.detector.sources import DetectionStream

        return DetectionStream(self, source, options=options)

    def prepare(self, images: Sequence[Image]) -> tuple[Tensors, tuple[Letterbox, ...]]:
        """Preprocess for one request, in new arrays.

        Raises:
            ConfigError: more images than the batch takes, or of different input sizes.
            ImageError: not a usable image.
        """
        return self._feeds.make([self.read(image) for image in images])

    def infer(self, feeds: Tensors) -> Tensors:
        """Run the network on what ``prepare`` made; the outputs are the caller's own."""
        self.session.check_process()
        with self._turn:
            return self.session.run(feeds)

    def finish(self, outputs: Tensors, letterboxes: Sequence[Letterbox]) -> list[Detections]:
        """Decode, suppress, and go back to image pixels: one result for each letterbox."""
        detections = [
            postprocess(
                outputs,
                self.contract,
                index=index,
                input_size=self._feeds.size((letterbox.image_height, letterbox.image_width)),
                letterbox=letterbox,
            )
            for index, letterbox in enumerate(letterboxes)
        ]
        return self._reported(detections)

    def _reported(self, detections: list[Detections]) -> list[Detections]:
        """Those whose scores are high enough."""
        if self._class_limits is not None:
            limits = self._class_limits
            detections = [d.above(limits[np.clip(d.labels, -1, len(limits) - 1)]) for d in detections]
        return detections if self._min_score is None else [d.above(self._min_score) for d in detections]

    def close(self) -> None:
        """Release the runtime after the asynchronous calls that run; may be called twice.

        In a process that was forked from the one that opened the detector there is nothing to release.
        """
        if self.session.forked:
            return
        self._gate.close()
        with self._turn:
            self.session.close()
            self._requests = PerThread(dict)  # which hold on to the runtime

    def __enter__(self) -> Detector:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorSpec:
    """A model on a backend at a precision: what ``Detector.open`` takes. Empty and None leave the choice to it."""

    model: Path
    backend: str = ""
    precision: Precision | None = None
    options: SessionOptions = field(default_factory=SessionOptions)

    @property
    def opens_file(self) -> bool:
        """Whether another process can open ``model`` as this one does."""
        return True

    def open(self, hint: PerformanceHint | None = None) -> Detector:
        """Load it, for ``hint`` in place of the options' own and their streams and batch; the caller closes it."""
        options = self.options
        if hint is not None and hint is not options.goal:
            options = replace(options, streams=None, batch=None)
        options = replace(options, hint=hint or options.hint)
        return Detector.open(self.model, backend=self.backend, precision=self.precision, options=options)


def _with_threshold(contract: ModelContract, score_threshold: float | None) -> ModelContract:
    """Lower the gate if a lower score is asked for; a higher one is applied to the final scores."""
    built_in = contract.decode.score_threshold
    if score_threshold is None or score_threshold >= built_in:
        return contract
    if contract.tail is not Tail.RAW:
        raise ConfigError(
            f"The score threshold {score_threshold} is below the {built_in} built into the '{contract.tail}' tail.",
            hint="export with a lower --score-threshold, or with --tail raw",
        )
    return replace(contract, decode=replace(contract.decode, score_threshold=score_threshold))


def _class_limits(scores: Mapping[str, float], names: Sequence[str]) -> NDArray[np.float32]:
    """(classes + 1,) the lowest score of each label that is kept; infinite without a threshold, as of other labels."""
    known = {name.casefold(): score for name, score in scores.items()}
    scores_of_labels = [*(known.get(name.casefold(), np.inf) for name in names), np.inf]
    limits: NDArray[np.float32] = np.nextafter(np.array(scores_of_labels, np.float32), np.float32(np.inf))
    return limits


def _carried(source: _ModelSource, session: Session, contract: ModelContract) -> dict[str, float]:
    """The score thresholds that the bundle carries for what runs.

    Raises:
        ConfigError: it carries none, or there is no bundle.
    """
    scores: dict[str, float] = {}
    if source.bundle is not None:
        from fcos_deploy.bundle.manifest import carried_scores

        scores = carried_scores(
            source.bundle.manifest.accuracy,
            backend=source.backend.name,
            precision=str(contract.precision),
            compute=session.description.get("compute", ""),
        )
    if not scores:
        raise ConfigError(
            f"'{source.path.name}' carries no score thresholds for {source.backend.name} {contract.precision}.",
            hint="give a bundle that was deployed with --annotations, or --score-threshold",
        )
    return scores


@dataclass(frozen=True, slots=True)
class _ModelSource:
    """A model file, the backend that is to open it, and those of the bundle that were passed over for it.

    ``artifact`` is its name in ``bundle``, ``options`` how it is opened.
    """

    path: Path
    backend: Backend
    options: SessionOptions
    fallbacks: tuple[Fallback, ...] = ()
    bundle: Bundle | None = None
    artifact: str = ""


def _find_model(model: Path, *, backend: str, precision: Precision | None, options: SessionOptions) -> _ModelSource:
    """A checkpoint, ONNX file, IR or engine as it is; of a bundle the artifact for this backend and precision."""
    if not model.exists():
        raise BackendLoadError(
            f"'{model}' does not exist.", hint="give a checkpoint, an ONNX file, an engine or a bundle"
        )
    checkpoint = is_checkpoint(model)
    if model.is_dir() or (model.suffix == ".tar" and not checkpoint):
        from fcos_deploy.bundle import open_trusted
        from fcos_deploy.bundle.selection import select_runnable, tuned_options

        bundle = open_trusted(model, options.trust)
        selection, fallbacks = select_runnable(
            bundle, backend=backend, precision=precision, allow_fallback=options.allow_fallback
        )
        for fallback in fallbacks:
            _LOG.warning("'%s' falls back from '%s': %s", model, fallback.backend, fallback.reason)
        name, tuned = selection.artifact.path, tuned_options(bundle, selection, options)
        return _ModelSource(bundle.path(name), get_backend(selection.backend), tuned, fallbacks, bundle, name)
    asked = options.public_keys or options.expect_name
    if asked and not (checkpoint and options.unsigned_checkpoints):
        raise SignatureError(
            f"'{model}' is not a bundle, so it has neither a signature nor a name.",
            hint="give the signed bundle that it belongs to",
        )
    kinds = (ArtifactKind.CHECKPOINT,) if checkpoint else kinds_of(model)
    if not backend:
        return _ModelSource(model, _default_backend(model, kinds), options)
    named = get_backend(backend)
    if named.accepts.isdisjoint(kinds):
        able = ", ".join(item.name for kind in kinds for item in backends_for(kind)) or "none"
        raise ConfigError(
            f"Backend '{backend}' does not open '{model.name}' ({' or '.join(kinds)}).",
            hint=f"it opens {', '.join(sorted(named.accepts))}; '{model.name}' is for {able}",
        )
    return _ModelSource(model, named, options)


def _default_backend(model: Path, kinds: tuple[ArtifactKind, ...]) -> Backend:
    """The backend that prefers the kind; if it is not installed, the only one that is.

    Raises:
        ConfigError: several are installed and none prefers the kind.
        MissingDependencyError: none is installed.
        DeviceError: one is installed and cannot run on this machine.
    """
    able = [backend for kind in kinds for backend in backends_for(kind)]
    # Preferred ones first and alone: a probe imports the runtime, which no start of a program should pay for in vain.
    for preferred in (True, False):
        group = [backend for backend in able if backend.preferred_for.isdisjoint(kinds) is not preferred]
        installed = [backend for backend in group if backend.probe().available]
        if len(installed) == 1:
            return installed[0]
        if installed:
            names = ", ".join(backend.name for backend in installed)
            raise ConfigError(f"Several backends open '{model.name}'.", hint=f"name one with --backend: {names}")
    remedies = []
    for backend in able:
        probe = backend.probe()
        remedies.append(probe.remedy or f"pip install 'fcos-deploy[{backend.extra}]'")
        if probe.version:  # installed, but unable to run: that is what the user wants to know
            raise DeviceError(f"'{model.name}' cannot run here. {backend.name}: {probe.problem}", hint=probe.remedy)
    raise MissingDependencyError(
        f"No backend is installed that opens '{model.name}'.",
        hint=" or ".join(dict.fromkeys(remedies)),
    )


class _Feeds:
    """Preprocesses images as the contract says, into tensors of the shapes that the session takes."""

    def __init__(self, session: Session, contract: ModelContract, *, batch: int | None) -> None:
        """Check the session's tensors against the contract."""
        inputs = {spec.name: spec for spec in session.inputs}
        images = contract.input_specs[0]
        if "images" not in inputs or not inputs.keys() <= {"images", "image_sizes"}:
            raise BackendLoadError(f"The model must have the input 'images', it has {sorted(inputs)}.")
        if not _takes(inputs["images"], images):
            raise BackendLoadError(f"The contract says that 'images' is {images}, the model has {inputs['images']}.")
        missing = sorted(set(contract.outputs) - {spec.name for spec in session.outputs})
        if missing:
            raise BackendLoadError(f"The contract's tail '{contract.tail}' has outputs {missing}, the model does not.")
        self._spec, self._canvas = contract.preprocess, contract.preprocess.canvas
        self._takes_sizes = "image_sizes" in inputs
        self._fixed_batch = inputs["images"].shape[0]
        limits = [limit for limit in (batch, session.max_batch) if limit]
        self.largest = self._fixed_batch or min(limits, default=_LARGEST_BATCH)

    def size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(height, width) of the network input for an image of ``shape`` (height, width, ...)."""
        return self._canvas or padded_size(shape[0], shape[1], self._spec)

    def chunks(self, images: Sequence[NDArray[np.uint8]]) -> list[list[int]]:
        """Indices of images that can share a request, in order."""
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            by_size.setdefault(self.size(image.shape), []).append(index)
        step = self.largest
        return [same[i : i + step] for same in by_size.values() for i in range(0, len(same), step)]

    def make(self, images: Sequence[NDArray[np.uint8]]) -> tuple[Tensors, tuple[Letterbox, ...]]:
        """New tensors for images (h, w, 3) uint8 RGB of one input size, and one letterbox for each image.

        Raises:
            ConfigError: no image, more than the batch takes, or of different input sizes.
            ImageError: not (h, w, 3) uint8.
        """
        sizes = {self.size(image.shape) for image in images}
        if not sizes:
            raise ConfigError("There is no image.")
        if len(sizes) > 1:
            raise ConfigError(f"Images of one request need one input size, got {sorted(sizes)}.")
        feeds = self.allocate(len(images), sizes.pop())
        writers = self.writers(feeds, [image.shape for image in images])
        for writer, image in zip(writers, images, strict=True):
            writer.write(image)
        return feeds, tuple(writer.letterbox for writer in writers)

    def allocate(self, count: int, size: tuple[int, ...]) -> Tensors:
        """Tensors of a request, not written, for ``count`` images of the input size (height, width).

        Raises:
            ConfigError: more images than the batch takes.
        """
        if self._fixed_batch and count > self._fixed_batch:
            raise ConfigError(f"The model takes {self._fixed_batch} images at a time, got {count}.")
        shape = (self._fixed_batch or count, self._spec.channels, *size)
        feeds: Tensors = {"images": np.empty(shape, self._spec.input_dtype.value)}
        if self._takes_sizes:
            feeds["image_sizes"] = np.empty((shape[0], 4), np.float32)
        return feeds

    def writers(self, feeds: Tensors, shapes: Sequence[tuple[int, ...]]) -> list[ImageWriter]:
        """What writes images of these shapes into the first rows of the batch; the other rows are 0."""
        batch = feeds["images"]
        writers = [ImageWriter(shape, self._spec, out=row) for shape, row in zip(shapes, batch, strict=False)]
        batch[len(shapes) :] = 0
        if self._takes_sizes:
            feeds["image_sizes"][:] = image_sizes_row(writers[-1].letterbox)
            feeds["image_sizes"][: len(writers)] = [image_sizes_row(writer.letterbox) for writer in writers]
        return writers


class _Request:
    """Arrays of one thread for requests of so many images of one input size, and what is known of these.

    While the images are as large as the last ones, preprocessing is but resizing; while outputs lie where the last ones
    did, decoding is one call.
    """

    def __init__(
        self, feeds: _Feeds, session: Session, contract: ModelContract, *, count: int, size: tuple[int, ...]
    ) -> None:
        self._feeds, self._contract, self._size = feeds, contract, (size[0], size[1])
        self._tensors = feeds.allocate(count, size)
        self._infer = session.bound(self._tensors)
        self._shapes: list[tuple[int, ...]] = []
        self._writers: list[ImageWriter] = []
        self._outputs: Tensors | None = None
        self._postprocessors: list[Postprocessor] = []

    def write(self, images: Sequence[NDArray[np.uint8]]) -> None:
        """Preprocess.

        Raises:
            ImageError: not (h, w, 3) uint8.
        """
        shapes = [image.shape for image in images]
        if shapes != self._shapes:
            self._shapes, self._outputs = [], None
            self._writers = self._feeds.writers(self._tensors, shapes)
            self._shapes = shapes
        for writer, image in zip(self._writers, images, strict=True):
            writer.write(image)

    def run(self) -> tuple[list[Detections], float, float]:
        """Detections of each image, and when the network began and ended (``time.perf_counter``)."""
        prepared = time.perf_counter()
        outputs = self._infer()
        ran = time.perf_counter()
        if outputs is not self._outputs:
            self._postprocessors = [
                Postprocessor(outputs, self._contract, index=index, input_size=self._size, letterbox=writer.letterbox)
                for index, writer in enumerate(self._writers)
            ]
            self._outputs = outputs
        return [postprocess() for postprocess in self._postprocessors], prepared, ran


def _takes(model: TensorSpec, contract: TensorSpec) -> bool:
    """Whether the model's input takes the contract's: a dynamic axis takes any size, a fixed one only its own.

    The batch is not compared: ``_Feeds`` makes batches of the model's size.
    """
    sizes = zip(model.shape[1:], contract.shape[1:], strict=False)
    same_rank = len(model.shape) == len(contract.shape)
    return model.dtype == contract.dtype and same_rank and all(m in (None, c) for m, c in sizes)
