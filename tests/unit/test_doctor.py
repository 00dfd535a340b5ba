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

from fcos_deploy.core.backend import BackendProbe, all_backends
from fcos_deploy.core.machine import MachineFacts, read_machine
from fcos_deploy.targets.doctor import Examination, Health, _runtimes, compare, difference_lines, examine, lines
from fcos_deploy.targets.profiles import load_profile

ORIN_RELEASE = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 2025\n"


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


def orin_nano(facts: MachineFacts) -> Examination:
    probe = BackendProbe(available=True, version="10.3.0", devices=("cuda:0 Orin (sm_87)",))
    return Examination((), facts, {"tensorrt": probe})


@pytest.fixture
def orin_facts(tmp_path: Path) -> MachineFacts:
    for path, text in (("etc/nv_tegra_release", ORIN_RELEASE), ("proc/meminfo", "MemTotal:        7802108 kB\n")):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(text)
    return read_machine(tmp_path)


def differences(examination: Examination, profile: str) -> set[str]:
    return {difference.name for difference in compare(examination, load_profile(profile))}


def test_the_machine_of_the_profile_does_not_differ(orin_facts: MachineFacts) -> None:
    expected = set() if platform.machine() == "aarch64" else {"architecture"}
    assert differences(orin_nano(orin_facts), "jetson-orin-nano") == expected


def test_another_jetpack_differs(orin_facts: MachineFacts) -> None:
    assert differences(orin_nano(orin_facts), "jetson-orin-nano-jp7") >= {"TensorRT", "JetPack"}


def test_too_little_memory_and_another_gpu_differ(orin_facts: MachineFacts) -> None:
    found = differences(orin_nano(replace(orin_facts, memory_mib=3900)), "jetson-thor")
    assert found >= {"memory", "GPU", "TensorRT", "JetPack"}


def test_missing_openvino_device_differs(orin_facts: MachineFacts) -> None:
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


def test_every_difference_says_what_would_mend_it(orin_facts: MachineFacts) -> None:
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
    if read_machine().nvidia_driver and not version.endswith("+cpu"):
        pytest.skip("with a GPU, torch itself is asked")
    code = (
        "import sys, json; from fcos_deploy.core.backend import get_backend; p = get_backend('pytorch').probe();"
        "print(json.dumps([p.available, p.version, p.devices, 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [True, version, ["cpu"], False]


def test_torch_that_cannot_be_imported_is_not_said_to_work(tmp_path: Path) -> None:
    """A folder of that name without the compiled part, as an interrupted installation leaves it."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise ImportError('libtorch.so is missing')\n")
    code = (
        "from fcos_deploy.core.backend import get_backend; p = get_backend('pytorch').probe();"
        "print(p.available, p.problem)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "False libtorch.so is missing\n", done.stderr


def test_without_an_nvidia_gpu_tensorrt_is_not_asked_for(orin_facts: MachineFacts) -> None:
    probes = {"tensorrt": BackendProbe(available=False, problem="'tensorrt' is not installed.", remedy="install it")}
    (elsewhere,) = _runtimes(replace(orin_facts, jetson=None, gpus=(), nvidia_driver=""), probes)
    assert elsewhere.remedy == "not needed here, there is no NVIDIA GPU; for one: install it"
    (on_a_jetson,) = _runtimes(orin_facts, probes)
    assert (on_a_jetson.health, on_a_jetson.remedy) == (Health.ABSENT, "install it")
