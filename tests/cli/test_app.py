"""The command line as a whole: commands, help, errors on one screen, exit codes, verbosity."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

import fcos_deploy.cli
from fcos_deploy.cli import output
from fcos_deploy.cli.app import _OTHER_COMMANDS, _OTHER_OPTIONS, COMMANDS, build_app
from fcos_deploy.cli.output import progress_bar
from fcos_deploy.cli.settings import typed_name
from fcos_deploy.core import errors

APP = build_app()
GROUP: Any = typer.main.get_command(APP)  # Any: Click's group, or Typer's copy of it
NAMES = [name for names in COMMANDS.values() for name in names]


def _run(*words: object) -> Result:
    return CliRunner().invoke(APP, [str(word) for word in words])


def test_every_module_with_a_command_is_listed_once() -> None:
    modules = [
        importlib.import_module(f"fcos_deploy.cli.{m.name}") for m in pkgutil.iter_modules(fcos_deploy.cli.__path__)
    ]
    defined = [name for module in modules for name in getattr(module, "__all__", ()) if name.endswith("_command")]
    assert sorted(f"{name.replace('-', '_')}_command" for name in NAMES) == sorted(defined)
    listed = _run("--help")
    assert listed.exit_code == 0
    assert all(f" {name} " in listed.stdout for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_help_is_complete_and_in_one_form(name: str) -> None:
    shown = _run(name, "--help")
    assert shown.exit_code == 0
    assert "Usage:" in shown.stdout
    summary = GROUP.commands[name].help.splitlines()[0]
    assert summary[0].isupper()
    assert GROUP.commands[name].help.rstrip().endswith(".")
    for parameter in GROUP.commands[name].params:
        assert parameter.help[0].isupper(), parameter.name
        assert parameter.help.endswith("."), parameter.name


def test_options_of_the_same_name_have_the_same_help() -> None:
    """Apart from those that mean what the command does with them."""
    own = {"output", "images", "image", "precision", "backend", "annotations", "limit", "max_map_drop", "target"}
    own |= {"score_threshold", "batch", "weights", "method", "rounds", "reference", "consumer", "serving", "version"}
    own |= {"tail", "device", "min_match_rate", "cache", "compute", "config", "calibration_images", "min_ap", "threads"}
    texts: dict[str, set[str]] = {}
    for name in NAMES:
        for parameter in GROUP.commands[name].params:
            if parameter.param_type_name == "option" and parameter.name not in own:
                texts.setdefault(parameter.name, set()).add(f"{parameter.help} {parameter.opts}")
    assert {name: told for name, told in texts.items() if len(told) > 1} == {}


def test_checkpoint_options_are_in_titled_panels() -> None:
    shown = _run("export", "--help").stdout
    for panel in ("Checkpoint", "Preprocessing", "Detection", "Output"):
        assert f"─ {panel} ─" in shown
    assert "--imgsz" in shown
    for name in ("export", "deploy", "inspect"):
        assert "--norm-eps" in {opt for p in GROUP.commands[name].params for opt in p.opts}
    common = {opt for p in GROUP.commands["evaluate"].params for opt in p.opts}
    assert {"--ecosystem", "--variant", "--classes", "--input-size", "--score-threshold"} <= common
    assert "--checkpoint-options" in common
    assert "--norm-eps" not in common


@pytest.mark.parametrize("columns", [80, 150])
def test_help_is_as_wide_as_the_terminal_and_whole(columns: int) -> None:
    command = [sys.executable, "-c", "from fcos_deploy.cli.app import main; main()", "export", "--help"]
    environment = {**os.environ, "COLUMNS": str(columns)}
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert max(map(len, shown.splitlines())) == columns
    assert "…" not in shown


def test_help_imports_no_framework() -> None:
    code = (
        "import sys\nfrom fcos_deploy.cli.app import main\n"
        "try:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'onnx', 'onnxruntime', 'openvino', 'nncf', 'cv2', 'PIL', 'scipy', 'matplotlib'}\n"
        "    assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, check=True)


def test_a_named_command_is_loaded_alone_and_works_the_same() -> None:
    alone = build_app(only="verify-signature")
    assert [item.name for item in alone.registered_commands] == ["verify-signature"]
    assert len(build_app(only="verify-signatures").registered_commands) == len(NAMES)
    assert CliRunner().invoke(alone, ["verify-signature", "--help"]).stdout == _run("verify-signature", "--help").stdout


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        (("evalaute",), "evaluate"),
        (("verify-signatures",), "verify-signature"),
        (("predict", "m.onnx", "a.png", "--treads", "2"), "--threads"),
        (("export", "m.pth", "-o", "m.onnx", "--score-treshold", "0.5"), "--score-threshold"),
    ],
)
def test_a_mistyped_word_is_answered_with_the_nearest(words: tuple[str, ...], suggestion: str) -> None:
    refused = _run(*words)
    assert refused.exit_code == 2
    assert any(words in refused.stderr for words in ("Did you mean", "Possible options"))
    assert suggestion in refused.stderr


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("export m.pth -o m.onnx --imgsz 640", "--imgsz. Here it is --input-size HxW: Fixed input size"),
        ("predict m.onnx a.png --conf 0.5", "Here it is --score-threshold SCORE: Minimum score"),
        ("predict --weights m.onnx --source a.png", "Here it is MODEL: "),
        ("evaluate m.onnx --images val --data coco.yaml", "Here it is --annotations FILE: "),
        ("export m.pth -o m.onnx --half", "Here it is --precision fp32|fp16: "),
        ("export model=m.pth format=onnx imgsz=640", "Give 'm.pth' as CHECKPOINT: "),
        ("predict m.onnx a.png backend=openvino", "Give 'openvino' as --backend NAME: "),
        ("build m.onnx --saveEngine=m.engine", "Here it is --output FILE: "),
        ("benchmark -m m.onnx -d CPU", "Here it is MODEL...: "),
        ("export m.pth --input-size 320 320", "'320' is too much: export takes CHECKPOINT, an option takes one value."),
        ("ovc m.onnx", "Here it is: fcos-deploy build"),
        ("detect m.onnx a.png", "Here it is: fcos-deploy predict"),
        ("val m.onnx", "Here it is: fcos-deploy evaluate"),
        ("version", "Here it is: fcos-deploy --version"),
        (f"{Path(__file__).name}", f"To see what it is: fcos-deploy inspect {Path(__file__).name}"),
        ("export m.pth", "Missing option '-o' / '--output'. --output FILE: ONNX file to write."),
        ("build m.onnx -o m.xml", "Missing option '--backend'. --backend NAME: Backend to build for"),
        ("predict m.onnx", "Missing argument 'IMAGES'. IMAGES: Images, folders"),
    ],
)
def test_what_other_tools_taught_is_answered_with_our_word(
    words: str, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    refused = _run(*words.split())
    assert refused.exit_code == 2
    assert answer in " ".join(refused.stderr.split())
    assert "Possible options" not in refused.stderr


def test_words_of_other_tools_lead_to_what_is_there() -> None:
    known = {name for c in GROUP.commands.values() for p in c.params for name in (*p.opts, typed_name(p))}
    assert {name for names in _OTHER_OPTIONS.values() for name in names} <= known
    assert set(_OTHER_COMMANDS.values()) <= {*NAMES, "--version", "--help"}
    assert not set(_OTHER_COMMANDS) & set(NAMES)


def test_a_file_with_an_equals_sign_in_its_name_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model=1.onnx").write_bytes(b"x")
    assert "not how options are typed" not in _run("inspect", "model=1.onnx").stderr


def test_a_mistyped_backend_is_answered_with_the_nearest(tiny_onnx: Path) -> None:
    refused = _run("predict", tiny_onnx, "a.png", "--backend", "openvinoo")
    assert refused.exit_code == 2
    assert "did you mean 'openvino'?" in refused.stderr


def test_version_and_completion() -> None:
    assert _run("--version").stdout == f"fcos-deploy {importlib.metadata.version('fcos-deploy')}\n"
    assert {"--install-completion", "--show-completion"} <= {opt for p in GROUP.params for opt in p.opts}


def test_shells_complete_commands_options_and_names() -> None:
    def completed(words: str) -> list[str]:
        program = [
            sys.executable,
            "-c",
            "from fcos_deploy.cli.app import build_app; build_app()(prog_name='fcos-deploy')",
        ]
        position = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        environment = {**os.environ, **position, "_FCOS_DEPLOY_COMPLETE": "complete_bash"}
        return subprocess.run(program, capture_output=True, text=True, check=False, env=environment).stdout.split()

    assert completed("fcos-deploy ver") == ["verify", "verify-signature"]
    assert "--score-threshold" in completed("fcos-deploy predict --sc")
    assert completed("fcos-deploy predict --backend openv") == ["openvino"]
    assert "jetson-orin-nano" in completed("fcos-deploy deploy --target jetson-o")


def test_verbose_tells_the_steps_and_quiet_only_errors(tiny_checkpoint: Path, tmp_path: Path) -> None:
    export = ("export", tiny_checkpoint, "-o", tmp_path / "m.onnx", "--no-simplify", "--json")
    quiet = _run(*export, "-q")
    assert quiet.exit_code == 0
    assert quiet.stderr == ""
    assert json.loads(quiet.stdout)["opset"] == 17
    told = _run(*export, "--verbose").stderr
    assert "info: " in told
    missing = ("inspect", tmp_path / "none.pth")
    assert "error: " in _run(*missing, "--quiet").stderr
    assert "Traceback" not in _run(*missing, "-v").stderr
    assert "Traceback" in _run(*missing, "-vv").stderr
    assert _run(*missing, "-v", "-q").exit_code == 2


def test_without_a_terminal_a_stage_leaves_one_line_with_its_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("fcos_deploy.cli.output.time.monotonic", lambda: now[0])
    with progress_bar() as report:
        for label, seconds in (("calibrating", 1.0), ("openvino fp32", 0.05), ("openvino fp32", 0.25), ("short", 0.01)):
            for done in range(21):
                report(label, done, 20)
                now[0] += seconds
    assert capsys.readouterr().err.splitlines() == [
        "calibrating: 20 in 20.0 s, 1.0/s",
        "openvino fp32: 20 in 1.0 s, 20.0/s",
        "openvino fp32: 20 in 5.0 s, 4.0/s",
    ]


@pytest.mark.parametrize("seconds", [0.5, 40.0])
def test_after_a_tenth_of_a_stage_the_time_that_remains_is_known(
    seconds: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps of uneven length, of which the first takes five times as long as the others: a model warms up."""
    now, bars = [0.0], []

    class Recorded(output.Progress):
        def __init__(self, *columns: Any, **options: Any) -> None:
            super().__init__(*columns, **options)
            bars.append(self)

    monkeypatch.setattr("rich.console.monotonic", lambda: now[0])
    monkeypatch.setattr("fcos_deploy.cli.output.Progress", Recorded)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    lengths = seconds * np.random.default_rng(0).uniform(0.7, 1.3, 87)
    lengths[0] = 5 * seconds
    with progress_bar() as report:
        report("export", 1, 4)
        for done, length in enumerate(lengths):
            report("openvino int8", done, 87)
            if done > 8:
                few, many = bars[0].tasks
                assert many.time_remaining == pytest.approx(lengths[done:].sum(), rel=0.2, abs=1.0)
                column = bars[0].columns[-1]
                assert ":" in column.render(many).plain
                assert column.render(few).plain == "", "four steps of different kinds"
            now[0] += length


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.FcosDeployError, 1),
        (errors.ConfigError, 2),
        (errors.MissingDependencyError, 3),
        (errors.AccuracyGateError, 4),
        (errors.CheckpointError, 1),
    ],
)
def test_exit_codes_of_the_errors(error: type[errors.FcosDeployError], code: int) -> None:
    assert error("something.").exit_code == code


def test_missing_file_is_one_sentence_and_no_traceback() -> None:
    result = _run("predict", "nothing.onnx", "nothing.jpg")
    assert result.exit_code != 0
    assert "nothing.onnx" in result.stderr
    assert "Traceback" not in result.stderr
