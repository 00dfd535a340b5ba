"""Names of tensors in a file to canonical names (spec 2.3 and 8)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fcos_deploy.core.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Rename", "canonical_names", "canonical_tensors", "refuse_unsupported"]

_DROPPED = re.compile(r".*\.num_batches_tracked|pixel_mean|pixel_std|ema_.*|n_averaged")
_TOWER_CONV = re.compile(r"(head\.(?:classification_head|regression_head|shared_tower)\.conv\.\d+)\.weight")
_SCALE = re.compile(r"head\.regression_head\.scales\.(\d+)")
_SCALES = "head.regression_head.scales"

# What this network does not have, by parts of names; each with what to call it.
_UNSUPPORTED = (
    (
        re.compile(r"(.*)\.(conv_offset|offset)\.(weight|bias)|(.*conv\d)_offset\.(weight|bias)"),
        "deformable convolution (DCN)",
    ),
    (re.compile(r"(backbone\.bottom_up\.stage\d+\..*OSA\d*_\d+)\..*"), "VoVNet block"),
    (re.compile(r"(backbone\.stage\d\.\d+\.fuse_layers)\..*"), "HRNet fusion"),
)


@dataclass(frozen=True, slots=True)
class Rename:
    """Names that match ``pattern`` in full become ``target``: a template, or a function of the match."""

    pattern: re.Pattern[str]
    target: str | Callable[[re.Match[str]], str]

    @staticmethod
    def of(pattern: str, target: str | Callable[[re.Match[str]], str]) -> Rename:
        """Compile ``pattern``."""
        return Rename(re.compile(pattern), target)

    def apply(self, name: str) -> str | None:
        """The new name, or None when the pattern does not match."""
        match = self.pattern.fullmatch(name)
        if match is None:
            return None
        return match.expand(self.target) if isinstance(self.target, str) else self.target(match)


def refuse_unsupported(names: Iterable[str]) -> None:
    """Stop at layers that FCOS variants have and this network does not.

    Raises:
        CheckpointError: naming the kind and the first layer.
    """
    for pattern, what in _UNSUPPORTED:
        layers = sorted({m[1] or m[m.lastindex or 1] for m in map(pattern.fullmatch, names) if m})
        if layers:
            raise CheckpointError(
                f"Layer '{layers[0]}' is a {what}, which is not supported ({len(layers)} such layers).",
                hint="retrain without it: ONNX backends do not agree on these operators",
            )


def canonical_names(names: Iterable[str], renames: tuple[Rename, ...]) -> dict[str, str]:
    """Source name -> canonical name, without the tensors that inference does not need.

    Raises:
        CheckpointError: when two names become one.
    """
    mapping: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in names:
        if _DROPPED.fullmatch(name):
            continue
        target = next((new for rename in renames if (new := rename.apply(name)) is not None), name)
        if target in taken:
            raise CheckpointError(f"Tensors '{taken[target]}' and '{name}' are both '{target}'.")
        taken[target] = name
        mapping[name] = target
    return mapping


def canonical_tensors(tensors: Mapping[str, Tensor], mapping: Mapping[str, str]) -> dict[str, Tensor]:
    """Rename, gather the per-level scales into one vector, give bias-free tower convolutions a bias of zeros."""
    import torch

    renamed = {target: tensors[source] for source, target in mapping.items()}
    scales = {int(m.group(1)): renamed.pop(n) for n in list(renamed) if (m := _SCALE.fullmatch(n))}
    if scales:
        if sorted(scales) != list(range(len(scales))) or any(t.numel() != 1 for t in scales.values()):
            raise CheckpointError(f"Expected one scale for each level, got levels {sorted(scales)}.")
        renamed[_SCALES] = torch.cat([scales[i].reshape(1) for i in range(len(scales))])
    for name in list(renamed):
        match = _TOWER_CONV.fullmatch(name)
        if match and renamed[name].ndim == 4:
            renamed.setdefault(f"{match.group(1)}.bias", torch.zeros(renamed[name].shape[0]))
    return renamed
