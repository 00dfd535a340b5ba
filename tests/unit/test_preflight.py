"""What does not fit is found before an engine is opened, and named."""

from __future__ import annotations

import dataclasses

import pytest

from fcos_deploy.bundle import Artifact, Requirements, StepRecord, VersionRule
from fcos_deploy.bundle.selection import preflight
from fcos_deploy.core.backend import BackendProbe
from fcos_deploy.core.enums import ArtifactKind, Precision
from fcos_deploy.core.machine import MachineFacts

MACHINE = MachineFacts(
    machine="aarch64",
    processor="ARMv8",
    cpu_features=("asimd", "fp16"),
    system="Linux",
    gpus=(("Orin", "8.7"),),
    nvidia_driver="540.3.0",
)
PROBE = BackendProbe(available=True, version="10.3.0", devices=("cuda:0 Orin",))


def _differences(requires: Requirements, *, probe: BackendProbe = PROBE) -> list[str]:
    return [str(d) for d in preflight(_artifact(requires), probe=probe, machine=MACHINE)]


def _artifact(requires: Requirements) -> Artifact:
    return Artifact(
        path="m.engine",
        kind=ArtifactKind.TENSORRT_ENGINE,
        precision=Precision.INT8,
        sha256="0" * 64,
        size=1,
        step=StepRecord(name="build"),
        requires=requires,
    )


def test_what_asks_for_nothing_fits() -> None:
    assert _differences(Requirements()) == []


def test_what_fits_in_everything_fits() -> None:
    requires = Requirements(
        backend_version="10.3.0",
        compute_capabilities=("8.6", "8.7"),
        driver="535",
        machine="aarch64",
        cpu_features=("asimd",),
        device="cuda",
    )
    assert _differences(requires) == []


@pytest.mark.parametrize(
    ("requires", "message"),
    [
        (Requirements(backend_version="10.3.1"), "the runtime's version must be 10.3.1, it is 10.3.0"),
        (Requirements(backend_version="11.0", version_rule=VersionRule.SAME_MAJOR), r"11.0 (same major), it is 10.3.0"),
        (Requirements(backend_version="10.4", version_rule=VersionRule.AT_LEAST), "10.4 or newer, it is 10.3.0"),
        (Requirements(compute_capabilities=("8.6",)), "capability must be 8.6, it is 8.7 (Orin)"),
        (Requirements(compute_capabilities=("9.0",), hardware_compatible=True), "9.0 or newer"),
        (Requirements(driver="550.54"), "the NVIDIA driver must be 550.54 or newer, it is 540.3.0"),
        (Requirements(machine="x86_64"), "architecture must be x86_64, it is aarch64"),
        (Requirements(cpu_features=("avx512_vnni", "asimd")), "one with avx512_vnni, it is ARMv8, without"),
        (Requirements(device="GPU"), "the device must be GPU, it is cuda:0 Orin"),
    ],
)
def test_what_differs_is_named_with_both_values(requires: Requirements, message: str) -> None:
    (found,) = _differences(requires)
    assert message in found


@pytest.mark.parametrize(
    "requires",
    [
        Requirements(backend_version="10.0", version_rule=VersionRule.SAME_MAJOR),
        Requirements(backend_version="9.9", version_rule=VersionRule.AT_LEAST),
        Requirements(compute_capabilities=("8.0",), hardware_compatible=True),
        Requirements(driver="540.3"),
    ],
)
def test_newer_is_accepted_where_the_rule_says_so(requires: Requirements) -> None:
    assert _differences(requires) == []


def test_version_10_is_newer_than_9() -> None:
    requires = Requirements(backend_version="9.12", version_rule=VersionRule.AT_LEAST)
    assert _differences(requires, probe=dataclasses.replace(PROBE, version="10.1")) == []


def test_everything_is_told_at_once() -> None:
    found = _differences(Requirements(backend_version="8", machine="x86_64", compute_capabilities=("7.5",)))
    assert len(found) == 3


def test_a_missing_runtime_is_all_that_is_told() -> None:
    probe = BackendProbe(available=False, problem="'tensorrt' is not installed")
    (found,) = _differences(Requirements(machine="x86_64"), probe=probe)
    assert "installed" in found


def test_a_machine_whose_gpu_is_gone_is_told_as_one_without() -> None:
    artifact = _artifact(Requirements(compute_capabilities=("8.7",)))
    gone = dataclasses.replace(MACHINE, gpus=())
    (found,) = preflight(artifact, probe=PROBE, machine=gone)
    assert str(found) == "the GPU's compute capability must be 8.7, it is no NVIDIA GPU"
