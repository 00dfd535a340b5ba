"""One value per thread."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

from fcos_deploy.core.backend import PerThread


class _Value:
    pass


def test_a_thread_keeps_its_value_and_shares_it_with_nobody() -> None:
    values = PerThread(_Value)
    mine = values.get()
    assert values.get() is mine
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(values.get).result() is not mine


def test_a_value_goes_with_its_thread() -> None:
    values = PerThread(_Value)
    seen: list[weakref.ref[_Value]] = []
    thread = threading.Thread(target=lambda: seen.append(weakref.ref(values.get())))
    thread.start()
    thread.join()
    gc.collect()
    assert seen[0]() is None


def test_all_values_go_with_the_object() -> None:
    owner = [PerThread(_Value)]
    mine, barrier = weakref.ref(owner[0].get()), threading.Barrier(2)
    theirs: list[weakref.ref[_Value]] = []

    def work() -> None:
        theirs.append(weakref.ref(owner[0].get()))
        barrier.wait(30)
        barrier.wait(30)

    thread = threading.Thread(target=work)
    thread.start()
    barrier.wait(30)
    owner.clear()
    gc.collect()
    assert mine() is None
    assert theirs[0]() is None
    barrier.wait(30)
    thread.join()
