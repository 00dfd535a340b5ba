"""Open Inference Protocol v2 over HTTP, with the standard library; tensors travel as bytes where the server can."""

from __future__ import annotations

import http.client
import json
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fcos_deploy.core.backend import Tensors
from fcos_deploy.core.errors import BackendError, BackendLoadError, DeviceError
from fcos_deploy.core.serialize import parse_json
from fcos_deploy.core.tensor_spec import TensorSpec
from runtimes._kserve_protocol import DATATYPES, Client, ModelAddress, ModelMetadata, tensor_specs

__all__ = ["HttpClient"]

_HEADER_LENGTH = "Inference-Header-Content-Length"
_BINARY = "binary_tensor_data"  # the protocol extension, as servers announce it
_NAMES = {dtype: name for name, dtype in DATATYPES.items()}
_MAX_ANSWER = 1 << 30  # bytes


class _Answer(Exception):  # noqa: N818  (an HTTP status, raised where it is found and translated by the caller)
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class HttpClient(Client):
    """Keeps one connection a thread; one that the server closed meanwhile is opened again."""

    def __init__(self, address: ModelAddress, *, timeout: float) -> None:
        self._address = address
        self._timeout = timeout
        self._local = threading.local()
        self._all: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()
        self._binary = False
        version = f"/versions/{address.version}" if address.version else ""
        self._path = f"/v2/models/{address.model}{version}"

    def metadata(self) -> ModelMetadata:
        try:
            server = self._json("GET", "/v2")
            model = self._json("GET", self._path)
            self._json("GET", f"{self._path}/ready")
        except _Answer as answer:
            raise BackendLoadError(
                f"The server at {self._address.host}:{self._address.port} does not serve '{self._address.model}': "
                f"{answer} (HTTP {answer.status}).",
                hint="look at the names of its models, and at its log",
            ) from answer
        except (OSError, http.client.HTTPException) as error:
            raise DeviceError(
                f"The server at {self._address.host}:{self._address.port} does not answer: {_reason(error)}.",
                hint="start it, or correct the address",
            ) from error
        extensions = server.get("extensions")
        self._binary = isinstance(extensions, list) and _BINARY in extensions
        return ModelMetadata(
            server=f"{server.get('name', '?')} {server.get('version', '')}".strip(),
            platform=str(model.get("platform", "")),
            versions=tuple(map(str, model.get("versions") or ())),
            inputs=tensor_specs(model.get("inputs"), where="inputs"),
            outputs=tensor_specs(model.get("outputs"), where="outputs"),
        )

    def infer(self, feeds: Tensors, *, outputs: Sequence[TensorSpec]) -> Tensors:
        body, headers = self._request(feeds, outputs)
        try:
            content, received = self._exchange("POST", f"{self._path}/infer", body=body, headers=headers)
        except _Answer as answer:
            raise BackendError(f"The server refused the request: {answer} (HTTP {answer.status}).") from answer
        except TimeoutError as error:
            raise BackendError(
                f"The server did not answer within {self._timeout:g} s.", hint="is it overloaded? raise timeout_s"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise BackendError(
                f"The connection to {self._address} was lost: {_reason(error)}.",
                hint="the next request connects again; check that the server runs",
            ) from error
        try:
            return _read_outputs(content, received, outputs)
        except (KeyError, TypeError, ValueError) as error:
            raise BackendError(f"The answer of {self._address} is not understood: {error!r}.") from error

    def _request(self, feeds: Tensors, outputs: Sequence[TensorSpec]) -> tuple[bytes, dict[str, str]]:
        tensors, blobs = [], []
        for name, array in feeds.items():
            tensor: dict[str, Any] = {"name": name, "datatype": _NAMES[array.dtype.name], "shape": list(array.shape)}
            if self._binary:
                blobs.append(np.ascontiguousarray(array).tobytes())
                tensor["parameters"] = {"binary_data_size": len(blobs[-1])}
            else:
                tensor["data"] = array.reshape(-1).tolist()
            tensors.append(tensor)
        wanted = [{"name": spec.name, "parameters": {"binary_data": self._binary}} for spec in outputs]
        head = json.dumps({"inputs": tensors, "outputs": wanted}).encode()
        if self._binary:
            headers = {"Content-Type": "application/octet-stream", _HEADER_LENGTH: str(len(head))}
        else:
            headers = {"Content-Type": "application/json"}
        return b"".join((head, *blobs)), headers

    def _json(self, method: str, path: str) -> dict[str, Any]:
        content, _ = self._exchange(method, path)
        try:
            value = parse_json(content or b"{}")
        except ValueError as error:
            raise _Answer(200, f"'{path}' is not JSON, so this is not a server of the protocol v2") from error
        return value if isinstance(value, dict) else {}

    def _exchange(
        self, method: str, path: str, *, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> tuple[bytes, Mapping[str, str]]:
        connection, fresh = self._connection()
        try:
            return self._send(connection, method, path, body=body, headers=headers or {})
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            connection.close()
            if fresh:
                raise
            # The server closed a kept-alive connection. Inference has no side effects, so ask once more.
            return self._send(connection, method, path, body=body, headers=headers or {})
        except (OSError, http.client.HTTPException):
            connection.close()
            raise

    def _send(
        self, connection: http.client.HTTPConnection, method: str, path: str, *, body: bytes, headers: Mapping[str, str]
    ) -> tuple[bytes, Mapping[str, str]]:
        connection.request(method, path, body=body or None, headers=dict(headers))
        response = connection.getresponse()
        content = response.read(_MAX_ANSWER + 1)
        if len(content) > _MAX_ANSWER:
            connection.close()
            raise _Answer(response.status, "the answer is larger than 1 GiB")
        if response.status != http.client.OK:
            raise _Answer(response.status, _error_text(content))
        return content, {name.lower(): value for name, value in response.getheaders()}

    def _connection(self) -> tuple[http.client.HTTPConnection, bool]:
        """The calling thread's connection, and whether it is not open yet."""
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            kind = http.client.HTTPSConnection if self._address.scheme == "https" else http.client.HTTPConnection
            connection = kind(self._address.host, self._address.port, timeout=self._timeout)
            self._local.connection = connection
            with self._lock:
                self._all.append(connection)
        return connection, connection.sock is None

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


def _read_outputs(content: bytes, headers: Mapping[str, str], outputs: Sequence[TensorSpec]) -> Tensors:
    head_size = int(headers.get(_HEADER_LENGTH.lower(), len(content)))
    position = head_size
    found: Tensors = {}
    for tensor in parse_json(content[:head_size])["outputs"]:
        dtype = np.dtype(DATATYPES[tensor["datatype"]])
        shape = tuple(int(size) for size in tensor["shape"])
        size = tensor.get("parameters", {}).get("binary_data_size")
        if size is None:
            found[tensor["name"]] = np.asarray(tensor["data"], dtype).reshape(shape)
            continue
        if math.prod(shape) * dtype.itemsize != size:
            raise ValueError(f"{size} bytes for {tensor['datatype']}{list(shape)}")
        found[tensor["name"]] = np.frombuffer(content, dtype, math.prod(shape), position).reshape(shape)
        position += size
    return {spec.name: found[spec.name] for spec in outputs}
