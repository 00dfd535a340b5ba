"""Which layers of an FCOS leave a fixed-function accelerator: NVIDIA's DLA, Intel's NPU.

Sources: TensorRT, "DLA Supported Layers and Restrictions" (no GridSample, no normalisation, no TopK, of activations
ReLU, sigmoid, tanh and clipped ReLU, of unary operations no Exp); openvinotoolkit/npu_compiler (GridSample and MVN
are fp16 software kernels of the vector processors).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fcos_deploy.core.enums import Tail
from fcos_deploy.core.network import BackboneType, BoxActivation, FcosConfig, TowerNorm

__all__ = ["DLA", "NPU", "Accelerator", "fallback_note", "operators_of"]

_SAMPLING = "the sampling of deformable convolutions"
_NORMS = "GroupNorm"


@dataclass(frozen=True, slots=True)
class Accelerator:
    """``lacks``: the layers that an ONNX operator computes, by the operators that the accelerator does not execute."""

    name: str
    fallback: str
    lacks: Mapping[str, str]


DLA = Accelerator(
    name="a DLA",
    fallback="the GPU",
    lacks={
        "GridSample": _SAMPLING,
        "DeformConv": "deformable convolutions",
        "InstanceNormalization": _NORMS,
        "GroupNormalization": _NORMS,
        "HardSigmoid": "VoVNet's gates",
        "Exp": "the exponential of the distances",
        "TopK": "the top-k of the tail",
        "NonMaxSuppression": "NMS",
    },
)
NPU = Accelerator(
    name="an NPU",
    fallback="its vector processors, in fp16 also where the graph is INT8",
    lacks={"GridSample": _SAMPLING, "InstanceNormalization": _NORMS, "GroupNormalization": _NORMS},
)


def operators_of(config: FcosConfig) -> frozenset[str]:
    """ONNX operators of the exported network that some accelerator lacks, without exporting it."""
    present = {
        "GridSample": bool(config.deformable),
        "GroupNormalization": config.tower_norm is TowerNorm.GROUP,
        "HardSigmoid": config.backbone is BackboneType.VOVNET,
        "Exp": config.box_activation is BoxActivation.EXP,
    }
    return frozenset(operator for operator, there in present.items() if there)


def fallback_note(accelerator: Accelerator, operators: Collection[str], *, tail: Tail | None = None) -> str:
    """The sentence that names the layers which fall back; '' when there are none. ``tail`` adds what it ends in."""
    computed = set(operators) | ({"TopK"} if tail in (Tail.CANDIDATES, Tail.NMS) else set())
    layers = dict.fromkeys(layer for operator, layer in accelerator.lacks.items() if operator in computed)
    if not layers:
        return ""
    *first, last = layers
    listed = f"{', '.join(first)} and {last}" if first else last
    return f"On {accelerator.name} these layers fall back to {accelerator.fallback}: {listed}."
