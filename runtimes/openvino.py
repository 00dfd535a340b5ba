"""OpenVINO, on Intel's and other processors.

The inference precision is always explicit: left alone, OpenVINO computes fp32 graphs in bf16 where the processor can.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.backend import Backend, BackendProbe, PerThread, Session, SessionOptions, Tensors
from fcos_deploy.core.contract import TensorSpec
from fcos_deploy.core.enums import ArtifactKind, ComputeType, PerformanceHint
from fcos_deploy.core.errors import BackendError, BackendLoadError, DeviceError, missing_device
from fcos_deploy.core.files import sha256_file
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.core.trust import KeptModel

__all__ = ["BACKEND", "executed_primitives", "open_model"]

_LOG = logging.getLogger(__name__)
# Compiled models that stay in memory, by what they were compiled from and for; one entry for each ``keeping_models``.
_IN_MEMORY: list[dict[_Compiled, Any]] = []

ov = lazy_import("openvino", extra="openvino")

_MAX_XML = 256 << 20  # bytes; that of an FCOS takes 0.5 MB, the weights lie in another file
_HINTS = {PerformanceHint.LATENCY: "LATENCY", PerformanceHint.THROUGHPUT: "THROUGHPUT"}
_CAPABILITIES = {ComputeType.F32: "FP32", ComputeType.F16: "FP16", ComputeType.BF16: "BF16"}


def open_model(
    model: bytes | Path | Any,  # Any: an openvino.Model
    *,
    threads: int | None = None,
    keep: bool = False,
) -> Session:
    """Open a graph on the CPU in float32, for a check or a calibration, without a contract.

    model: a serialized ``onnx.ModelProto``, an ONNX or IR file, or an ``openvino.Model``.
    threads: for one inference; None takes OpenVINO's choice. ``keep``: of a file, take the compiled form that was kept
    of it, or keep this one: it is soon opened again.

    Raises:
        MissingDependencyError: openvino is not installed.
        BackendLoadError: OpenVINO cannot read or compile the graph.
    """
    core, settings = ov.Core(), _settings(SessionOptions(threads=threads))
    if keep and isinstance(model, Path):
        compiled, _ = _compile_once(core, model, device="CPU", settings=settings, folder=None)
    else:
        compiled = _compile(core, model, device="CPU", settings=settings)
    return _OpenVinoSession(compiled, description={})


def executed_primitives(session: Session) -> list[dict[str, str]]:
    """What a session of this module really executes: OpenVINO's facts about each primitive of the compiled model.

    For example ``layerType`` (Convolution), ``runtimePrecision`` (i8) and ``originalLayersNames`` (the ONNX nodes that
    the primitive computes, separated by commas).
    """
    if not isinstance(session, _OpenVinoSession):
        raise BackendError("The session is not one of OpenVINO's.")
    nodes = session.compiled.get_runtime_model().get_ops()
    return [{key: str(value.astype(str)) for key, value in node.get_rt_info().items()} for node in nodes]


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A compiled model in memory: hashes of its files, the device, and the settings that it was compiled with.

    ``folder``: where it is kept on the disk, if that was asked for.
    """

    model: str
    device: str
    settings: frozenset[tuple[str, str]]
    folder: Path | None

    def serves(self, asked: _Compiled) -> bool:
        """Whether ``asked`` is this one's exported form, imported with its own settings.

        OpenVINO's CPU plug-in transforms a model, which takes most of the time of compiling it, before it chooses
        kernels for a precision, streams and threads; what it exports is the model in between. Float16 changes the
        transformations.
        """
        same = (self.model, self.device, self.folder) == (asked.model, asked.device, asked.folder)
        halves = ("INFERENCE_PRECISION_HINT", str(ComputeType.F16))
        return same and self.device.startswith("CPU ") and halves not in self.settings | asked.settings


class _Request:
    """An infer request, and the arrays that its input tensors share memory with."""

    def __init__(self, compiled: Any, outputs: Sequence[str]) -> None:
        self._request = compiled.create_infer_request()
        self._outputs = outputs
        self._arrays: dict[str, NDArray[Any]] = {}

    def start(self, feeds: Tensors) -> None:
        """Begin; ``finish`` must follow."""
        for name, array in feeds.items():
            if self._arrays.get(name) is not array:
                # The tensor lies in the array's own memory, or in a copy's if that is not contiguous or read-only.
                shared = self._arrays[name] = np.require(array, requirements=["C", "W"])
                self._request.set_tensor(name, ov.Tensor(shared, shared_memory=True))
        # Not ``infer``, which copies the outputs.
        self._request.start_async()

    def finish(self) -> Tensors:
        """Wait for what was started: the outputs as views that the next ``start`` overwrites."""
        self._request.wait()
        return {name: self._request.get_output_tensor(i).data for i, name in enumerate(self._outputs)}

    def place_outputs(self, arrays: Sequence[NDArray[Any]]) -> None:
        """Have the outputs of all further inferences in these arrays, which are as large as they."""
        for index, array in enumerate(arrays):
            self._request.set_output_tensor(index, ov.Tensor(array, shared_memory=True))

    def run_again(self) -> None:
        """Another inference of the arrays that ``start`` was given, into those of ``place_outputs``."""
        self._request.start_async()
        self._request.wait()


class _OpenVinoSession(Session):
    def __init__(self, compiled: Any, *, description: Mapping[str, str]) -> None:
        super().__init__(
            inputs=tuple(_spec(port) for port in compiled.inputs),
            outputs=tuple(_spec(port) for port in compiled.outputs),
            description=description,
        )
        self._workers = int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))  # those of _ring
        self._names = [spec.name for spec in self.outputs]
        self.compiled = compiled
        self._requests = PerThread(partial(_Request, compiled, self._names))
        self._ring: list[_Request] = []
        self._ring_lock = threading.Lock()

    def _run(self, feeds: Tensors) -> Tensors:
        return _copied(self._borrow(feeds))

    def _borrow(self, feeds: Tensors) -> Tensors:
        requests = self._requests
        if requests is None:
            raise BackendError("The session is closed.")
        with _errors_in_words():
            request = requests.get()
            request.start(feeds)
            return request.finish()

    def _bound(self, feeds: Tensors) -> Callable[[], Tensors]:
        with _errors_in_words():
            request = _Request(self.compiled, self._names)
        outputs: Tensors = {}

        def infer() -> Tensors:
            if outputs:
                try:
                    request.run_again()
                except RuntimeError as error:
                    raise BackendError(f"OpenVINO failed: {_reason(error)}") from error
            else:  # Their shapes are known once they are there.
                with _errors_in_words():
                    request.start(feeds)
                    arrays = _copied(request.finish())
                    request.place_outputs(list(arrays.values()))
                    outputs.update(arrays)
            return outputs

        return infer

    def _run_many(self, feeds: Sequence[Tensors]) -> list[Tensors]:
        """As many requests at a time as OpenVINO finds best.

        Not its AsyncInferQueue: that calls back into Python, and taking it down can wait, with the interpreter's lock
        held, for a thread that wants this lock (2026.4).
        """
        with self._ring_lock, _errors_in_words():
            if self.compiled is None:
                raise BackendError("The session is closed.")
            if not self._ring:
                self._ring = [_Request(self.compiled, self._names) for _ in range(self._workers)]
            return _through(self._ring, feeds)

    def _close(self) -> None:
        with self._ring_lock:
            # A model that stays in memory would keep its intermediate tensors, 107 MB at 800x1344.
            if hasattr(self.compiled, "release_memory"):  # not in OpenVINO 2025.0
                with contextlib.suppress(RuntimeError):  # refused while another thread, or session, runs the model
                    self.compiled.release_memory()
            self._ring = []
            self._requests = self.compiled = None  # type: ignore[assignment]  # every use looks first


class _OpenVino(Backend):
    """Runs IR and ONNX files. Devices are OpenVINO's own: ``CPU``, ``GPU``, ``GPU.0``, ``NPU``, upper case or lower."""

    name = "openvino"
    accepts = frozenset({ArtifactKind.ONNX, ArtifactKind.OPENVINO_IR})
    extra = "openvino"
    placements = ("openvino", "portable")
    preferred_for = frozenset({ArtifactKind.OPENVINO_IR})

    def open(self, path: Path, options: SessionOptions) -> Session:
        contract = self.contract_of(path, options)
        if path.suffix == ".xml" and path.stat().st_size > _MAX_XML:
            raise BackendLoadError(f"'{path}' is larger than the {_MAX_XML >> 20} MiB that a description may take.")
        core = ov.Core()
        device = _device(core, options.device or "CPU")
        _check_compute(core, device, options.compute_type)
        settings = _settings(options)
        # ONNX files come and go while models are searched and compared; an IR was built to be run often.
        keep = options.cache_dir is not None or path.suffix == ".xml"
        if keep:
            compiled, from_cache = _compile_once(core, path, device=device, settings=settings, folder=options.cache_dir)
        else:
            compiled, from_cache = _compile(core, path, device=device, settings=settings), False
        description = {
            "backend": self.name,
            "version": ov.__version__,
            "device": device,
            "compute": str(options.compute_type),
            "hint": str(options.goal),
            "threads": str(compiled.get_property("INFERENCE_NUM_THREADS")) if device == "CPU" else "",
            "streams": str(compiled.get_property("NUM_STREAMS")),
            "model_cache": "hit" if from_cache else "miss",
        }
        session = _OpenVinoSession(compiled, description=description)
        session.contract = contract
        return session

    @contextlib.contextmanager
    def keeping_models(self) -> Iterator[None]:
        models: dict[_Compiled, Any] = {}
        _IN_MEMORY.append(models)
        try:
            yield
        finally:
            _IN_MEMORY[:] = [others for others in _IN_MEMORY if others is not models]

    def probe(self) -> BackendProbe:
        return BackendProbe.of_library(self.name, lambda: (ov.__version__, ov.Core().available_devices))


BACKEND = _OpenVino()


def _settings(options: SessionOptions) -> dict[str, str]:
    settings = {"INFERENCE_PRECISION_HINT": str(options.compute_type), "PERFORMANCE_HINT": _HINTS[options.goal]}
    if options.threads is not None:
        settings["INFERENCE_NUM_THREADS"] = str(options.threads)
    if options.streams is not None:
        settings["NUM_STREAMS"] = str(options.streams)
    return settings


def _compile(core: Any, model: bytes | Path | Any, *, device: str, settings: Mapping[str, str]) -> Any:
    what, source = "the graph", model
    if isinstance(model, Path):
        what, source = f"'{model}'", str(model)
        if model.suffix == ".xml" and not model.with_suffix(".bin").is_file():
            raise BackendLoadError(f"{what} has no '{model.stem}.bin' beside it.", hint="copy both files together")
    try:
        if isinstance(model, bytes):
            source = core.read_model(model)
        compiled = core.compile_model(source, device, dict(settings))
    except (RuntimeError, UnicodeDecodeError) as error:  # its message quotes the file's bytes, whatever they are
        raise BackendLoadError(f"OpenVINO cannot open {what} on {device}: {_reason(error)}") from error
    chosen = compiled.get_property("EXECUTION_DEVICES")
    if chosen not in ([device], device):  # Some plug-ins answer with a list.
        raise DeviceError(f"OpenVINO could not use '{device}' and chose {chosen}.")
    return compiled


def _device(core: Any, name: str) -> str:
    """The device as OpenVINO names it.

    Raises:
        DeviceError: it is not there, or is one that chooses another by itself (AUTO, MULTI, HETERO).
    """
    available: list[str] = core.available_devices
    device = name.upper()
    if device in available:
        return device
    if f"{device}.0" in available:
        return f"{device}.0"
    raise missing_device("OpenVINO", name, available)


def _check_compute(core: Any, device: str, compute: ComputeType) -> None:
    """Refuse a type that the device does not compute in: OpenVINO itself takes the hint and computes in another.

    Raises:
        DeviceError: naming the types that it has.
    """
    capabilities = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
    if _CAPABILITIES[compute] not in capabilities:
        types = ", ".join(str(t) for t, capability in _CAPABILITIES.items() if capability in capabilities)
        raise DeviceError(
            f"'{core.get_property(device, 'FULL_DEVICE_NAME')}' does not compute in {compute}.",
            hint=f"it computes in {types}; choose one with --compute",
        )


def _compile_once(
    core: Any, path: Path, *, device: str, settings: Mapping[str, str], folder: Path | None
) -> tuple[Any, bool]:
    """The compiled model, and whether it had been kept; what was not is kept from now on.

    Not OpenVINO's own cache (CACHE_DIR): that goes by path and date, and executes whatever lies there.

    Raises:
        ConfigError: ``folder`` cannot be written, or others own it or can write it.
    """
    weights = path.with_suffix(".bin")
    files = [path, weights] if path.suffix == ".xml" and weights.is_file() else [path]
    facts = {
        "model": " ".join(sha256_file(file) for file in files),
        "version": ov.__version__,
        "device": f"{device} {core.get_property(device, 'FULL_DEVICE_NAME')}",
        **settings,
    }
    key = _Compiled(facts["model"], facts["device"], frozenset(settings.items()), folder)
    for models in _IN_MEMORY:
        if key in models:
            return models[key], True
    compiled, from_cache = _load_or_compile(
        core, path, device=device, settings=settings, kept=KeptModel(BACKEND.name, facts=facts, folder=folder), key=key
    )
    if _IN_MEMORY:
        _IN_MEMORY[-1][key] = compiled
    return compiled, from_cache


def _load_or_compile(
    core: Any, path: Path, *, device: str, settings: Mapping[str, str], kept: KeptModel, key: _Compiled
) -> tuple[Any, bool]:
    content = kept.load()
    if content is not None:
        try:
            return core.import_model(content, device, dict(settings)), True
        except RuntimeError as error:  # of a driver that changed without its version, for example
            _LOG.info("OpenVINO does not take the kept model: %s", _reason(error))
            kept.drop()
    try:
        alike = next((m for models in _IN_MEMORY for known, m in models.items() if known.serves(key)), None)
        content = None if alike is None else _exported(alike)
        compiled = None if content is None else core.import_model(content, device, dict(settings))
    except RuntimeError as error:
        _LOG.info("OpenVINO does not take the model as it was compiled for other settings: %s", _reason(error))
        content = compiled = None
    if compiled is None:
        compiled = _compile(core, path, device=device, settings=settings)
    if kept.enabled:
        try:
            kept.store(content or _exported(compiled))
        except RuntimeError as error:
            _LOG.info("OpenVINO cannot export the compiled model of this device: %s", _reason(error))
    return compiled, False


def _exported(compiled: Any) -> bytes:
    """What ``import_model`` takes."""
    exported = compiled.export_model()
    return exported if isinstance(exported, bytes) else bytes(exported.getvalue())  # bytes, or BytesIO


def _through(ring: Sequence[_Request], feeds: Sequence[Tensors]) -> list[Tensors]:
    """Send ``feeds`` through the requests in turn, so that results come in order."""
    results: list[Tensors] = []
    started = 0
    try:
        for tensors in feeds:
            # The oldest request is finished before it is started again, so every result is copied in its turn.
            if started >= len(ring):
                results.append(_copied(ring[started % len(ring)].finish()))
            ring[started % len(ring)].start(tensors)
            started += 1
    finally:  # Also after a failure: a request that runs on would write into memory that nobody holds any more.
        for index in range(len(results), started):
            results.append(_copied(ring[index % len(ring)].finish()))
    return results


def _copied(views: Tensors) -> Tensors:
    return {name: array.copy() for name, array in views.items()}


@contextlib.contextmanager
def _errors_in_words() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise BackendError(f"OpenVINO failed: {_reason(error)}") from error


def _spec(port: Any) -> TensorSpec:
    # Compiling may add names of operators that were folded into a tensor; its name in the model is the result node's.
    own = (name for name in port.names if port.node.friendly_name.startswith(f"{name}/sink_port"))
    shape = tuple(d.get_length() if d.is_static else None for d in port.partial_shape)
    return TensorSpec(str(next(own, port.any_name)), port.element_type.to_dtype().name, shape)


def _reason(error: RuntimeError | UnicodeDecodeError) -> str:
    """OpenVINO's text without the places in its sources; it may hold bytes that are no text."""
    text = error.object.decode(errors="replace") if isinstance(error, UnicodeDecodeError) else str(error)
    lines = [line.strip() for line in text.splitlines()]
    reasons = [line for line in lines if line and not re.match(r"(Exception from|Check .* failed at) ", line)]
    return (" ".join(reasons)[:300] or text[:300]).rstrip(". ") + "."
