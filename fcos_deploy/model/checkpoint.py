"""From a checkpoint file of any ecosystem to the network and its contract."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fcos_deploy.core.atomic import sha256_file
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.contract import Decision, ModelContract
from fcos_deploy.core.errors import CheckpointError
from fcos_deploy.core.network import FcosConfig
from fcos_deploy.model.describe import describe_checkpoint
from fcos_deploy.model.fcos import Fcos
from fcos_deploy.model.materialize import assembled, require_finite, to_tensors
from fcos_deploy.model.stored_tensor import TensorFacts

__all__ = ["CheckpointOptions", "LoadedCheckpoint", "build_network", "load_checkpoint"]


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """A network in evaluation mode and the contract around it (tail ``raw``, precision fp32)."""

    model: Fcos
    contract: ModelContract
    config: FcosConfig

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """What tensors do not tell, and who decided it."""
        return self.contract.decisions


def load_checkpoint(path: Path, *, options: CheckpointOptions | None = None) -> LoadedCheckpoint:
    """Load a checkpoint of any ecosystem; nothing in it is executed.

    float32 weights stay in the memory-mapped file: replace it by renaming, do not overwrite it while it is in use.

    Raises:
        CheckpointError: unreadable, unsafe, damaged, of another architecture, or with weights that are not finite.
        ConfigError: an option does not fit, or the file leaves open what an option must say.
    """
    described = describe_checkpoint(path, options=options)
    tensors = to_tensors(described.tensors)
    require_finite(tensors)
    contract = dataclasses.replace(described.contract, source_sha256=sha256_file(path))
    return LoadedCheckpoint(build_network(described.config, tensors), contract, described.config)


def build_network(config: FcosConfig, tensors: Mapping[str, TensorFacts]) -> Fcos:
    """The network in evaluation mode, float32, over exactly these tensors (canonical names).

    Raises:
        CheckpointError: naming tensors that are missing, left over, damaged, or of another shape.
    """
    found = assembled(to_tensors(tensors))
    with torch.device("meta"):
        model = Fcos(config)
    wanted = model.state_dict()
    counters = {name: torch.zeros((), dtype=torch.int64) for name in wanted if name.endswith(".num_batches_tracked")}
    _require_same_names(wanted, [*found, *counters])
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"Tensor '{name}' must have shape {list(wanted[name].shape)}, got {list(tensor.shape)}."
            )
    weights = {name: tensor.to(torch.float32).contiguous() for name, tensor in found.items()}
    model.load_state_dict({**weights, **counters}, strict=True, assign=True)
    return model.eval().requires_grad_(requires_grad=False)


def _require_same_names(wanted: Iterable[str], found: Iterable[str]) -> None:
    for what, names in (("lacks", set(wanted) - set(found)), ("has unknown", set(found) - set(wanted))):
        if names:
            shown = ", ".join(f"'{n}'" for n in sorted(names)[:4]) + (", ..." if len(names) > 4 else "")
            raise CheckpointError(
                f"The checkpoint {what} {len(names)} tensors: {shown}.",
                hint="is it another architecture, or incomplete? For a network of your own see docs/your-own-fcos.md",
            )
