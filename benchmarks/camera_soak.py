"""Memory, dropped frames and latency of a detector on an RTSP camera for half an hour; the camera is killed meanwhile.

    python benchmarks/camera_soak.py MODEL --seconds 1800 --rate 5

The camera is ``rtsp_camera.py`` in a process of its own, which is killed and started again every five minutes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from pathlib import Path

from fcos_deploy import Detector, SessionOptions
from fcos_deploy.detector.sources import StreamOptions

CAMERA = Path(__file__).with_name("rtsp_camera.py")
LIFE = 300.0  # seconds of a camera
PAUSE = 5.0  # seconds without one


def resident_mib() -> float:
    """Memory of this process, in 1024 ** 2 bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024


class Camera:
    """The server, killed after ``LIFE`` seconds and started again on the same port after a pause, until ``close``."""

    def __init__(self, *, rate: float) -> None:
        self._arguments = [sys.executable, str(CAMERA), "--rate", str(rate), "--size", "640x480"]
        self._process = self._start(port=0)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self._closing = threading.Event()
        self.kills = 0
        threading.Thread(target=self._kill_now_and_then, daemon=True).start()

    def _start(self, *, port: int) -> subprocess.Popen[str]:
        return subprocess.Popen([*self._arguments, "--port", str(port)], stdout=subprocess.PIPE, text=True)

    def _kill_now_and_then(self) -> None:
        while not self._closing.wait(LIFE):
            self._process.kill()
            self._process.wait()
            self.kills += 1
            time.sleep(PAUSE)
            self._process = self._start(port=self.port)

    def close(self) -> None:
        """Stop it for good."""
        self._closing.set()
        self._process.kill()
        self._process.wait()


def main() -> None:
    """Print a row every minute, and the figures of the whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--rate", type=float, default=5.0, help="frames a second")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    camera = Camera(rate=options.rate)
    session = SessionOptions(threads=options.threads)
    limits = StreamOptions(max_seconds=options.seconds)
    print(
        "| minute | frames | detected | dropped | failed | reconnections | MiB |\n|---:|---:|---:|---:|---:|---:|---:|"
    )
    with (
        Detector.open(options.model, options=session) as detector,
        detector.stream(f"rtsp://127.0.0.1:{camera.port}/camera", options=limits) as stream,
    ):
        shown = -1
        for _ in stream:
            figures = stream.statistics
            minute = int(figures.seconds // 60)
            if minute > shown:
                shown = minute
                print(
                    f"| {minute} | {figures.frames} | {figures.detected} | {figures.dropped} | {figures.failed} | "
                    f"{figures.reconnections} | {resident_mib():.1f} |",
                    flush=True,
                )
        figures = stream.statistics
    camera.close()
    print(f"{figures}\n{camera.kills} kills, drop rate {figures.drop_rate:.2%}, {resident_mib():.1f} MiB at the end")


if __name__ == "__main__":
    main()
