"""A served model gives the detections of a local one; who may talk to whom over TLS; answers without bounds.

The server is NVIDIA Triton itself. It serves the repository that ``package --for triton`` writes, as it is written.
``FCOS_DEPLOY_TRITON_PYTHON`` names the Python of the server's environment (``make server-env``). Without it, only what
needs no server is tested. For TLS it is Python's own for HTTPS and gRPC's own for grpcs, with a real model in ONNX
Runtime behind both.
"""

from __future__ import annotations

import contextlib
import datetime
import http.client
import http.server
import ipaddress
import json
import os
import resource
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

from fcos_deploy.accuracy.verify import VerifyOptions, verify_bundle
from fcos_deploy.bundle import open_bundle
from fcos_deploy.cli.app import build_app
from fcos_deploy.core.artifact import read_contract
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.errors import BackendError, BackendLoadError, ConfigError, DeviceError, FcosDeployError
from fcos_deploy.detector import Detector
from fcos_deploy.serving import package_bundle
from runtimes.kserve import BACKEND, DATATYPES, RemoteModel, parse_address, write_remote_model

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


grpc = pytest.importorskip("grpc")
pytest.importorskip("tritonclient")
ort = pytest.importorskip("onnxruntime")
x509 = pytest.importorskip("cryptography.x509")

TOKEN = "a-token"
_NAMES = {dtype: name for name, dtype in DATATYPES.items()}
SCHEMES = pytest.mark.parametrize("scheme", ["https", "grpcs"])


# ---- certificates ----


def _certificate(folder: Path, name: str, *, issuer: tuple[Any, Any] | None, address: str = "") -> tuple[Any, Any]:
    """A P-256 key and a certificate signed by ``issuer``, or by itself, as ``NAME.pem`` and ``NAME.key``."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    signer, signing_key = issuer or (None, key)
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signer.subject if signer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key()), critical=False)
    )
    if issuer is None:
        usage = dict.fromkeys(
            ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False
        )
        usage |= {"key_cert_sign": True, "crl_sign": True, "encipher_only": False, "decipher_only": False}
        builder = builder.add_extension(x509.KeyUsage(**usage), critical=True)
    if address:
        names = [x509.IPAddress(ipaddress.ip_address(address))]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    certificate = builder.sign(signing_key, hashes.SHA256())
    (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pem = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / f"{name}.key").write_bytes(key.private_bytes(*pem))
    return certificate, key


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, a server's and a client's certificate of it, a server's for another address, and a stranger."""
    folder = tmp_path_factory.mktemp("certificates")
    authority = _certificate(folder, "ca", issuer=None)
    _certificate(folder, "server", issuer=authority, address="127.0.0.1")
    _certificate(folder, "elsewhere", issuer=authority, address="192.0.2.1")
    _certificate(folder, "client", issuer=authority)
    _certificate(folder, "stranger", issuer=None)
    (folder / "token").write_text(f"{TOKEN}\n")
    return folder


# ---- the server ----


@dataclass
class Served:
    """A model in ONNX Runtime, and how what is said of it differs from the truth."""

    session: Any
    shapes: dict[str, list[int]] = field(default_factory=dict)  # in the metadata, in place of the model's
    answers: dict[str, NDArray[Any]] = field(default_factory=dict)  # in place of the model's

    def tensors(self, nodes: Any) -> list[dict[str, Any]]:
        kinds = {"tensor(float)": "FP32", "tensor(uint8)": "UINT8", "tensor(int32)": "INT32", "tensor(int64)": "INT64"}
        return [
            {"name": n.name, "datatype": kinds[n.type], "shape": self.shapes.get(n.name, list(n.shape))} for n in nodes
        ]

    def metadata(self) -> dict[str, Any]:
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        return {"name": "m", "platform": "onnx", "inputs": self.tensors(inputs), "outputs": self.tensors(outputs)}

    def infer(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        names = [node.name for node in self.session.get_outputs()]
        return {**dict(zip(names, self.session.run(names, feeds), strict=True)), **self.answers}


def _handler(served: Served) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, value: object) -> None:
            code = 200 if self.headers["Authorization"] == f"Bearer {TOKEN}" else 401
            content = json.dumps(value if code == 200 else {"error": "who are you?"}).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            server = {"name": "test", "version": "1", "extensions": []}
            self._answer(server if self.path == "/v2" else served.metadata())

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            feeds = {
                t["name"]: np.array(t["data"], DATATYPES[t["datatype"]]).reshape(t["shape"]) for t in request["inputs"]
            }
            outputs = [
                {"name": n, "datatype": _NAMES[a.dtype.name], "shape": list(a.shape), "data": a.ravel().tolist()}
                for n, a in served.infer(feeds).items()
            ]
            self._answer({"outputs": outputs})

    return Handler


@contextlib.contextmanager
def _https(served: Served, certificates: Path, *, name: str) -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(served))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / f"{name}.pem", certificates / f"{name}.key")
    context.load_verify_locations(certificates / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # handshakes that are refused
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


@contextlib.contextmanager
def _grpcs(served: Served, certificates: Path, *, name: str) -> Iterator[int]:
    from tritonclient.grpc import service_pb2 as messages
    from tritonclient.grpc import service_pb2_grpc as services

    class Service(services.GRPCInferenceServiceServicer):
        def _check(self, context: Any) -> None:
            if dict(context.invocation_metadata()).get("authorization") != f"Bearer {TOKEN}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")

        def ServerMetadata(self, _: Any, context: Any) -> Any:
            self._check(context)
            return messages.ServerMetadataResponse(name="test", version="1")

        def ModelMetadata(self, _: Any, context: Any) -> Any:
            self._check(context)
            return messages.ModelMetadataResponse(**served.metadata())

        def ModelInfer(self, request: Any, context: Any) -> Any:
            self._check(context)
            feeds = {
                tensor.name: np.frombuffer(content, DATATYPES[tensor.datatype]).reshape(list(tensor.shape))
                for tensor, content in zip(request.inputs, request.raw_input_contents, strict=True)
            }
            answer = messages.ModelInferResponse(model_name="m")
            for output, array in served.infer(feeds).items():
                answer.outputs.add(name=output, datatype=_NAMES[array.dtype.name], shape=list(array.shape))
                answer.raw_output_contents.append(array.tobytes())
            return answer

    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.max_send_message_length", -1)])
    services.add_GRPCInferenceServiceServicer_to_server(Service(), server)
    pair = ((certificates / f"{name}.key").read_bytes(), (certificates / f"{name}.pem").read_bytes())
    authority = (certificates / "ca.pem").read_bytes()
    credentials = grpc.ssl_server_credentials([pair], root_certificates=authority, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    yield port
    server.stop(None).wait()


@pytest.fixture(scope="module")
def session(tiny_onnx: Path) -> Any:
    return ort.InferenceSession(str(tiny_onnx))


@pytest.fixture(scope="module")
def contract(tiny_onnx: Path) -> ModelContract:
    return read_contract(tiny_onnx)


@contextlib.contextmanager
def _serving(
    scheme: str, served: Served, certificates: Path, contract: ModelContract, folder: Path, *, name: str = "server"
) -> Iterator[Path]:
    """The description of the model that is served meanwhile."""
    with {"https": _https, "grpcs": _grpcs}[scheme](served, certificates, name=name) as port:
        model = folder / "m.kserve"
        write_remote_model(model, RemoteModel(url=f"{scheme}://127.0.0.1:{port}/v2/models/m", contract=contract))
        yield model


@pytest.fixture
def known(certificates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This client has what the server asks for."""
    for name, file in {"CA": "ca.pem", "CERT": "client.pem", "KEY": "client.key", "TOKEN_FILE": "token"}.items():
        monkeypatch.setenv(f"FCOS_DEPLOY_SERVER_{name}", str(certificates / file))


# ---- who may talk to whom ----


@SCHEMES
def test_client_and_server_that_know_each_other_give_the_local_detections(
    scheme: str,
    session: Any,
    contract: ModelContract,
    certificates: Path,
    tiny_onnx: Path,
    smooth_images: Path,
    tmp_path: Path,
) -> None:
    """Through the options of a command."""
    image = next(smooth_images.rglob("*.png"))
    options = [f"--server-{name}={certificates / file}" for name, file in {
        "ca": "ca.pem", "cert": "client.pem", "key": "client.key", "token-file": "token",
    }.items()]  # fmt: skip
    local = CliRunner().invoke(build_app(), ["predict", str(tiny_onnx), str(image), "--json"])
    with _serving(scheme, Served(session), certificates, contract, tmp_path) as model:
        remote = CliRunner().invoke(build_app(), ["predict", str(model), str(image), "--json", *options])
        assert remote.exit_code == 0, remote.stderr
        found, expected = (json.loads(result.stdout)[0]["detections"] for result in (remote, local))
        assert [d["label"] for d in found] == [d["label"] for d in expected]
        np.testing.assert_allclose([d["box"] for d in found], [d["box"] for d in expected], atol=1e-3)
        assert found
        # The options are those of one run.
        assert CliRunner().invoke(build_app(), ["predict", str(model), str(image)]).exit_code == 1


@SCHEMES
@pytest.mark.parametrize("lack", ["CA", "CERT", "TOKEN_FILE", "address", "stranger"])
def test_one_that_lacks_something_is_refused_in_a_sentence(
    scheme: str,
    lack: str,
    session: Any,
    contract: ModelContract,
    certificates: Path,
    known: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if lack == "CERT":
        monkeypatch.delenv("FCOS_DEPLOY_SERVER_KEY")
    if lack == "stranger":
        monkeypatch.setenv("FCOS_DEPLOY_SERVER_CA", str(certificates / "stranger.pem"))
    elif lack != "address":
        monkeypatch.delenv(f"FCOS_DEPLOY_SERVER_{lack}")
    name = "elsewhere" if lack == "address" else "server"
    with _serving(scheme, Served(session), certificates, contract, tmp_path, name=name) as model:
        with pytest.raises((BackendLoadError, DeviceError)) as refused:
            Detector.open(model)
        words = {"TOKEN_FILE": "who are you"}.get(lack, "does not answer")
        assert words in refused.value.message


def test_files_that_are_no_credentials_are_named(
    certificates: Path, contract: ModelContract, known: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "m.kserve"
    write_remote_model(model, RemoteModel(url="https://127.0.0.1:9/v2/models/m", contract=contract))
    for name in ("CA", "CERT", "TOKEN_FILE"):
        with monkeypatch.context() as patch:
            patch.setenv(f"FCOS_DEPLOY_SERVER_{name}", str(tmp_path / "missing"))
            with pytest.raises(ConfigError):
                Detector.open(model)


# ---- what a server may answer ----


@SCHEMES
@pytest.mark.parametrize("fault", ["channels", "rank", "type"])
def test_a_model_that_is_not_the_contracts_is_refused_when_it_is_opened(
    scheme: str,
    fault: str,
    session: Any,
    contract: ModelContract,
    certificates: Path,
    known: None,
    tmp_path: Path,
) -> None:
    served = Served(session)
    logits = list(session.get_outputs()[0].shape)
    if fault == "channels":
        served.shapes["cls_logits"] = [*logits[:2], logits[2] + 1]
    elif fault == "rank":
        served.shapes["cls_logits"] = logits[:2]
    else:
        served.shapes["images"] = [1, 3, 64, 64]
    with (
        _serving(scheme, served, certificates, contract, tmp_path) as model,
        pytest.raises(BackendLoadError, match="the contract says"),
    ):
        Detector.open(model)


@SCHEMES
@pytest.mark.parametrize("fault", ["shape", "nan", "huge"])
def test_an_answer_that_is_not_what_was_promised_is_an_error(
    scheme: str,
    fault: str,
    session: Any,
    contract: ModelContract,
    certificates: Path,
    known: None,
    blobs: list[NDArray[np.uint8]],
    tmp_path: Path,
) -> None:
    served = Served(session)
    logits = np.zeros([n or 1 for n in session.get_outputs()[0].shape], np.float32)
    one_nan = logits - 30.0  # nothing is detected but for it
    one_nan[0, 5, 0] = np.nan
    served.answers["cls_logits"] = {
        "shape": logits[:, :-1],
        "nan": one_nan,
        "huge": np.zeros((1, 4_000_000 if scheme == "https" else 70_000_000, 1), np.float32),
    }[fault]
    with _serving(scheme, served, certificates, contract, tmp_path) as model, Detector.open(model) as detector:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(FcosDeployError) as refused:
            detector.detect(blobs[0])
        if fault == "nan":
            assert "'cls_logits' of image 0 is not finite: 1 of" in refused.value.message
        if fault == "huge":
            assert isinstance(refused.value, BackendError)
            # The server, in this process, holds the answer about three times.
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < (4 << 20)


def test_a_handshake_that_trickles_meets_the_deadline(
    contract: ModelContract, certificates: Path, known: None, tmp_path: Path
) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            for byte in b"\x16\x03\x03\x40\x00" + bytes(1000):  # a record of 16 KiB, of which each byte takes its time
                if stop.wait(0.1):
                    return
                connection.send(bytes([byte]))

    thread = threading.Thread(target=serve)
    thread.start()
    model = RemoteModel(url=f"https://127.0.0.1:{listener.getsockname()[1]}/v2/models/m", contract=contract)
    write_remote_model(tmp_path / "m.kserve", replace(model, timeout_s=1.0))
    started = time.monotonic()
    try:
        with pytest.raises(DeviceError):
            Detector.open(tmp_path / "m.kserve", options=SessionOptions())
        assert time.monotonic() - started < 5
    finally:
        stop.set()
        thread.join()
        listener.close()
