"""What the HTTP and the gRPC client of the Open Inference Protocol v2 share."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from fcos_deploy.core.backend import Tensors
from fcos_deploy.core.errors import BackendLoadError, ConfigError
from fcos_deploy.core.tensor_spec import TensorSpec

__all__ = ["DATATYPES", "Client", "ModelAddress", "ModelMetadata", "parse_address", "tensor_specs"]

# The protocol's names and NumPy's.
DATATYPES: dict[str, str] = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
}
_PATH = re.compile(r"(?:/v2/models)?/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?/?")
_PORTS = {"http": 8000, "https": 443, "grpc": 8001}


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
class ModelMetadata:
    """What a server says of itself and of a model."""

    server: str
    platform: str
    versions: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class Client(ABC):
    """A connection to one model; ``infer`` may be called from several threads at a time."""

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


def tensor_specs(tensors: object, *, where: str) -> tuple[TensorSpec, ...]:
    """From ``[{"name", "datatype", "shape"}]``; a size of -1 is dynamic.

    Raises:
        BackendLoadError: when the server's answer is something else.
    """
    try:
        return tuple(_tensor_spec(tensor) for tensor in tensors)  # type: ignore[attr-defined]  # anything may come
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BackendLoadError(f"The {where} of the server's model are not understood: {error!r}.") from error


def _tensor_spec(tensor: dict[str, object]) -> TensorSpec:
    shape = tensor["shape"]
    if not isinstance(shape, list):
        raise TypeError(f"shape {shape!r}")
    sizes = tuple(None if int(size) < 0 else int(size) for size in shape)
    return TensorSpec(str(tensor["name"]), DATATYPES[str(tensor["datatype"])], sizes)
