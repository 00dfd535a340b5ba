"""Options from variables and the project file: which comes first, what is refused, and what is said of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from fcos_deploy.cli.app import build_app
from fcos_deploy.cli.settings import PROJECT_FILE, option_name, variable_names
from fcos_deploy.core.serialize import parse_toml

APP = build_app()
GROUP: Any = typer.main.get_command(APP)  # Any: Click's group, or Typer's copy of it
NEEDED = 'model = "m.pth"\noutput = "out"\ncalibration_images = "images"\n'


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _run(*words: object) -> Result:
    return CliRunner().invoke(APP, [str(word) for word in words])


def _shown(*words: object) -> dict[str, dict[str, Any]]:
    result = _run(*words, "--show-config", "--json")
    assert result.exit_code == 0, result.output
    options: dict[str, dict[str, Any]] = json.loads(result.stdout)["options"]
    return options


def test_command_line_before_variable_before_project_file_before_default(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = ("deploy", "--seed", "4", "--backend", "pytorch")
    assert _shown("deploy")["seed"] == {"value": 0, "source": "default"}
    Path(PROJECT_FILE).write_text(NEEDED + 'seed = 1\nbackend = ["openvino", "onnxruntime"]\nfast = true\n')
    assert _shown("deploy")["seed"] == {"value": 1, "source": "'fcos-deploy.toml'"}
    assert _shown("deploy")["backend"]["value"] == ["openvino", "onnxruntime"]
    monkeypatch.setenv("FCOS_DEPLOY_SEED", "2")
    monkeypatch.setenv("FCOS_DEPLOY_BACKEND", "onnxruntime, openvino")
    monkeypatch.setenv("FCOS_DEPLOY_FAST", "no")
    shown = _shown("deploy")
    assert shown["seed"] == {"value": 2, "source": "the variable FCOS_DEPLOY_SEED"}
    assert shown["backend"]["value"] == ["onnxruntime", "openvino"]
    assert shown["fast"]["value"] is False
    monkeypatch.setenv("FCOS_DEPLOY_DEPLOY_SEED", "3")
    assert _shown("deploy")["seed"] == {"value": 3, "source": "the variable FCOS_DEPLOY_DEPLOY_SEED"}
    assert _shown("calibrate")["seed"]["value"] == 2
    assert _shown(*typed)["seed"] == {"value": 4, "source": "command line"}
    assert _shown(*typed)["backend"]["value"] == ["pytorch"]
    assert _shown(*typed)["model"] == {"value": "m.pth", "source": "'fcos-deploy.toml'"}


def test_what_is_typed_replaces_what_contradicts_it_below(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(PROJECT_FILE).write_text('input_size = "640x640"\nsize_rule = "stretch"\n')
    sides = ("--shortest", "800", "--longest", "1333")
    assert _shown("deploy", *sides)["input_size"]["value"] is None
    assert _shown("deploy", *sides)["size_rule"]["value"] is None
    monkeypatch.setenv("FCOS_DEPLOY_INPUT_SIZE", "320x320")
    assert _shown("deploy")["size_rule"]["value"] is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SEED", "", "FCOS_DEPLOY_SEED is empty"),
        ("SEED", " \n", "FCOS_DEPLOY_SEED is empty"),
        ("SEED", "three", "--seed (of the variable FCOS_DEPLOY_SEED)"),
        ("SEED", "1.5", "--seed (of the variable FCOS_DEPLOY_SEED)"),
        ("OUTPUT", "", "FCOS_DEPLOY_OUTPUT is empty"),
        ("JUDGE", "\x1b[31mred", "--judge (of the variable FCOS_DEPLOY_JUDGE)"),
        ("PRECISION", "int8,fp33", "--precision (of the variable FCOS_DEPLOY_PRECISION)"),
        ("PRECISION", "int8,,fp32", "--precision (of the variable FCOS_DEPLOY_PRECISION)"),
        ("FAST", "perhaps", "FCOS_DEPLOY_FAST must be true or false, got 'perhaps'"),
        ("VERBOSE", "true", "--verbose (of the variable FCOS_DEPLOY_VERBOSE)"),
        ("INPUT_SIZE", "x" * 300, "from:  --input-size is that of the variable FCOS_DEPLOY_INPUT_SIZE"),
        ("MEAN", "1,2", "from:  --mean is that of the variable FCOS_DEPLOY_MEAN"),
        ("BACKEND", "openvinoo", "from:  --backend is that of the variable FCOS_DEPLOY_BACKEND"),
        ("SEEED", "1", "did you mean FCOS_DEPLOY_SEED?"),
        ("REQUIRE_SIGNATURES", "1", "did you mean FCOS_DEPLOY_REQUIRE_SIGNATURE?"),
        ("CONFIG", "none.toml", "Cannot read 'none.toml'"),
    ],
)
def test_a_value_that_cannot_be_used_names_its_variable(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"FCOS_DEPLOY_{name}", value)
    output = [] if name == "OUTPUT" else ["-o", "out"]
    refused = _run("deploy", "m.pth", *output, "--calibration-images", "images", "--dry-run")
    assert refused.exit_code == 2
    assert message in " ".join(refused.stderr.split(" "))
    assert "\x1b" not in refused.stderr
    assert _run("deploy", "--help").exit_code == 0


def test_variables_are_of_one_option_and_those_of_others_stay_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of all commands and options never meet; what tests and Kubernetes set is left alone."""
    first = [variable_names(name, p)[:1] for name, command in GROUP.commands.items() for p in command.params]
    own = [name for names in first for name in names]
    shared = {
        n for name, command in GROUP.commands.items() for p in command.params for n in variable_names(name, p)[1:]
    }
    assert len(own) == len(set(own))
    assert not set(own) & shared
    assert "FCOS_DEPLOY_CACHE" not in shared
    for name in ("PORT", "SERVICE_HOST", "PORT_80_TCP_ADDR", "REQUIRE", "FUZZ", "KILLS", "KILLS_SEED", "TRITON_PYTHON"):
        monkeypatch.setenv(f"FCOS_DEPLOY_{name}", "")
    assert _shown("deploy")["seed"]["source"] == "default"
    monkeypatch.setenv("FCOS_DEPLOY_MAX_PIXEL", "1000000")
    assert "did you mean FCOS_DEPLOY_MAX_PIXELS?" in _run("deploy", "--show-config").stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_map_dorp = 0.02", "did you mean 'max_map_drop'?"),
        ("max-map-drop = 0.02", "did you mean 'max_map_drop'?"),
        ("[deploy]\nseed = 1", "unknown option 'deploy'"),
        ("config = 'other.toml'", "unknown option 'config'"),
        ("seed = 1.5", "--seed (of 'fcos-deploy.toml')"),
        ("seed = true", "'seed' in 'fcos-deploy.toml' must be one text or number"),
        ("seed = [1]", "'seed' in 'fcos-deploy.toml' must be one text or number"),
        ("seed = 2026-01-01", "'seed' in 'fcos-deploy.toml' must be one text or number"),
        ("annotations = ''", "'annotations' in 'fcos-deploy.toml' is empty"),
        ("fast = 'yes'", "'fast' in 'fcos-deploy.toml' must be true or false"),
        ("precision = ['fp33']", "--precision (of 'fcos-deploy.toml')"),
        ("precision = [['fp32']]", "must be text or a number, got a list"),
        ("run_code = true", "may not set"),
        ("seed = ", "not a TOML file"),
        ('calibration_images = "C:\\images"', "a path with backslashes in single ones"),
        ("seed = 1\nseed = 2", "not a TOML file"),
        ("\0", "not a TOML file"),
    ],
)
def test_a_project_file_is_refused_with_its_name_and_place(text: str, message: str) -> None:
    Path(PROJECT_FILE).write_text(text)
    refused = _run("deploy", "m.pth", "-o", "out", "--calibration-images", "images")
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert "fcos-deploy.toml" in refused.stderr
    assert _run("deploy", "--show-config", "--no-config").exit_code == 0


def test_a_file_that_lies_in_the_folder_is_named_also_in_quiet(tmp_path: Path) -> None:
    Path(PROJECT_FILE).write_text("seed = 5\n")
    said = "options are read from 'fcos-deploy.toml' in this folder: seed (--no-config ignores it)"
    assert said in _run("deploy", "--show-config", "-q").stderr
    assert "fcos-deploy.toml" not in _run("deploy", "--no-config", "--show-config").output
    below = tmp_path / "below"
    below.mkdir()
    os.chdir(below)
    assert _shown("deploy")["seed"]["source"] == "default"
    os.mkfifo(PROJECT_FILE)
    assert "it is not a regular file" in _run("deploy", "--show-config").stderr


def test_only_deploy_reads_it_and_no_option_of_trust_is_in_it() -> None:
    Path(PROJECT_FILE).write_text("require_signature = false\ntrust_local_builds = true\n")
    assert "unknown option 'require_signature'" in _run("deploy", "--show-config").stderr
    for name in GROUP.commands.keys() - {"deploy"}:
        assert PROJECT_FILE not in _run(name, "--show-config").output, name


def test_a_named_file_permits_code_and_its_paths_are_beside_it(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "p.toml").write_text(NEEDED + "run_code = true\nmean = '1,2,3'\n")
    shown = _shown("deploy", "--config", "sub/p.toml")
    assert shown["model"]["value"] == "sub/m.pth"
    assert shown["calibration_images"]["value"] == "sub/images"
    assert shown["run_code"] == {"value": True, "source": "'sub/p.toml'"}
    assert shown["mean"]["value"] == "1,2,3"
    assert _run("deploy", "--config", "sub/p.toml", "--no-config").exit_code == 2


def test_what_is_shown_is_a_project_file_again() -> None:
    Path(PROJECT_FILE).write_text(NEEDED + 'seed = 7\nnorm_eps = 1e-5\nprecision = ["fp16"]\n')
    shown = _run("deploy", "--show-config")
    values = parse_toml(shown.stdout)
    assert (values["seed"], values["norm_eps"], values["precision"]) == (7, 1e-5, ["fp16"])
    Path(PROJECT_FILE).write_text(shown.stdout)
    assert parse_toml(_run("deploy", "--show-config").stdout) == values
    assert "# not given, and needed" in _run("deploy", "--show-config", "--no-config").stdout


def test_init_writes_every_option_of_deploy_and_what_is_given(tiny_checkpoint: Path, tmp_path: Path) -> None:
    given = ("--calibration-images", "images", "-o", "out", "--target", "jetson-orin-nano", "--mean", "0.5,0.5,0.5")
    result = _run("init", tiny_checkpoint, *given)
    assert result.exit_code == 0, result.output
    text = Path(PROJECT_FILE).read_text()
    assert parse_toml(text) == {
        "model": str(tiny_checkpoint),
        "calibration_images": "images",
        "output": "out",
        "target": ["jetson-orin-nano"],
        "mean": "0.5,0.5,0.5",
    }
    options = {option_name(p) for p in GROUP.commands["deploy"].params}
    of_a_run = {"config", "no_config", "show_config", "verbose", "quiet", "json", "dry_run", "run_code"}
    assert set(re.findall(r"^(?:# )?(\w+) =", text, re.MULTILINE)) == options - of_a_run
    assert {name: entry["value"] for name, entry in _shown("deploy").items() if entry["source"] == "'fcos-deploy.toml'"}
    again = _run("init", tiny_checkpoint, *given)
    assert (again.exit_code, Path(PROJECT_FILE).read_text()) == (2, text)
    (tmp_path / "sub").mkdir()
    assert _run("init", tiny_checkpoint, *given, "--config", "sub/p.toml").exit_code == 0
    assert parse_toml(Path("sub/p.toml").read_text())["output"] == str(tmp_path / "out")


def test_init_refuses_what_is_open_where_nobody_is_asked(tiny_checkpoint: Path) -> None:
    refused = _run("init", tiny_checkpoint, "-o", "out")
    assert refused.exit_code == 2
    assert "needs --calibration-images." in refused.stderr
    Path("names.txt").write_text("one\ntwo\n")
    open_question = _run(
        "init", tiny_checkpoint, "-o", "o", "--calibration-images", "i", "--classes", "names.txt", "-y"
    )
    assert open_question.exit_code == 2
    assert "give --classes FILE" in open_question.stderr
    assert not Path(PROJECT_FILE).exists()


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="a terminal can be made on POSIX only")
def test_init_asks_what_the_checkpoint_leaves_open(tiny_checkpoint: Path) -> None:
    Path("two.txt").write_text("one\ntwo\n")
    Path("three.txt").write_text("one\ntwo\nthree\n")
    terminal, keyboard = os.openpty()
    program = "import sys; from fcos_deploy.cli.app import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", program, "init", str(tiny_checkpoint), "--classes", "two.txt", "--shortest", "96"],
        stdin=keyboard,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        os.write(terminal, b"128\n--longest 128\n--clases three.txt\nthree.txt\nout\nimages\n")
        _, said = process.communicate(timeout=60)
    os.close(terminal)
    os.close(keyboard)
    assert process.returncode == 0, said
    assert "give --classes FILE" in said
    assert "--classes" in said
    assert "output: Folder of the bundle:" in said
    assert "Give it with its option: --shortest 128" in said
    kept = parse_toml(Path(PROJECT_FILE).read_text())
    assert kept == {
        "model": str(tiny_checkpoint),
        "output": "out",
        "calibration_images": "images",
        "classes": "three.txt",
        "shortest": 96,
        "longest": 128,
    }
