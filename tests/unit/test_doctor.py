"""What the doctor finds: on this machine for real, and from the files of other machines."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fcos_deploy.core.backend import BackendProbe
from fcos_deploy.core.machine import SystemFacts, system_facts
from fcos_deploy.core.registry import all_backends
from fcos_deploy.targets.doctor import Examination, Health, compare, difference_lines, examine, lines
from fcos_deploy.targets.profiles import load_profile

ORIN_RELEASE = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 2025\n"
XEON = "model name\t: Intel(R) Xeon(R) Platinum 8480+\nflags\t\t: fpu sse4_2 avx2 avx512_vnni amx_bf16 amx_int8\n"
ORIN_CPU = "processor\t: 0\nFeatures\t: fp asimd evtstrm aes asimddp\n"
DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:17:00 UTC 2025\nGCC version: ...\n"
OPEN_DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.57.08  Release Build\n"


def machine(root: Path, **files: str) -> SystemFacts:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("0", "-")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return system_facts(root)


def test_jetson_is_known_by_its_release_file(tmp_path: Path) -> None:
    facts = machine(
        tmp_path,
        etc__nv_tegra_release=ORIN_RELEASE,
        proc__cpuinfo=ORIN_CPU,
        proc__device0tree__model="NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
        proc__meminfo="MemTotal:        7802108 kB\n",
    )
    assert facts.jetson is not None
    assert (facts.jetson.l4t, facts.jetson.jetpack) == ("36.4.3", "6.1 or 6.2")
    assert facts.jetson.model.endswith("Kit Super")
    assert facts.int8_features == ("Arm dot product",)
    assert facts.memory_mib == 7619


@pytest.mark.parametrize(
    ("release", "revision", "jetpack"),
    [
        (39, "2.1", "7.2"),
        (38, "4.0", "7.1"),
        (38, "2.0", "7.0"),
        (36, "3.0", "6.0"),
        (35, "4.1", "5.1"),
        (34, "1.0", ""),
    ],
)
def test_jetpack_of_a_release(release: int, revision: str, jetpack: str, tmp_path: Path) -> None:
    facts = machine(tmp_path, etc__nv_tegra_release=f"# R{release} (release), REVISION: {revision}, GCID: 1\n")
    assert facts.jetson is not None
    assert facts.jetson.jetpack == jetpack


def test_int8_instructions_of_a_xeon(tmp_path: Path) -> None:
    facts = machine(tmp_path, proc__cpuinfo=XEON)
    assert facts.processor == "Intel(R) Xeon(R) Platinum 8480+"
    assert facts.int8_features == ("AVX2", "AVX512-VNNI", "AMX-INT8", "AMX-BF16")


@pytest.mark.parametrize(("text", "version"), [(DRIVER, "580.65.06"), (OPEN_DRIVER, "575.57.08")])
def test_nvidia_driver_of_the_kernel(text: str, version: str, tmp_path: Path) -> None:
    assert machine(tmp_path, proc__driver__nvidia__version=text).nvidia_driver == version


def test_an_empty_machine_has_nothing(tmp_path: Path) -> None:
    facts = system_facts(tmp_path)
    assert (facts.jetson, facts.nvidia_driver, facts.npu_driver, facts.int8_features) == (None, "", "", ())


def test_npu_driver_and_device(tmp_path: Path) -> None:
    (tmp_path / "sys/module/intel_vpu").mkdir(parents=True)
    (tmp_path / "dev/accel").mkdir(parents=True)
    (tmp_path / "dev/accel/accel0").touch()
    facts = system_facts(tmp_path)
    assert (facts.npu_driver, facts.npu_device) == ("intel_vpu", True)


@pytest.fixture(scope="module")
def here() -> Examination:
    return examine()


def test_every_backend_is_examined(here: Examination) -> None:
    found = {finding.name for finding in here.findings if finding.area == "runtime"}
    assert found == set(all_backends())


def test_what_does_not_work_says_what_to_do(here: Examination) -> None:
    for finding in here.findings:
        if finding.area == "runtime" and finding.health is not Health.WORKS:
            assert finding.remedy, finding


def test_a_line_for_each_finding_and_each_remedy(here: Examination) -> None:
    expected = len(here.findings) + sum(bool(finding.remedy) for finding in here.findings)
    assert len(list(lines(here.findings))) == expected


def test_another_distribution_with_our_names_is_found(tmp_path: Path) -> None:
    """A real distribution on the import path, as pip leaves it."""
    (tmp_path / "runtimes").mkdir()
    (tmp_path / "runtimes/__init__.py").touch()
    info = tmp_path / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "top_level.txt").write_text("runtimes\n")
    (info / "RECORD").write_text("runtimes/__init__.py,,\n")
    code = (
        "import fcos_deploy.targets.doctor as d, json, runtimes, sys\n"
        f"sys.path.append({str(tmp_path)!r})\n"
        "print(json.dumps([[f.name, str(f.health), f.detail, f.remedy] for f in d._packages()]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [
        [
            "runtimes",
            "broken",
            "also owned by stranger",
            "use an environment of its own, or: pip uninstall stranger",
        ]
    ]


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {'torch', 'onnx', 'onnxscript', 'torchvision'}:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Blocker())
from fcos_deploy.cli.app import build_app
build_app()(['doctor', '--json'])
"""


def test_doctor_works_without_torch_and_onnx() -> None:
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, env=environment, check=True)
    findings = {f["name"]: f for f in json.loads(done.stdout)["findings"]}
    assert findings["pytorch"]["health"] == "absent"
    assert "fcos-deploy[export]" in findings["pytorch"]["remedy"]
    assert findings["Python"]["health"] == "works"


def orin_nano(facts: SystemFacts) -> Examination:
    probe = BackendProbe(available=True, version="10.3.0", devices=("cuda:0 Orin (sm_87)",))
    return Examination((), facts, {"tensorrt": probe})


@pytest.fixture
def orin_facts(tmp_path: Path) -> SystemFacts:
    return machine(
        tmp_path,
        etc__nv_tegra_release=ORIN_RELEASE,
        proc__cpuinfo=ORIN_CPU,
        proc__meminfo="MemTotal:        7802108 kB\n",
    )


def differences(examination: Examination, profile: str) -> set[str]:
    return {difference.name for difference in compare(examination, load_profile(profile))}


def test_the_machine_of_the_profile_does_not_differ(orin_facts: SystemFacts) -> None:
    expected = set() if platform.machine() == "aarch64" else {"architecture"}
    assert differences(orin_nano(orin_facts), "jetson-orin-nano") == expected


def test_another_jetpack_differs(orin_facts: SystemFacts) -> None:
    assert differences(orin_nano(orin_facts), "jetson-orin-nano-jp7") >= {"TensorRT", "JetPack"}


def test_too_little_memory_and_another_gpu_differ(orin_facts: SystemFacts) -> None:
    found = differences(orin_nano(replace(orin_facts, memory_mib=3900)), "jetson-thor")
    assert found >= {"memory", "GPU", "TensorRT", "JetPack"}


def test_missing_openvino_device_differs(orin_facts: SystemFacts) -> None:
    cpu = BackendProbe(available=True, version="2026.4", devices=("CPU",))
    examination = Examination((), replace(orin_facts, memory_mib=64000), {"openvino": cpu})
    assert "device" in differences(examination, "intel-npu")
    assert "device" not in differences(examination, "intel-xeon")


def test_onnxruntime_too_old_for_its_tensorrt_is_found() -> None:
    from fcos_deploy.targets.doctor import _pairs

    probes = {
        "onnxruntime": BackendProbe(available=True, version="1.26.0", devices=("cpu", "tensorrt")),
        "tensorrt": BackendProbe(available=True, version="11.4.0"),
    }
    (finding,) = _pairs(probes)
    assert finding.health is Health.BROKEN
    assert list(_pairs({**probes, "tensorrt": BackendProbe(available=True, version="10.3.0")})) == []


def test_own_distribution_is_the_only_owner_here() -> None:
    owners = importlib.metadata.packages_distributions()
    assert {name.lower() for name in owners["runtimes"]} == {"fcos-deploy"}


def test_every_difference_says_what_would_mend_it(orin_facts: SystemFacts) -> None:
    examination = orin_nano(replace(orin_facts, memory_mib=3900, jetson=None))
    examination = replace(examination, probes={"tensorrt": replace(examination.probes["tensorrt"], available=False)})
    found = compare(examination, load_profile("jetson-thor"))
    assert {"memory", "runtime tensorrt", "TensorRT", "GPU", "JetPack"} <= {difference.name for difference in found}
    told = list(difference_lines(found))
    assert len(told) == 2 * len(found)
    assert all(line.strip() for line in told)


def test_the_doctor_does_not_import_torch() -> None:
    """It takes two seconds of CPU; a build for the CPU, or a machine without a GPU, is known from files."""
    pytest.importorskip("torch")
    version = importlib.metadata.version("torch")
    if system_facts().nvidia_driver and not version.endswith("+cpu"):
        pytest.skip("with a GPU, torch itself is asked")
    code = (
        "import sys, json; from fcos_deploy.core.registry import get_backend; p = get_backend('pytorch').probe();"
        "print(json.dumps([p.available, p.version, p.devices, 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [True, version, ["cpu"], False]


def test_torch_that_cannot_be_imported_is_not_said_to_work(tmp_path: Path) -> None:
    """A folder of that name without the compiled part, as an interrupted installation leaves it."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise ImportError('libtorch.so is missing')\n")
    code = (
        "from fcos_deploy.core.registry import get_backend; p = get_backend('pytorch').probe();"
        "print(p.available, p.problem)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "False libtorch.so is missing\n", done.stderr
