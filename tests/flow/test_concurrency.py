"""One detector for many threads and event loops."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fcos_deploy import Detections, Detector, PerformanceHint, SessionOptions
from fcos_deploy.benchmark.soak import SoakReport, require_sound, soak, soak_images
from fcos_deploy.core.errors import BackendError, ConfigError, ImageError
from fcos_deploy.detector.detector import AsyncGate

Images = list[NDArray[np.uint8]]


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def detector(request: pytest.FixtureRequest, tiny_onnx: Path) -> Iterator[Detector]:
    pytest.importorskip(request.param)
    with Detector.open(tiny_onnx, backend=request.param, options=SessionOptions(threads=1)) as opened:
        yield opened


def _same(left: Detections, right: Detections) -> bool:
    return all(np.array_equal(getattr(left, n), getattr(right, n)) for n in ("boxes", "scores", "labels"))


def test_a_soak_run_finds_nothing(detector: Detector) -> None:
    seen: list[tuple[str, int, int]] = []
    report = soak(detector, soak_images(None), inferences=320, threads=8, progress=lambda *told: seen.append(told))
    assert report.different == 0
    assert report.descriptors_after <= report.descriptors_before
    assert seen[-1] == ("soak", 320, 320)
    require_sound(report, max_memory_growth=0.2)  # a short run; the real bound is for 20,000


def test_a_throughput_session_answers_threads_too(tiny_onnx: Path) -> None:
    for backend in ("onnxruntime", "openvino"):
        options = SessionOptions(hint=PerformanceHint.THROUGHPUT, threads=2, streams=2)
        with Detector.open(tiny_onnx, backend=backend, options=options) as opened:
            assert opened.session.description["streams"] == "2"
            report = soak(opened, soak_images(None), inferences=64, threads=4)
            assert report.different == 0


def test_a_detector_that_answers_otherwise_among_threads_is_found(detector: Detector) -> None:
    main = threading.get_ident()

    class Confused(Detector):
        def detect(self, image: NDArray[np.uint8] | Path) -> Detections:
            found = super().detect(image)
            return found if threading.get_ident() == main else found.above(float(found.scores[0]))

    report = soak(Confused(detector.session, detector.contract), soak_images(None), inferences=64, threads=2)
    assert report.different > 0
    with pytest.raises(BackendError, match="differ from the single-threaded"):
        require_sound(report, max_memory_growth=1.0)


def test_leaks_are_found() -> None:
    sound = SoakReport(
        inferences=10, threads=2, seconds=1.0, different=0,
        memory_before=1000, memory_after=1010, descriptors_before=7, descriptors_after=7,
    )  # fmt: skip
    assert sound.problems(max_memory_growth=0.02) == []
    assert "grew by 1.0%" in sound.problems(max_memory_growth=0.005)[0]
    from dataclasses import replace

    assert "from 7 to 9" in replace(sound, descriptors_after=9).problems(max_memory_growth=0.02)[0]


def test_nothing_to_soak_is_an_error(detector: Detector, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        soak(detector, [], inferences=1, threads=1)
    with pytest.raises(ImageError, match="no images"):
        soak_images(tmp_path)


def test_an_error_in_one_thread_ends_the_run(detector: Detector) -> None:
    images = soak_images(None)

    class Failing(Detector):
        def detect(self, image: NDArray[np.uint8] | Path) -> Detections:
            if threading.current_thread() is not threading.main_thread():
                raise BackendError("gone")
            return super().detect(image)

    started = time.monotonic()
    with pytest.raises(BackendError, match="gone"):
        soak(Failing(detector.session, detector.contract), images, inferences=10**9, threads=4)
    assert time.monotonic() - started < 60


def test_threads_that_end_leave_nothing_behind(detector: Detector, blobs: Images) -> None:
    expected = [detector.detect(image) for image in blobs]
    before = threading.active_count()
    for _ in range(5):
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(detector.detect, blobs * 2))
        assert all(_same(one, expected[i % 4]) for i, one in enumerate(found))
    assert threading.active_count() == before


def test_coroutines_get_what_calls_get(detector: Detector, blobs: Images) -> None:
    async def run() -> list[Detections]:
        return await asyncio.gather(*(detector.async_detect(image) for image in blobs * 6))

    for found, image in zip(asyncio.run(run()), blobs * 6, strict=True):
        assert _same(found, detector.detect(image))
    assert len(asyncio.run(run())) == 24  # another event loop


def test_errors_reach_the_coroutine(detector: Detector, tmp_path: Path) -> None:
    with pytest.raises(ImageError):
        asyncio.run(detector.async_detect(tmp_path / "missing.jpg"))


def test_a_closed_detector_refuses_coroutines(tiny_onnx: Path, blobs: Images) -> None:
    opened = Detector.open(tiny_onnx, options=SessionOptions(threads=1))

    async def run() -> None:
        await opened.async_detect(blobs[0])
        opened.close()
        with pytest.raises(BackendError, match="closed"):
            await opened.async_detect(blobs[0])

    asyncio.run(run())
    opened.close()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_detector_is_closed_while_threads_detect(backend: str, tiny_onnx: Path, blobs: Images) -> None:
    pytest.importorskip(backend)
    for _ in range(3):
        opened = Detector.open(tiny_onnx, backend=backend, options=SessionOptions(threads=1))
        begun = threading.Barrier(4)

        def detect(opened: Detector = opened, begun: threading.Barrier = begun) -> None:
            opened.detect(blobs[0])
            begun.wait()
            while True:
                opened.detect(blobs[0])

        with ThreadPoolExecutor(3) as pool:
            threads = [pool.submit(detect) for _ in range(3)]
            begun.wait()
            time.sleep(0.01)
            opened.close()
            for thread in threads:
                with pytest.raises(BackendError, match="closed"):
                    thread.result()


class _Door:
    """Calls that wait until the door opens, and are counted."""

    def __init__(self) -> None:
        self.opened, self.started, self.lock = threading.Event(), 0, threading.Lock()

    def pass_through(self) -> int:
        with self.lock:
            self.started += 1
            number = self.started
        assert self.opened.wait(30)
        return number


async def _until(condition: object, *, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]  # a callable
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def test_no_more_calls_are_taken_than_there_are_places() -> None:
    door, gate = _Door(), AsyncGate(workers=2, places=3)

    async def run() -> list[int]:
        calls = [asyncio.ensure_future(gate.call(door.pass_through)) for _ in range(10)]
        await _until(lambda: door.started == 2)
        await asyncio.sleep(0.05)
        assert door.started == 2
        door.opened.set()
        return await asyncio.gather(*calls)

    assert sorted(asyncio.run(run())) == list(range(1, 11))
    gate.close()


def test_a_cancelled_call_that_has_not_begun_never_begins() -> None:
    door, gate = _Door(), AsyncGate(workers=1, places=2)

    async def run() -> None:
        running = asyncio.ensure_future(gate.call(door.pass_through))
        await _until(lambda: door.started == 1)
        queued = asyncio.ensure_future(gate.call(door.pass_through))
        outside = asyncio.ensure_future(gate.call(door.pass_through))
        await asyncio.sleep(0.02)
        for task in (queued, outside):
            task.cancel()
        assert await asyncio.gather(queued, outside, return_exceptions=True) != [None, None]
        assert queued.cancelled()
        assert outside.cancelled()
        door.opened.set()
        assert await running == 1
        assert await gate.call(door.pass_through) == 2  # its place was freed

    asyncio.run(run())
    assert door.started == 2
    gate.close()


def test_a_running_call_keeps_its_place_after_it_was_cancelled() -> None:
    door, gate = _Door(), AsyncGate(workers=1, places=1)

    async def run() -> None:
        running = asyncio.ensure_future(gate.call(door.pass_through))
        await _until(lambda: door.started == 1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        following = asyncio.ensure_future(gate.call(door.pass_through))
        await asyncio.sleep(0.05)
        assert door.started == 1
        door.opened.set()
        assert await following == 2

    asyncio.run(run())
    gate.close()


def test_a_timeout_does_not_wedge_the_gate() -> None:
    door, gate = _Door(), AsyncGate(workers=1, places=1)

    async def run() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(gate.call(door.pass_through), timeout=0.05)
        door.opened.set()
        assert await asyncio.wait_for(gate.call(door.pass_through), timeout=30) == 2

    asyncio.run(run())
    gate.close()
    with pytest.raises(BackendError, match="closed"):
        asyncio.run(gate.call(door.pass_through))


_WORKERS = """
import multiprocessing, sys
from fcos_deploy import Detector, SessionOptions
from fcos_deploy.core.errors import BackendError

model, image, backend, parent = sys.argv[1:]
detector = None

def open_detector():
    global detector
    detector = Detector.open(model, backend=backend, options=SessionOptions(threads=1))

def detect(path):
    try:
        return len(detector.detect(path))
    except BackendError as error:
        detector.close()
        return error.message

if parent == "opens":
    open_detector()
    detector.detect(image)
pool = multiprocessing.get_context("fork").Pool(2, initializer=None if parent == "opens" else open_detector)
print(*set(pool.map(detect, [image] * 4)), sep="\\n")
"""


@pytest.mark.parametrize("parent", ["opens", "imports"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "pytorch"])
def test_a_detector_works_in_the_process_that_opened_it_only(
    backend: str, parent: str, tiny_onnx: Path, tiny_checkpoint: Path, blobs: Images, tmp_path: Path
) -> None:
    pytest.importorskip({"pytorch": "torch"}.get(backend, backend))
    cv2 = pytest.importorskip("cv2")
    cv2.imwrite(str(tmp_path / "image.png"), blobs[0])
    model = tiny_checkpoint if backend == "pytorch" else tiny_onnx
    command = [sys.executable, "-c", _WORKERS, str(model), str(tmp_path / "image.png"), backend, parent]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    told = result.stdout.strip()
    if parent == "opens":
        assert "cannot run in process" in told
    else:
        assert int(told) > 0
