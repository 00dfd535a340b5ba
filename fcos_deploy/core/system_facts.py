"""What the operating system says of a machine: processor, JetPack, NVIDIA driver, NPU. Reads files, starts nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["JetsonFacts", "SystemFacts", "system_facts"]

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
