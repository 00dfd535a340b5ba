"""One value per thread, made when the thread first asks for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["PerThread"]

T = TypeVar("T")


class PerThread(Generic[T]):
    """Calls ``make`` once in every thread that asks; a thread's value goes when the thread or this object goes."""

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
