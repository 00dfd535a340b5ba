"""A model on a remote server that speaks the Open Inference Protocol v2: Triton, OpenVINO Model Server, KServe, ...

The artifact is a small JSON file, ``NAME.kserve``, with the model's address and its contract.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fcos_deploy.core.backend import Backend, BackendProbe, ComputeType, Session, SessionOptions, Tensors
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.enums import ArtifactKind
from fcos_deploy.core.errors import BackendLoadError, ConfigError
from fcos_deploy.core.files import read_file, write_text
from fcos_deploy.core.serialize import from_json, parse_json, to_json
from runtimes._kserve import Client, GrpcClient, HttpClient, ModelMetadata, parse_address

__all__ = ["BACKEND", "RemoteModel", "write_remote_model"]

_MAX_BYTES = 4 << 20  # of a description
_CLIENTS: dict[str, Callable[..., Client]] = {
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
    contract = model.contract
    served = {spec.name: spec for spec in (*metadata.inputs, *metadata.outputs)}
    for expected in (*contract.input_specs, *contract.output_specs):
        given = served.get(expected.name)
        if given is None:
            continue  # outputs that are missing have a sentence of their own
        pairs = zip(given.shape[1:], expected.shape[1:], strict=False)
        sizes_fit = len(given.shape) == len(expected.shape) and all(
            None in pair or pair[0] == pair[1] for pair in pairs
        )
        if not sizes_fit or given.dtype != expected.dtype:
            raise BackendLoadError(
                f"Tensor '{expected.name}' of the model at {model.url} is {given}, the contract says {expected}.",
                hint="serve the artifact that the description was made from",
            )


class _KServe(Backend):
    """Everything about devices, threads and precision is the server's business, so such options are refused."""

    name = "kserve"
    accepts = frozenset({ArtifactKind.REMOTE_MODEL})
    preferred_for = frozenset({ArtifactKind.REMOTE_MODEL})
    extra = "serving"
    # Whose placement it is was decided when the server's model was made; the server runs what it was given.
    placements = ("onnxruntime-cpu", "openvino", "portable")

    def open(self, path: Path, options: SessionOptions) -> Session:
        local = {
            "device": bool(options.device),
            "compute": options.compute is not ComputeType.F32,
            "threads": options.threads is not None,
            "streams": options.streams is not None,
        }
        refused = sorted(name for name, given in local.items() if given)
        if refused:
            raise ConfigError(f"A remote model cannot be told {', '.join(refused)}.", hint="set it on the server")
        try:
            model = from_json(RemoteModel, parse_json(read_file(path, limit=_MAX_BYTES)), where=path.name)
        except (OSError, ValueError, RecursionError) as error:
            raise BackendLoadError(f"Cannot read '{path}': {error}.") from error
        address = parse_address(model.url)
        client = _CLIENTS[address.scheme](address, timeout=model.timeout_s)
        try:
            metadata = client.metadata()
            missing = sorted(set(model.contract.outputs) - {spec.name for spec in metadata.outputs})
            if missing:
                raise BackendLoadError(
                    f"The model at {model.url} lacks the outputs {missing}, it has "
                    f"{[spec.name for spec in metadata.outputs]}.",
                    hint="serve the artifact that the description was made from",
                )
            _require_contract(model, metadata)
            return _RemoteSession(client, metadata, model=model)
        except BaseException:
            client.close()
            raise

    def probe(self) -> BackendProbe:
        grpc = importlib.util.find_spec("tritonclient") is not None
        return BackendProbe(available=True, version="v2", devices=("http", "grpc") if grpc else ("http",))


BACKEND = _KServe()
