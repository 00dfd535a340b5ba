"""A served model gives the detections of a local one; the server is NVIDIA Triton itself.

``FCOS_DEPLOY_TRITON_PYTHON`` names the Python of an environment with nvidia-pytriton and onnxruntime
(docs/serving.md says how to make one). Without it, only what needs no server is tested.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fcos_deploy.bundle import open_bundle
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.contract_io import read_contract
from fcos_deploy.core.errors import BackendError, BackendLoadError, ConfigError, DeviceError
from fcos_deploy.detector import Detector
from fcos_deploy.verification import VerifyOptions, verify_bundle
from runtimes._kserve_protocol import parse_address
from runtimes.kserve import BACKEND, RemoteModel, write_remote_model

SCRIPT = Path(__file__).parents[1] / "data" / "serving" / "triton_server.py"
PYTHON = os.environ.get("FCOS_DEPLOY_TRITON_PYTHON", "")
needs_server = pytest.mark.skipif(not PYTHON, reason="FCOS_DEPLOY_TRITON_PYTHON is not set")
ANY_NAME = "tiny"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A Triton server in a process group of its own."""

    def __init__(self, model: Path, *, pause: float = 0.0) -> None:
        self.model, self.pause = model, pause
        self.http, self.grpc = _free_port(), _free_port()
        self.start()

    def start(self) -> None:
        command = [PYTHON, str(SCRIPT), str(self.model), ANY_NAME, str(self.http), str(self.grpc), str(self.pause)]
        self.process = subprocess.Popen(
            command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + 120
        while not self._ready():
            assert self.process.poll() is None, "the server ended"
            assert time.monotonic() < end, "the server is not ready after two minutes"
            time.sleep(0.2)

    def _ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.http, timeout=5)
        try:
            connection.request("GET", f"/v2/models/{ANY_NAME}/ready")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def url(self, scheme: str) -> str:
        return f"{scheme}://127.0.0.1:{self.http if scheme == 'http' else self.grpc}/v2/models/{ANY_NAME}"


@pytest.fixture(scope="module")
def server(tiny_onnx: Path) -> Iterator[Server]:
    running = Server(tiny_onnx)
    yield running
    running.kill()


def _description(folder: Path, url: str, model: Path, *, timeout_s: float = 60.0) -> Path:
    path = folder / "tiny.kserve"
    write_remote_model(path, RemoteModel(url=url, contract=read_contract(model), timeout_s=timeout_s))
    return path


@needs_server
@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_the_server_gives_the_detections_of_the_local_engine(
    server: Server, scheme: str, tiny_onnx: Path, blobs: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    if scheme == "grpc":
        pytest.importorskip("tritonclient")
    remote_path = _description(tmp_path, server.url(scheme), tiny_onnx)
    with Detector.open(remote_path) as remote, Detector.open(tiny_onnx, backend="onnxruntime") as local:
        assert remote.session.description["server"].startswith("triton")
        found = 0
        for image in blobs:
            here, there = local.detect(image), remote.detect(image)
            np.testing.assert_array_equal(there.labels, here.labels)
            np.testing.assert_allclose(there.boxes, here.boxes, atol=1e-3)
            np.testing.assert_allclose(there.scores, here.scores, atol=1e-5)
            found += len(here)
        assert found > 10


@needs_server
def test_a_bundle_is_verified_against_a_server(server: Server, tiny_bundle: Path) -> None:
    with open_bundle(tiny_bundle) as bundle:
        record = verify_bundle(bundle, options=VerifyOptions(server=server.url("http")))
    assert record.passed, record.summary
    assert record.matched == 1.0
    assert record.backend == "kserve"
    assert record.session["url"] == server.url("http")


@needs_server
def test_eight_threads_share_a_session(
    server: Server, tiny_onnx: Path, blobs: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    with Detector.open(_description(tmp_path, server.url("http"), tiny_onnx)) as remote, ThreadPoolExecutor(8) as pool:
        single = [remote.detect(image) for image in blobs]
        many = list(pool.map(remote.detect, blobs * 6))
    for index, found in enumerate(many):
        np.testing.assert_array_equal(found.boxes, single[index % len(blobs)].boxes)


@needs_server
@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_killed_in_the_middle_it_is_a_clear_error_and_resumes_after_a_restart(
    scheme: str, tiny_onnx: Path, blobs: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    if scheme == "grpc":
        pytest.importorskip("tritonclient")
    server = Server(tiny_onnx, pause=1.0)
    try:
        with Detector.open(_description(tmp_path, server.url(scheme), tiny_onnx)) as remote:
            before = remote.detect(blobs[0])
            killer = threading.Timer(0.3, server.kill)
            killer.start()
            with pytest.raises(BackendError, match="lost"):
                remote.detect(blobs[0])
            killer.join()
            with pytest.raises(BackendError, match="lost"):
                remote.detect(blobs[0])
            server.start()
            after = _patiently(remote, blobs[0])
            np.testing.assert_array_equal(after.boxes, before.boxes)
    finally:
        if server.process.poll() is None:
            server.kill()


def _patiently(remote: Detector, image: NDArray[np.uint8]):
    """gRPC waits longer and longer between attempts to connect; a few seconds are allowed."""
    for _ in range(30):
        try:
            return remote.detect(image)
        except BackendError:
            time.sleep(0.5)
    return remote.detect(image)


@needs_server
@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_an_answer_that_takes_too_long_is_a_timeout(
    scheme: str, tiny_onnx: Path, blobs: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    if scheme == "grpc":
        pytest.importorskip("tritonclient")
    server = Server(tiny_onnx, pause=4.0)
    try:
        path = _description(tmp_path, server.url(scheme), tiny_onnx, timeout_s=2.0)
        with Detector.open(path) as remote, pytest.raises(BackendError, match="within 2 s"):
            remote.detect(blobs[0])
    finally:
        server.kill()


@needs_server
def test_a_model_that_the_server_does_not_have_is_named(server: Server, tiny_onnx: Path, tmp_path: Path) -> None:
    path = _description(tmp_path, server.url("http").replace(ANY_NAME, "huge"), tiny_onnx)
    with pytest.raises(BackendLoadError, match="does not serve 'huge'"):
        Detector.open(path)


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_server_that_is_away_is_told_with_its_address(scheme: str, bundle_contract, tmp_path: Path) -> None:
    if scheme == "grpc":
        pytest.importorskip("tritonclient")
    port = _free_port()
    path = tmp_path / "m.kserve"
    model = RemoteModel(url=f"{scheme}://127.0.0.1:{port}/v2/models/m", contract=bundle_contract, timeout_s=3.0)
    write_remote_model(path, model)
    with pytest.raises(DeviceError, match=f"127.0.0.1:{port} does not answer"):
        BACKEND.open(path, SessionOptions())


def test_something_else_that_speaks_http_is_not_taken_for_a_server(bundle_contract, tmp_path: Path) -> None:
    (tmp_path / "v2").write_text("<html>hello</html>")
    web = subprocess.Popen(
        ["python", "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert web.stdout is not None
        port = int(web.stdout.readline().split(" port ")[1].split()[0])
        path = tmp_path / "m.kserve"
        write_remote_model(path, RemoteModel(url=f"http://127.0.0.1:{port}/v2/models/m", contract=bundle_contract))
        with pytest.raises(BackendLoadError, match="not JSON"):
            BACKEND.open(path, SessionOptions())
    finally:
        web.terminate()
        web.wait()
        assert web.stdout is not None
        web.stdout.close()


@pytest.mark.parametrize("url", ["", "tiny", "ftp://h/v2/models/m", "http://h:99999/m", "http://h/", "http://h/a/b/c"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        parse_address(url)


def test_addresses() -> None:
    assert str(parse_address("http://h/v2/models/m/versions/3")) == "http://h:8000/v2/models/m/versions/3"
    assert parse_address("grpc://h/m").port == 8001
    assert parse_address("https://h:444/m").port == 444


def test_options_of_a_local_engine_are_refused(bundle_contract, tmp_path: Path) -> None:
    path = tmp_path / "m.kserve"
    write_remote_model(path, RemoteModel(url="http://localhost/m", contract=bundle_contract))
    with pytest.raises(ConfigError, match="device, threads"):
        BACKEND.open(path, SessionOptions(device="cpu", threads=2))


@pytest.mark.parametrize("content", ["", "{}", '{"url": "http://h/m"}', '{"url": 5, "contract": null}'])
def test_a_damaged_description_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "m.kserve").write_text(content)
    with pytest.raises((BackendLoadError, ConfigError)):
        BACKEND.open(tmp_path / "m.kserve", SessionOptions())
