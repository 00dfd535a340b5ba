"""Live sources: cameras, network streams and folders that grow; and their view in a browser.

A detector always gets the newest frame of a stream: a thread reads every frame as it arrives and keeps only the last
one, and the frames that a slow detector missed are counted. Viewers get frames with their boxes as MJPEG over HTTP.
Drawing, encoding and sending happen in the viewers' threads, a few times a second, once for all viewers, so that slow
viewers never delay the detector.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import ConfigError, ImageError
from fcos_deploy.core.image import IMAGE_SUFFIXES
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.detector.draw import DrawOptions, draw_detections

if TYPE_CHECKING:
    from fcos_deploy.detector.detector import Detector

__all__ = [
    "DetectionStream",
    "StreamOptions",
    "StreamStatistics",
    "StreamView",
    "StreamedDetections",
    "is_stream",
    "is_view_address",
    "shown_source",
]


_LOG = logging.getLogger(__name__)

cv2 = lazy_import("cv2")

_PROTOCOLS = ("rtsp", "rtsps", "http", "https", "rtmp", "rtp", "udp", "tcp", "srt")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://", re.ASCII)
_DEVICE = re.compile(r"/dev/video\d+|\d{1,3}", re.ASCII)
_TIMEOUT_MS = 5000  # of opening a stream, and of waiting for its next frame
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 30.0  # seconds before a lost source is opened again; doubled each time
_POLL = 0.1  # seconds between two looks into a folder
_LATENCIES = 100_000  # of the last frames, for the percentiles: a stream has no end, and memory has


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """When a stream ends: after ``max_frames`` detections, after ``max_seconds``, or after ``give_up`` without a frame.

    All but the first in seconds; None is never.
    """

    max_frames: int | None = None
    max_seconds: float | None = None
    give_up: float | None = 60.0

    def __post_init__(self) -> None:
        for name in ("max_frames", "max_seconds", "give_up"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"'{name}' must be more than 0, got {value}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedDetections:
    """One frame: its number among all that came, when it came (seconds since 1970), and seconds until the detections.

    ``pixels``: (h, w, 3) uint8 RGB. ``dropped``: frames before it that nobody saw, since the last one that was seen.
    ``image``: name of the file in a folder that grows, elsewhere empty.
    """

    frame: int
    time: float
    latency: float
    dropped: int
    pixels: NDArray[np.uint8]
    detections: Detections
    image: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamStatistics:
    """Frames that came, were detected on, were dropped and could not be read; reconnections; percentiles of latency.

    ``latency_p50`` and so on: of the last 100,000 frames, in milliseconds from a frame's arrival in this process to its
    detections. ``problem``: why the last of the ``failed`` could not be read.
    """

    frames: int
    detected: int
    dropped: int
    failed: int
    reconnections: int
    seconds: float
    latency_p50: float | None = None
    latency_p90: float | None = None
    latency_p99: float | None = None
    problem: str = ""

    @property
    def drop_rate(self) -> float:
        """Share of the frames that came, 0..1."""
        return self.dropped / self.frames if self.frames else 0.0


def is_stream(source: str) -> bool:
    """Whether a source is a URL, a camera's number or device, or a GStreamer pipeline, and not a file of that name."""
    if _URL.match(source) or " ! " in source:
        return True
    return _DEVICE.fullmatch(source) is not None and (source.startswith("/dev/") or not Path(source).exists())


def shown_source(source: str) -> str:
    """The source for people and records: without the password that a URL may hold."""
    return re.sub(r"(://[^/@:]*):[^/]*@", r"\1:***@", source)


# The name of a folder's file, and what gives the pixels: the reading thread does not convert what is dropped.
_Frame = tuple[str, Callable[[], NDArray[np.uint8]]]


class DetectionStream:
    """Iterates over the detections of a source; to be used in a ``with`` block, which stops the reading thread.

    A source that ends, fails or is not there yet is opened again, after 0.5 seconds at first and 30 at last.
    """

    def __init__(self, detector: Detector, source: str | Path, *, options: StreamOptions | None = None) -> None:
        """Start to read ``source``: a URL, a camera's number or device, a GStreamer pipeline, or a folder."""
        self._detector, self._options = detector, options or StreamOptions()
        self._source = str(source)
        self._connect = _connection(self._source, read=detector.read)
        self._changed = threading.Condition()
        self._newest: tuple[int, float, _Frame] | None = None
        self._frames = self._dropped = self._reconnections = 0
        self._problem = ""
        self._stopped = False
        self._detected = self._failed = 0
        self._failure = ""
        self._latencies: deque[float] = deque(maxlen=_LATENCIES)
        self._begin = time.monotonic()
        self._thread = threading.Thread(target=self._read, name="camera", daemon=True)
        self._thread.start()

    def __enter__(self) -> DetectionStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading; a read that hangs is left to end by its timeout."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(2 * _POLL)

    @property
    def statistics(self) -> StreamStatistics:
        """Up to now."""
        with self._changed:
            waiting = self._newest is not None
            percentiles = [None] * 3 if not self._latencies else np.percentile(self._latencies, (50, 90, 99)) * 1000
            p50, p90, p99 = (None if value is None else round(float(value), 2) for value in percentiles)
            return StreamStatistics(
                frames=self._frames - waiting,
                detected=self._detected,
                dropped=self._dropped,
                failed=self._failed,
                reconnections=self._reconnections,
                seconds=round(time.monotonic() - self._begin, 3),
                latency_p50=p50,
                latency_p90=p90,
                latency_p99=p99,
                problem=self._failure,
            )

    def __iter__(self) -> Iterator[StreamedDetections]:
        """Detections of the newest frame, again and again; a frame that cannot be read is counted and passed over.

        Raises:
            ImageError: no frame came for ``give_up`` seconds.
        """
        seen = 0
        while self._options.max_frames is None or self._detected < self._options.max_frames:
            newest = self._next()
            if newest is None:
                return
            number, arrival, (image, read) = newest
            wall = time.time() - (time.monotonic() - arrival)
            try:
                pixels = read()
                detections = self._detector.detect(pixels)
            except ImageError as error:  # a file of a folder that is no image, or a frame of no usable size
                self._problem = error.message
                with self._changed:
                    self._failed, self._failure, seen = self._failed + 1, error.message, number
                _LOG.warning("frame %d is passed over: %s", number, error.message)
                continue
            latency = time.monotonic() - arrival
            with self._changed:
                self._latencies.append(latency)
                self._detected += 1
            dropped, seen = number - seen - 1, number
            yield StreamedDetections(
                frame=number,
                time=wall,
                latency=latency,
                dropped=dropped,
                pixels=pixels,
                detections=detections,
                image=image,
            )

    def _next(self) -> tuple[int, float, _Frame] | None:
        """The newest frame, once it is there; None when the stream's time is over."""
        options, now = self._options, time.monotonic()
        end = None if options.max_seconds is None else self._begin + options.max_seconds
        lost = None if options.give_up is None else now + options.give_up
        with self._changed:
            while self._newest is None:
                now = time.monotonic()
                if self._stopped or (end is not None and now >= end):
                    return None
                if lost is not None and now >= lost:
                    raise ImageError(
                        f"'{shown_source(self._source)}' gave no frame for {options.give_up:g} seconds"
                        f"{self._problem and f': {self._problem}'}.",
                        hint="is the camera on, and the address right? --give-up waits longer",
                    )
                waits = [limit - now for limit in (end, lost) if limit is not None]
                self._changed.wait(min(waits) if waits else None)
            newest, self._newest = self._newest, None
            return None if end is not None and time.monotonic() >= end else newest

    def _read(self) -> None:
        """The reading thread: keep the newest frame, and open the source again whenever it is lost."""
        delay = _FIRST_DELAY
        while not self._stopped:
            try:
                for frame in self._connect():
                    delay = _FIRST_DELAY
                    if not self._offer(frame):
                        return
                self._problem = "the stream ended"
            except (ImageError, OSError) as error:
                self._problem = str(getattr(error, "message", error)).rstrip(".")
            except Exception as error:  # noqa: BLE001  # OpenCV raises its own; the reader must not die silently
                self._problem = f"{type(error).__name__}: {error}"
            with self._changed:
                if self._changed.wait_for(lambda: self._stopped, delay):
                    return
                self._reconnections += 1
            delay = min(2 * delay, _LONGEST_DELAY)

    def _offer(self, frame: _Frame) -> bool:
        """Keep a frame in place of the one before; False when nobody wants it any more."""
        with self._changed:
            self._frames += 1
            self._dropped += self._newest is not None
            self._newest = self._frames, time.monotonic(), frame
            self._changed.notify_all()
            return not self._stopped


def _connection(source: str, *, read: Callable[[Path], NDArray[np.uint8]]) -> Callable[[], Iterator[_Frame]]:
    """What opens a source and yields its frames until it ends; ``read`` gives the pixels of a file of a folder."""
    if " ! " in source:
        if "GStreamer:                   YES" not in cv2.getBuildInformation():
            raise ConfigError(
                "This OpenCV was built without GStreamer, so that it opens no pipeline.",
                hint="install the distribution's python3-opencv, or give the camera's address",
            )
        return lambda: _captured(source, cv2.CAP_GSTREAMER)
    url = _URL.match(source)
    if url:
        if url[1].lower() not in _PROTOCOLS:
            raise ConfigError(
                f"'{shown_source(source)}' uses a protocol that is not supported.",
                hint=f"known: {', '.join(_PROTOCOLS)}",
            )
        return lambda: _captured(source, cv2.CAP_FFMPEG)
    if _DEVICE.fullmatch(source) and not Path(source).is_dir():
        return lambda: _captured(int(source) if source.isdigit() else source, cv2.CAP_V4L2)
    if Path(source).is_dir():
        return lambda: _arriving(Path(source), read)
    raise ConfigError(
        f"'{source}' is not a stream.", hint="give a URL, a camera's number or /dev/video0, or a folder that grows"
    )


def _captured(source: str | int, backend: int) -> Iterator[_Frame]:
    limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _TIMEOUT_MS]
    capture = cv2.VideoCapture(source, backend, limits if backend == cv2.CAP_FFMPEG else [])
    try:
        if not capture.isOpened():
            raise ImageError("it cannot be opened")
        while True:
            read, frame = capture.read()
            if not read:
                return
            yield "", functools.partial(_rgb, frame)
    finally:
        capture.release()


def _rgb(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), np.uint8)


def _arriving(folder: Path, read: Callable[[Path], NDArray[np.uint8]]) -> Iterator[_Frame]:
    """Images that come into a folder or change from now on, oldest first, as soon as they are the same at two looks."""
    given = _entries(folder)
    before = given
    while True:
        entries = _entries(folder)
        for name, state in sorted(entries.items(), key=lambda item: item[1]):
            if state != given.get(name) and state == before.get(name) and state[1]:
                given[name] = state
                yield name, functools.partial(read, folder / name)
        given = {name: state for name, state in given.items() if name in entries}
        before = entries
        time.sleep(_POLL)


def _entries(folder: Path) -> dict[str, tuple[int, int]]:
    """Time of the last change in nanoseconds, and size, of the images in a folder by name."""
    entries = {}
    with os.scandir(folder) as scan:
        for entry in scan:
            if Path(entry.name).suffix.lower() in IMAGE_SUFFIXES and not entry.name.startswith("."):
                with contextlib.suppress(OSError):  # removed in between
                    entries[entry.name] = (entry.stat().st_mtime_ns, entry.stat().st_size)
    return entries


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
                f"'{address}' is not an address to show frames at.", hint="--draw http://localhost:8090, or 127.0.0.1"
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

    def __exit__(self, *_: object) -> None:
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
