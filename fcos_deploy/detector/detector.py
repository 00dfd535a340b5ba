"""The detector that applications use."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Union

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.backend import Session, SessionOptions, Tensors
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.contract_io import read_contract
from fcos_deploy.core.cpu import usable_cpus
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import ArtifactKind, Precision, Tail
from fcos_deploy.core.errors import BackendError, ConfigError
from fcos_deploy.core.image_io import read_image
from fcos_deploy.core.postprocess import postprocess
from fcos_deploy.core.preprocess import Letterbox, padded_size
from fcos_deploy.detector.feeds import FeedMaker, Prepared
from fcos_deploy.detector.model_source import ModelSource, find_model

if TYPE_CHECKING:
    from fcos_deploy.bundle.preflight import StepDown
    from fcos_deploy.detector.async_gate import AsyncGate
    from fcos_deploy.model.fcos import Fcos

__all__ = ["Detector", "Image"]

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
        stepped_down: tuple[StepDown, ...] = (),
    ) -> None:
        """Take over an open session; ``open`` is the usual way.

        ``score_threshold``: only detections with at least this score; None leaves the model's own choice.
        ``stepped_down``: the backends of the bundle that were passed over for this session.

        Raises:
            ConfigError: a score threshold below the one that the model's tail has built in.
            BackendLoadError: the session's tensors are not those of the contract.
        """
        self.session = session
        self.contract = _with_threshold(contract, score_threshold)
        self.stepped_down = stepped_down
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
            return cls(session, contract, score_threshold=score_threshold, stepped_down=source.stepped_down)

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
                from fcos_deploy.detector.async_gate import AsyncGate  # asyncio takes a fifth of the time to start

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
