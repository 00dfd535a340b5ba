"""A bounded number of blocking calls for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from weakref import WeakKeyDictionary

from fcos_deploy.core.errors import BackendError

__all__ = ["AsyncGate"]

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
        self._taken = 0

    async def call(self, function: Callable[[], T]) -> T:
        """``function()`` in a thread.

        Raises:
            BackendError: the gate was closed.
        """
        loop = asyncio.get_running_loop()
        with self._lock:
            semaphore = self._semaphores.setdefault(loop, asyncio.Semaphore(self._places))
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
