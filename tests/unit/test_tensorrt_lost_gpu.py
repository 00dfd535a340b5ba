"""A GPU that disappears while an engine runs: an error in words, and a session that closes all the same.

No test can pull a GPU out, so the fault is put in: real sessions, lanes and buffers over a device of host memory that
answers with cuda-python's own error codes from a given moment on.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from fcos_deploy.core.errors import BackendError, ConfigError, DeviceError
from runtimes._cuda import Cuda
from runtimes._tensorrt_session import EngineTensor, Lane, TensorrtSession
from runtimes.tensorrt_rtx import _RuntimeCache

runtime: Any = pytest.importorskip("cuda.bindings.runtime")  # Any: cuda-python has no type information

SHAPE = (1, 4)
TENSORS = tuple(
    EngineTensor(name=name, dtype=np.dtype(np.float32), shape=SHAPE, largest=SHAPE, is_input=name == "images")
    for name in ("images", "boxes")
)


class _Device:
    """Host memory in the place of a GPU; after ``lose`` every call fails with ``error``, as CUDA's sticky errors do."""

    def __init__(self) -> None:
        self.error = "cudaSuccess"
        self.room = 1 << 30
        self.memory: dict[int, Any] = {}
        self.released: list[str] = []

    def __getattr__(self, name: str) -> Any:  # Any: constants and functions of the module
        if not name.startswith("cuda") or name.startswith(("cudaMemcpyKind", "cudaStreamN", "cudaHostAllocM")):
            return getattr(runtime, name)
        return getattr(runtime, name) if name == "cudaError_t" else lambda *words: self._answer(name, *words)

    def _answer(self, name: str, *words: Any) -> tuple[Any, ...]:
        if name in ("cudaFree", "cudaFreeHost", "cudaStreamDestroy"):
            self.released.append(name)
        code = getattr(runtime.cudaError_t, self.error)
        if self.error != "cudaSuccess":
            return (code, *([None] if name.endswith(("Malloc", "HostAlloc", "WithFlags")) else []))
        if name == "cudaMalloc":
            self.room -= words[0]
            if self.room < 0:
                return runtime.cudaError_t.cudaErrorMemoryAllocation, None
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


@pytest.mark.parametrize(("content", "closed"), [(b"kernels", True), (None, False), (b"kernels", False)])
def test_a_cache_that_cannot_be_kept_costs_no_result(
    content: bytes | None, closed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cache"
    if closed:
        folder.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        _RuntimeCache(cast(Any, _Serialized(content)), folder / "runtime.cache").save()
    kept = content is not None and not closed
    assert (folder / "runtime.cache").exists() is kept
    assert ("is not kept" in caplog.text) is not kept
