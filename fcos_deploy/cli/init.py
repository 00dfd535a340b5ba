"""``fcos-deploy init``."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fcos_deploy.cli import deploy
from fcos_deploy.cli import options as cli
from fcos_deploy.cli.output import note
from fcos_deploy.cli.settings import PROJECT_FILE, option_name, project_text, typed_name
from fcos_deploy.core.checkpoint_options import option_infos
from fcos_deploy.core.errors import CheckpointError, ConfigError

__all__ = ["init_command"]

_DEPLOY = inspect.signature(deploy.deploy_command).parameters
_NEEDED = [name for name, parameter in _DEPLOY.items() if parameter.default is inspect.Parameter.empty]
_OF_A_RUN = {"config", "no_config", "dry_run", "run_code", "as_json"}  # no part of what is deployed
_UsageError: Any = typer.BadParameter.__base__  # Any: a class that Typer does not export
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]")


def _with_options_of_deploy(command: Callable[..., None]) -> Callable[..., None]:
    """Give it every option of ``deploy``, none of which it needs; it receives their values as ``values``."""

    def with_values(
        *, context: typer.Context, config: Path, yes: bool, **values: Any
    ) -> None:  # Any: each option's own
        command(context=context, config=config, yes=yes, values=values)

    added = [
        parameter.replace(default=None if name in _NEEDED else parameter.default)
        for name, parameter in _DEPLOY.items()
        if name not in _OF_A_RUN
    ]
    return cli.with_parameters(with_values, command, added, hidden="values")


@_with_options_of_deploy
def init_command(
    *,
    context: typer.Context,
    config: Annotated[Path, cli.option("Project file to write; it must not exist.", metavar="FILE")] = Path(
        PROJECT_FILE
    ),
    yes: Annotated[
        bool,
        cli.option("Nothing is asked, as without a terminal: what is open is an error.", "-y", "--yes"),
    ] = False,
    values: dict[str, Any],  # Any: each option's own type
) -> None:
    """Write the project file of a deployment, after asking what the checkpoint and the options leave open.

    Options that are given go into the file, every other option of 'deploy' stands in it as a comment.
    """
    from fcos_deploy.core.files import write_text
    from fcos_deploy.pipeline.source import names_a_function

    if config.exists() or config.is_symlink():
        raise ConfigError(f"'{config}' exists.", hint="edit it, remove it, or write another one with --config FILE")
    ask = not yes and sys.stdin.isatty()
    given = {name: value for name, value in values.items() if _is_given(context, name)}
    if ask and "checkpoint" not in given:
        given |= _answer(context, "checkpoint")
    if "checkpoint" in given:
        given = _settle_checkpoint(context, given, ask=ask)
    missing = [name for name in _NEEDED if name not in given]
    if missing and not ask:
        names = ", ".join(typed_name(p) for p in context.command.params if p.name in missing)
        raise ConfigError(
            f"The project file needs {names}.", hint="give them here, or run it on a terminal, which asks"
        )
    for name in missing:
        given |= _answer(context, name)
    if not names_a_function(given["checkpoint"]):
        given["checkpoint"] = Path(given["checkpoint"])
    kept = [parameter for parameter in context.command.params if parameter.name in _DEPLOY.keys() - _OF_A_RUN]
    text = project_text(kept, {name: _from_folder_of(config, value) for name, value in given.items()})
    write_text(config, text)
    where = "" if config == Path(PROJECT_FILE) else f" --config {shlex.quote(str(config))}"
    note(f"wrote '{config}'\nplan:    fcos-deploy deploy{where} --dry-run\nbundle:  fcos-deploy deploy{where}")


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _settle_checkpoint(context: typer.Context, given: dict[str, Any], *, ask: bool) -> dict[str, Any]:
    """``given`` with the answers to what the checkpoint leaves open.

    Raises:
        ConfigError: it leaves something open, and nobody can be asked.
        CheckpointError: the same, or the file is no checkpoint.
    """
    from fcos_deploy.checkpoints.rules import UNKNOWN_CLASS_NAMES
    from fcos_deploy.pipeline.inspect import inspect_file
    from fcos_deploy.pipeline.source import names_a_function

    if names_a_function(given["checkpoint"]):
        return given  # Only running it would tell.
    while True:
        texts = {name: value for name, value in given.items() if name in option_infos()}
        try:
            options = cli.checkpoint_options_of(texts, file=given.get("checkpoint_options"))
            inspection = inspect_file(Path(given["checkpoint"]), options=options)
        except (ConfigError, CheckpointError) as error:
            known = {flag for p in context.command.params for flag in (*p.opts, *p.secondary_opts)}
            flags = [flag for flag in dict.fromkeys(_OPTION.findall(error.hint)) if flag in known]
            if not (ask and flags):
                raise
            note(f"{error.message}\n{error.hint}")
            given = {**given, **_answered_options(context, flags)}
            continue
        unnamed = any(decision.source == UNKNOWN_CLASS_NAMES for decision in inspection.decisions)
        return given | (_answer(context, "class_names", default="") if unnamed and ask else {})


def _answered_options(context: typer.Context, flags: list[str]) -> dict[str, Any]:
    """What a person answers to a hint that names these options: options with values, or the value of the only one."""
    while True:
        words = shlex.split(typer.prompt(f"Your answer, such as {flags[0]} ...", err=True))
        if words and not words[0].startswith("-") and len(flags) == 1:
            words.insert(0, flags[0])
        try:
            typed: Mapping[str, Any] = context.command.make_parser(context).parse_args(args=words)[0]
            answers = {
                p.name: p.process_value(context, typed[p.name]) for p in context.command.params if p.name in typed
            }
            return {str(name): value for name, value in answers.items() if value is not None}
        except _UsageError as error:
            note(error.format_message())


def _answer(context: typer.Context, name: str, *, default: str | None = None) -> dict[str, Any]:
    """What a person says to a parameter; without a ``default`` the project file needs it."""
    parameters: list[Any] = context.command.params  # Any: Typer's copy of Click's parameter, which has a help
    (parameter,) = (p for p in parameters if p.name == name)
    return {name: typer.prompt(f"{option_name(parameter)}: {parameter.help}", default=default, err=True)}


def _from_folder_of(config: Path, value: Any) -> Any:  # Any: an option's own type
    """A path as a project file in another folder has it: not relative, as that would be to its own folder."""
    return Path.cwd() / value if isinstance(value, Path) and config.parent != Path() else value
