"""Facts of a machine: its processor, the cores that this process may use, its GPUs, and the drivers that are loaded."""

from __future__ import annotations

import ctypes
import datetime
import math
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["JetsonFacts", "MachineFacts", "is_jetson", "kernel_text", "read_machine", "usable_cpus", "utc_now"]

_ROOT = Path("/")
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


_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_* of cuda.h


@dataclass(frozen=True, slots=True)
class JetsonFacts:
    """``l4t`` such as ``36.4.3``; ``jetpack`` is empty for a release that is not known."""

    model: str
    l4t: str
    jetpack: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """What is known of a machine; whatever cannot be read is empty, 0 or None.

    ``machine`` is the architecture, such as ``x86_64``. ``cpu_features`` are the flags of ``/proc/cpuinfo``, sorted.
    ``cores`` are those that this process may use, ``load`` is the load average of the last minute. ``gpus`` are those
    of NVIDIA: (name, compute capability such as "8.7"). ``nvidia_driver`` is the version of the kernel module,
    ``cuda_driver`` the newest CUDA that it serves. ``npu_driver`` names the loaded driver of an Intel NPU, and
    ``npu_device`` says whether the driver has a device.
    """

    machine: str
    processor: str
    system: str
    python: str = ""
    cpu_features: tuple[str, ...] = ()
    cores: int = 0
    memory_mib: int = 0
    load: float | None = None
    jetson: JetsonFacts | None = None
    gpus: tuple[tuple[str, str], ...] = ()
    nvidia_driver: str = ""
    cuda_driver: str = ""
    npu_driver: str = ""
    npu_device: bool = False

    @property
    def int8_features(self) -> tuple[str, ...]:
        """The instructions that decide how fast int8 is, in their makers' words."""
        return tuple(label for flag, label in _INT8_FLAGS.items() if flag in self.cpu_features)


def read_machine(root: Path = _ROOT) -> MachineFacts:
    """Look at this machine; ``root`` is where ``proc``, ``sys``, ``etc`` and ``dev`` lie."""
    lines = (line.partition(":") for line in kernel_text(root / "proc/cpuinfo").partition("\n\n")[0].splitlines())
    first_cpu = {name.strip(): value.strip() for name, _, value in lines}
    board = kernel_text(root / "proc/device-tree/model")
    memory = re.search(r"^MemTotal:\s*(\d+) kB", kernel_text(root / "proc/meminfo"), re.MULTILINE)
    load = kernel_text(root / "proc/loadavg").split()
    driver = re.search(r"Kernel Module(?: for \S+)?\s+([\d.]+)", kernel_text(root / "proc/driver/nvidia/version"))
    # The driver's library is this machine's, wherever its files are said to lie.
    gpus, cuda = _nvidia_gpus() if root == _ROOT else ((), "")
    return MachineFacts(
        machine=platform.machine(),
        processor=first_cpu.get("model name") or board or platform.processor() or platform.machine(),
        system=platform.platform(),
        python=platform.python_version(),
        cpu_features=tuple(sorted(first_cpu.get("flags", first_cpu.get("Features", "")).split())),
        cores=usable_cpus(root),
        memory_mib=int(memory[1]) // 1024 if memory else 0,
        load=float(load[0]) if load else None,
        jetson=_jetson(root, board),
        gpus=gpus,
        nvidia_driver=driver[1] if driver else "",
        cuda_driver=cuda,
        npu_driver="intel_vpu" if (root / "sys/module/intel_vpu").is_dir() else "",
        npu_device=any((root / "dev/accel").glob("accel*")),
    )


def utc_now() -> str:
    """The time as records keep it, such as ``2026-01-31T09:30:00+00:00``."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def usable_cpus(root: Path = _ROOT) -> int:
    """How many cores this process may use: the machine's, less what affinity or a container's CPU quota takes away.

    A quota is a share of time, not of cores; more threads than its cores would only be throttled, all at once.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cpus, *map(math.ceil, _cpu_quotas(root))]))


def _cpu_quotas(root: Path) -> Iterator[float]:
    """The limits of this process's control group and of the groups above it, in cores; the smallest one holds.

    Version 2 writes ``cpu.max`` as "quota period" or "max period"; version 1 has two files, and -1 for no quota
    (Documentation/admin-guide/cgroup-v2.rst and scheduler/sched-bwc.rst of Linux).
    """
    for line in kernel_text(root / "proc/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy != "0" and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controllers
        group = top / path.lstrip("/")
        # Inside a container the path may be the host's, of which only the mounted part is visible.
        for folder in (group, *group.parents):
            words = kernel_text(folder / "cpu.max").split() or [
                kernel_text(folder / "cpu.cfs_quota_us"),
                kernel_text(folder / "cpu.cfs_period_us"),
            ]
            if all(word.isdigit() for word in words):
                yield int(words[0]) / int(words[1])
            if folder == top:
                break


def kernel_text(path: Path) -> str:
    """The text of a file of ``/proc`` or ``/sys``, without what ends it; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""


def is_jetson(root: Path = _ROOT) -> bool:
    """Whether this is a Jetson: by its release file or, in a container, which may lack that, by the board's name."""
    board = kernel_text(root / "proc/device-tree/model")
    return (root / "etc/nv_tegra_release").is_file() or "jetson" in board.lower()


def _jetson(root: Path, board: str) -> JetsonFacts | None:
    """From lines such as ``# R36 (release), REVISION: 4.3, GCID: ...``."""
    release = re.search(r"# R(\d+) \(release\), REVISION: ([\d.]+)", kernel_text(root / "etc/nv_tegra_release"))
    if release is None:
        return None
    l4t = f"{release[1]}.{release[2]}"
    numbers = tuple(int(part) for part in l4t.split(".")[:2])
    jetpack = next((name for first, name in _JETPACKS if numbers[0] == first[0] and numbers >= first), "")
    return JetsonFacts(model=board, l4t=l4t, jetpack=jetpack)


def _nvidia_gpus() -> tuple[tuple[tuple[str, str], ...], str]:
    """(GPUs, newest CUDA), from the driver's own library: a Jetson has neither nvidia-smi nor NVML."""
    count, version = ctypes.c_int(), ctypes.c_int()
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        if (
            cuda.cuInit(0)
            or cuda.cuDeviceGetCount(ctypes.byref(count))
            or cuda.cuDriverGetVersion(ctypes.byref(version))
        ):
            return (), ""
        gpus = tuple(gpu for index in range(count.value) if (gpu := _gpu(cuda, index)))
    except (OSError, AttributeError):  # no driver, not a library, or a library without one of the functions
        return (), ""
    return gpus, f"{version.value // 1000}.{version.value % 1000 // 10}"  # 12060 is 12.6


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
