"""A soak run: many inferences from many threads, checked for results, memory and open files that change over time."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.enums import Orientation
from fcos_deploy.core.errors import BackendError, ConfigError
from fcos_deploy.core.image import list_images, read_image
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.detector import Detector

__all__ = ["SoakReport", "require_sound", "soak", "soak_images"]

_WARM_UP = 0.1  # of the inferences: until allocators and thread pools have their final size
_MIB = 1 << 20
_MAX_IMAGES = 16
_PAGE = mmap.PAGESIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakReport:
    """The run and what changed over it; memory in resident bytes, after the warm-up and at the end."""

    inferences: int
    threads: int
    seconds: float
    different: int
    memory_before: int
    memory_after: int
    descriptors_before: int
    descriptors_after: int

    @property
    def memory_growth(self) -> float:
        """As a share of the memory after the warm-up."""
        return self.memory_after / self.memory_before - 1

    def __str__(self) -> str:
        return (
            f"{self.inferences} inferences over {self.threads} threads in {self.seconds:.1f} s: "
            f"{self.different} results differ, "
            f"memory {self.memory_before / _MIB:.1f} -> {self.memory_after / _MIB:.1f} MiB "
            f"({self.memory_growth:+.2%}), "
            f"open files {self.descriptors_before} -> {self.descriptors_after}"
        )

    def problems(self, *, max_memory_growth: float) -> list[str]:
        """Sentences; empty when all is well."""
        sentences = []
        if self.different:
            sentences.append(f"{self.different} of {self.inferences} results differ from the single-threaded ones.")
        if self.memory_growth > max_memory_growth:
            sentences.append(f"Resident memory grew by {self.memory_growth:.1%}, more than {max_memory_growth:.1%}.")
        if self.descriptors_after > self.descriptors_before:
            sentences.append(f"Open files grew from {self.descriptors_before} to {self.descriptors_after}.")
        return sentences


def soak_images(folder: Path | None, *, orientation: Orientation = Orientation.EXIF) -> list[NDArray[np.uint8]]:
    """The first images of a folder, or synthetic ones: (h, w, 3) uint8 RGB of several sizes.

    Raises:
        ImageError: the folder has none, or one is unreadable.
    """
    if folder is not None:
        return [read_image(path, orientation=orientation) for path in list_images(folder)[:_MAX_IMAGES]]
    generator = np.random.default_rng(0)
    sizes = [(240 + 16 * i, 320 - 8 * i) for i in range(8)]
    coarse = [generator.integers(0, 256, (h // 8, w // 8, 3), np.uint8) for h, w in sizes]
    return [np.repeat(np.repeat(c, 8, axis=0), 8, axis=1) for c in coarse]


def require_sound(report: SoakReport, *, max_memory_growth: float) -> None:
    """Refuse what is not.

    Raises:
        BackendError: with all that the run showed.
    """
    if problems := report.problems(max_memory_growth=max_memory_growth):
        raise BackendError(" ".join(problems))


def soak(
    detector: Detector,
    images: Sequence[NDArray[np.uint8]],
    *,
    inferences: int,
    threads: int,
    progress: ProgressFn = no_progress,
) -> SoakReport:
    """Detect ``inferences`` times over ``threads`` threads, and compare every result with a single-threaded one.

    Half of the inferences compare detections, the others all outputs of the network, bit by bit.

    Raises:
        ConfigError: nothing to run.
        BackendError: an inference failed.
    """
    if inferences < 1 or threads < 1 or not images:
        raise ConfigError("A soak run needs at least one inference, one thread and one image.")
    run = _Run(detector, images)
    warm_up = max(threads * len(images), int(inferences * _WARM_UP))
    run.repeat(warm_up, threads=threads, label="warm up", progress=progress)
    memory, descriptors, started = _resident_memory(), _descriptors(), time.perf_counter()
    different = run.repeat(inferences, threads=threads, label="soak", progress=progress)
    return SoakReport(
        inferences=inferences,
        threads=threads,
        seconds=time.perf_counter() - started,
        different=different,
        memory_before=memory,
        memory_after=_resident_memory(),
        descriptors_before=descriptors,
        descriptors_after=_descriptors(),
    )


class _Run:
    """The images with their single-threaded results."""

    def __init__(self, detector: Detector, images: Sequence[NDArray[np.uint8]]) -> None:
        self._detector = detector
        self._images = images
        self._feeds = [detector.prepare([image])[0] for image in images]
        self._detections = [detector.detect(image) for image in images]
        self._outputs = [detector.infer(feeds) for feeds in self._feeds]

    def repeat(self, count: int, *, threads: int, label: str, progress: ProgressFn) -> int:
        """How many of ``count`` results differ."""
        done = [0] * threads
        stop = threading.Event()

        def work(worker: int) -> int:
            different = 0
            try:
                for ticket in range(worker, count, threads):
                    if stop.is_set():
                        break
                    different += not self._same(ticket)
                    done[worker] += 1
            except BaseException:
                stop.set()  # The others need not go on for hours.
                raise
            return different

        with ThreadPoolExecutor(threads, "soak") as pool:
            workers = [pool.submit(work, worker) for worker in range(threads)]
            try:
                while wait(workers, timeout=0.5).not_done:
                    progress(label, sum(done), count)
            except BaseException:  # an interrupt: the pool waits for its threads, and they would finish the run
                stop.set()
                raise
            progress(label, sum(done), count)
            return sum(worker.result() for worker in workers)

    def _same(self, ticket: int) -> bool:
        index = ticket % len(self._images)
        if ticket // len(self._images) % 2:
            outputs, expected = self._detector.infer(self._feeds[index]), self._outputs[index]
            return all(np.array_equal(outputs[name], expected[name], equal_nan=True) for name in expected)
        detections, known = self._detector.detect(self._images[index]), self._detections[index]
        return all(np.array_equal(getattr(detections, n), getattr(known, n)) for n in ("boxes", "scores", "labels"))


def _resident_memory() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  (names are enough)
