"""The network that a canonical state dict belongs to, as far as shapes tell (spec 8.5)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fcos_deploy.core.errors import CheckpointError, FcosDeployError
from fcos_deploy.core.network import BlockType, BodyType, FcosConfig, TowerNorm
from fcos_deploy.model.stored_tensor import TensorFacts

__all__ = ["infer_network"]

_STRIDES = (8, 16, 32, 64, 128)
_BODY = "backbone.body."
_CLS, _REG, _SHARED = "head.classification_head", "head.regression_head", "head.shared_tower"
_BODY_MARKS = {
    BodyType.RESNET: _BODY + "layer1.0.conv1.weight",
    BodyType.DLA34: _BODY + "base_layer.0.weight",
    BodyType.MOBILENET_V2: _BODY + "features.0.0.weight",
}


def infer_network(tensors: Mapping[str, TensorFacts]) -> FcosConfig:
    """The configuration that fits the tensors; what shapes do not tell has its default.

    Raises:
        CheckpointError: a tensor that every FCOS has is missing, or the shapes fit no FCOS.
    """
    shapes = _Shapes(tensors)
    body = shapes.body()
    levels = 5 if "backbone.fpn.extra_blocks.p6.weight" in tensors else 3
    shapes.of(f"{_REG}.bbox_ctrness.weight", 4)  # Absent in RetinaNet, whose other names are the same.
    try:
        return FcosConfig(
            num_classes=shapes.of(f"{_CLS}.cls_logits.weight", 4)[0],
            body=body,
            fpn_channels=shapes.of("backbone.fpn.inner_blocks.0.0.weight", 4)[0],
            strides=_STRIDES[:levels],
            cls_convs=shapes.tower_convs(_CLS),
            reg_convs=shapes.tower_convs(_REG),
            shared_convs=shapes.tower_convs(_SHARED),
            tower_norm=shapes.tower_norm(),
            has_scales=any(name in tensors for name in (f"{_REG}.scales", f"{_REG}.scales.0")),
            **(shapes.resnet() if body is BodyType.RESNET else {}),
        )
    except FcosDeployError as error:
        raise CheckpointError(f"The shapes fit no FCOS: {error.message}", hint=error.hint) from error


class _Shapes:
    """Questions about names and shapes."""

    def __init__(self, tensors: Mapping[str, TensorFacts]) -> None:
        self._tensors = tensors

    def of(self, name: str, ndim: int) -> tuple[int, ...]:
        """Shape of a tensor that must be there with ``ndim`` axes, none of them empty."""
        if name not in self._tensors:
            raise CheckpointError(f"The checkpoint has no '{name}' under any name that we know.", hint=_hint(name))
        shape = tuple(self._tensors[name].shape)
        if len(shape) != ndim or 0 in shape:
            raise CheckpointError(f"'{name}' must have {ndim} axes that are not empty, got shape {list(shape)}.")
        return shape

    def body(self) -> BodyType:
        for body, mark in _BODY_MARKS.items():
            if mark in self._tensors:
                return body
        shown = sorted(name for name in self._tensors if name.startswith("backbone."))[:3]
        raise CheckpointError(
            f"The body is none of {', '.join(_BODY_MARKS)}; the file has {shown or 'no tensor of a body'}.",
            hint="for a network of your own see docs/your-own-fcos.md",
        )

    def resnet(self) -> dict[str, Any]:  # Any: keyword arguments of FcosConfig
        blocks = tuple(self._count(rf"backbone\.body\.layer{i}\.(\d+)\.conv1\.weight") for i in (1, 2, 3, 4))
        stem = self.of(_BODY + "conv1.weight", 4)[0]
        if _BODY + "layer1.0.conv3.weight" not in self._tensors:
            return {"block": BlockType.BASIC, "blocks": blocks, "stem_channels": stem}
        width, inputs = self.of(_BODY + "layer1.0.conv2.weight", 4)[:2]
        groups = max(1, width // inputs)
        return {
            "block": BlockType.BOTTLENECK,
            "blocks": blocks,
            "stem_channels": stem,
            "groups": groups,
            "width_per_group": width // groups,
        }

    def tower_convs(self, head: str) -> int:
        pattern = re.compile(re.escape(head) + r"\.conv\.(\d+)\.weight")
        return sum(1 for n, t in self._tensors.items() if pattern.fullmatch(n) and len(t.shape) == 4)

    def tower_norm(self) -> TowerNorm:
        towers = [head for head in (_CLS, _SHARED, _REG) if self.tower_convs(head)]
        names = [f"{head}.conv.1" for head in towers[:1]]
        if any(f"{name}.0.running_mean" in self._tensors for name in names):
            return TowerNorm.BATCH_PER_LEVEL
        return TowerNorm.GROUP if any(f"{name}.weight" in self._tensors for name in names) else TowerNorm.NONE

    def _count(self, pattern: str) -> int:
        found = {int(m.group(1)) for name in self._tensors if (m := re.fullmatch(pattern, name))}
        if found != set(range(len(found))) or not found:
            raise CheckpointError(f"Expected blocks 0, 1, 2, ... under '{pattern}', got {sorted(found)[:8]}.")
        return len(found)


def _hint(name: str) -> str:
    return "a RetinaNet has no centerness and is not an FCOS" if name.endswith("bbox_ctrness.weight") else ""
