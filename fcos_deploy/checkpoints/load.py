"""Stored tensors as torch tensors, over the memory-mapped file where they can be."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fcos_deploy.checkpoints.describe import describe_checkpoint
from fcos_deploy.checkpoints.pickle_reader import PickledArray
from fcos_deploy.checkpoints.reader import ITEM_SIZES, TRUNCATED, StoredTensor, TensorFacts
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.contract import Decision, ModelContract
from fcos_deploy.core.errors import CheckpointError
from fcos_deploy.core.files import sha256_file
from fcos_deploy.core.network import FcosConfig
from fcos_deploy.model.fcos import Fcos

__all__ = [
    "CheckpointOptions",
    "LoadedCheckpoint",
    "assembled",
    "build_network",
    "load_checkpoint",
    "require_finite",
    "to_tensors",
]

_TOWER_CONV = re.compile(r"(head\.(?:classification_head|regression_head|shared_tower)\.conv\.\d+)\.weight")
_SCALES = "head.regression_head.scales"


def to_tensors(stored: Mapping[str, TensorFacts]) -> dict[str, Tensor]:
    """The tensors themselves; those of a file that is mapped share its pages.

    Raises:
        CheckpointError: naming a tensor that reaches beyond the file, or is damaged.
    """
    maps: dict[Path, Tensor] = {}
    return {name: _tensor(name, value, maps) for name, value in stored.items()}


def _tensor(name: str, value: TensorFacts, maps: dict[Path, Tensor]) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        if isinstance(value, StoredTensor):
            return _mapped(value, maps)
        if isinstance(value, PickledArray):
            array = value.take()
            return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)))
    except CheckpointError as error:
        raise CheckpointError(f"Tensor '{name}': {error.message}", hint=error.hint) from error
    raise CheckpointError(f"Tensor '{name}' is a {type(value).__name__}.")


def _mapped(stored: StoredTensor, maps: dict[Path, Tensor]) -> Tensor:
    stored.check()
    archive, dtype = stored.storage.archive, getattr(torch, stored.dtype)
    size = stored.elements * ITEM_SIZES[stored.dtype]
    if stored.start % ITEM_SIZES[stored.dtype]:  # Old files do not align; a copy of mapped pages would count twice.
        numbers = _read(archive.path, stored.start, size).view(dtype)
    else:
        if archive.path not in maps:
            maps[archive.path] = torch.from_file(str(archive.path), shared=False, size=archive.size, dtype=torch.uint8)
        numbers = maps[archive.path][stored.start : stored.start + size].view(dtype)
    return numbers.as_strided(stored.shape, stored.strides, numbers.storage_offset() + stored.offset)


def _read(path: Path, start: int, size: int) -> Tensor:
    content = torch.empty(size, dtype=torch.uint8)
    with path.open("rb") as stream:
        stream.seek(start)
        if stream.readinto(content.numpy().data) != size:
            raise CheckpointError(f"'{path}' became shorter while it was read.", hint=TRUNCATED)
    return content


def assembled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Per-level scales gathered into one vector, and a bias of zeros for tower convolutions that have none."""
    made = {name: tensor for name, tensor in tensors.items() if not name.startswith(_SCALES + ".")}
    levels = len(tensors) - len(made)
    if levels:
        made[_SCALES] = torch.cat([tensors[f"{_SCALES}.{level}"].reshape(1) for level in range(levels)])
    for name in list(made):
        match = _TOWER_CONV.fullmatch(name)
        if match and made[name].ndim == 4:
            made.setdefault(f"{match.group(1)}.bias", torch.zeros(made[name].shape[0]))
    return made


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError naming the first tensor that holds a NaN or an infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor)  # Propagates NaN, and needs no memory of the tensor's size.
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise CheckpointError(
                    f"Tensor '{name}' holds NaN or infinite values.", hint="did the training diverge?"
                )


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
