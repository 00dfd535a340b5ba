"""A session on a TensorRT engine: a pool of lanes, so that several threads run at a time."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from fcos_deploy.core.backend import Session, Tensors
from fcos_deploy.core.errors import BackendError
from fcos_deploy.core.tensor_spec import TensorSpec
from runtimes._cuda import Cuda
from runtimes._tensorrt_lane import EngineTensor, Lane

__all__ = ["TensorrtSession"]

_CLOSE_NOTICED_SECONDS = 0.2


class TensorrtSession(Session):
    """Lends a lane to each call; the first is made at once, up to ``lanes`` more when threads compete for them."""

    def __init__(
        self,
        *,
        cuda: Cuda,
        device: int,
        tensors: tuple[EngineTensor, ...],
        make_lane: Callable[[], Lane],
        lanes: int,
        description: dict[str, str],
        on_close: Callable[[], None],
    ) -> None:
        super().__init__(
            inputs=tuple(_spec(tensor) for tensor in tensors if tensor.is_input),
            outputs=tuple(_spec(tensor) for tensor in tensors if not tensor.is_input),
            description=description,
        )
        self._cuda = cuda
        self._device = device
        self._make_lane = make_lane
        self._on_close = on_close
        self._all = [make_lane()]
        self._limit = lanes
        self._idle: queue.LifoQueue[Lane] = queue.LifoQueue()
        self._idle.put(self._all[0])
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(lanes, "tensorrt") if lanes > 1 else None

    def _run(self, feeds: Tensors) -> Tensors:
        self._cuda.select(self._device)  # CUDA's current device belongs to the thread
        lane = self._take()
        try:
            return {name: array.copy() for name, array in lane.infer(feeds).items()}
        finally:
            self._idle.put(lane)

    def _take(self) -> Lane:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            pass
        with self._lock:
            if self._closed:
                raise BackendError("The session is closed.")
            if len(self._all) < self._limit:
                lane = self._make_lane()
                self._all.append(lane)
                return lane
        return self._wait()

    def _wait(self) -> Lane:
        while not self._closed:
            try:
                return self._idle.get(timeout=_CLOSE_NOTICED_SECONDS)
            except queue.Empty:
                continue
        raise BackendError("The session is closed.")

    def _run_many(self, feeds: Sequence[Tensors]) -> list[Tensors]:
        return list(self._pool.map(self._run, feeds)) if self._pool else super()._run_many(feeds)

    def _close(self) -> None:
        if self._pool:
            self._pool.shutdown()
        with self._lock:
            lanes = [self._idle.get() for _ in self._all]  # waits for running calls
            self._all.clear()
        with contextlib.suppress(BackendError):  # A GPU that is gone: what is left here is released all the same.
            self._cuda.select(self._device)
        try:
            self._on_close()
        finally:
            for lane in lanes:
                lane.close()
            del self._make_lane, self._on_close  # They hold the engine, whose memory goes with them.


def _spec(tensor: EngineTensor) -> TensorSpec:
    return TensorSpec(tensor.name, tensor.dtype.name, tuple(None if n < 0 else n for n in tensor.shape))
