"""A served model gives the detections of a local one; the server is NVIDIA Triton itself.

It serves the repository that ``package --for triton`` writes, as it is written. ``FCOS_DEPLOY_TRITON_PYTHON`` names
the Python of the server's environment (``make server-env``). Without it, only what needs no server is tested.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

from fcos_deploy.accuracy.verify import VerifyOptions, verify_bundle
from fcos_deploy.bundle import open_bundle
from fcos_deploy.cli.app import build_app
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.contract import read_contract
from fcos_deploy.core.errors import BackendError, BackendLoadError, ConfigError, DeviceError
from fcos_deploy.detector import Detector
from fcos_deploy.serving import package_bundle
from runtimes._kserve import parse_address
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

    def __init__(self, repository: Path, folder: Path) -> None:
        self.repository, self.folder = repository, folder
        self.log = folder / "log"
        self.http, self.grpc = _free_port(), _free_port()
        self.start()

    def start(self) -> None:
        command = [PYTHON, str(SCRIPT), str(self.repository), str(self.http), str(self.grpc), str(self.folder)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, start_new_session=True, stdout=log, stderr=subprocess.STDOUT)
        end = time.monotonic() + 120
        while not self._ready():
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                pytest.fail("The server is not ready:\n" + self.log.read_text(errors="replace")[-3000:])
            time.sleep(0.1)

    def _ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.http, timeout=5)
        try:
            connection.request("GET", f"/v2/models/{ANY_NAME}/ready")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    @contextlib.contextmanager
    def pausing(self, seconds: float) -> Iterator[None]:
        """Each inference waits meanwhile."""
        (self.folder / "pause").write_text(str(seconds))
        try:
            yield
        finally:
            (self.folder / "pause").unlink()

    def kill(self) -> None:
        """With everything that it started; may be called twice."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for region in Path("/dev/shm").glob(f"{self.folder.name}*"):
            region.unlink(missing_ok=True)  # a killed server leaves its shared memory

    def url(self, scheme: str) -> str:
        return f"{scheme}://127.0.0.1:{self.http if scheme == 'http' else self.grpc}/v2/models/{ANY_NAME}"


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    repository = tmp_path_factory.mktemp("repository") / "models"
    with open_bundle(tiny_bundle) as bundle:
        package_bundle(bundle, server="triton", output=repository)
    running = Server(repository, tmp_path_factory.mktemp(f"triton-{os.getpid()}-"))
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
    scheme: str, server: Server, tiny_onnx: Path, blobs: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    if scheme == "grpc":
        pytest.importorskip("tritonclient")
    with Detector.open(_description(tmp_path, server.url(scheme), tiny_onnx)) as remote:
        before = remote.detect(blobs[0])
        with server.pausing(5.0):
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


def _patiently(remote: Detector, image: NDArray[np.uint8]):
    """gRPC waits longer and longer between attempts to connect; a few seconds are allowed."""
    for _ in range(30):
        try:
            return remote.detect(image)
        except BackendError:
            time.sleep(0.5)
    return remote.detect(image)


def _when(condition: Callable[[], bool], action: Callable[[], None]) -> threading.Thread:
    def watch() -> None:
        end = time.monotonic() + 120
        while not condition() and time.monotonic() < end:
            time.sleep(0.005)
        action()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@needs_server
@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_an_evaluation_whose_server_dies_goes_on_after_a_restart_and_holds_the_gate(
    scheme: str, server: Server, tiny_onnx: Path, smooth_images: Path, tmp_path: Path
) -> None:
    if scheme == "grpc":
        pytest.importorskip("tritonclient")
    images, kept = tmp_path / "images", tmp_path / "kept"
    images.mkdir()
    for path in smooth_images.rglob("*.png"):
        (images / path.name).write_bytes(path.read_bytes())
    gate = ("--min-match-rate", "1", "--judge", "point", "--reference", tiny_onnx, "--resamples", "0", "--json")
    description = _description(tmp_path, server.url(scheme), tiny_onnx)

    def run() -> Result:
        arguments = ("evaluate", description, "--images", images, "--predictions", kept, *gate)
        return CliRunner().invoke(build_app(), [str(argument) for argument in arguments])

    def remote_lines() -> int:
        return sum(path.read_bytes().count(b"\n") for path in kept.glob("*.jsonl"))

    with server.pausing(0.2):  # the reference is done first, without the server
        killer = _when(lambda: remote_lines() >= 12 + 3, server.kill)
        failed = run()
        killer.join()
    assert failed.exit_code == 1, failed.stderr
    assert "127.0.0.1" in failed.stderr
    assert "was lost" in failed.stderr
    before = remote_lines()
    assert 12 + 3 <= before < 12 + 12
    server.start()
    done = run()
    assert done.exit_code == 0, done.stderr
    assert "PASSED" in done.stderr
    assert remote_lines() == 24
    assert '"resumed_images": ' + str(before - 12) in done.stdout, done.stdout
    here, there = (sorted(map(json.loads, path.read_text().splitlines()), key=_image) for path in kept.glob("*.jsonl"))
    for one, other in zip(here, there, strict=True):
        assert one["labels"] == other["labels"]
        np.testing.assert_allclose(one["boxes"], other["boxes"], atol=1e-3)


def _image(record: dict[str, int]) -> int:
    return record["image_id"]


@needs_server
@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_an_answer_that_takes_too_long_is_a_timeout(
    scheme: str, server: Server, tiny_onnx: Path, blobs: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    if scheme == "grpc":
        pytest.importorskip("tritonclient")
    path = _description(tmp_path, server.url(scheme), tiny_onnx, timeout_s=1.0)
    with server.pausing(2.5), Detector.open(path) as remote, pytest.raises(BackendError, match="within 1 s"):
        remote.detect(blobs[0])


@needs_server
def test_triton_took_the_repository_as_it_was_packaged(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.http, timeout=30)
    connection.request("GET", f"/v2/models/{ANY_NAME}/config")
    config = json.loads(connection.getresponse().read())
    connection.close()
    assert (config["backend"], config["max_batch_size"]) == ("onnxruntime", 0)
    assert config["output"][0]["label_filename"] == "labels.txt"
    assert config["model_warmup"][0]["inputs"]["images"]["random_data"] is True
    assert json.loads(config["parameters"]["fcos_deploy.contract"]["string_value"])["class_names"][0] == "red"
    assert "successfully loaded 'tiny'" in server.log.read_text()


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
