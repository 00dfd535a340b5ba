"""What is read of a machine: from the files of other machines, from control groups, and from NVIDIA's driver."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fcos_deploy.core.machine import MachineFacts, read_machine, usable_cpus

ORIN_RELEASE = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 2025\n"
XEON = "model name\t: Intel(R) Xeon(R) Platinum 8480+\nflags\t\t: fpu sse4_2 avx2 avx512_vnni amx_bf16 amx_int8\n"
ORIN_CPU = "processor\t: 0\nFeatures\t: fp asimd evtstrm aes asimddp\n"
DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:17:00 UTC 2025\nGCC version: ...\n"
OPEN_DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.57.08  Release Build\n"


def machine(root: Path, **files: str) -> MachineFacts:
    """Read a machine with these files; in a name "__" stands for "/" and "0" for "-"."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("0", "-")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return read_machine(root)


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
    facts = read_machine(tmp_path)
    assert (facts.jetson, facts.nvidia_driver, facts.npu_driver, facts.int8_features) == (None, "", "", ())


def test_npu_driver_and_device(tmp_path: Path) -> None:
    (tmp_path / "sys/module/intel_vpu").mkdir(parents=True)
    (tmp_path / "dev/accel").mkdir(parents=True)
    (tmp_path / "dev/accel/accel0").touch()
    facts = read_machine(tmp_path)
    assert (facts.npu_driver, facts.npu_device) == ("intel_vpu", True)


def test_load_memory_and_processor(tmp_path: Path) -> None:
    files = {"proc__cpuinfo": "model name\t: Fast CPU\ncpu MHz\t\t: 1000.0\n", "proc__loadavg": "0.50 0.4 0.3 1/2 3\n"}
    facts = machine(tmp_path, **files, proc__meminfo="MemTotal:       2097152 kB\n")
    assert (facts.processor, facts.memory_mib, facts.load) == ("Fast CPU", 2048, 0.5)


def test_the_facts_of_this_machine() -> None:
    facts = read_machine()
    assert facts.machine == platform.machine()
    assert facts.processor
    assert facts.cpu_features
    assert facts.cores == usable_cpus() > 0


_CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_V2, _V1 = "0::{}\n", "12:memory:{0}\n4:cpu,cpuacct:{0}\n1:name=systemd:{0}\n0::{0}\n"


@pytest.mark.parametrize(
    ("groups", "path", "files", "cpus"),
    [
        (_V2, "/", {"cpu.max": "100000 100000"}, 1),
        (_V2, "/", {"cpu.max": "max 100000"}, _CPUS),
        (_V2, "/", {"cpu.max": "50000 100000"}, 1),  # half a core
        (_V2, "/", {"cpu.max": "1000000000 100000"}, _CPUS),  # more than there is
        (_V2, "/a/b", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "max 100000"}, 1),  # the group above limits it
        (_V2, "/docker/host-path", {"cpu.max": "100000 100000"}, 1),  # the path is the host's, not the container's
        (_V1, "/", {"cpu,cpuacct/cpu.cfs_quota_us": "100000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 1),
        (_V1, "/d", {"cpu,cpuacct/d/cpu.cfs_quota_us": "50000", "cpu,cpuacct/d/cpu.cfs_period_us": "100000"}, 1),
        (_V1, "/", {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, _CPUS),
    ],
)
def test_a_quota_of_a_container_counts(
    groups: str, path: str, files: dict[str, str], cpus: int, tmp_path: Path
) -> None:
    written = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in {"proc/self/cgroup": groups.format(path), **written}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert usable_cpus(tmp_path) == cpus


_LOOK = """
import json
from fcos_deploy.core.machine import read_machine
facts = read_machine()
print(json.dumps([facts.gpus, facts.cuda_driver]))
"""
_DOCTOR = "from fcos_deploy.cli.app import main; main()"
# Two GPUs of capability 8.7; INIT is cuInit's answer, LOST the index of one that was counted and no longer answers.
_DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return INIT; }
int cuDeviceGetCount(int* count) { *count = 2; return 0; }
int cuDriverGetVersion(int* version) { *version = 12060; return 0; }
int cuDeviceGet(int* device, int index) { *device = index; return index == LOST ? 101 : 0; }
int cuDeviceGetName(char* name, int size, int device) { strncpy(name, "Orin", size); return 0; }
int cuDeviceGetAttribute(int* value, int what, int device) { *value = what == 75 ? 8 : 7; return 0; }
"""
_ORIN = ["Orin", "8.7"]


def _compile(folder: Path, source: str, *defines: str) -> None:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc is not installed")
    (folder / "driver.c").write_text(source)
    output = str(folder / "libcuda.so.1")
    subprocess.run([compiler, "-shared", "-fPIC", *defines, "-o", output, str(folder / "driver.c")], check=True)


def _process(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """With the driver in ``folder``, and a PATH without nvidia-smi."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "PATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", *words], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def _gpus_and_cuda(folder: Path) -> tuple[list[list[str]], str]:
    done = _process(folder, _LOOK)
    assert done.returncode == 0, done.stderr
    gpus, cuda = json.loads(done.stdout)
    return gpus, cuda


def test_a_driver_that_answers_tells_its_gpus(tmp_path: Path) -> None:
    _compile(tmp_path, _DRIVER, "-DINIT=0", "-DLOST=-1")
    assert _gpus_and_cuda(tmp_path) == ([_ORIN, _ORIN], "12.6")


def test_a_gpu_that_fell_off_is_none_of_the_machines(tmp_path: Path) -> None:
    _compile(tmp_path, _DRIVER, "-DINIT=0", "-DLOST=1")
    assert _gpus_and_cuda(tmp_path) == ([_ORIN], "12.6")


def test_a_driver_that_refuses_has_no_gpus(tmp_path: Path) -> None:
    _compile(tmp_path, _DRIVER, "-DINIT=100", "-DLOST=-1")  # CUDA_ERROR_NO_DEVICE
    assert _gpus_and_cuda(tmp_path) == ([], "")


def test_a_driver_that_was_cut_short_has_no_gpus(tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").write_bytes(b"not a library")
    assert _gpus_and_cuda(tmp_path) == ([], "")
    _compile(tmp_path, "int cuInit(unsigned flags) { return 0; }")
    assert _gpus_and_cuda(tmp_path) == ([], "")


@pytest.mark.slow
def test_the_doctor_ends_with_a_report_whatever_the_driver_is(tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").write_bytes(b"not a library")
    done = _process(tmp_path, _DOCTOR, "doctor", "--json")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    findings = {one["name"]: one for one in json.loads(done.stdout)["findings"]}
    assert findings["driver"]["health"] in ("absent", "works")
    assert findings["tensorrt"]["health"] != "works"
    assert findings["tensorrt"]["remedy"]
