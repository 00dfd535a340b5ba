"""Examines this machine: what works, what does not, and the command that repairs it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fcos_deploy.core.backend import BackendProbe, all_backends
from fcos_deploy.core.enums import ArtifactKind, StrEnum
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.libraries import parse_version
from fcos_deploy.core.machine import MachineFacts, read_machine
from fcos_deploy.core.native import SWITCH, library_problem, native
from fcos_deploy.targets.profiles import DeviceProfile

__all__ = ["Difference", "Examination", "Finding", "Health", "compare", "difference_lines", "examine", "lines"]

_OWN_PACKAGES = ("fcos_deploy", "exporters", "runtimes", "calibration")
_DISTRIBUTION = "fcos-deploy"
# ONNX Runtime's TensorRT provider is linked against one major of TensorRT: the first version for TensorRT 11.
_ORT_FOR_TENSORRT_11 = (1, 27)
_NVIDIA_ENGINES = frozenset({ArtifactKind.TENSORRT_ENGINE, ArtifactKind.TENSORRT_RTX_ENGINE})
_MEMORY_TOLERANCE = 0.85  # the kernel and the GPU's carve-out take their part of a board's nominal memory


class Health(StrEnum):
    """``absent``: not installed, which is no fault. ``broken``: installed, but does not work."""

    WORKS = "works"
    ABSENT = "absent"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Finding:
    """The state of one part; ``remedy`` is what to do, empty when there is nothing to do."""

    area: str
    name: str
    health: Health
    detail: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Difference:
    """Where this machine differs from a profile; ``remedy`` is what removes the difference."""

    name: str
    expected: str
    actual: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Examination:
    """All findings, with the facts and probes that ``compare`` needs."""

    findings: tuple[Finding, ...]
    facts: MachineFacts
    probes: dict[str, BackendProbe]

    @property
    def broken(self) -> tuple[Finding, ...]:
        """Those that do not work."""
        return tuple(finding for finding in self.findings if finding.health is Health.BROKEN)


def examine() -> Examination:
    """Examine everything; what does not work becomes a finding, not an exception."""
    facts = read_machine()
    probes = {name: backend.probe() for name, backend in all_backends().items()}
    findings = (
        *_hardware(facts, probes),
        _host_path(),
        *_runtimes(facts, probes),
        *_packages(),
        *_pairs(probes),
    )
    return Examination(findings, facts, probes)


def lines(findings: Iterable[Finding]) -> Iterator[str]:
    """A line for each finding, and one below it for what to do."""
    for finding in findings:
        yield f"{finding.health:8}{f'{finding.area}: {finding.name}':24}{finding.detail}"
        if finding.remedy:
            yield f"{'':32}{finding.remedy}"


def difference_lines(differences: Iterable[Difference]) -> Iterator[str]:
    """As ``lines``."""
    for difference in differences:
        yield f"{'differs':8}{difference.name:24}expected '{difference.expected}', got '{difference.actual}'"
        yield f"{'':32}{difference.remedy}"


def _hardware(facts: MachineFacts, probes: dict[str, BackendProbe]) -> Iterator[Finding]:
    """The machine, and the drivers of its GPU and NPU."""
    version = platform.python_version()
    yield Finding("machine", "Python", Health.WORKS, f"{version} on {platform.system()} {platform.machine()}")
    features = ", ".join(facts.int8_features) or "no int8 instructions"
    yield Finding("machine", "processor", Health.WORKS, f"{facts.processor or 'unknown'}: {features}")
    if facts.jetson is not None:
        jetpack = facts.jetson.jetpack or "unknown"
        detail = f"{facts.jetson.model or 'Jetson'}, L4T {facts.jetson.l4t}, JetPack {jetpack}"
        yield Finding("machine", "JetPack", Health.WORKS, detail)
    if facts.nvidia_driver:
        yield Finding("NVIDIA", "driver", Health.WORKS, facts.nvidia_driver)
    elif facts.jetson is not None:
        yield Finding("NVIDIA", "driver", Health.WORKS, f"of L4T {facts.jetson.l4t}")
    else:
        yield Finding(
            "NVIDIA", "driver", Health.ABSENT, "no kernel module", "needed for a GPU: install NVIDIA's driver"
        )
    seen = any("NPU" in device for probe in probes.values() for device in probe.devices)
    if seen:
        yield Finding("Intel", "NPU", Health.WORKS, facts.npu_driver or "driver outside the kernel tree")
    elif facts.npu_driver or facts.npu_device:
        detail = "the kernel has its driver, OpenVINO does not see it"
        yield Finding("Intel", "NPU", Health.BROKEN, detail, "install intel-level-zero-npu and join the group 'render'")
    else:
        yield Finding("Intel", "NPU", Health.ABSENT, "no driver in the kernel")


def _host_path() -> Finding:
    """Whether decoding and suppression run in C or in NumPy."""
    try:
        if native() is not None:
            return Finding("machine", "host path", Health.WORKS, "compiled")
    except ConfigError as error:
        return Finding("machine", "host path", Health.BROKEN, error.message, error.hint)
    if os.environ.get(SWITCH) == "0":
        return Finding("machine", "host path", Health.WORKS, f"NumPy, as {SWITCH}=0 says")
    remedy = "for faster decoding install a wheel for this machine, or install from source with a C compiler"
    return Finding("machine", "host path", Health.ABSENT, f"NumPy: {library_problem()}", remedy)


def _runtimes(facts: MachineFacts, probes: dict[str, BackendProbe]) -> Iterator[Finding]:
    """What every backend finds. Nobody is told to install what runs on an NVIDIA GPU where there is none."""
    nvidia = facts.nvidia_driver or facts.gpus or facts.jetson is not None
    for name, probe in sorted(probes.items()):
        if probe.available:
            devices = ", ".join(probe.devices)
            yield Finding("runtime", name, Health.WORKS, f"{probe.version}: {devices or 'no devices'}")
        else:
            health = Health.ABSENT if probe.missing else Health.BROKEN
            version = f"{probe.version}: " if probe.version else ""
            unused = probe.missing and not nvidia and not _NVIDIA_ENGINES.isdisjoint(all_backends()[name].accepts)
            remedy = f"not needed here, there is no NVIDIA GPU; for one: {probe.remedy}" if unused else probe.remedy
            yield Finding("runtime", name, health, f"{version}{probe.problem}", remedy)


def _packages() -> Iterator[Finding]:
    """Other distributions that own our top-level names, and two distributions of one library, which overwrite it."""
    owners = importlib.metadata.packages_distributions()
    for package in _OWN_PACKAGES:
        others = sorted({name for name in owners.get(package, []) if _normal(name) != _DISTRIBUTION})
        if others:
            remedy = f"use an environment of its own, or: pip uninstall {' '.join(others)}"
            yield Finding("packages", package, Health.BROKEN, f"also owned by {', '.join(others)}", remedy)
    for package in ("onnxruntime", "cv2", "openvino", "tensorrt"):
        names = sorted({_normal(name) for name in owners.get(package, [])})
        if len(names) > 1:
            remedy = f"keep one: pip uninstall {' '.join(names)}, then install the one you need"
            yield Finding("packages", package, Health.BROKEN, f"installed by {', '.join(names)} at once", remedy)
    # A folder with the name of one of our packages, earlier on the import path, is imported in its place.
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in _OWN_PACKAGES}
    roots = {name: file.rsplit("/", 2)[0] for name, file in files.items() if file}
    home = roots.get(_OWN_PACKAGES[0], "")
    shadowing = "; ".join(f"'{name}' comes from {root}" for name, root in roots.items() if root != home)
    if shadowing:
        yield Finding("packages", "import path", Health.BROKEN, shadowing, "run from another folder, or rename it")


def _normal(distribution: str) -> str:
    return distribution.lower().replace("_", "-")


def _pairs(probes: dict[str, BackendProbe]) -> Iterator[Finding]:
    """Versions that must fit each other."""
    runtime, tensorrt = probes.get("onnxruntime"), probes.get("tensorrt")
    provided = runtime is not None and any("tensorrt" in device for device in runtime.devices)
    if runtime is None or tensorrt is None or not provided or not tensorrt.version:
        return
    if parse_version(tensorrt.version)[0] >= 11 and parse_version(runtime.version) < _ORT_FOR_TENSORRT_11:
        detail = f"ONNX Runtime {runtime.version} cannot load TensorRT {tensorrt.version}"
        yield Finding("packages", "TensorRT provider", Health.BROKEN, detail, "pip install 'onnxruntime-gpu>=1.27'")


def compare(examination: Examination, profile: DeviceProfile) -> tuple[Difference, ...]:
    """Where this machine differs from a profile; versions are compared in the parts that the profile names."""
    return (*_common(examination, profile), *_gpu(examination, profile), *_intel(examination, profile))


def _common(examination: Examination, profile: DeviceProfile) -> Iterator[Difference]:
    facts = examination.facts
    if facts.machine != profile.machine:
        remedy = "run this on the device; from here, plan for it: fcos-deploy deploy --dry-run"
        yield Difference("architecture", profile.machine, facts.machine, remedy)
    if sys.version_info[:2] < parse_version(profile.python)[:2]:
        remedy = "make an environment of that Python: python3 -m venv"
        yield Difference("Python", f"{profile.python} or later", platform.python_version(), remedy)
    if facts.memory_mib < profile.memory_mib * _MEMORY_TOLERANCE:
        remedy = "lower --workspace-mib, and add swap for builds: sudo fallocate -l 8G /swapfile"
        yield Difference("memory", f"{profile.memory_mib} MiB", f"{facts.memory_mib} MiB", remedy)
    name = profile.backends[0]
    probe = examination.probes.get(name, BackendProbe(available=False, problem="not registered"))
    if not probe.available:
        yield Difference(f"runtime {name}", "works", probe.problem, probe.remedy or "see the findings above")


def _gpu(examination: Examination, profile: DeviceProfile) -> Iterator[Difference]:
    expected, probe = profile.nvidia, examination.probes.get(profile.backends[0])
    if expected is None or probe is None:
        return
    if probe.version and not _begins(probe.version, expected.tensorrt):
        remedy = "take the profile of this version, or a file of your own: --target ./board.toml"
        yield Difference("TensorRT", expected.tensorrt, probe.version, remedy)
    marker = f"sm_{expected.compute_capability.replace('.', '')}"
    if not any(marker in device for device in probe.devices):
        remedy = "see what the driver sees: nvidia-smi; in a container: --gpus all (Jetson: --runtime nvidia)"
        yield Difference("GPU", marker, ", ".join(probe.devices) or "none", remedy)
    jetson = examination.facts.jetson
    if expected.l4t and (jetson is None or not _begins(jetson.l4t, expected.l4t)):
        actual = jetson.l4t if jetson is not None else "no Jetson"
        remedy = "take the profile of this JetPack, or update: sudo apt install nvidia-jetpack"
        yield Difference("JetPack", f"{expected.jetpack} (L4T {expected.l4t})", actual, remedy)


def _intel(examination: Examination, profile: DeviceProfile) -> Iterator[Difference]:
    expected = profile.intel
    devices = [d for probe in examination.probes.values() for d in probe.devices]
    if expected is not None and not any(device.startswith(expected.device) for device in devices):
        remedy = "install Intel's driver of the device, and join its group: sudo usermod -aG render $USER"
        yield Difference("device", expected.device, ", ".join(devices) or "none", remedy)


def _begins(version: str, prefix: str) -> bool:
    """Whether ``version`` equals ``prefix`` in the parts that the prefix names."""
    parts = parse_version(prefix)
    return parse_version(version)[: len(parts)] == parts
