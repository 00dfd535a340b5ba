"""What this machine is: processor, its features, NVIDIA GPUs and driver; read without any framework."""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MachineFacts", "read_machine"]

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
_CPUINFO = Path("/proc/cpuinfo")
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """``gpus`` are (name, compute capability such as "8.7"); ``cuda_driver`` is the newest CUDA the driver knows."""

    machine: str
    processor: str
    cpu_features: frozenset[str]
    system: str
    gpus: tuple[tuple[str, str], ...] = ()
    driver: str = ""
    cuda_driver: str = ""


def read_machine() -> MachineFacts:
    """Look at this machine; what cannot be read is left empty."""
    fields = _cpuinfo()
    gpus, cuda = _nvidia_gpus()
    return MachineFacts(
        machine=platform.machine(),
        processor=fields.get("model name", platform.processor() or platform.machine()),
        cpu_features=frozenset(fields.get("flags", fields.get("Features", "")).split()),
        system=platform.platform(),
        gpus=gpus,
        driver=_driver_version(),
        cuda_driver=cuda,
    )


def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _driver_version() -> str:
    try:
        text = _DRIVER.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    numbers = [word for word in text.partition("\n")[0].split() if word[0].isdigit() and "." in word]
    return numbers[0] if numbers else ""


def _nvidia_gpus() -> tuple[tuple[tuple[str, str], ...], str]:
    """Asks the driver's own library, which every NVIDIA machine has, a Jetson without nvidia-smi and NVML too."""
    try:
        return _ask_driver(ctypes.CDLL("libcuda.so.1"))
    except (OSError, AttributeError):  # Not there, no library, or one without a function: an installation cut short.
        return (), ""


def _ask_driver(cuda: ctypes.CDLL) -> tuple[tuple[tuple[str, str], ...], str]:
    count, version = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or cuda.cuDriverGetVersion(ctypes.byref(version)):
        return (), ""
    gpus = (_gpu(cuda, index) for index in range(count.value))
    return tuple(gpu for gpu in gpus if gpu), f"{version.value // 1000}.{version.value % 1000 // 10}"


def _gpu(cuda: ctypes.CDLL, index: int) -> tuple[str, str] | None:
    """None for one that does not answer: it fell off the bus after it was counted."""
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    major, minor = ctypes.c_int(), ctypes.c_int()
    failed = (
        cuda.cuDeviceGet(ctypes.byref(device), index)
        or cuda.cuDeviceGetName(name, len(name), device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
    )
    return None if failed else (name.value.decode(errors="replace"), f"{major.value}.{minor.value}")
