"""Device profiles: what is known of a device without being on it, as TOML files in ``fcos_deploy/targets/devices``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fcos_deploy.core.enums import Precision, StrEnum, Tail
from fcos_deploy.core.errors import ConfigError, unknown_name
from fcos_deploy.core.files import MAX_TEXT_BYTES, read_file
from fcos_deploy.core.libraries import parse_version
from fcos_deploy.core.serialize import from_json, parse_toml
from fcos_deploy.core.text import decoded_text

__all__ = ["DeviceFamily", "DeviceProfile", "IntelFacts", "NvidiaFacts", "load_profile", "profile_names"]

_FOLDER = Path(__file__).parent / "devices"
_OLDEST_PYTHON = (3, 10)


class DeviceFamily(StrEnum):
    """Boards with NVIDIA's own system image, other machines with an NVIDIA GPU, and Intel machines."""

    JETSON = "jetson"
    NVIDIA = "nvidia"
    INTEL = "intel"


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
    family: DeviceFamily
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
        if (self.family is DeviceFamily.INTEL) != (self.intel is not None) or (self.intel is None) == (
            self.nvidia is None
        ):
            raise ConfigError(
                f"Profile '{self.name}' of family '{self.family}' needs its own table, and only that one."
            )
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
