"""Progress and cancellation of an engine build, from whatever thread the builder reports."""

from __future__ import annotations

import threading
from typing import Any

from fcos_deploy.core.progress import ProgressFn

__all__ = ["BuildMonitor"]


class BuildMonitor:
    """Turns the builder's nested phases into one bar, and a request to stop into the answer that stops it.

    The bar follows the outermost phase; its label names the phase that is running.
    """

    def __init__(self, progress: ProgressFn) -> None:
        self._progress = progress
        self._steps: dict[str, int] = {}
        self._outermost = ""
        self._stop = threading.Event()
        self.failure: BaseException | None = None

    def stop(self) -> None:
        """Ask the builder to give up at its next step."""
        self._stop.set()

    @property
    def stopped(self) -> bool:
        """Whether ``stop`` was called, or the progress function raised."""
        return self._stop.is_set()

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        """A phase begins; one without a parent is what the bar measures."""
        if not parent_phase:
            self._outermost = phase_name
        self._steps[phase_name] = num_steps
        self._report(phase_name, 0)

    def step_complete(self, phase_name: str, step: int) -> bool:
        """A step is done; False stops the build."""
        self._report(phase_name, step + 1)
        return not self.stopped

    def phase_finish(self, phase_name: str) -> None:
        """A phase ends, perhaps early."""
        self._report(phase_name, self._steps.get(phase_name, 0))

    def _report(self, phase_name: str, done: int) -> None:
        if phase_name != self._outermost:
            return
        try:
            self._progress(phase_name, done, self._steps[phase_name])
        except BaseException as error:  # noqa: BLE001  (an exception must not travel through the builder's C++ frames)
            self.failure = error
            self.stop()

    def binding(self, library: Any) -> Any:  # Any: a subclass of a class that is known at run time only
        """The object to hand to ``IBuilderConfig.progress_monitor``."""
        monitor = self

        class Monitor(library.IProgressMonitor):  # type: ignore[misc]  # its base is known at run time only
            def __init__(self) -> None:
                library.IProgressMonitor.__init__(self)

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                monitor.phase_start(phase_name, parent_phase, num_steps)

            def step_complete(self, phase_name: str, step: int) -> bool:
                return monitor.step_complete(phase_name, step)

            def phase_finish(self, phase_name: str) -> None:
                monitor.phase_finish(phase_name)

        return Monitor()
