"""Any arguments to any command: an exit code from 0 to 4 within seconds, and never a traceback.

``FCOS_DEPLOY_FUZZ=100`` takes a hundred times the examples, as in every property test (``tests/conftest.py``).
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fcos_deploy.cli.app import build_app

APP = build_app()
COMMANDS: dict[str, Any] = typer.main.get_command(APP).commands  # type: ignore[attr-defined]  # a group
_SECONDS = 60.0  # includes the first import of the frameworks
# So that a command line which happens to be right does little work.
_SHORT = {
    "demo": ["-o", "file/below"],
    "soak": ["--inferences", "4", "--concurrency", "2"],
    "benchmark": ["--rounds", "1", "--seconds", "0.1", "--no-cold-start"],
    "report": ["--limit", "0"],
    "doctor": ["--target", "none"],
}

NAMES = [
    "missing", "folder", "empty", "text.txt", "text.onnx", "text.pth", "text.safetensors", "text.xml", "text.json",
    "text.tar", "text.engine", "text.kserve", "text.jpg", "empty.onnx", "link", "images", "images/a.png", "list.txt",
    "bundle", "file/below", "tiny.onnx", "tiny.onnx", "n\udcffme", "x" * 300, "", ".", "-", "\0", "a\nb",
    "/dev/null", "/proc/self/mem", "*.onnx",
]  # fmt: skip
WORDS = [
    "", "0", "-1", "1", "1e999", "nan", "-inf", "99999999999999999999", "0x0", "1x1", "320x320", "999999x999999",
    "1,2,3", "1,2", "nan,nan,nan", "a,b,c", "0,0,0", "int8", "fp32", "onnxruntime", "openvino", "pytorch", "tensorrt",
    "kserve", "triton", "cpu", "cuda:0", "GPU.7", "jetson-orin-nano", "portable", "nncf", "http://h/m",
    "ftp://", "é", "[red]",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files of every suffix, of which one is a model, and two real images."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("place")
    for name in NAMES:
        if name.startswith("text."):
            (folder / name).write_text("hello\n")
    for name in ("empty", "empty.onnx", "file"):
        (folder / name).touch()
    for name in ("folder", "images", "bundle"):
        (folder / name).mkdir()
    (folder / "tiny.onnx").write_bytes(tiny_onnx.read_bytes())
    (folder / "link").symlink_to("nowhere")
    (folder / "list.txt").write_text("images/a.png\n\0\n")
    (folder / "bundle" / "manifest.json").write_text(json.dumps({"schema_version": 1}))
    for name in ("a", "b"):
        Image.new("RGB", (8, 6), (9, 0, 0)).save(folder / "images" / f"{name}.png")
    return folder


def _run(arguments: list[str], place: Path) -> tuple[int, str]:
    before = Path.cwd()
    os.chdir(place)
    started = time.monotonic()
    try:
        result = CliRunner().invoke(APP, arguments)
    finally:
        os.chdir(before)
    assert time.monotonic() - started < _SECONDS
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in {0, 1, 2, 3, 4}, result.output
    assert "Traceback" not in result.output
    return result.exit_code, result.output


@st.composite
def _command_lines(draw: st.DrawFn) -> list[str]:
    name = draw(st.sampled_from(sorted(COMMANDS)))
    values = st.one_of(st.sampled_from(NAMES), st.sampled_from(WORDS), st.text(max_size=5))
    tokens = [name]
    for parameter in COMMANDS[name].params:
        likely = parameter.required or draw(st.integers(0, 5)) == 0
        if not likely or parameter.name == "help":
            continue
        if parameter.param_type_name == "argument":
            tokens += draw(st.lists(values, min_size=1, max_size=2))
        elif parameter.is_flag:
            tokens.append(draw(st.sampled_from([*parameter.opts, *parameter.secondary_opts])))
        else:
            tokens += [draw(st.sampled_from(parameter.opts)), draw(values)]
    tokens += draw(st.lists(st.one_of(values, st.sampled_from(["--bogus", "-x", "--"])), max_size=1))
    return [*tokens, *_SHORT.get(name, [])] if "--" not in tokens else [name, *_SHORT.get(name, []), *tokens[1:]]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(arguments=_command_lines())
def test_any_arguments(arguments: list[str], place: Path) -> None:
    _run(arguments, place)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_and_an_unknown_option(name: str, place: Path) -> None:
    assert _run([name, "--help"], place)[0] == 0
    assert _run([name, "--bogus"], place)[0] == 2
