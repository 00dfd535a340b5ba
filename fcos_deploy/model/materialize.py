"""Stored tensors as torch tensors, over the memory-mapped file where they can be."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fcos_deploy.core.errors import CheckpointError
from fcos_deploy.model.pickle_stubs import PickledArray
from fcos_deploy.model.stored_tensor import ITEM_SIZES, TRUNCATED, StoredTensor, TensorFacts

__all__ = ["assembled", "require_finite", "to_tensors"]

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
