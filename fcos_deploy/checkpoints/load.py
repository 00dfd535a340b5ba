"""Loads a checkpoint: the network that its description asks for, over the memory-mapped weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fcos_deploy.checkpoints.describe import describe_checkpoint
from fcos_deploy.checkpoints.pickle_reader import PickledArray
from fcos_deploy.checkpoints.reader import ITEM_SIZES, StoredTensor, TensorFacts
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.errors import CheckpointError
from fcos_deploy.core.files import sha256_file
from fcos_deploy.core.network import FcosConfig
from fcos_deploy.model.fcos import Fcos

__all__ = ["CheckpointOptions", "LoadedCheckpoint", "build_network", "load_checkpoint", "to_tensors"]


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """A network in evaluation mode and the contract around it (tail ``raw``, precision fp32)."""

    model: Fcos
    contract: ModelContract


def load_checkpoint(path: Path, *, options: CheckpointOptions | None = None) -> LoadedCheckpoint:
    """Load a checkpoint of any ecosystem; nothing in it is executed.

    float32 weights stay in the memory-mapped file: replace it by renaming, do not overwrite it while it is in use.

    Raises:
        CheckpointError: unreadable, unsafe, damaged, of another architecture, or with weights that are not finite.
        ConfigError: an option does not fit, or the file leaves open what an option must say.
    """
    description = describe_checkpoint(path, options=options)
    tensors = to_tensors(description.tensors)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor)  # Propagates NaN, and needs no memory of the tensor's size.
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise CheckpointError(
                    f"Tensor '{name}' holds NaN or infinite values.", hint="did the training diverge?"
                )
    contract = dataclasses.replace(description.contract, source_sha256=sha256_file(path))
    return LoadedCheckpoint(build_network(description.config, tensors), contract)


def to_tensors(stored: Mapping[str, TensorFacts]) -> dict[str, Tensor]:
    """The tensors themselves; those of a file that is mapped share its pages.

    Raises:
        CheckpointError: naming a tensor that reaches beyond the file, or is damaged.
    """
    maps: dict[Path, Tensor] = {}
    tensors = {}
    for name, value in stored.items():
        try:
            tensors[name] = _to_tensor(value, maps)
        except CheckpointError as error:
            raise CheckpointError(f"Tensor '{name}': {error.message}", hint=error.hint) from error
    return tensors


def _to_tensor(value: TensorFacts, maps: dict[Path, Tensor]) -> Tensor:
    """``maps``: the mapped files so far, as uint8 tensors."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, PickledArray):
        array = value.take()
        return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)))
    if not isinstance(value, StoredTensor):
        raise CheckpointError(f"A {type(value).__name__} is not a tensor.")
    value.check()
    path, size = value.storage.archive.path, value.elements * ITEM_SIZES[value.dtype]
    if size and value.start % ITEM_SIZES[value.dtype]:  # Files of torch before 1.6 do not align their numbers.
        return torch.from_numpy(value.read()).view(getattr(torch, value.dtype))
    if path not in maps:
        maps[path] = torch.from_file(str(path), shared=False, size=value.storage.archive.size, dtype=torch.uint8)
    content = maps[path][value.start : value.start + size] if size else torch.empty(0, dtype=torch.uint8)
    numbers = content.view(getattr(torch, value.dtype))
    return numbers.as_strided(value.shape, value.strides, numbers.storage_offset() + value.offset)


def build_network(config: FcosConfig, tensors: Mapping[str, TensorFacts]) -> Fcos:
    """The network in evaluation mode, float32, over exactly these tensors (canonical names).

    Raises:
        CheckpointError: naming tensors that are missing, left over, damaged, or of another shape.
    """
    weights = _assembled(_with_merged_norms(to_tensors(tensors), eps=config.fpn_norm_eps))
    with torch.device("meta"):
        model = Fcos(config)
    expected = model.state_dict()
    counters = {name: torch.zeros((), dtype=torch.int64) for name in expected if name.endswith(".num_batches_tracked")}
    for verb, names in (
        ("lacks", expected.keys() - weights.keys() - counters.keys()),
        ("has unknown", weights.keys() - expected.keys()),
    ):
        if names:
            shown = ", ".join(f"'{name}'" for name in sorted(names)[:4]) + (", ..." if len(names) > 4 else "")
            raise CheckpointError(
                f"The checkpoint {verb} {len(names)} tensors: {shown}.",
                hint="is it another architecture, or incomplete? For a network of your own see docs/your-own-fcos.md",
            )
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"Tensor '{name}' must have shape {list(expected[name].shape)}, got {list(tensor.shape)}."
            )
    converted = {name: tensor.to(torch.float32).contiguous() for name, tensor in weights.items()}
    model.load_state_dict({**converted, **counters}, strict=True, assign=True)
    return model.eval().requires_grad_(requires_grad=False)


_TOWER_CONV = re.compile(r"(head\.(?:classification_head|regression_head|shared_tower)\.conv\.\d+)\.weight")
_LEVEL_NORM = re.compile(r"(head\..+\.conv\.\d+)\.(\d+)\.running_mean")
_FPN_NORM = re.compile(r"(backbone\.fpn\..+)\.norm\.running_mean")
_SCALES = "head.regression_head.scales"


def _with_merged_norms(tensors: Mapping[str, Tensor], *, eps: float) -> dict[str, Tensor]:
    """The pyramid's convolutions with the batch norm behind them merged in, for files that have one.

    gamma (w x - mean) / sqrt(var + eps) + beta is a convolution again, to the rounding of its weights.

    Raises:
        CheckpointError: naming a tensor of the norm that is missing or has another shape.
    """
    merged = dict(tensors)
    for name in tensors:
        match = _FPN_NORM.fullmatch(name)
        if match is None:
            continue
        conv, norm = match[1], {}
        for part in ("weight", "bias", "running_mean", "running_var"):
            value = merged.pop(f"{conv}.norm.{part}", None)
            if value is None or f"{conv}.weight" not in merged or value.shape != merged[f"{conv}.weight"].shape[:1]:
                raise CheckpointError(f"The batch norm after '{conv}' lacks '{part}', or has another width than it.")
            norm[part] = value.double()
        factor = norm["weight"] / torch.sqrt(norm["running_var"] + eps)
        bias = merged.get(f"{conv}.bias", torch.zeros_like(factor)).double()
        merged[f"{conv}.weight"] = (merged[f"{conv}.weight"].double() * factor.view(-1, 1, 1, 1)).float()
        merged[f"{conv}.bias"] = (norm["bias"] + (bias - norm["running_mean"]) * factor).float()
    return merged


def _assembled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scales gathered into one vector, norms with a weight for each level, a bias of zeros for convolutions without."""
    assembled = {name: tensor for name, tensor in tensors.items() if not name.startswith(_SCALES + ".")}
    levels = len(tensors) - len(assembled)  # the scales that were left out
    if levels:
        assembled[_SCALES] = torch.cat([tensors[f"{_SCALES}.{level}"].reshape(1) for level in range(levels)])
    for name in list(assembled):
        match = _LEVEL_NORM.fullmatch(name)
        # detectron2's CycleBatchNormList: statistics of each level, one weight and bias for all.
        for part in ("weight", "bias") if match else ():
            if match and f"{match[1]}.{part}" in tensors:
                assembled.pop(f"{match[1]}.{part}", None)
                assembled[f"{match[1]}.{match[2]}.{part}"] = tensors[f"{match[1]}.{part}"]
    for name in list(assembled):
        match = _TOWER_CONV.fullmatch(name)
        # mmdetection's plain head has no bias; adding zeros is exact, and all networks have the same names.
        if match and assembled[name].ndim == 4:
            assembled.setdefault(f"{match.group(1)}.bias", torch.zeros(assembled[name].shape[0]))
    return assembled
