"""How library functions do long work: they report progress, time their stages, and work ahead in other threads."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["INFERENCES", "InferenceCounter", "ProgressFn", "StageClock", "StageRecord", "map_ahead", "no_progress"]

# (what is being done, steps done, steps in all); 0 in all means that the end is not known.
ProgressFn = Callable[[str, int, int], None]


def no_progress(label: str, done: int, total: int) -> None:
    """Report nothing."""


class InferenceCounter:
    """How many inferences the sessions of this process have run; a batch is one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0

    @property
    def count(self) -> int:
        """So far."""
        return self._count

    def add(self, inferences: int = 1) -> None:
        """Count some more."""
        with self._lock:
            self._count += inferences


INFERENCES = InferenceCounter()


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord:
    """A stage: seconds by the clock, and the inferences that this process ran for it."""

    name: str
    seconds: float
    inferences: int


class StageClock:
    """Times the stages of one command; a stage that is entered again adds to what it has."""

    def __init__(self) -> None:
        self._stages: dict[str, tuple[float, int]] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What runs within is of this stage."""
        started, inferences = time.perf_counter(), INFERENCES.count
        try:
            yield
        finally:
            seconds, before = self._stages.get(name, (0.0, 0))
            self._stages[name] = (seconds + time.perf_counter() - started, before + INFERENCES.count - inferences)

    @property
    def records(self) -> tuple[StageRecord, ...]:
        """The stages so far, in the order in which they began to end."""
        return tuple(
            StageRecord(name=name, seconds=round(seconds, 3), inferences=inferences)
            for name, (seconds, inferences) in self._stages.items()
        )


_In = TypeVar("_In")
_Out = TypeVar("_Out")


def map_ahead(
    pool: ThreadPoolExecutor, work: Callable[[_In], _Out], items: Iterable[_In], *, ahead: int = 4
) -> Iterator[_Out]:
    """``map`` in the pool's threads, in order; up to ``ahead`` items are under way, or finished, when one is taken."""
    waiting: deque[Future[_Out]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
