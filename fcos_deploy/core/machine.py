"""The processor cores that this process may use."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["JetsonFacts", "MachineFacts", "SystemFacts", "read_machine", "system_facts", "usable_cpus"]


def usable_cpus() -> int:
    """How many; fewer than the machine has where affinity (``taskset``, containers) says so."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# Instructions that decide how fast int8 is, as /proc/cpuinfo names them.
_INT8_FLAGS = {
    "avx2": "AVX2",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX512-VNNI",
    "amx_int8": "AMX-INT8",
    "amx_bf16": "AMX-BF16",
    "asimddp": "Arm dot product",
    "i8mm": "Arm int8 matrix multiply",
}
# First JetPack of each L4T release (revision: major.minor), newest first.
_JETPACKS = (
    ((39, 2), "7.2"),
    ((38, 4), "7.1"),
    ((38, 2), "7.0"),
    ((36, 4), "6.1 or 6.2"),
    ((36, 3), "6.0"),
    ((35, 1), "5.1"),
    ((32, 7), "4.6"),
)


@dataclass(frozen=True, slots=True)
class JetsonFacts:
    """``l4t`` such as ``36.4.3``; ``jetpack`` is empty for a release that is not known."""

    model: str
    l4t: str
    jetpack: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemFacts:
    """``nvidia_driver`` is the kernel module's version; ``npu_driver`` the name of the loaded NPU driver."""

    processor: str
    int8_features: tuple[str, ...]
    memory_mib: int
    jetson: JetsonFacts | None
    nvidia_driver: str
    npu_driver: str
    npu_device: bool


def system_facts(root: Path = Path("/")) -> SystemFacts:
    """Read them; ``root`` is where ``proc``, ``sys``, ``etc`` and ``dev`` lie."""
    cpuinfo = _text(root / "proc/cpuinfo")
    flags = (
        set(re.findall(r"^(?:flags|Features)\s*:\s*(.*)$", cpuinfo, re.MULTILINE)[:1][0].split()) if cpuinfo else set()
    )
    model = re.search(r"^model name\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    board = _text(root / "proc/device-tree/model").rstrip("\0\n")
    return SystemFacts(
        processor=model[1] if model else board,
        int8_features=tuple(label for flag, label in _INT8_FLAGS.items() if flag in flags),
        memory_mib=_memory_mib(root),
        jetson=_jetson(root, board),
        nvidia_driver=_nvidia_driver(root),
        npu_driver="intel_vpu" if (root / "sys/module/intel_vpu").is_dir() else "",
        npu_device=any((root / "dev/accel").glob("accel*")),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _memory_mib(root: Path) -> int:
    found = re.search(r"^MemTotal:\s*(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    return int(found[1]) // 1024 if found else 0


def _jetson(root: Path, board: str) -> JetsonFacts | None:
    """From lines such as ``# R36 (release), REVISION: 4.3, GCID: ...``."""
    found = re.search(r"# R(\d+) \(release\), REVISION: ([\d.]+)", _text(root / "etc/nv_tegra_release"))
    if found is None:
        return None
    l4t = f"{found[1]}.{found[2]}"
    release = tuple(int(part) for part in l4t.split(".")[:2])
    jetpack = next((name for first, name in _JETPACKS if release[0] == first[0] and release >= first), "")
    return JetsonFacts(model=board, l4t=l4t, jetpack=jetpack)


def _nvidia_driver(root: Path) -> str:
    found = re.search(r"Kernel Module(?: for \S+)?\s+([\d.]+)", _text(root / "proc/driver/nvidia/version"))
    return found[1] if found else ""


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
