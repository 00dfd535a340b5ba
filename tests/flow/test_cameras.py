"""Streams that do not wait: a real MJPEG server over HTTP, and folders that grow."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from fcos_deploy import Detector
from fcos_deploy.cli.app import build_app
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import Orientation
from fcos_deploy.core.errors import ConfigError, ImageError
from fcos_deploy.detector.draw import draw_detections
from fcos_deploy.detector.sources import StreamOptions, StreamView, is_stream, shown_source

pytest.importorskip("onnxruntime")


class Camera:
    """Sends frames whose gray value is their number, 50 a second, of ``sizes`` (width, height) by turns."""

    def __init__(self, *, sizes: tuple[tuple[int, int], ...] = ((160, 128),), port: int = 0) -> None:
        frames = [self._jpeg(sizes[value // 8 % len(sizes)], value) for value in range(256)]

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:  # noqa: N805
                handler.send_response(200)
                handler.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                handler.end_headers()
                try:
                    while not self.stopped:
                        self.sent += 1
                        jpeg = frames[self.sent % 256]
                        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
                        handler.wfile.write(head.encode() + jpeg + b"\r\n")
                        time.sleep(0.02)
                except OSError:
                    pass

            def log_message(self, *arguments: object) -> None:
                pass

        self.sent, self.stopped = 0, False
        ThreadingHTTPServer.allow_reuse_address = True
        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/stream"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @staticmethod
    def _jpeg(size: tuple[int, int], value: int) -> bytes:
        stream = io.BytesIO()
        Image.new("RGB", size, (value, value, value)).save(stream, "JPEG")
        return stream.getvalue()

    def close(self) -> None:
        self.stopped = True
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def camera() -> Iterator[Camera]:
    started = Camera()
    yield started
    started.close()


@pytest.fixture(scope="module")
def detector(tiny_onnx: Path) -> Iterator[Detector]:
    with Detector.open(tiny_onnx) as opened:
        yield opened


def run(*arguments: object) -> Result:
    return CliRunner().invoke(build_app(), [str(argument) for argument in arguments])


def test_a_slow_detector_sees_the_present_and_counts_what_it_missed(detector: Detector, camera: Camera) -> None:
    behind = []
    with detector.stream(camera.url, options=StreamOptions(max_frames=8)) as stream:
        for item in stream:
            behind.append((camera.sent - round(float(item.pixels.mean()))) % 256)
            time.sleep(0.2)  # ten frames of the camera
        figures = stream.statistics
    assert figures.detected == 8
    assert figures.frames == figures.detected + figures.dropped
    assert figures.dropped > 30
    # At 50 frames a second a queue would be 70 frames behind by now.
    assert max(behind[2:]) < 15
    assert figures.latency_p50 is not None
    assert figures.latency_p50 <= figures.latency_p90 <= figures.latency_p99 < 1000


def test_a_stream_is_opened_again_when_its_server_comes_back(detector: Detector) -> None:
    first = Camera()
    with detector.stream(first.url, options=StreamOptions(max_frames=40, give_up=20)) as stream:
        items = iter(stream)
        for _ in range(5):
            next(items)
        first.close()
        time.sleep(0.8)
        second = Camera(port=first.port)
        rest = list(items)
        second.close()
        assert len(rest) == 35
        assert stream.statistics.reconnections >= 1
        assert rest[-1].time == pytest.approx(time.time(), abs=30)


def test_a_stream_whose_size_changes_goes_on(detector: Detector) -> None:
    """FFmpeg's reader in OpenCV scales all frames to the size of the first."""
    camera = Camera(sizes=((160, 128), (96, 64)))
    with detector.stream(camera.url, options=StreamOptions(max_frames=30)) as stream:
        shapes = {item.pixels.shape for item in stream}
    camera.close()
    assert shapes == {(128, 160, 3)}


class RtspCamera:
    """An RTSP server in a process of its own, which prints its port once it listens."""

    def __init__(self, *command: object) -> None:
        words = [str(word) for word in command]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.kill()
            pytest.skip("the system's Python has no RTSP server of GStreamer (Debian: gir1.2-gst-rtsp-server-1.0)")
        self.port = int(line)
        self.url = f"rtsp://127.0.0.1:{self.port}/camera"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def jpeg_camera(*sizes: str, port: int = 0) -> RtspCamera:
    """``benchmarks/rtsp_camera.py``; its frames are ``sizes`` by turns."""
    script = Path(__file__).parents[2] / "benchmarks" / "rtsp_camera.py"
    return RtspCamera(sys.executable, script, f"--port={port}", "--rate=50", *(f"--size={size}" for size in sizes))


GSTREAMER = """
import sys
import gi
gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer
Gst.init(None)
assert Gst.ElementFactory.find("x264enc")
width, height = sys.argv[1].split("x")
server = GstRtspServer.RTSPServer(address="127.0.0.1", service=sys.argv[2])
factory = GstRtspServer.RTSPMediaFactory(shared=True)
factory.set_launch(
    f"videotestsrc is-live=true ! video/x-raw,format=I420,width={width},height={height},framerate=50/1 "
    "! x264enc tune=zerolatency key-int-max=10 ! rtph264pay name=pay0 config-interval=1"
)
server.get_mount_points().add_factory("/camera", factory)
server.attach(None)
print(server.get_bound_port(), flush=True)
GLib.MainLoop().run()
"""


def h264_camera(size: str, *, port: int = 0) -> RtspCamera:
    """GStreamer's RTSP server, with H.264, in the system's Python."""
    return RtspCamera("/usr/bin/python3", "-c", GSTREAMER, size, port)


def test_an_rtsp_server_of_gstreamer_is_killed_and_comes_back_with_another_size(detector: Detector) -> None:
    camera = h264_camera("160x128")
    with detector.stream(camera.url, options=StreamOptions(max_frames=60, give_up=60)) as stream:
        items = iter(stream)
        before = [next(items) for _ in range(30)]
        camera.kill()
        again = h264_camera("96x64", port=camera.port)
        after = list(items)
        again.kill()
        figures = stream.statistics
    assert {item.pixels.shape for item in before} == {(128, 160, 3)}
    assert {item.pixels.shape for item in after[-5:]} == {(64, 96, 3)}
    assert all(first.time < second.time for first, second in itertools.pairwise(before))
    assert figures.detected == 60
    assert figures.reconnections >= 1
    assert figures.frames == figures.detected + figures.dropped + figures.failed


def test_an_rtsp_server_is_killed_comes_back_and_changes_its_size(detector: Detector) -> None:
    camera = jpeg_camera("160x128", "96x64")
    with detector.stream(camera.url, options=StreamOptions(max_frames=60, give_up=30)) as stream:
        items = iter(stream)
        before = [next(items) for _ in range(30)]
        camera.kill()
        again = jpeg_camera("96x64", port=camera.port)
        after = list(items)
        again.kill()
        figures = stream.statistics
    assert {item.pixels.shape for item in before} == {(128, 160, 3), (64, 96, 3)}
    assert {item.pixels.shape for item in after[-5:]} == {(64, 96, 3)}
    assert figures.detected == 60
    assert figures.reconnections >= 1
    assert figures.frames == figures.detected + figures.dropped + figures.failed


def test_an_unreadable_image_of_a_followed_folder_counts_as_failed(
    tiny_onnx: Path, smooth_images: Path, tmp_path: Path
) -> None:
    source, ended = next(smooth_images.rglob("*.png")), threading.Event()

    def arrive() -> None:
        for number in range(200):  # by turns, since nobody says when the command looks for the first time
            (tmp_path / f"{number}.png").write_bytes(source.read_bytes() if number % 2 else b"no image")
            if ended.wait(0.3):
                return

    thread = threading.Thread(target=arrive)
    thread.start()
    done = run("predict", tiny_onnx, tmp_path, "--follow", "--max-frames", 2, "--give-up", 30, "--json")
    ended.set()
    thread.join()
    *lines, last = map(json.loads, done.stdout.splitlines())
    figures = last["statistics"]
    assert figures["detected"] == 2
    assert [int(Path(line["image"]).stem) % 2 for line in lines] == [1, 1]
    assert figures["failed"] >= 1
    assert figures["frames"] == figures["detected"] + figures["dropped"] + figures["failed"]
    assert done.exit_code == 1
    message = " ".join(done.stderr.split())
    assert f"{figures['failed']} of {figures['frames']} frames of '{tmp_path}' could not be read" in message
    assert "is not an image" in figures["problem"]


def _look(url: str, *, frames: int, headers: dict[str, str] | None = None) -> list[Image.Image]:
    """The first frames that a browser gets."""
    request = urllib.request.Request(url, headers=headers or {})
    images = []
    with urllib.request.urlopen(request, timeout=20) as response:
        assert response.headers["Content-Type"].startswith("multipart/x-mixed-replace")
        while len(images) < frames:
            length = next(int(line[16:]) for line in response if line.startswith(b"Content-Length: "))
            response.readline()
            images.append(Image.open(io.BytesIO(response.read(length))).convert("RGB"))
    return images


def test_a_stream_is_shown_and_nobody_who_looks_holds_it_up(detector: Detector) -> None:
    pixels = np.full((240, 320, 3), 90, np.uint8)
    detections = Detections(np.float32([[40, 60, 200, 180]]), np.float32([0.9]), np.int64([1]))
    big = np.random.default_rng(0).integers(0, 255, (1500, 2000, 3), np.uint8)
    with StreamView("http://localhost:0", names=detector.names) as view:
        view.show(pixels, detections)
        (shown,) = _look(view.url, frames=1)
        expected = draw_detections(pixels, detections, detector.names)
        assert np.abs(np.asarray(shown, int) - expected).mean() < 1.5
        assert np.abs(expected.astype(int) - pixels).mean() > 3, "a box is drawn"
        for path, host, code in (("etc", None, 404), ("", "evil.example:1", 403)):
            with pytest.raises(urllib.error.HTTPError) as refused:
                _look(view.url + path, frames=1, headers={"Host": host} if host else {})
            assert refused.value.code == code
            refused.value.close()
        port = int(view.url.split(":")[-1].strip("/"))
        sleepers = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
        for sleeper in sleepers:  # ask, and read nothing
            sleeper.sendall(b"GET / HTTP/1.1\r\nHost: localhost:1\r\n\r\n")
        begin = time.monotonic()
        for _ in range(200):
            view.show(big, detections)
        assert time.monotonic() - begin < 0.5
        time.sleep(0.5)
        with pytest.raises(urllib.error.HTTPError) as full:
            _look(view.url, frames=1)
        assert full.value.code == 503
        full.value.close()
        for sleeper in sleepers:
            sleeper.close()
        for _ in range(50):  # they are noticed as gone at the next frames
            view.show(pixels, detections)
            time.sleep(0.1)
            try:
                assert _look(view.url, frames=1)
                break
            except urllib.error.HTTPError as busy:
                busy.close()
        else:
            pytest.fail("the dead viewers keep their places")
        addresses = {item[4][0] for item in socket.getaddrinfo(socket.gethostname(), None)} - {"127.0.0.1", "::1"}
        for address in addresses:  # this machine, by the names that others reach it by
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((address, port), timeout=2).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=2).close()


def test_predict_shows_a_stream_while_it_runs(tiny_onnx: Path, camera: Camera) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    looks: list[Image.Image] = []

    def look() -> None:
        for _ in range(100):
            try:
                looks.extend(_look(f"http://localhost:{port}/", frames=2))
                return
            except OSError:
                time.sleep(0.1)

    thread = threading.Thread(target=look)
    thread.start()
    done = run("predict", tiny_onnx, camera.url, "--max-seconds", 6, "--draw", f"http://localhost:{port}")
    thread.join()
    assert done.exit_code == 0, done.stderr
    assert f"shown at http://localhost:{port}/" in done.stderr
    assert [image.size for image in looks] == [(160, 128)] * 2


def test_a_folder_that_grows_is_followed(detector: Detector, smooth_images: Path, tmp_path: Path) -> None:
    sources = sorted(smooth_images.rglob("*.png"))[:4]
    shutil.copyfile(sources[0], tmp_path / "old.png")

    def arrive() -> None:
        time.sleep(0.3)
        (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
        for number, source in enumerate(sources[1:]):
            content = source.read_bytes()
            with (tmp_path / f"{number}.png").open("wb") as stream:  # in two halves
                stream.write(content[: len(content) // 2])
                stream.flush()
                time.sleep(0.15)
                stream.write(content[len(content) // 2 :])
            time.sleep(0.35)

    thread = threading.Thread(target=arrive)
    with detector.stream(tmp_path, options=StreamOptions(max_frames=3, give_up=20)) as stream:
        thread.start()
        found = list(stream)
    thread.join()
    assert stream.statistics.failed >= 1
    assert [item.image for item in found] == ["0.png", "1.png", "2.png"]
    assert [item.detections.scores.tolist() for item in found] == [
        detector.detect(source).scores.tolist() for source in sources[1:]
    ]


def test_files_of_a_folder_are_turned_as_the_contract_says(detector: Detector, tmp_path: Path) -> None:
    """As ``predict`` does with a file that is named."""
    spec = replace(detector.contract.preprocess, orientation=Orientation.STORED)
    stored = Detector(detector.session, replace(detector.contract, preprocess=spec))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    with stored.stream(tmp_path, options=StreamOptions(max_frames=1, give_up=20)) as stream:
        time.sleep(0.3)
        Image.new("RGB", (80, 40)).save(tmp_path / "turned.jpg", exif=exif)
        (item,) = stream
    assert item.pixels.shape == stored.read(tmp_path / "turned.jpg").shape == (40, 80, 3)


def test_predict_prints_a_line_a_frame(tiny_onnx: Path, camera: Camera) -> None:
    done = run("predict", tiny_onnx, camera.url, "--max-frames", 5, "--json")
    assert done.exit_code == 0, done.stderr
    *lines, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["source"] for line in lines] == [camera.url] * 5
    assert all(line["width"] == 160 and line["latency_ms"] > 0 and "detections" in line for line in lines)
    assert last["statistics"]["detected"] == 5
    assert "latency p50" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("http://127.0.0.1:9/none", "--give-up", "0.4"), 1, "gave no frame for 0.4 seconds"),
        (("rtsp://me:secret@127.0.0.1:9/x", "--give-up", "0.4"), 1, "'rtsp://me:***@127.0.0.1:9/x' gave no frame"),
        (("/dev/video77", "--give-up", "0.4"), 1, "gave no frame"),
        (("file:///etc/passwd",), 2, "uses a protocol that is not supported"),
        (("videotestsrc ! appsink",), 2, "built without GStreamer"),
        (("nowhere", "--follow"), 2, "'nowhere' is not a stream"),
        (("http://127.0.0.1:9/none", "--draw", "folder"), 2, "A stream is shown in a browser"),
        (("a.png", "--draw", "http://localhost:8090"), 2, "A stream is shown in a browser"),
        (("http://127.0.0.1:9/none", "--draw", "http://localhost"), 2, "is not an address to show frames at"),
        (("http://127.0.0.1:9/none", "--draw", "https://localhost:1"), 2, "is not an address to show frames at"),
        (("http://127.0.0.1:9/none", "--draw", "http://192.0.2.1:8090"), 2, "Cannot show frames at"),
        (("http://127.0.0.1:9/none", "a.png"), 2, "A command reads a single stream"),
        (("a.png", "--max-frames", "3"), 2, "end a stream"),
    ],
)
def test_streams_that_cannot_be_read_are_a_sentence(
    arguments: tuple[str, ...], code: int, message: str, tiny_onnx: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done = run("predict", tiny_onnx, *arguments)
    assert done.exit_code == code, done.output
    assert message in " ".join(done.stderr.split())
    assert "secret" not in done.output
    capfd.readouterr()  # OpenCV's and FFmpeg's lines


def test_what_a_stream_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, detector: Detector) -> None:
    monkeypatch.chdir(tmp_path)
    assert all(map(is_stream, ("0", "12", "/dev/video0", "rtsp://a/b", "HTTP://a", "a ! b")))
    assert not any(map(is_stream, ("a.png", "1234", "photos", "/dev/null", "a!b.jpg")))
    (tmp_path / "0").mkdir()
    assert not is_stream("0")
    assert shown_source("rtsp://u:p@h/x") == "rtsp://u:***@h/x"
    assert shown_source("rtsp://u:p@ss:w@h/x") == "rtsp://u:***@h/x"
    assert shown_source("rtsp://h/x@y") == "rtsp://h/x@y"
    for wrong in ({"max_frames": 0}, {"max_seconds": -1.0}, {"give_up": 0.0}):
        with pytest.raises(ConfigError, match="more than 0"):
            StreamOptions(**wrong)
    with (
        detector.stream("http://127.0.0.1:9/", options=StreamOptions(give_up=0.3)) as stream,
        pytest.raises(ImageError),
    ):
        next(iter(stream))
    assert np.isfinite(stream.statistics.drop_rate)
