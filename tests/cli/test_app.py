"""The command line as a whole: commands, errors on one screen, exit codes."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from fcos_deploy.cli.app import build_app
from fcos_deploy.core import errors

COMMANDS = (
    *("export", "simplify", "calibrate", "quantize", "build", "deploy", "verify"),
    *("predict", "evaluate", "benchmark", "inspect", "doctor", "demo"),
)


def test_every_documented_command_exists() -> None:
    result = CliRunner().invoke(build_app(), ["--help"])
    assert result.exit_code == 0
    listed = {line.split()[0] for line in result.stdout.splitlines() if line.startswith("  ") and line.strip()}
    assert set(COMMANDS) <= listed


def test_a_named_command_is_loaded_alone_and_works_the_same() -> None:
    alone, everything = (build_app(only=word) for word in ("verify-signature", "verify-signatures"))
    assert [item.name for item in alone.registered_commands] == ["verify-signature"]
    assert len(everything.registered_commands) == len(build_app().registered_commands)
    asked = [CliRunner().invoke(app, ["verify-signature", "--help"]).stdout for app in (alone, everything)]
    assert asked[0] == asked[1]
    assert "did you mean" in CliRunner().invoke(everything, ["verify-signatures"]).stderr.lower()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = CliRunner().invoke(build_app(), [command, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


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
    result = CliRunner().invoke(build_app(), ["predict", "nothing.onnx", "nothing.jpg"])
    assert result.exit_code != 0
    assert "nothing.onnx" in result.stderr
    assert "Traceback" not in result.stderr
