"""Becomes NVIDIA Triton (the core that nvidia-pytriton ships), serving a model repository on loopback until killed.

Usage: triton_server.py REPOSITORY HTTP_PORT GRPC_PORT FOLDER
Runs in an environment of its own (requirements.txt); nothing of fcos-deploy is needed there. FOLDER is for Triton's
backends; ``FOLDER/pause``, if there, holds the seconds that each inference waits. Shared memory is named after FOLDER.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

BACKEND = Path(__file__).with_name("onnxruntime_backend.py")


def backends(triton: Path, folder: Path) -> Path:
    """Triton's Python backend with the stub for this interpreter, and on top of it one named onnxruntime."""
    made = folder / "backends"
    if not made.exists():
        shutil.copytree(triton / "backends" / "python", made / "python", ignore=shutil.ignore_patterns("__pycache__"))
        stub = triton / "python_backend_stubs" / f"{sys.version_info[0]}.{sys.version_info[1]}"
        shutil.copy2(stub / "triton_python_backend_stub", made / "python")
        (made / "onnxruntime").mkdir()
        shutil.copyfile(BACKEND, made / "onnxruntime" / "model.py")
    return made


def main() -> None:
    repository, http_port, grpc_port, folder = sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])
    spec = importlib.util.find_spec("pytriton")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    os.environ["LD_LIBRARY_PATH"] = str(package.parent / "nvidia_pytriton.libs")
    os.environ["PYTHONPATH"] = str(package.parent)
    # The Python inside Triton takes its environment from the first python3 on the path.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    os.environ["PAUSE_FILE"] = str(folder / "pause")
    triton = package / "tritonserver"
    options = {
        "model-repository": repository,
        "backend-directory": backends(triton, folder),
        "http-address": "127.0.0.1",
        "http-port": http_port,
        "grpc-address": "127.0.0.1",
        "grpc-port": grpc_port,
        "allow-metrics": "false",
        "backend-config": f"python,shm-region-prefix-name={folder.name}",
    }
    program = str(triton / "bin" / "tritonserver")
    os.execv(program, [program, *(f"--{name}={value}" for name, value in options.items())])


main()
