"""Where the value of an option comes from: command line, variable, project file, default; the first one decides."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import os
import shlex
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from fcos_deploy.cli.output import print_json
from fcos_deploy.core.checkpoint_options import read_options_file, replaced_fields
from fcos_deploy.core.errors import ConfigError, brief
from fcos_deploy.core.serialize import to_json, toml_value

PROJECT_FILE = "fcos-deploy.toml"
_PREFIX = "FCOS_DEPLOY_"
_OWN_VARIABLES = frozenset({"CACHE", "STATE"})  # these name folders of the product, whatever the command
_OF_NO_OPTION = frozenset({"NATIVE", "MAX_PIXELS", "KEY_PASSPHRASE", "SERVER_TOKEN"})
_SIMILAR = 0.82  # of two names; PORT, which Kubernetes sets for a service 'fcos-deploy', and EXPORT have 0.8
_NOT_IN_FILE = frozenset({"config", "no_config", "show_config"})
_PERMISSIONS = frozenset({"run_code"})  # a file that merely lies in the current folder does not give them
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True, slots=True)
class Setting:
    """The value of one parameter from outside of the command line, as the command line would hand it over.

    ``option`` is the parameter as one types it, ``words`` both as one types them. ``source``: 'the variable X', or
    the file.
    """

    value: str | bool | list[str]
    option: str
    words: tuple[str, ...]
    source: str


_IN_FORCE: ContextVar[Mapping[str, Setting]] = ContextVar("settings", default={})  # noqa: B039  (never changed)


@contextlib.contextmanager
def settings_in_force(settings: Mapping[str, Setting]) -> Iterator[None]:
    """Within, ``command_line`` and ``origins`` know them."""
    token = _IN_FORCE.set(settings)
    try:
        yield
    finally:
        _IN_FORCE.reset(token)


def command_line() -> str:
    """The command as one would type it without variables and project file, for reports and manifests."""
    added = [word for setting in _IN_FORCE.get().values() for word in setting.words]
    return shlex.join(["fcos-deploy", *sys.argv[1:], *added])


def origins(text: str, *, of_options: bool) -> str:
    """Where the options that the text of an error names, or whose values it quotes, come from.

    ``of_options``: the error is about options in any case, so that where it names none all sources are named. Empty:
    nothing of it comes from elsewhere than the command line.
    """
    settings = _IN_FORCE.get().values()
    words = text.replace("'", " ").split()
    named = [s for s in settings if s.option in words or any(f"'{word}'" in text for word in s.words)]
    if named:
        return "; ".join(f"{setting.option} is that of {setting.source}" for setting in named)
    return (
        f"options come from {', '.join(dict.fromkeys(s.source for s in settings))} too"
        if settings and of_options
        else ""
    )


def option_name(parameter: Any) -> str:  # Any: Typer's copy of Click's parameter
    """What names a parameter in a project file, and in capitals in a variable: 'max_map_drop', or 'model'."""
    return typed_name(parameter).removeprefix("--").replace("-", "_").lower()


def typed_name(parameter: Any) -> str:
    """The option as one types it, in its long form; of an argument, its name in the help."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    return next(str(flag) for flag in parameter.opts if flag.startswith("--"))


def variable_names(command: str, parameter: Any) -> tuple[str, ...]:
    """The variables of an option; the first, which is for this command alone, comes before the one for all."""
    if parameter.param_type_name == "argument":
        return ()
    name = option_name(parameter).upper()
    alone = f"{_PREFIX}{command.upper().replace('-', '_')}_{name}"
    return (alone,) if name in _OWN_VARIABLES else (alone, f"{_PREFIX}{name}")


def refuse_mistyped_variables(known: Sequence[str], all_known: Callable[[], Sequence[str]]) -> None:
    """``known``: the variables of this command; ``all_known``: those of every command, asked for only if need be.

    Raises:
        ConfigError: a variable has nearly the name of an option. Others may belong to anybody.
    """
    own = {_PREFIX + name for name in _OWN_VARIABLES | _OF_NO_OPTION}
    unknown = {name for name in os.environ if name.startswith(_PREFIX)} - own - set(known)
    if not unknown:
        return
    names = {name.removeprefix(_PREFIX) for name in all_known()} | _OWN_VARIABLES | _OF_NO_OPTION
    for name in sorted(unknown):
        bare = name.removeprefix(_PREFIX)
        similar = [] if bare in names else difflib.get_close_matches(bare, names, n=1, cutoff=_SIMILAR)
        if similar:
            raise ConfigError(
                f"The variable {brief(name)} is unknown.",
                hint=f"did you mean {_PREFIX}{similar[0]}? Otherwise unset it",
            )


def read_settings(command: Any, typed: Mapping[str, Any]) -> dict[str, Setting]:  # Any: Typer's command, raw values
    """What variables and the project file say of the parameters that are not ``typed``, by the names of parameters.

    Raises:
        ConfigError: naming the variable or the file, where a value is empty or not of the option's kind, or an option
            does not exist.
    """
    parameters = {parameter.name: parameter for parameter in command.params}
    stated = {name for name, value in typed.items() if value is not None}
    settings = {}
    for name, parameter in parameters.items():
        variable = next((v for v in variable_names(command.name, parameter) if v in os.environ), None)
        if variable is not None and name not in stated | replaced_fields(stated):
            settings[name] = _setting(parameter, _of_variable(parameter, variable), f"the variable {variable}")
    if "no_config" in parameters:
        above = stated | set(settings)
        hidden = above | replaced_fields(above)
        choices = {n: typed.get(n) or (settings[n].value if n in settings else None) for n in ("config", "no_config")}
        in_file = _read_project_file(command, config=choices["config"], ignored=bool(choices["no_config"]))
        settings |= {name: setting for name, setting in in_file.items() if name not in hidden}
    return settings


def _read_project_file(command: Any, *, config: Any, ignored: bool) -> dict[str, Setting]:
    if config is not None and ignored:
        raise ConfigError("--config and --no-config contradict each other.", hint="give one of them")
    path = Path(config or PROJECT_FILE)
    if ignored or (config is None and not os.path.lexists(path)):
        return {}
    parameters = {option_name(parameter): parameter for parameter in command.params}
    known = [name for name in parameters if name not in _NOT_IN_FILE]
    values = read_options_file(path, known, otherwise=f"'fcos-deploy {command.name} --help' shows what there is")
    settings = {}
    for name, value in values.items():
        where = f"'{path}'"
        if config is None and name in _PERMISSIONS and value is not False:
            raise ConfigError(
                f"{where} has {name}, which a project file that was found in the current folder may not set.",
                hint=f"give --{name.replace('_', '-')} on the command line, or name the file: --config {path}",
            )
        text = _of_file(parameters[name], value, where=f"'{name}' in {where}")
        if path.parent != Path() and _takes_path(command, parameters[name]):
            text = str(path.parent / str(text))  # Paths in a project file are relative to its folder.
        settings[parameters[name].name] = _setting(parameters[name], text, where)
    if config is None:
        # Also with --quiet: what lies in a folder by accident, or by intent, is never read in silence.
        said = f"options are read from '{path}' in this folder: {', '.join(values) or 'none'} (--no-config ignores it)"
        typer.echo(said, err=True)
    return settings


def _setting(parameter: Any, value: str | bool | list[str], source: str) -> Setting:
    option = typed_name(parameter)
    if isinstance(value, bool):
        flags = [option] if value else parameter.secondary_opts[:1]
        return Setting(value, option, tuple(flags), source)
    values = value if isinstance(value, list) else [value]
    if parameter.param_type_name == "argument":
        return Setting(value, option, tuple(values), source)
    return Setting(value, option, tuple(word for item in values for word in (option, item)), source)


def _repeatable(parameter: Any) -> bool:
    return bool(getattr(parameter, "multiple", False))  # which an argument lacks


def _of_variable(parameter: Any, variable: str) -> str | bool | list[str]:
    text = os.environ[variable]
    if not text.strip():
        raise ConfigError(f"The variable {variable} is empty.", hint="give it a value, or unset it")
    if getattr(parameter, "is_bool_flag", False):
        if text.lower() not in (*_TRUE, *_FALSE):
            raise ConfigError(f"The variable {variable} must be true or false, got {brief(text)}.")
        return text.lower() in _TRUE
    if _repeatable(parameter):
        return [item.strip() for item in text.split(",")]
    return text


def _of_file(parameter: Any, value: Any, *, where: str) -> str | bool | list[str]:  # Any: a TOML value
    """Numbers become text again, so that the option's own check reads them as it reads what is typed."""
    if getattr(parameter, "is_bool_flag", False):
        if not isinstance(value, bool):
            raise ConfigError(f"{where} must be true or false, got {brief(value)}.")
        return value
    if _repeatable(parameter):
        items = value if isinstance(value, list) else [value]
        return [_scalar(item, where=where, expected="text or a number") for item in items]
    return _scalar(value, where=where, expected="one text or number, as one would type it")


def _scalar(value: Any, *, where: str, expected: str) -> str:
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        raise ConfigError(f"{where} must be {expected}, got {brief(value)}.")
    if value == "":
        raise ConfigError(f"{where} is empty.", hint="give it a value, or leave it out")
    return str(value)


def _takes_path(command: Any, parameter: Any) -> bool:
    """Whether the parameter is a path: as the function behind the command declares it, or as an argument."""

    def mentions(form: Any) -> bool:
        return form is Path or any(mentions(part) for part in typing.get_args(form))

    declared = inspect.signature(command.callback.__wrapped__).parameters
    return parameter.param_type_name == "argument" or mentions(declared[parameter.name].annotation)


def show_settings(command: Any, context: Any, typed: Mapping[str, Any], settings: Mapping[str, Setting]) -> None:
    """Print every option in force and where it comes from: on stdout, as a project file or, with ``--json``, as JSON.

    Raises:
        typer.BadParameter: a value is not of the option's kind.
    """
    values, sources = {}, {}
    for parameter in command.params:
        name = parameter.name
        raw, _ = parameter.consume_value(context, typed)
        values[name] = None if raw is None else to_json(parameter.process_value(context, raw))
        typed_here = typed.get(name) is not None
        sources[name] = "command line" if typed_here else settings[name].source if name in settings else "default"
        if parameter.required and raw is None:
            sources[name] = "not given, and needed"
    shown = [parameter for parameter in command.params if option_name(parameter) not in _NOT_IN_FILE]
    if typed.get("as_json"):
        entries = {option_name(p): {"value": values[p.name], "source": sources[p.name]} for p in shown}
        print_json({"command": command.name, "options": entries})
        return
    typer.echo(f"# Options of 'fcos-deploy {command.name}' in force here, and where they come from.")
    for parameter in shown:
        typer.echo(f"{_assignment(parameter, values[parameter.name])}  # {sources[parameter.name]}")


def project_text(parameters: Sequence[Any], values: Mapping[str, Any]) -> str:  # Any: Typer's, what it made of words
    """A project file with these values by the names of parameters; the other parameters stand there as comments."""
    lines = ["# Options of 'fcos-deploy deploy' in this folder. Variables and the command line override them."]
    for parameter in parameters:
        lines += ["", f"# {parameter.help}", _assignment(parameter, to_json(values.get(parameter.name)))]
    return "\n".join(lines) + "\n"


def _assignment(parameter: Any, value: Any) -> str:
    given = value is not None and value not in ("", [])
    return f"{option_name(parameter)} = {toml_value(value)}" if given else f"# {option_name(parameter)} ="
