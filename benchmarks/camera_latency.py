"""How late detections of a camera are, and how many frames nobody sees, at half, once and twice the detector's rate.

    python benchmarks/camera_latency.py MODEL --seconds 10

A server of this script sends an image as MJPEG over HTTP on localhost; ``Detector.stream`` reads it in this process.
With ``--viewers 1`` each rate is measured once more with somebody who looks at the detections, as with ``--draw
http://localhost:8090``. The last column is the CPU time of all of it for a detected frame.
"""

from __future__ import annotations

import argparse
import contextlib
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fcos_deploy import Detector
from fcos_deploy.core.image import list_images
from fcos_deploy.detector.sources import StreamOptions, StreamView
from fcos_deploy.pipeline.deploy import DEMO_DATA


def serve(jpeg: bytes, *, rate: float) -> ThreadingHTTPServer:
    """A camera that sends the same JPEG ``rate`` times a second."""
    head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n".encode()

    class Camera(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            due = time.monotonic()
            try:
                while True:
                    self.wfile.write(head + jpeg + b"\r\n")
                    due += 1 / rate
                    time.sleep(max(0.0, due - time.monotonic()))
            except OSError:
                return

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Camera)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def main() -> None:
    """Print one row a rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--backend", default="")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--viewers", type=int, default=0)
    options = parser.parse_args()
    path = list_images(DEMO_DATA / "evaluation")[0]
    with Detector.open(options.model, backend=options.backend) as detector:
        image, times = detector.read(path), []
        for _ in range(20):
            begin = time.monotonic()
            detector.detect(image)
            times.append(time.monotonic() - begin)
        seconds = sorted(times)[len(times) // 2]
        print(f"alone: {1000 * seconds:.1f} ms a detection, {1 / seconds:.1f} a second")
        print("| rate | viewers | frames | detected | dropped | p50 ms | p90 ms | p99 ms | CPU ms |")
        print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
        for factor in (0.5, 1.0, 2.0):
            for viewers in sorted({0, options.viewers}):
                cells = measured(
                    detector, path.read_bytes(), rate=factor / seconds, seconds=options.seconds, viewers=viewers
                )
                print(
                    f"| {factor:g}x ({factor / seconds:.1f} a second) | {viewers} | {' | '.join(cells)} |", flush=True
                )


def measured(detector: Detector, jpeg: bytes, *, rate: float, seconds: float, viewers: int) -> list[str]:
    """The cells of a row, from the number of frames on."""
    server = serve(jpeg, rate=rate)
    with StreamView("http://localhost:0", names=detector.names) as view:
        for _ in range(viewers):
            threading.Thread(target=look, args=(view.url,), daemon=True).start()
        begin = time.process_time()
        stream_options = StreamOptions(max_seconds=seconds)
        address = f"http://127.0.0.1:{server.server_port}/"
        with detector.stream(address, options=stream_options) as stream:
            for frame in stream:
                view.show(frame.pixels, frame.detections)
            figures = stream.statistics
        used = 1000 * (time.process_time() - begin) / max(figures.detected, 1)
    server.shutdown()
    counts = [str(figures.frames), str(figures.detected), f"{figures.drop_rate:.1%}"]
    return [*counts, *map(str, (figures.latency_p50, figures.latency_p90, figures.latency_p99)), f"{used:.0f}"]


def look(address: str) -> None:
    """Take what a view sends, until it closes."""
    with contextlib.suppress(OSError), urllib.request.urlopen(address) as response:
        while response.read(1 << 16):
            pass


if __name__ == "__main__":
    main()
