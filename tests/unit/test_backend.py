"""Options of a session, and one value per thread."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fcos_deploy.core.backend import ComputeType, PerformanceHint, PerThread, SessionOptions
from fcos_deploy.core.errors import ConfigError


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


def test_session_options_take_the_documented_words() -> None:
    options = SessionOptions(hint="throughput", compute="bf16")  # type: ignore[arg-type]  # text, as the page says
    assert options.hint is PerformanceHint.THROUGHPUT
    assert options.compute is ComputeType.BF16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hint": "fast"}, "'hint' must be one of 'latency', 'throughput', got 'fast'"),
        ({"compute": "fp32"}, "'compute' must be one of 'f32', 'f16', 'bf16', got 'fp32'"),
        ({"threads": "2"}, "'threads' must be a whole number of at least 1, or None, got '2'"),
        ({"threads": 0}, "got 0"),
        ({"streams": True}, "'streams' must be a whole number of at least 1, or None, got True"),
        ({"threads": 2.0}, "got 2.0"),
        ({"device": 0}, "'device' must be text"),
        ({"public_keys": "key.pem"}, "'public_keys' must be a tuple"),
        ({"contract": {}}, "'contract' must be a ModelContract or None"),
        ({"checkpoint": "coco"}, "'checkpoint' must be CheckpointOptions or None"),
        ({"allow_fallback": "no"}, "'allow_fallback' must be True or False, got 'no'"),
    ],
)
def test_a_wrong_session_option_is_named_with_what_came(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SessionOptions(**options)
    assert message in caught.value.message
