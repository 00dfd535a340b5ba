"""TensorRT sessions where there is no GPU: one clear sentence. What needs one is listed in docs/hardware.md."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fcos_deploy.core.backend import Backend, ComputeType, SessionOptions
from fcos_deploy.core.contract import ModelContract, write_sidecar
from fcos_deploy.core.errors import BackendLoadError, ConfigError, DeviceError, MissingDependencyError
from runtimes import _cuda as cuda_module
from runtimes._cuda import Cuda, CudaDevice, host_array, load_cuda
from runtimes._tensorrt_library import load_tensorrt
from runtimes._tensorrt_session import build_record, choose_device
from runtimes.tensorrt import BACKEND as TENSORRT
from runtimes.tensorrt_rtx import BACKEND as RTX

BOTH = pytest.mark.parametrize("backend", [TENSORRT, RTX], ids=lambda backend: backend.name)
ORIN = CudaDevice(index=0, name="Orin", capability=(8, 7), memory_bytes=8 << 30, integrated=True)


@pytest.fixture(scope="module")
def cuda() -> Cuda:
    """The real CUDA runtime, on a machine without a GPU."""
    pytest.importorskip("cuda.bindings.runtime")
    found = load_cuda(extra="tensorrt")
    try:
        found.devices()
    except DeviceError:
        return found
    pytest.skip("this machine has a GPU")


@pytest.fixture
def engine(tmp_path: Path, bundle_contract: ModelContract) -> Path:
    path = tmp_path / "model.engine"
    path.write_bytes(b"plan")
    write_sidecar(path, bundle_contract, {"version": "10.3.0"})
    return path


def test_without_a_driver_the_first_cuda_call_says_so(cuda: Cuda) -> None:
    with pytest.raises(DeviceError) as caught:
        cuda.devices()
    assert caught.value.message == "No working NVIDIA driver is installed (cudaErrorInsufficientDriver)."
    assert "install the NVIDIA driver" in caught.value.hint
    assert cuda.versions()[0] == 0


@pytest.mark.parametrize("error", sorted(cuda_module._DEVICE_PROBLEMS))
def test_every_known_driver_problem_is_an_error_of_cuda(error: str) -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    assert hasattr(runtime.cudaError_t, error)


def test_every_cuda_call_exists_in_cuda_python() -> None:
    runtime: ModuleType = pytest.importorskip("cuda.bindings.runtime")
    source = Path(cuda_module.__file__).read_text()
    used = {
        word for word in source.replace('"', " ").replace("(", " ").replace(")", " ").split() if word.startswith("cuda")
    }
    calls = {word.rstrip(",.") for word in used if word[4:5].isupper() and "Error" not in word}
    assert len(calls) >= 15
    assert [name for name in sorted(calls) if not hasattr(runtime, name)] == []


def test_rtx_probe_names_version_and_problem(cuda: Cuda) -> None:
    library = pytest.importorskip("tensorrt_rtx")
    probe = RTX.probe()
    assert not probe.available
    assert probe.version == library.__version__
    assert probe.problem.startswith("No working NVIDIA driver is installed")


def test_opening_an_engine_without_a_gpu_is_one_sentence(cuda: Cuda, engine: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(DeviceError) as caught:
        RTX.open(engine, SessionOptions())
    assert "\n" not in caught.value.message
    assert caught.value.message.count(".") == 1


def test_a_driver_that_cannot_be_loaded_is_one_sentence(tmp_path: Path) -> None:
    """A file that is no library in the place of the driver's, as an interrupted installation leaves it."""
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "libcuda.so.1").write_bytes(b"not a library")
    code = "from runtimes.tensorrt_rtx import BACKEND; p = BACKEND.probe(); print(p.available, p.problem)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"LD_LIBRARY_PATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("False ")
    assert len(done.stdout.splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_tensorrt_whose_stubs_alone_are_installed_says_so() -> None:
    library = pytest.importorskip("tensorrt")
    if hasattr(library, "Runtime"):
        pytest.skip("TensorRT is installed")
    probe = TENSORRT.probe()
    assert not probe.available
    assert "only type stubs" in probe.problem
    assert "fcos-deploy[tensorrt]" in probe.remedy


@BOTH
def test_another_compute_type_is_refused(backend: Backend, engine: Path) -> None:
    with pytest.raises(ConfigError, match="types that it was built with"):
        backend.open(engine, SessionOptions(compute=ComputeType.F16))


@BOTH
def test_missing_engine_is_refused(backend: Backend, tmp_path: Path) -> None:
    with pytest.raises(BackendLoadError, match="is not there"):
        backend.open(tmp_path / "no.engine", SessionOptions())


@pytest.mark.parametrize("wanted", ["", "cuda", "cuda:0"])
def test_devices_by_name(wanted: str) -> None:
    assert choose_device([ORIN], wanted) is ORIN
    assert str(ORIN) == "cuda:0 Orin (sm_87)"


@pytest.mark.parametrize(
    ("wanted", "error", "message"),
    [
        ("cuda:1", DeviceError, "There is no cuda:1, this machine has 1"),
        ("cpu", ConfigError, "not on 'cpu'"),
        ("cuda:x", ConfigError, "not on 'cuda:x'"),
    ],
)
def test_device_that_is_not_there_is_refused(wanted: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        choose_device([ORIN], wanted)


def test_the_first_installed_library_is_taken() -> None:
    library = pytest.importorskip("tensorrt_rtx")
    assert load_tensorrt("no_full_one", "tensorrt_rtx", extra="tensorrt") is library
    with pytest.raises(MissingDependencyError, match="no_full_one"):
        load_tensorrt("no_full_one", "no_lean_one", extra="tensorrt")


def test_damaged_sidecar_is_refused(engine: Path) -> None:
    assert build_record(engine) == {"version": "10.3.0"}
    engine.with_suffix(".json").write_text("{")
    with pytest.raises(BackendLoadError, match="is damaged"):
        build_record(engine)
    engine.with_suffix(".json").unlink()
    assert build_record(engine) == {}


@pytest.mark.parametrize("shape", [(2, 3), (1,), (0, 4), ()])
def test_host_memory_is_seen_as_an_array(shape: tuple[int, ...]) -> None:
    memory = (ctypes.c_float * 8)(*range(8))
    view = host_array(ctypes.addressof(memory), dtype=np.dtype(np.float32), shape=shape)
    assert view.shape == shape
    assert view.ravel().tolist() == list(range(int(np.prod(shape))))
    view[...] = 7
    assert list(memory)[: view.size] == [7.0] * view.size
