"""A model on a remote server that speaks the Open Inference Protocol v2: Triton, OpenVINO Model Server, KServe, ...

The artifact is a small JSON file, ``NAME.kserve``, with the model's address and its contract. The protocol:
https://github.com/kserve/open-inference-protocol; its extension for binary tensors over HTTP is Triton's
(docs/protocol/extension_binary_data.md of triton-inference-server/server).
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import math
import os
import re
import socket
import ssl
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from fcos_deploy.core.backend import Backend, BackendProbe, Session, SessionOptions, Tensors
from fcos_deploy.core.contract import ModelContract, TensorSpec
from fcos_deploy.core.enums import ArtifactKind, ComputeType
from fcos_deploy.core.errors import BackendError, BackendLoadError, ConfigError, DeviceError
from fcos_deploy.core.files import read_file, write_text
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.core.serialize import from_json, parse_json, to_json

__all__ = ["BACKEND", "RemoteModel", "open_model", "write_remote_model"]

grpc = lazy_import("tritonclient.grpc", extra="serving")
grpc_utils = lazy_import("tritonclient.utils", extra="serving")

# The protocol's names and NumPy's.
_INTEGERS = ("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
DATATYPES: dict[str, str] = {
    **{name.upper(): name for name in _INTEGERS},
    **{f"FP{bits}": f"float{bits}" for bits in (16, 32, 64)},
}
_NAMES = {dtype: name for name, dtype in DATATYPES.items()}
_PATH = re.compile(r"(?:/v2/models)?/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?/?")
_PORTS = {"http": 8000, "https": 443, "grpc": 8001, "grpcs": 443}
_TLS = frozenset({"https", "grpcs"})
_MAX_DESCRIPTION = 4 << 20  # bytes of what describes a server or a model
_HEADER_LENGTH = "Inference-Header-Content-Length"
_BINARY = "binary_tensor_data"  # the protocol extension, as servers announce it
_MAX_ANSWER = 256 << 20  # bytes: raw outputs of 33 images of 800x1333 with 80 classes
_JSON_DIGITS = 32  # characters of a number in JSON; twice what the shortest spelling of a float32 has
_MAX_TOKEN = 64 << 10  # bytes
_CREDENTIALS_PREFIX = "FCOS_DEPLOY_SERVER_"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelAddress:
    """A model on a server; ``version`` empty leaves the choice to the server."""

    scheme: str
    host: str
    port: int
    model: str
    version: str = ""

    def __str__(self) -> str:
        version = f"/versions/{self.version}" if self.version else ""
        return f"{self.scheme}://{self.host}:{self.port}/v2/models/{self.model}{version}"


def parse_address(url: str) -> ModelAddress:
    """``http://host:8000/v2/models/NAME[/versions/N]``, the same with ``https`` or ``grpc``.

    Raises:
        ConfigError: when it is not of this form.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError as error:
        raise ConfigError(f"'{url}' is not a URL: {error}.") from error
    path = _PATH.fullmatch(parts.path)
    if parts.scheme not in _PORTS or not parts.hostname or path is None or parts.query or parts.username:
        raise ConfigError(
            f"'{url}' is not the address of a model.",
            hint="give http://HOST:8000/v2/models/NAME, https://... or grpc://HOST:8001/v2/models/NAME",
        )
    return ModelAddress(
        scheme=parts.scheme, host=parts.hostname, port=port, model=path["model"], version=path["version"] or ""
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """How this machine and the server know each other: a token to send, and PEM files.

    ``authority``: whose certificates are accepted, in place of the system's. ``certificate`` and ``key``: this
    client's own.
    """

    token: str = ""
    authority: str = ""
    certificate: str = ""
    key: str = ""

    @staticmethod
    def of_environment(address: ModelAddress) -> Credentials:
        """Those in FCOS_DEPLOY_SERVER_TOKEN or _TOKEN_FILE, _CA, _CERT and _KEY; never in the description: it travels.

        Raises:
            ConfigError: there are some, and the address is one that would send them without encryption; or the token's
                file cannot be read.
        """
        token, file, authority, certificate, key = (
            os.environ.get(f"{_CREDENTIALS_PREFIX}{name}", "") for name in ("TOKEN", "TOKEN_FILE", "CA", "CERT", "KEY")
        )
        if file:
            try:
                token = read_file(Path(file), limit=_MAX_TOKEN).decode(errors="replace").strip()
            except OSError as error:
                raise ConfigError(f"Cannot read the token in '{file}': {error.strerror or error}.") from error
        if (token or certificate) and address.scheme not in _TLS:
            raise ConfigError(
                f"A token or certificate is only sent over an encrypted connection, not to '{address}'.",
                hint="give an address that begins with https:// or grpcs://, or unset the variables",
            )
        if bool(certificate) != bool(key):
            raise ConfigError(f"{_CREDENTIALS_PREFIX}CERT and {_CREDENTIALS_PREFIX}KEY go together.")
        if not token.isascii() or not token.isprintable():
            raise ConfigError("The token for the server must be printable ASCII, on one line.")
        return Credentials(token=token, authority=authority, certificate=certificate, key=key)

    @property
    def headers(self) -> dict[str, str]:
        """What each request carries."""
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    def context(self) -> ssl.SSLContext:
        """For HTTPS.

        Raises:
            ConfigError: a file cannot be used.
        """
        try:
            context = ssl.create_default_context(cafile=self.authority or None)
            if self.certificate:
                context.load_cert_chain(self.certificate, self.key)
        except (OSError, ValueError) as error:
            raise ConfigError(f"The certificates for the server cannot be used: {error}.") from error
        return context

    def files(self) -> dict[str, Any]:  # Any: keyword arguments of tritonclient
        """For gRPC."""
        names = {"root_certificates": self.authority, "certificate_chain": self.certificate, "private_key": self.key}
        return {name: path or None for name, path in names.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMetadata:
    """What a server says of itself and of a model."""

    server: str
    platform: str
    versions: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @staticmethod
    def of_answers(server: dict[str, Any], model: dict[str, Any]) -> ModelMetadata:  # Any: whatever the server sent
        """From the server's answers about itself and about a model.

        Raises:
            BackendLoadError: the tensors are not described as the protocol says.
        """
        return ModelMetadata(
            server=f"{server.get('name', '?')} {server.get('version', '')}".strip(),
            platform=str(model.get("platform", "")),
            versions=tuple(map(str, model.get("versions") or ())),
            inputs=_tensor_specs(model.get("inputs"), where="inputs"),
            outputs=_tensor_specs(model.get("outputs"), where="outputs"),
        )


def _tensor_specs(tensors: Any, *, where: str) -> tuple[TensorSpec, ...]:  # Any: whatever the server sent
    """From ``[{"name", "datatype", "shape"}]``; a size of -1 is dynamic.

    JSON made of protobuf, as gRPC clients do it, gives sizes as text and leaves out a shape that is empty.
    """
    specs = []
    try:
        for tensor in tensors:
            shape = tensor.get("shape", [])
            if not isinstance(shape, list):
                raise TypeError(f"shape {shape!r}")
            sizes = tuple(None if int(size) < 0 else int(size) for size in shape)
            specs.append(TensorSpec(str(tensor["name"]), DATATYPES[str(tensor["datatype"])], sizes))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BackendLoadError(f"The {where} of the server's model are not understood: {error!r}.") from error
    return tuple(specs)


class Client(ABC):
    """A connection to one model; ``infer`` may be called from several threads at a time."""

    def __init__(self, address: ModelAddress, *, timeout: float) -> None:
        self._address = address
        self._timeout = timeout
        self._credentials = Credentials.of_environment(address)

    @abstractmethod
    def metadata(self) -> ModelMetadata:
        """Ask the server for the model.

        Raises:
            DeviceError: the server does not answer, or is not ready.
            BackendLoadError: it has no such model, or describes it in a way that is not understood.
        """

    @abstractmethod
    def infer(self, feeds: Tensors, *, outputs: Sequence[TensorSpec]) -> Tensors:
        """One request.

        Raises:
            BackendError: the server does not answer in time, or refuses.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the connections."""

    def _no_answer(self, reason: str) -> DeviceError:
        place = f"{self._address.host}:{self._address.port}"
        return DeviceError(f"The server at {place} does not answer: {reason}.", hint="start it, or correct the address")

    def _not_served(self, reason: str) -> BackendLoadError:
        address = self._address
        return BackendLoadError(
            f"The server at {address.host}:{address.port} does not serve '{address.model}': {reason}.",
            hint="look at the names of its models, and at its log",
        )

    def _too_slow(self) -> BackendError:
        return BackendError(
            f"The server did not answer within {self._timeout:g} s.", hint="is it overloaded? raise timeout_s"
        )

    def _connection_lost(self, reason: str) -> BackendError:
        return BackendError(
            f"The connection to {self._address} was lost: {reason}.",
            hint="the next request connects again; check that the server runs",
        )

    def _refused(self, reason: str, *, status: str) -> BackendError:
        return BackendError(f"The server refused the request: {reason} ({status}).")

    def _not_understood(self, reason: object) -> BackendError:
        return BackendError(f"The answer of {self._address} is not understood: {reason}.")


class _Answer(Exception):  # noqa: N818  (an HTTP status, raised where it is found and translated by the caller)
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class _HttpsConnection(http.client.HTTPSConnection):
    """One whose handshake can be ended from outside as well: its socket is there before the handshake begins."""

    def __init__(self, host: str, port: int, *, timeout: float, context: ssl.SSLContext) -> None:
        super().__init__(host, port, timeout=timeout, context=context)
        self._tls = context

    def connect(self) -> None:
        http.client.HTTPConnection.connect(self)
        secure = self._tls.wrap_socket(self.sock, server_hostname=self.host, do_handshake_on_connect=False)
        self.sock = secure
        secure.do_handshake()


class HttpClient(Client):
    """Keeps one connection a thread; one that the server closed meanwhile is opened again."""

    def __init__(self, address: ModelAddress, *, timeout: float) -> None:
        super().__init__(address, timeout=timeout)
        self._context = self._credentials.context() if address.scheme in _TLS else None
        self._local = threading.local()
        self._all: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()
        self._binary = False
        version = f"/versions/{address.version}" if address.version else ""
        self._path = f"/v2/models/{address.model}{version}"

    def metadata(self) -> ModelMetadata:
        try:
            server = self._get("/v2")
            model = self._get(self._path)
            self._get(f"{self._path}/ready")
        except _Answer as answer:
            raise self._not_served(f"{answer} (HTTP {answer.status})") from answer
        except (OSError, http.client.HTTPException) as error:
            raise self._no_answer(_reason(error)) from error
        extensions = server.get("extensions")
        self._binary = isinstance(extensions, list) and _BINARY in extensions
        return ModelMetadata.of_answers(server, model)

    def infer(self, feeds: Tensors, *, outputs: Sequence[TensorSpec]) -> Tensors:
        payload, headers = self._request(feeds, outputs)
        limit = _answer_limit(outputs, batch=len(next(iter(feeds.values()))), binary=self._binary)
        try:
            content, received = self._exchange(f"{self._path}/infer", payload=payload, headers=headers, limit=limit)
        except _Answer as answer:
            raise self._refused(str(answer), status=f"HTTP {answer.status}") from answer
        except TimeoutError as error:
            raise self._too_slow() from error
        except (OSError, http.client.HTTPException) as error:
            raise self._connection_lost(_reason(error)) from error
        try:
            return _read_outputs(content, received, outputs)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise self._not_understood(repr(error)) from error

    def _request(self, feeds: Tensors, outputs: Sequence[TensorSpec]) -> tuple[bytes, dict[str, str]]:
        """Payload and headers: JSON, and behind it the tensors' bytes where the server takes them."""
        tensors, blobs = [], []
        for name, array in feeds.items():
            tensor: dict[str, Any] = {"name": name, "datatype": _NAMES[array.dtype.name], "shape": list(array.shape)}
            if self._binary:
                blobs.append(np.ascontiguousarray(array).tobytes())
                tensor["parameters"] = {"binary_data_size": len(blobs[-1])}
            else:
                tensor["data"] = array.reshape(-1).tolist()
            tensors.append(tensor)
        requested = [{"name": spec.name, "parameters": {"binary_data": self._binary}} for spec in outputs]
        head = json.dumps({"inputs": tensors, "outputs": requested}).encode()
        if self._binary:
            headers = {"Content-Type": "application/octet-stream", _HEADER_LENGTH: str(len(head))}
        else:
            headers = {"Content-Type": "application/json"}
        return b"".join((head, *blobs)), headers

    def _get(self, path: str) -> dict[str, Any]:
        """The JSON object at ``path``; empty where the answer is no object."""
        content, _ = self._exchange(path)
        try:
            value = parse_json(content or b"{}")
        except ValueError as error:
            raise _Answer(200, f"'{path}' is not JSON, so this is not a server of the protocol v2") from error
        return value if isinstance(value, dict) else {}

    def _exchange(
        self,
        path: str,
        *,
        payload: bytes = b"",
        headers: Mapping[str, str] | None = None,
        limit: int = _MAX_DESCRIPTION,
    ) -> tuple[bytes, Mapping[str, str]]:
        """Contents and headers of an answer of at most ``limit`` bytes; with a ``payload``, to POST."""
        connection = self._connection()
        kept_alive = connection.sock is not None
        while True:
            try:
                with self._deadline(connection):
                    sent = {**(headers or {}), **self._credentials.headers}
                    connection.request("POST" if payload else "GET", path, body=payload or None, headers=sent)
                    response = connection.getresponse()
                    content = response.read(limit + 1)
                break
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                # The server closes idle connections. Inference has no side effects, so ask once more.
                if not kept_alive or not isinstance(error, ConnectionError):
                    raise
                kept_alive = False
        if len(content) > limit:
            connection.close()
            raise _Answer(response.status, f"the answer is larger than {limit} bytes")
        if response.status != http.client.OK:
            raise _Answer(response.status, _error_text(content))
        return content, {name.lower(): value for name, value in response.getheaders()}

    @contextlib.contextmanager
    def _deadline(self, connection: http.client.HTTPConnection) -> Iterator[None]:
        """End the exchange after the timeout: that of a socket begins anew with every byte that arrives."""
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    # Not SSLSocket's own, which lets go of the state that the other thread is using.
                    socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)

        timer = threading.Timer(self._timeout, expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        except (OSError, ValueError, http.client.HTTPException) as error:
            if expired.is_set():
                raise TimeoutError from error
            raise
        finally:
            timer.cancel()
        if expired.is_set():
            raise TimeoutError

    def _connection(self) -> http.client.HTTPConnection:
        """The calling thread's connection, which may not be open yet."""
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            host, port = self._address.host, self._address.port
            if self._context is not None:
                connection = _HttpsConnection(host, port, timeout=self._timeout, context=self._context)
            else:
                connection = http.client.HTTPConnection(host, port, timeout=self._timeout)
            self._local.connection = connection
            with self._lock:
                self._all.append(connection)
        return connection

    def close(self) -> None:
        with self._lock:
            for connection in self._all:
                connection.close()
            self._all.clear()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _error_text(content: bytes) -> str:
    try:
        value = parse_json(content)
        return str(value.get("error", value))[:500]
    except (ValueError, AttributeError):
        return content[:200].decode(errors="replace")


def _answer_limit(outputs: Sequence[TensorSpec], *, batch: int, binary: bool) -> int:
    """The largest number of bytes that an answer with these outputs can have."""
    sizes = [[batch, *spec.shape[1:]] for spec in outputs]
    if any(size is None for shape in sizes for size in shape):
        return _MAX_ANSWER
    widths = [np.dtype(spec.dtype).itemsize if binary else _JSON_DIGITS for spec in outputs]
    numbers = (math.prod(size or 0 for size in shape) for shape in sizes)
    return min(_MAX_ANSWER, _MAX_DESCRIPTION + sum(n * width for n, width in zip(numbers, widths, strict=True)))


def _read_outputs(content: bytes, headers: Mapping[str, str], outputs: Sequence[TensorSpec]) -> Tensors:
    head_size = int(headers.get(_HEADER_LENGTH.lower(), len(content)))
    position = head_size
    arrays: Tensors = {}
    for tensor in parse_json(content[:head_size])["outputs"]:
        dtype = np.dtype(DATATYPES[tensor["datatype"]])
        shape = tuple(int(size) for size in tensor["shape"])
        size = tensor.get("parameters", {}).get("binary_data_size")
        if size is None:
            arrays[tensor["name"]] = np.asarray(tensor["data"], dtype).reshape(shape)
            continue
        if math.prod(shape) * dtype.itemsize != size:
            raise ValueError(f"{size} bytes for {tensor['datatype']}{list(shape)}")
        arrays[tensor["name"]] = np.frombuffer(content, dtype, math.prod(shape), position).reshape(shape)
        position += size
    return {spec.name: arrays[spec.name] for spec in outputs}


_GRPC_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", _MAX_ANSWER)]


class GrpcClient(Client):
    """One channel for all threads; gRPC connects again by itself."""

    def __init__(self, address: ModelAddress, *, timeout: float) -> None:
        super().__init__(address, timeout=timeout)
        self._failure = grpc_utils.InferenceServerException
        headers = {key.lower(): value for key, value in self._credentials.headers.items()} or None
        self._options = {"client_timeout": timeout, "headers": headers}  # of every call
        secure = address.scheme in _TLS
        try:
            files = self._credentials.files() if secure else {}
            self._client = grpc.InferenceServerClient(
                f"{address.host}:{address.port}", ssl=secure, channel_args=_GRPC_OPTIONS, **files
            )
        except OSError as error:
            raise ConfigError(f"The certificates for the server cannot be used: {error}.") from error

    def metadata(self) -> ModelMetadata:
        name, version = self._address.model, self._address.version
        try:
            server = self._client.get_server_metadata(as_json=True, **self._options)
            model = self._client.get_model_metadata(name, version, as_json=True, **self._options)
        except self._failure as error:
            if any(word in str(error.status()) for word in ("UNAVAILABLE", "DEADLINE_EXCEEDED")):
                raise self._no_answer(error.message()) from error
            raise self._not_served(error.message()) from error
        return ModelMetadata.of_answers(server, model)

    def infer(self, feeds: Tensors, *, outputs: Sequence[TensorSpec]) -> Tensors:
        inputs = []
        for name, array in feeds.items():
            tensor = grpc.InferInput(name, list(array.shape), _NAMES[array.dtype.name])
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        requested = [grpc.InferRequestedOutput(spec.name) for spec in outputs]
        name, version = self._address.model, self._address.version
        try:
            answer = self._client.infer(name, inputs, model_version=version, outputs=requested, **self._options)
        except self._failure as error:
            status = str(error.status())
            if "DEADLINE_EXCEEDED" in status:
                raise self._too_slow() from error
            if "UNAVAILABLE" in status:
                raise self._connection_lost(error.message()) from error
            raise self._refused(error.message(), status=status) from error
        try:
            tensors = {spec.name: answer.as_numpy(spec.name) for spec in outputs}
        except ValueError as error:
            raise self._not_understood(error) from error
        missing = sorted(name for name, array in tensors.items() if array is None)
        if missing:
            raise BackendError(f"The answer of {self._address} lacks {missing}.")
        return tensors

    def close(self) -> None:
        self._client.close()


_CLIENTS: dict[str, type[Client]] = {
    "http": HttpClient,
    "https": HttpClient,
    "grpc": GrpcClient,
    "grpcs": GrpcClient,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteModel:
    """Contents of a ``.kserve`` file. ``timeout_s`` bounds connecting and each request, in seconds."""

    url: str
    contract: ModelContract
    timeout_s: float = 10.0

    def __post_init__(self) -> None:
        parse_address(self.url)
        if not 0 < self.timeout_s <= 3600:
            raise ConfigError(f"timeout_s must be in (0, 3600], got {self.timeout_s}.")


def write_remote_model(path: Path, model: RemoteModel) -> None:
    """Write the file that ``BACKEND`` opens; its name must end in ``.kserve``.

    Raises:
        ConfigError: another suffix, or a folder that cannot be written.
    """
    if path.suffix != ".kserve":
        raise ConfigError(f"The description of a remote model is named '*.kserve', got '{path.name}'.")
    write_text(path, json.dumps(to_json(model), indent=1, sort_keys=True) + "\n")


class _RemoteSession(Session):
    """``run`` may be called from several threads. After a lost connection the next call connects again."""

    def __init__(self, client: Client, metadata: ModelMetadata, *, model: RemoteModel) -> None:
        self._client = client
        self.contract = model.contract
        super().__init__(
            inputs=metadata.inputs,
            outputs=tuple(tensor for tensor in metadata.outputs if tensor.name in model.contract.outputs),
            description={
                "backend": "kserve",
                "server": metadata.server,
                "url": model.url,
                "platform": metadata.platform,
                "model_versions": ", ".join(metadata.versions),
                "device": "remote",
            },
        )

    def _run(self, feeds: Tensors) -> Tensors:
        outputs = self._client.infer(feeds, outputs=self.outputs)
        for spec in self.outputs:
            spec.check(outputs[spec.name])
        return outputs

    def _close(self) -> None:
        self._client.close()


def _require_contract(model: RemoteModel, metadata: ModelMetadata) -> None:
    """Raise BackendLoadError when the server's tensors are not those of the contract, a free batch aside."""
    hint = "serve the artifact that the description was made from"
    missing = sorted(set(model.contract.outputs) - {spec.name for spec in metadata.outputs})
    if missing:
        outputs = [spec.name for spec in metadata.outputs]
        raise BackendLoadError(f"The model at {model.url} lacks the outputs {missing}, it has {outputs}.", hint=hint)
    served = {spec.name: spec for spec in (*metadata.inputs, *metadata.outputs)}
    for expected in (*model.contract.input_specs, *model.contract.output_specs):
        given = served.get(expected.name, expected)
        sizes_fit = len(given.shape) == len(expected.shape) and all(
            None in pair or pair[0] == pair[1] for pair in zip(given.shape[1:], expected.shape[1:], strict=True)
        )
        if not sizes_fit or given.dtype != expected.dtype:
            raise BackendLoadError(
                f"Tensor '{expected.name}' of the model at {model.url} is {given}, the contract says {expected}.",
                hint=hint,
            )


def open_model(model: RemoteModel, options: SessionOptions) -> Session:
    """Connect to a model on its server, which must have what the contract says.

    Raises:
        ConfigError: ``options`` ask for what only the server can set.
        BackendError, BackendLoadError: it cannot be reached, or is another model.
    """
    local = {
        "device": bool(options.device),
        "compute": options.compute_type is not ComputeType.F32,
        "threads": options.threads is not None,
        "streams": options.streams is not None,
    }
    refused = sorted(name for name, given in local.items() if given)
    if refused:
        raise ConfigError(f"{', '.join(refused)} cannot be set for a remote model.", hint="set it on the server")
    address = parse_address(model.url)
    client = _CLIENTS[address.scheme](address, timeout=model.timeout_s)
    try:
        metadata = client.metadata()
        _require_contract(model, metadata)
        return _RemoteSession(client, metadata, model=model)
    except BaseException:
        client.close()
        raise


class _KServe(Backend):
    """Everything about devices, threads and precision is the server's business, so such options are refused."""

    name = "kserve"
    accepts = frozenset({ArtifactKind.REMOTE_MODEL})
    preferred_for = frozenset({ArtifactKind.REMOTE_MODEL})
    extra = "serving"
    # Whose placement it is was decided when the server's model was made; the server runs what it was given.
    placements = ("onnxruntime-cpu", "openvino", "portable")

    def placement_advice(self, placement: str) -> str:  # noqa: ARG002  (nobody here knows the server's runtime)
        """Nothing."""
        return ""

    def open(self, path: Path, options: SessionOptions) -> Session:
        try:
            model = from_json(RemoteModel, parse_json(read_file(path, limit=_MAX_DESCRIPTION)), where=path.name)
        except (OSError, ValueError, RecursionError) as error:
            raise BackendLoadError(f"Cannot read '{path}': {error}.") from error
        return open_model(model, options)

    def probe(self) -> BackendProbe:
        grpc = importlib.util.find_spec("tritonclient") is not None
        return BackendProbe(available=True, version="v2", devices=("http", "grpc") if grpc else ("http",))


BACKEND = _KServe()
