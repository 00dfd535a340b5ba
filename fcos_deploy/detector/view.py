"""A look at a stream's detections: frames with their boxes as MJPEG over HTTP, for a browser on this machine.

A viewer gets what is newest when it is ready for it. Drawing, encoding and sending are done in the viewers' threads, a
few times a second, once for all of them, so that nobody who looks slowly, or not at all, holds up the detector.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.detector.draw import DrawOptions, draw_detections

__all__ = ["StreamView", "is_view_address"]

cv2 = lazy_import("cv2")

_ADDRESS = re.compile(r"http://(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+):(\d{1,5})/?", re.ASCII)
_LOCAL = ("localhost", "127.0.0.1", "[::1]")
_RATE = 10.0  # frames a second
_VIEWERS = 4
_PATIENCE = 5.0  # seconds in which a viewer must take a frame
_QUALITY = 80  # of the JPEG
_LARGEST = 1280  # pixels of the longer side; larger frames are shown smaller


def is_view_address(text: str) -> bool:
    """Whether a place to draw to is an address, and not a folder."""
    return text.startswith(("http:", "https:"))


class StreamView:
    """Serves the newest frame that ``show`` was given; a context manager that closes the server."""

    def __init__(self, address: str, *, names: Sequence[str] = (), options: DrawOptions | None = None) -> None:
        """Listen at ``address``, such as ``http://localhost:8090``; another host must be named to be heard there.

        Raises:
            ConfigError: it is no such address, or cannot be listened at.
        """
        match = _ADDRESS.fullmatch(address)
        if match is None or int(match[2]) > 65535:
            raise ConfigError(
                f"'{address}' is no address to show frames at.", hint="--draw http://localhost:8090, or 127.0.0.1"
            )
        self.is_local = match[1] in _LOCAL
        host = "127.0.0.1" if match[1] == "localhost" else match[1].strip("[]")
        self._names, self._options = names, options
        self._changed = threading.Condition()
        self._newest: tuple[int, NDArray[np.uint8], Detections] | None = None
        self._encoded = 0, b""
        self._encoding = threading.Lock()
        self._viewers = threading.BoundedSemaphore(_VIEWERS)
        self._closed = False
        try:
            kind = _ServerV6 if ":" in host else _Server
            self._server = kind((host, int(match[2])), self._handler())
        except OSError as error:
            raise ConfigError(
                f"Cannot show frames at '{address}': {error.strerror or error}.", hint="name another port with --draw"
            ) from error
        self.url = f"http://{match[1]}:{self._server.server_address[1]}/"
        threading.Thread(target=self._server.serve_forever, name="view", daemon=True).start()

    def __enter__(self) -> StreamView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening, and send nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()

    def show(self, pixels: NDArray[np.uint8], detections: Detections) -> None:
        """Make this the frame that viewers get; ``pixels`` (h, w, 3) uint8 RGB, which are not changed afterwards."""
        with self._changed:
            number = self._newest[0] + 1 if self._newest else 1
            self._newest = number, pixels, detections
            self._changed.notify_all()

    def _jpeg_after(self, seen: int) -> tuple[int, bytes] | None:
        """The number and JPEG of a frame newer than ``seen``, once there is one; None when the server closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (self._newest is not None and self._newest[0] > seen))
            if self._closed or self._newest is None:
                return None
        with self._encoding:  # one viewer draws, the others take the result
            with self._changed:
                number, pixels, detections = self._newest
            if self._encoded[0] < number:
                self._encoded = number, self._draw(pixels, detections)
            return self._encoded

    def _draw(self, pixels: NDArray[np.uint8], detections: Detections) -> bytes:
        drawn = draw_detections(pixels, detections, self._names, options=self._options)
        scale = _LARGEST / max(drawn.shape[:2])
        if scale < 1:
            drawn = cv2.resize(drawn, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        _, jpeg = cv2.imencode(".jpg", drawn[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
        content: bytes = jpeg.tobytes()
        return content

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        view = self

        class Viewer(BaseHTTPRequestHandler):
            timeout = _PATIENCE

            def do_GET(self) -> None:
                host = self.headers.get("Host", "").rpartition(":")[0]
                if view.is_local and host not in _LOCAL:  # a page of somebody whose name now means this machine
                    self.send_error(403)
                elif self.path != "/":
                    self.send_error(404)
                elif not view._viewers.acquire(blocking=False):
                    self.send_error(503, f"{_VIEWERS} are looking already")
                else:
                    try:
                        self._stream()
                    except OSError:  # gone, or too slow
                        self.close_connection = True
                    finally:
                        view._viewers.release()

            def _stream(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.send_header("Cache-Control", "no-store")
                self.send_header("Cross-Origin-Resource-Policy", "same-origin")
                self.end_headers()
                seen = 0
                while item := view._jpeg_after(seen):
                    seen, jpeg = item
                    head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
                    self.wfile.write(head.encode() + jpeg + b"\r\n")
                    time.sleep(1 / _RATE)

            def log_message(self, *_: object) -> None:
                return

        return Viewer


class _Server(ThreadingHTTPServer):
    """A thread for each connection; one that breaks is no news."""

    daemon_threads = True
    request_queue_size = 2 * _VIEWERS

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's own asks the network for the name of the host
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, *_: object) -> None:
        return


class _ServerV6(_Server):
    address_family = socket.AF_INET6
