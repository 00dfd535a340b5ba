"""TensorRT sessions without a GPU: what they say when none is there, and when it is lost while an engine runs.

What needs a GPU is listed in docs/hardware.md. No test can pull a GPU out, so that fault is put in: real sessions,
lanes and buffers over a device of host memory that answers with cuda-python's own error codes from a given moment on.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from fcos_deploy.core.artifact import write_sidecar
from fcos_deploy.core.backend import Backend, SessionOptions
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.enums import ComputeType
from fcos_deploy.core.errors import (
    BackendError,
    BackendLoadError,
    ConfigError,
    DeviceError,
    MissingDependencyError,
    TensorMismatchError,
)
from fcos_deploy.core.trust import KeptModel
from runtimes import _cuda as cuda_module
from runtimes import tensorrt
from runtimes._cuda import Cuda, CudaDevice, host_array, load_cuda
from runtimes._tensorrt_library import TensorRT, install_hint, library_log, load_tensorrt
from runtimes.tensorrt import (
    BACKEND,
    EngineTensor,
    Lane,
    TensorrtSession,
    _require_trust,
    _RuntimeCache,
    build_record,
    choose_device,
)

TENSORRT, RTX = BACKEND
BOTH = pytest.mark.parametrize("backend", BACKEND, ids=lambda backend: backend.name)
ORIN = CudaDevice(index=0, name="Orin", capability=(8, 7), integrated=True)


@pytest.fixture(scope="module")
def cuda() -> Cuda:
    """The real CUDA runtime, on a machine without a GPU."""
    pytest.importorskip("cuda.bindings.runtime")
    found = load_cuda(extra="tensorrt")
    try:
        found.devices()
    except DeviceError:
        return found
    pytest.skip("this machine has a GPU")


@pytest.fixture
def engine(tmp_path: Path, bundle_contract: ModelContract) -> Path:
    path = tmp_path / "model.engine"
    path.write_bytes(b"plan")
    write_sidecar(path, bundle_contract, {"version": "10.3.0"})
    return path


def test_without_a_driver_the_first_cuda_call_says_so(cuda: Cuda) -> None:
    with pytest.raises(DeviceError) as caught:
        cuda.devices()
    assert caught.value.message == "No working NVIDIA driver is installed (cudaErrorInsufficientDriver)."
    assert "install the NVIDIA driver" in caught.value.hint
    assert cuda.versions()[0] == 0


@pytest.mark.parametrize("error", sorted(cuda_module._DEVICE_PROBLEMS))
def test_every_known_driver_problem_is_an_error_of_cuda(error: str) -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    assert hasattr(runtime.cudaError_t, error)


def test_every_cuda_call_exists_in_cuda_python() -> None:
    runtime: ModuleType = pytest.importorskip("cuda.bindings.runtime")
    source = Path(cuda_module.__file__).read_text()
    used = {
        word for word in source.replace('"', " ").replace("(", " ").replace(")", " ").split() if word.startswith("cuda")
    }
    calls = {word.rstrip(",.") for word in used if word[4:5].isupper() and "Error" not in word}
    assert len(calls) >= 15
    assert [name for name in sorted(calls) if not hasattr(runtime, name)] == []


def test_rtx_probe_names_version_and_problem(cuda: Cuda) -> None:
    library = pytest.importorskip("tensorrt_rtx")
    probe = RTX.probe()
    assert not probe.available
    assert probe.version == library.__version__
    assert probe.problem.startswith("No working NVIDIA driver is installed")


def test_opening_an_engine_without_a_gpu_is_one_sentence(cuda: Cuda, engine: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(DeviceError) as caught:
        RTX.open(engine, SessionOptions())
    assert "\n" not in caught.value.message
    assert caught.value.message.count(".") == 1


def test_a_driver_that_cannot_be_loaded_is_one_sentence(tmp_path: Path) -> None:
    """A file that is no library in the place of the driver's, as an interrupted installation leaves it."""
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "libcuda.so.1").write_bytes(b"not a library")
    code = "from runtimes.tensorrt import BACKEND; p = BACKEND[1].probe(); print(p.available, p.problem)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"LD_LIBRARY_PATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("False ")
    assert len(done.stdout.splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_of_two_logs_that_overlap_the_one_that_stays_open_hears_on() -> None:
    library = cast(TensorRT, SimpleNamespace(__name__="overlapping", ILogger=object))
    first, second = library_log(library), library_log(library)
    logger, kept = first.__enter__()
    _, ended = second.__enter__()
    second.__exit__(None, None, None)
    logger.log(SimpleNamespace(name="ERROR"), " no memory\n")  # type: ignore[arg-type]  # as the library calls it
    first.__exit__(None, None, None)
    assert kept.last_lines() == ["no memory"]
    assert ended.last_lines() == []


def test_every_library_has_one_logger_whose_errors_are_told_from_its_warnings() -> None:
    library = cast(TensorRT, SimpleNamespace(__name__="severities", ILogger=object))
    messages = (
        ("WARNING", "slow"),
        ("INTERNAL_ERROR", "bug"),
        ("ERROR", "no room"),
        ("ERROR", "no room"),
        ("INFO", "hi"),
    )
    with library_log(library) as (logger, log):
        for severity, text in messages:
            logger.log(SimpleNamespace(name=severity), text)  # type: ignore[arg-type]  # as the library calls it
    with library_log(library) as (again, _):
        assert again is logger
    assert (list(log.errors), list(log.warnings)) == (["bug", "no room"], ["slow"])
    assert log.last_lines() == ["bug", "no room"]


def test_tensorrt_whose_stubs_alone_are_installed_says_so() -> None:
    library = pytest.importorskip("tensorrt")
    if hasattr(library, "Runtime"):
        pytest.skip("TensorRT is installed")
    probe = TENSORRT.probe()
    assert not probe.available
    assert "Only the type stubs" in probe.problem
    assert "fcos-deploy[tensorrt]" in probe.remedy


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        ((), "pip install 'fcos-deploy[tensorrt]'"),
        (("etc/nv_tegra_release",), "sudo apt install python3-libnvinfer"),
        (("etc/nv_tegra_release", "var/lib/dpkg/info/python3-libnvinfer.list"), "this environment does not see it"),
        (("proc/device-tree/model",), "sudo apt install python3-libnvinfer"),
    ],
)
def test_a_jetson_is_never_told_to_install_the_tensorrt_of_pypi(
    tmp_path: Path, files: tuple[str, ...], hint: str
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("NVIDIA Jetson Orin Nano Developer Kit\0")
    said = install_hint("tensorrt", root=tmp_path)
    assert hint in said
    assert ("pip install" in said) == (not files)
    assert ("--system-site-packages" in said) == bool(files)
    assert ("take --backend tensorrt" in install_hint("tensorrt-rtx", root=tmp_path)) == bool(files)
    assert install_hint("tensorrt-rtx", root=tmp_path / "pc") == "pip install 'fcos-deploy[tensorrt-rtx]'"


@BOTH
def test_another_compute_type_is_refused(backend: Backend, engine: Path) -> None:
    with pytest.raises(ConfigError, match="types that it was built with"):
        backend.open(engine, SessionOptions(compute=ComputeType.F16))


@BOTH
def test_missing_engine_is_refused(backend: Backend, tmp_path: Path) -> None:
    with pytest.raises(BackendLoadError, match="does not exist"):
        backend.open(tmp_path / "no.engine", SessionOptions())


@pytest.mark.parametrize("wanted", ["", "cuda", "cuda:0"])
def test_devices_by_name(wanted: str) -> None:
    assert choose_device([ORIN], wanted) is ORIN
    assert str(ORIN) == "cuda:0 Orin (sm_87)"


@pytest.mark.parametrize(
    ("wanted", "error", "message"),
    [
        ("cuda:1", DeviceError, "There is no cuda:1, this machine has 1"),
        ("cpu", ConfigError, "not on 'cpu'"),
        ("cuda:x", ConfigError, "not on 'cuda:x'"),
    ],
)
def test_device_that_is_not_there_is_refused(wanted: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        choose_device([ORIN], wanted)


def test_the_first_installed_library_is_taken() -> None:
    library = pytest.importorskip("tensorrt_rtx")
    assert load_tensorrt("no_full_one", "tensorrt_rtx", extra="tensorrt") is library
    with pytest.raises(MissingDependencyError, match="no_full_one"):
        load_tensorrt("no_full_one", "no_lean_one", extra="tensorrt")


def test_damaged_sidecar_is_refused(engine: Path) -> None:
    assert build_record(engine) == {"version": "10.3.0"}
    engine.with_suffix(".json").write_text("{")
    with pytest.raises(BackendLoadError, match="is damaged"):
        build_record(engine)
    engine.with_suffix(".json").unlink()
    assert build_record(engine) == {}


@pytest.mark.parametrize("shape", [(2, 3), (1,), (0, 4), ()])
def test_host_memory_is_seen_as_an_array(shape: tuple[int, ...]) -> None:
    memory = (ctypes.c_float * 8)(*range(8))
    view = host_array(ctypes.addressof(memory), dtype=np.dtype(np.float32), shape=shape)
    assert view.shape == shape
    assert view.ravel().tolist() == list(range(int(np.prod(shape))))
    view[...] = 7
    assert list(memory)[: view.size] == [7.0] * view.size


SHAPE = (1, 4)
TENSORS = tuple(
    EngineTensor(name=name, dtype=np.dtype(np.float32), shape=SHAPE, largest=SHAPE, is_input=name == "images")
    for name in ("images", "boxes")
)


class _Device:
    """Host memory in the place of a GPU; after ``lose`` every call fails with ``error``, as CUDA's sticky errors do."""

    def __init__(self) -> None:
        self.runtime: Any = pytest.importorskip("cuda.bindings.runtime")  # Any: cuda-python has no type information
        self.error = "cudaSuccess"
        self.room = 1 << 30
        self.memory: dict[int, Any] = {}
        self.released: list[str] = []

    def __getattr__(self, name: str) -> Any:  # Any: constants and functions of the module
        if not name.startswith("cuda") or name.startswith(("cudaMemcpyKind", "cudaStreamN", "cudaHostAllocM")):
            return getattr(self.runtime, name)
        return getattr(self.runtime, name) if name == "cudaError_t" else lambda *words: self._answer(name, *words)

    def _answer(self, name: str, *words: Any) -> tuple[Any, ...]:
        if name in ("cudaFree", "cudaFreeHost", "cudaStreamDestroy"):
            self.released.append(name)
        code = getattr(self.runtime.cudaError_t, self.error)
        if self.error != "cudaSuccess":
            return (code, *([None] if name.endswith(("Malloc", "HostAlloc", "WithFlags")) else []))
        if name == "cudaMalloc":
            self.room -= words[0]
            if self.room < 0:
                return self.runtime.cudaError_t.cudaErrorMemoryAllocation, None
        if name in ("cudaMalloc", "cudaHostAlloc"):
            block = (ctypes.c_uint8 * words[0])()
            self.memory[ctypes.addressof(block)] = block
            return code, ctypes.addressof(block)
        if name == "cudaMemcpyAsync":
            ctypes.memmove(words[0], words[1], words[2])
        return (code, 7) if name == "cudaStreamCreateWithFlags" else (code,)


class _Context:
    """The engine y = 2 x."""

    def __init__(self) -> None:
        self.at: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        return (name, shape) == ("images", SHAPE)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        del name
        return SHAPE

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.at[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        del stream
        source, target = ((ctypes.c_float * 4).from_address(self.at[name]) for name in ("images", "boxes"))
        target[:] = [2 * value for value in source]
        return True


class _Logger:
    ERROR = INTERNAL_ERROR = WARNING = INFO = VERBOSE = 0

    def __init__(self) -> None:
        pass


LIBRARY: Any = SimpleNamespace(__name__="lost", ILogger=type("ILogger", (), {"Severity": _Logger}))


def _session(device: _Device, context: _Context, *, on_close: Callable[[], None] = lambda: None) -> TensorrtSession:
    cuda = Cuda(cast(ModuleType, device))
    made = [context]  # Handed over, so that the lane alone holds it.

    def make_lane() -> Lane:
        context = cast(Any, made.pop())
        return Lane(LIBRARY, context, cuda=cuda, tensors=TENSORS, unified=False, graphs=False)

    return TensorrtSession(
        cuda=cuda, device=0, tensors=TENSORS, make_lane=make_lane, lanes=1, description={}, on_close=on_close
    )


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        ("cudaErrorLaunchFailure", DeviceError, "stopped in the middle"),
        ("cudaErrorIllegalAddress", DeviceError, "stopped in the middle"),
        ("cudaErrorECCUncorrectable", DeviceError, "lost data"),
        ("cudaErrorNoDevice", DeviceError, "sees no GPU"),
        ("cudaErrorUnknown", DeviceError, "driver is broken"),
        ("cudaErrorHardwareStackError", BackendError, "CUDA failed in cudaSetDevice"),
    ],
)
def test_a_gpu_lost_in_the_middle_is_told_and_the_session_still_closes(
    error: str, kind: type[BackendError], words: str
) -> None:
    device, context = _Device(), _Context()
    session, alive = _session(device, context), weakref.ref(context)
    del context
    feeds = {"images": np.arange(4, dtype=np.float32).reshape(SHAPE)}
    assert session.run(feeds)["boxes"].tolist() == [[0.0, 2.0, 4.0, 6.0]]
    device.error = error
    for _ in range(2):  # A lost GPU stays lost, and the lane is not lost with it.
        with pytest.raises(kind, match=words) as caught:
            session.run(feeds)
        assert error in caught.value.message
        assert caught.value.hint
    del caught
    session.close()
    session.close()
    assert sorted(device.released) == ["cudaFree"] * 2 + ["cudaFreeHost"] * 2 + ["cudaStreamDestroy"]
    gc.collect()
    assert alive() is None
    with pytest.raises(BackendError, match="is closed"):
        session.run(feeds)


def test_a_context_without_room_gives_back_what_it_already_had() -> None:
    """A session asks again whenever threads compete for its contexts, so that each try would cost memory."""
    device = _Device()
    device.room = 20  # bytes: for the input, not for the output
    with pytest.raises(BackendError, match="no memory left"):
        _session(device, _Context())
    assert sorted(device.released) == ["cudaFree"] + ["cudaFreeHost"] * 2 + ["cudaStreamDestroy"]


def test_what_fails_when_a_session_closes_does_not_keep_its_memory() -> None:
    def fail() -> None:
        raise ConfigError("Cannot write the cache.")

    device = _Device()
    session = _session(device, _Context(), on_close=fail)
    with pytest.raises(ConfigError):
        session.close()
    assert device.released.count("cudaFree") == 2
    session.close()


def test_no_more_contexts_are_made_than_were_asked_for() -> None:
    session = _session(_Device(), _Context())
    lane = session._take()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(session._take)
        assert not wait([waiting], timeout=0.1).done
        session._idle.put(lane)
        assert waiting.result(timeout=10) is lane
    session._idle.put(lane)
    session.close()


class _Recording(Cuda):
    """Counts what happens to recorded graphs; ``fails``: the engine cannot be recorded."""

    fails = False

    def __init__(self, device: _Device) -> None:
        super().__init__(cast(ModuleType, device))
        self.calls: list[str] = []

    def devices(self) -> list[CudaDevice]:
        return [CudaDevice(index=0, name="Ada", capability=(8, 9), integrated=False)]

    def begin_capture(self, _stream: int) -> None:
        self.calls.append("record")

    def end_capture(self, _stream: int) -> object:
        if self.fails:
            raise BackendError("CUDA cannot record this.")
        return object()

    def launch(self, _graph: object, _stream: int) -> None:
        self.calls.append("launch")

    def destroy_graph(self, _graph: object) -> None:
        self.calls.append("destroy")


def test_a_graph_is_recorded_once_for_a_shape_and_goes_with_it() -> None:
    cuda = _Recording(_Device())
    lane = Lane(LIBRARY, cast(Any, _Context()), cuda=cuda, tensors=TENSORS, unified=False, graphs=True)
    fitting, other = ({"images": np.ones(shape, np.float32)} for shape in (SHAPE, (2, 4)))
    for _ in range(3):
        lane.infer(fitting)
    assert cuda.calls == ["record", "launch", "launch"]
    with pytest.raises(TensorMismatchError, match="does not fit the engine"):
        lane.infer(other)
    assert lane.infer(fitting)["boxes"].tolist() == [[2.0] * 4]
    assert cuda.calls[3:] == ["destroy", "record"]
    lane.close()


def test_an_engine_that_cannot_be_recorded_is_not_tried_again() -> None:
    cuda = _Recording(_Device())
    cuda.fails = True
    lane = Lane(LIBRARY, cast(Any, _Context()), cuda=cuda, tensors=TENSORS, unified=False, graphs=True)
    for _ in range(3):
        assert lane.infer({"images": np.ones(SHAPE, np.float32)})["boxes"].tolist() == [[2.0] * 4]
    assert cuda.calls == ["record"]
    lane.close()


class _Engine:
    """An engine of one context, as the library describes it."""

    num_io_tensors = 2

    def get_tensor_name(self, index: int) -> str:
        return TENSORS[index].name

    def get_tensor_dtype(self, _name: str) -> SimpleNamespace:
        return SimpleNamespace(name="FLOAT")

    def get_tensor_shape(self, _name: str) -> tuple[int, ...]:
        return SHAPE

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name == "images" else "output"

    def create_execution_context(self) -> _Context:
        return _Context()


def test_a_session_has_the_contract_and_no_engine_brings_code_unasked(
    engine: Path, bundle_contract: ModelContract, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda _: _Engine(), engine_host_code_allowed=False)
    library = SimpleNamespace(
        **{**vars(LIBRARY), "__name__": "opened", "ILogger": object, "__version__": "10.3.0"},
        Runtime=lambda _: runtime,
        TensorIOMode=SimpleNamespace(INPUT="input"),
    )
    monkeypatch.setattr(tensorrt, "load_tensorrt", lambda *_, **__: library)
    monkeypatch.setattr(tensorrt, "load_cuda", lambda **_: _Recording(_Device()))
    with TENSORRT.open(engine, SessionOptions()) as session:
        assert session.contract == bundle_contract
    assert not runtime.engine_host_code_allowed
    write_sidecar(engine, bundle_contract, {"version": "10.3.0", "options": "version_compatible"})
    with pytest.raises(BackendLoadError, match="contains a library"):
        TENSORRT.open(engine, SessionOptions())
    TENSORRT.open(engine, SessionOptions(allow_engine_code=True)).close()
    assert runtime.engine_host_code_allowed


class _Serialized:
    """What TensorRT-RTX compiled: some bytes, or nothing where the GPU is gone."""

    def __init__(self, content: bytes | None) -> None:
        self.content = content

    def create_runtime_cache(self) -> _Serialized:
        return self

    def set_runtime_cache(self, cache: _Serialized) -> None:
        assert cache is self

    def serialize(self) -> bytes | None:
        return self.content


@pytest.mark.parametrize(("content", "full"), [(b"kernels", True), (None, False), (b"kernels", False)])
def test_a_cache_that_cannot_be_kept_costs_no_result(
    content: bytes | None,
    full: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = KeptModel("tensorrt-rtx", facts={}, folder=tmp_path / "cache")
    if full:
        (tmp_path / "cache").rmdir()
    with caplog.at_level(logging.WARNING):
        _RuntimeCache(cast(Any, _Serialized(content)), model).save()
    kept = content is not None and not full
    assert model.load() == (content if kept else None)
    assert ("is not kept" in caplog.text) is not kept


def test_an_engine_that_contains_a_library_needs_a_signature_or_the_users_word() -> None:
    path = Path("model.engine")
    with pytest.raises(BackendLoadError, match="contains a library") as refused:
        _require_trust(path, SessionOptions())
    assert "--allow-engine-code" in refused.value.hint
    _require_trust(path, SessionOptions(allow_engine_code=True))
    _require_trust(path, SessionOptions(public_keys=("key.pub.pem",)))
