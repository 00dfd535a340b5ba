"""An NVIDIA driver that is missing, cut short, refuses, or loses a GPU: preflight and doctor say so, and go on.

Neither asks nvidia-smi or NVML, which a Jetson does not have, but the driver's own library. The tests put one of a few
lines of C in its place, and see in a process of its own what the programs make of it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_LOOK = """
import json
from fcos_deploy.core.machine import read_machine
found = read_machine()
print(json.dumps([found.gpus, found.cuda_driver]))
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
