"""The TensorRT code type-checks against the published stubs of TensorRT 10.13 (``pip install tensorrt-stubs``)."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("exporters/*tensorrt*.py", "runtimes/*tensorrt*.py", "fcos_deploy/core/tensorrt_library.py")
    for path in ROOT.glob(pattern)
)
# Only the two packages of the stubs are looked up there, so that mypy reads them as its own.
CONFIG = """
[mypy]
strict = True
python_version = 3.11
follow_imports = silent
warn_unused_ignores = False
[mypy-tensorrt.*,tensorrt_bindings.*]
ignore_errors = True
[mypy-tensorrt_libs.*,onnxruntime.*,openvino.*,cuda.*,cv2.*,tensorrt_rtx.*,torch.*,numpy.*]
ignore_missing_imports = True
"""


def stubs_folder() -> Path | None:
    found = importlib.util.find_spec("tensorrt_stubs")
    return Path(found.origin).parents[1] if found is not None and found.origin else None


def repaired(text: str) -> str:
    """The stubs with the signatures that are no Python (defaults printed as ``<...>``) made to accept anything.

    ``bool`` as a module's name for a data type hides the built-in that the signatures mean, so it goes.
    """
    lines = [line for line in text.splitlines() if not line.startswith("bool: ")]
    while (broken := first_broken_line(lines)) is not None:
        definition = re.match(r"(\s*def \w+)\(", lines[broken])
        assert definition is not None, lines[broken]
        lines[broken] = f"{definition[1]}(self, *arguments: typing.Any, **keywords: typing.Any) -> typing.Any:"
    return "\n".join(lines)


def first_broken_line(lines: list[str]) -> int | None:
    try:
        ast.parse("\n".join(lines))
    except SyntaxError as error:
        return (error.lineno or 1) - 1
    return None


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = stubs_folder()
    if folder is None:
        pytest.skip("tensorrt-stubs is not installed")
    copy = tmp_path_factory.mktemp("stubs")
    for path in [*folder.glob("tensorrt/*.pyi"), *folder.glob("tensorrt_bindings/*.pyi")]:
        target = copy / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        target.write_text(repaired(path.read_text()))
    (copy / "mypy.ini").write_text(CONFIG)
    return copy


def run_mypy(stubs: Path, *files: str) -> str:
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(stubs / "mypy.ini"),
        "--cache-dir",
        str(stubs / ".cache"),
    ]
    environment = {"MYPYPATH": f"{stubs}:{ROOT}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([*command, *files], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_code_fits_the_stubs(stubs: Path) -> None:
    assert len(SOURCES) >= 8
    output = run_mypy(stubs, *SOURCES)
    assert "Success" in output, output


@pytest.mark.slow
def test_a_wrong_call_does_not_fit_the_stubs(stubs: Path) -> None:
    wrong = stubs / "wrong.py"
    wrong.write_text(
        "import tensorrt as trt\n"
        "def f(config: trt.IBuilderConfig) -> None:\n"
        "    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 'many')\n"
        "    config.no_such_name()\n"
    )
    output = run_mypy(stubs, str(wrong))
    assert "arg-type" in output
    assert "attr-defined" in output
