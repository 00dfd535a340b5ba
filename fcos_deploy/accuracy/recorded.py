"""Outputs that trtexec computed elsewhere, replayed as a session: the host's part of the proof is done here."""

from __future__ import annotations

import base64
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fcos_deploy.bundle.manifest import Artifact
from fcos_deploy.bundle.store import Bundle
from fcos_deploy.core.backend import Session, Tensors
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.errors import BackendError, ConfigError, FcosDeployError
from fcos_deploy.core.files import read_file
from fcos_deploy.core.serialize import from_json, parse_json
from fcos_deploy.core.tensor_spec import TensorSpec

__all__ = ["RecordedRun", "RecordedSession", "read_recorded_run"]

_FORMAT = "fcos-deploy trtexec record, version 1"
_MAX_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedTensor:
    """A tensor's shape, and its values as little-endian float32 in base64."""

    shape: tuple[int, ...]
    float32: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedImage:
    """The outputs for the input tensor with this SHA-256."""

    inputs_sha256: str
    outputs: dict[str, RecordedTensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
    """What ``run_trtexec.py`` wrote on the device; ``median_ms`` is trtexec's, of the network alone."""

    format: str
    manifest_sha256: str
    onnx_sha256: str
    engine_sha256: str
    images: tuple[RecordedImage, ...]
    time: str
    version: str
    machine: dict[str, str]
    median_ms: float | None = None

    def artifact(self, bundle: Bundle) -> Artifact:
        """The graph of the bundle that the engine was built from.

        Raises:
            ConfigError: the record is of another bundle.
        """
        graphs = [artifact for artifact in bundle.manifest.artifacts if artifact.sha256 == self.onnx_sha256]
        if self.manifest_sha256 != bundle.manifest_sha256 or not graphs:
            raise ConfigError(
                f"The record is of another bundle than '{bundle.source}'.",
                hint="give the bundle that 'fcos-deploy package --for trtexec' was called on",
            )
        return graphs[0]


def read_recorded_run(path: Path) -> RecordedRun:
    """Read a record.

    Raises:
        ConfigError: it is none.
    """
    try:
        run = from_json(RecordedRun, parse_json(read_file(path, limit=_MAX_BYTES)), where=path.name)
    except (OSError, ValueError, TypeError, FcosDeployError) as error:
        raise ConfigError(f"'{path}' is not a record of trtexec: {error}.", hint="run_trtexec.py writes one") from error
    if run.format != _FORMAT:
        raise ConfigError(f"'{path}' is not a record of this version.", hint="package the bundle again")
    return run


class RecordedSession(Session):
    """Answers with the recorded outputs of the tensor that it is given."""

    def __init__(self, run: RecordedRun, contract: ModelContract) -> None:
        self._outputs = {image.inputs_sha256: image.outputs for image in run.images}
        self._dtypes = {spec.name: spec.dtype for spec in contract.output_specs}
        description = {"backend": "trtexec", "version": run.version, "device": run.machine.get("board", "")}
        super().__init__(
            inputs=tuple(TensorSpec(spec.name, spec.dtype, (1, *spec.shape[1:])) for spec in contract.input_specs),
            outputs=contract.output_specs,
            description={**description, "engine_sha256": run.engine_sha256, "median_ms": str(run.median_ms or "")},
        )

    def _run(self, feeds: Tensors) -> Tensors:
        key = hashlib.sha256(feeds["images"].tobytes()).hexdigest()
        if key not in self._outputs:
            raise BackendError(
                "The record has no outputs for this image as it is preprocessed here.",
                hint="package the bundle again on this machine, and run run_trtexec.py on the device",
            )
        return {name: self._tensor(name, tensor) for name, tensor in self._outputs[key].items() if name in self._dtypes}

    def _tensor(self, name: str, tensor: RecordedTensor) -> Any:  # Any: an array of the output's own dtype
        try:
            values = np.frombuffer(base64.b64decode(tensor.float32, validate=True), "<f4")
            if len(values) != math.prod(tensor.shape):
                raise ValueError(f"{len(values)} values for the shape {list(tensor.shape)}")
            return values.reshape(tensor.shape).astype(self._dtypes[name])
        except ValueError as error:
            raise BackendError(f"The recorded output '{name}' is damaged: {error}.") from error
