"""PyTorch: the reference that every other runtime is compared with."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fcos_deploy.core.backend import Backend, BackendProbe, Session, SessionOptions, Tensors
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.enums import ArtifactKind, ComputeType
from fcos_deploy.core.errors import BackendError, missing_device
from fcos_deploy.core.libraries import lazy_import, require
from fcos_deploy.core.machine import read_machine

if TYPE_CHECKING:
    import torch

    from fcos_deploy.model.fcos import Fcos
else:
    torch = lazy_import("torch", extra="export")

__all__ = ["BACKEND", "open_model"]

_Network = Callable[..., "tuple[torch.Tensor, ...]"]


class _PyTorchSession(Session):
    def __init__(
        self, network: _Network, *, device: torch.device, contract: ModelContract, options: SessionOptions
    ) -> None:
        if options.threads is not None:
            torch.set_num_threads(options.threads)  # PyTorch has one setting for the whole process.
        description = {
            "backend": BACKEND.name,
            "version": torch.__version__,
            "device": str(device),
            "compute": str(options.compute_type),
            "hint": str(options.goal),
            "threads": str(torch.get_num_threads()),
        }
        super().__init__(inputs=contract.input_specs, outputs=contract.output_specs, description=description)
        self.contract = contract
        self._network: _Network | None = network
        self._device = device
        self._compute = options.compute_type

    def _run(self, feeds: Tensors) -> Tensors:
        network = self._network
        if network is None:
            raise BackendError("The session is closed.")
        # Writable, because PyTorch warns of memory that it shares and must not write.
        arrays = [np.require(feeds[spec.name], requirements=["C", "W"]) for spec in self.inputs]
        arguments = [torch.from_numpy(array).to(self._device) for array in arrays]
        try:
            # Convolutions in another type than the float32 of the weights; what needs the range stays float32.
            dtype = {ComputeType.F16: torch.float16, ComputeType.BF16: torch.bfloat16}.get(self._compute)
            mixed = torch.autocast(self._device.type, dtype=dtype, enabled=dtype is not None)
            with torch.inference_mode(), mixed:
                values = network(*arguments)
            return {
                spec.name: value.to("cpu", getattr(torch, spec.dtype)).numpy()
                for spec, value in zip(self.outputs, values, strict=True)
            }
        except (RuntimeError, ValueError) as error:
            raise BackendError(f"PyTorch failed: {str(error).splitlines()[0]}") from error

    def _close(self) -> None:
        self._network = None


class _PyTorch(Backend):
    """Runs checkpoints, with any tail. Devices: ``cpu``, ``cuda``, ``cuda:0``."""

    name = "pytorch"
    accepts = frozenset({ArtifactKind.CHECKPOINT})
    extra = "export"
    preferred_for = frozenset({ArtifactKind.CHECKPOINT})

    def open(self, path: Path, options: SessionOptions) -> Session:
        require("torch", extra=self.extra)
        from fcos_deploy.checkpoints.load import load_checkpoint

        loaded = load_checkpoint(path, options=options.checkpoint)
        return open_model(loaded.model, contract=options.contract or loaded.contract, options=options)

    def probe(self) -> BackendProbe:
        probe = None if "torch" in sys.modules else _probe_files()
        return probe or BackendProbe.of_library("torch", lambda: (torch.__version__, _devices()))


BACKEND = _PyTorch()


def _probe_files() -> BackendProbe | None:
    """What the installed files say, because importing torch takes 2 s; None where only torch itself knows.

    That is where it is missing or incomplete, and where it may find a GPU.
    """
    try:
        spec = importlib.util.find_spec("torch")
        version = importlib.metadata.version("torch")
    except (ImportError, ValueError):
        return None
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    if folder is None or not list(folder.glob("_C.*")) or sys.platform == "darwin":
        return None
    facts = read_machine()
    gpu = bool(facts.nvidia_driver) or facts.jetson is not None
    if gpu and not version.endswith("+cpu"):
        return None
    return BackendProbe(available=True, version=version, devices=("cpu",))


def open_model(network: Fcos, *, contract: ModelContract, options: SessionOptions | None = None) -> Session:
    """A session over a network in memory, with the tail that ``contract`` names.

    Raises:
        DeviceError: the device is not there.
    """
    from fcos_deploy.model.tails import ExportableFcos

    options = options or SessionOptions()
    name, devices = options.device or "cpu", _devices()
    if name not in devices and not (name == "cuda" and len(devices) > 1):  # "cuda" is PyTorch's name of the current one
        raise missing_device("PyTorch", name, devices)
    device = torch.device(name)
    exportable = ExportableFcos(network, contract).eval().to(device)
    return _PyTorchSession(exportable, device=device, contract=contract, options=options)


def _devices() -> tuple[str, ...]:
    return ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count())))
