"""What is known of a device without being on it: profiles, and which layers of an FCOS leave its accelerator.

Profiles are TOML files in ``fcos_deploy/targets/devices``. Sources of the layers: TensorRT, "DLA Supported Layers and
Restrictions" (no GridSample, no normalisation, no TopK, of activations ReLU, sigmoid, tanh and clipped ReLU, of unary
operations no Exp); openvinotoolkit/npu_compiler (GridSample and MVN are fp16 software kernels of the vector
processors).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from fcos_deploy.core.enums import Precision, Tail
from fcos_deploy.core.errors import ConfigError, unknown_name
from fcos_deploy.core.files import MAX_TEXT_BYTES, decoded_text, read_file
from fcos_deploy.core.libraries import parse_version
from fcos_deploy.core.network import BackboneType, BoxActivation, FcosConfig, TowerNorm
from fcos_deploy.core.serialize import from_json, parse_toml

__all__ = [
    "DLA",
    "NPU",
    "Accelerator",
    "DeviceProfile",
    "IntelFacts",
    "NvidiaFacts",
    "fallback_note",
    "load_profile",
    "operators_of",
    "profile_names",
]

_FOLDER = Path(__file__).parent / "devices"
_OLDEST_PYTHON = (3, 10)


@dataclass(frozen=True, slots=True, kw_only=True)
class NvidiaFacts:
    """``tensorrt`` and ``cuda`` are versions; ``workspace_mib`` is what a build may take on a small board.

    ``dla_cores`` is what this TensorRT reports, which is fewer than the chip has where the version left DLA out.
    """

    compute_capability: str
    tensorrt: str
    cuda: str
    jetpack: str = ""
    l4t: str = ""
    dla_cores: int = 0
    workspace_mib: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class IntelFacts:
    """``device`` in OpenVINO's words; ``static_shapes``: it compiles graphs with fixed shapes only."""

    device: str
    openvino: str = "2025.0"
    static_shapes: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """A device that can be built for. The first of ``backends`` is the default.

    ``machine`` is the architecture, ``python`` the version of the system, ``memory_mib`` the memory of the smallest
    board of this name, which the GPU of a Jetson shares.

    ``verified`` says on which hardware this project has run it; empty: never.
    """

    name: str
    title: str
    machine: str
    python: str
    memory_mib: int
    backends: tuple[str, ...]
    precisions: tuple[Precision, ...]
    precision: Precision
    tail: Tail
    batch: int = 1
    nvidia: NvidiaFacts | None = None
    intel: IntelFacts | None = None
    notes: tuple[str, ...] = ()
    verified: str = ""

    def __post_init__(self) -> None:
        if (self.intel is None) == (self.nvidia is None):
            raise ConfigError(f"Profile '{self.name}' needs one of the tables 'nvidia' and 'intel', and only one.")
        if self.precision not in self.precisions or not self.backends:
            raise ConfigError(f"Profile '{self.name}' has a default precision or backend that it does not list.")

    @property
    def runs_python(self) -> bool:
        """Whether this package runs there; where it does not, engines are built and run by the vendor's own tools."""
        return parse_version(self.python) >= _OLDEST_PYTHON


def profile_names() -> tuple[str, ...]:
    """The profiles that come with the package."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


def load_profile(name: str) -> DeviceProfile:
    """A profile by its name, or from a file (``./my-board.toml``).

    Raises:
        ConfigError: unknown, unreadable, or a field that does not fit.
    """
    path = Path(name) if name.endswith(".toml") else _FOLDER / f"{name}.toml"
    if not path.is_file():
        raise unknown_name("device profile", name, profile_names())
    try:
        content = parse_toml(decoded_text(read_file(path, limit=MAX_TEXT_BYTES)))
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot read the device profile '{path}': {error}.") from error
    return from_json(DeviceProfile, content, where=path.name)


# ---- accelerators of fixed functions: NVIDIA's DLA, Intel's NPU ----

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
