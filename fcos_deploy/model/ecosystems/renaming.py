"""Names of tensors in a file to canonical names (spec 2.3 and 8)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fcos_deploy.core.errors import CheckpointError
from fcos_deploy.model.stored_tensor import TensorFacts, count_of

__all__ = ["Rename", "canonical", "canonical_names", "refuse_unsupported"]

_DROPPED = re.compile(r".*\.num_batches_tracked|pixel_mean|pixel_std|ema_.*|n_averaged")
_SCALE = re.compile(r"head\.regression_head\.scales\.(\d+)")

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


def canonical(tensors: Mapping[str, TensorFacts], renames: tuple[Rename, ...]) -> dict[str, TensorFacts]:
    """The tensors that inference needs, under canonical names; each level's scale is one of its own.

    Raises:
        CheckpointError: when two names become one, or the levels' scales do not fit each other.
    """
    found = {target: tensors[source] for source, target in canonical_names(tensors, renames).items()}
    scales = {int(m.group(1)): t for n, t in found.items() if (m := _SCALE.fullmatch(n))}
    if sorted(scales) != list(range(len(scales))) or any(count_of(t) != 1 for t in scales.values()):
        raise CheckpointError(f"Expected one scale for each level, got levels {sorted(scales)}.")
    return found
