"""Open Inference Protocol v2 over gRPC, with NVIDIA's client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fcos_deploy.core.backend import Tensors
from fcos_deploy.core.errors import BackendError, BackendLoadError, DeviceError
from fcos_deploy.core.require import require
from fcos_deploy.core.tensor_spec import TensorSpec
from runtimes._kserve_protocol import DATATYPES, Client, ModelAddress, ModelMetadata, tensor_specs

__all__ = ["GrpcClient"]

_NAMES = {dtype: name for name, dtype in DATATYPES.items()}
_NOT_ANSWERING = ("UNAVAILABLE", "DEADLINE_EXCEEDED")


class GrpcClient(Client):
    """One channel for all threads; gRPC connects again by itself."""

    def __init__(self, address: ModelAddress, *, timeout: float) -> None:
        self._library = require("tritonclient.grpc", extra="serving")
        self._failure = require("tritonclient.utils", extra="serving").InferenceServerException
        self._address = address
        self._timeout = timeout
        self._client = self._library.InferenceServerClient(f"{address.host}:{address.port}")

    def metadata(self) -> ModelMetadata:
        address = self._address
        try:
            server = self._client.get_server_metadata(as_json=True, client_timeout=self._timeout)
            model = self._client.get_model_metadata(
                address.model, address.version, as_json=True, client_timeout=self._timeout
            )
        except self._failure as error:
            if any(word in str(error.status()) for word in _NOT_ANSWERING):
                raise DeviceError(
                    f"The server at {address.host}:{address.port} does not answer: {error.message()}.",
                    hint="start it, or correct the address",
                ) from error
            raise BackendLoadError(
                f"The server at {address.host}:{address.port} does not serve '{address.model}': {error.message()}.",
                hint="look at the names of its models, and at its log",
            ) from error
        return ModelMetadata(
            server=f"{server.get('name', '?')} {server.get('version', '')}".strip(),
            platform=str(model.get("platform", "")),
            versions=tuple(map(str, model.get("versions") or ())),
            inputs=tensor_specs(_plain(model.get("inputs")), where="inputs"),
            outputs=tensor_specs(_plain(model.get("outputs")), where="outputs"),
        )

    def infer(self, feeds: Tensors, *, outputs: Sequence[TensorSpec]) -> Tensors:
        inputs = []
        for name, array in feeds.items():
            tensor = self._library.InferInput(name, list(array.shape), _NAMES[array.dtype.name])
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        wanted = [self._library.InferRequestedOutput(spec.name) for spec in outputs]
        try:
            answer = self._client.infer(
                self._address.model,
                inputs,
                model_version=self._address.version,
                outputs=wanted,
                client_timeout=self._timeout,
            )
        except self._failure as error:
            raise self._translated(error) from error
        try:
            found = {spec.name: answer.as_numpy(spec.name) for spec in outputs}
        except ValueError as error:
            raise BackendError(f"The answer of {self._address} is not understood: {error}.") from error
        missing = sorted(name for name, array in found.items() if array is None)
        if missing:
            raise BackendError(f"The answer of {self._address} lacks {missing}.")
        return found

    def _translated(self, error: Any) -> BackendError:  # Any: the class is known only when the library is loaded
        status = str(error.status())
        if "DEADLINE_EXCEEDED" in status:
            return BackendError(
                f"The server did not answer within {self._timeout:g} s.", hint="is it overloaded? raise timeout_s"
            )
        if "UNAVAILABLE" in status:
            return BackendError(
                f"The connection to {self._address} was lost: {error.message()}.",
                hint="the next request connects again; check that the server runs",
            )
        return BackendError(f"The server refused the request: {error.message()} ({status}).")

    def close(self) -> None:
        self._client.close()


def _plain(tensors: object) -> object:
    """Protobuf's JSON gives 64-bit sizes as text, and leaves a shape out that is empty."""
    if not isinstance(tensors, list):
        return tensors
    return [{**tensor, "shape": [int(size) for size in tensor.get("shape", [])]} for tensor in tensors]
