"""What messages and documentation tell people to type exists: every command, and every option on its command."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer

from fcos_deploy.cli.app import build_app

ROOT = Path(__file__).parents[2]
PACKAGES = ("fcos_deploy", "exporters", "runtimes", "calibration")
FOLDERS = [ROOT / name for name in (*PACKAGES, "tests")]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])

GROUP: Any = typer.main.get_command(build_app())  # Any: Click's group, or Typer's copy of it
OPTIONS = {
    name: {option for p in command.params for option in (*p.opts, *p.secondary_opts) if option.startswith("-")}
    | {"--help", "-h"}
    for name, command in GROUP.commands.items()
}
OPTIONS[""] = {option for p in GROUP.params for option in p.opts} | {"--help", "-h"}
SOMEWHERE = set().union(*OPTIONS.values())

SIGNED_MESSAGE = "fcos-deploy bundle manifest, version 1"  # no command, but what a signature begins with
# A value in an f-string; what it holds is not known here.
HOLE = "\ufffc"
# A call stands alone, in quotes, or after a colon: "install fcos-deploy from a clone" is none.
_CALL = re.compile(r"(?:^|['`|;:&=(]|\bor) *(?:\S+/bin/)?fcos-deploy +([a-z][a-z-]*|--[a-z-]+)")
_OPTION = re.compile(rf"(?<![\w{HOLE}/-])(--[a-z][a-z0-9-]*[a-z0-9])(?![\w{HOLE}-])")
# Other programs, whose options a text may name.
_FOREIGN = re.compile(r"\b(pip|docker|trtexec|pytest|python|ovms|tritonserver)\b")


def hints() -> Iterator[tuple[str, str]]:
    """Where it is, and the text, of every error's message and hint, and of the remedies of probes and findings."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                spoken = [node.value] if isinstance(node, ast.keyword) and node.arg in ("hint", "remedy") else []
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("Error"):
                    spoken += node.args[:1]
                for value in spoken:
                    for text in texts(value):
                        yield f"{path.relative_to(ROOT)}:{value.lineno}", text


def texts(node: ast.expr) -> Iterator[str]:
    """The strings that an expression can be, as far as it says."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
    elif isinstance(node, ast.IfExp):
        yield from texts(node.body)
        yield from texts(node.orelse)
    elif isinstance(node, ast.BinOp):
        yield "".join("".join(texts(part)) or HOLE for part in (node.left, node.right))


def lines() -> Iterator[tuple[str, str]]:
    """Every command line of ours in the pages: code blocks, where a backslash continues a line, and code spans."""
    for page in PAGES:
        if page.name == "first-hour.md":  # has what other tools taught, which is refused
            continue
        fenced = False
        content = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for number, line in enumerate(content.splitlines(), start=1):
            if line.lstrip().startswith("```"):
                fenced = not fenced
            code = fenced or line.startswith("    ")
            for span in [line.strip().removeprefix("$ ")] if code else re.findall(r"`([^`]+)`", line):
                short = span.split(" ")[0] in GROUP.commands and " --" in span
                call = f"fcos-deploy {span}" if short else span
                if "fcos-deploy " in call and call != SIGNED_MESSAGE:
                    yield f"{page.relative_to(ROOT)}:{number}", call.split(" #")[0]


def problems(text: str) -> list[str]:
    """What ``text`` names that the command line does not have."""
    calls = list(_CALL.finditer(text))
    found = []
    for call, following in pairwise([*calls, None]):
        name = call[1]
        if name.startswith("--"):
            found += [] if name in OPTIONS[""] else [f"no option {name}"]
            continue
        if name not in OPTIONS:
            found.append(f"no command '{name}'")
            continue
        # As far as the quote or the sentence goes; then options may be of another command.
        rest = re.split(r"['`;|&]|[.,] ", text[call.end() : following.start() if following else None])[0]
        found += [f"'{name}' has no option {option}" for option in _OPTION.findall(rest) if option not in OPTIONS[name]]
    if not calls and not _FOREIGN.search(text):
        found += [f"no command has an option {o}" for o in _OPTION.findall(text) if o not in SOMEWHERE]
    return found


def test_the_checker_finds_what_is_wrong() -> None:
    assert problems("run 'fcos-deploy exprot MODEL'") == ["no command 'exprot'"]
    assert problems(f"fcos-deploy export {HOLE} --nope 3; --output is right") == ["'export' has no option --nope"]
    assert problems("give --tartget") == ["no command has an option --tartget"]
    assert problems("'fcos-deploy verify B --log F' and --backend") == []


def test_there_is_much_to_check() -> None:
    assert sum(1 for _ in hints()) > 150
    assert sum(1 for _ in lines()) > 60


def test_hints_name_what_exists() -> None:
    assert [f"{where}: {what}" for where, text in hints() for what in problems(text)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_name_what_exists(page: Path) -> None:
    name = f"{page.relative_to(ROOT)}:"
    assert [f"{where}: {what}" for where, text in lines() if where.startswith(name) for what in problems(text)] == []


# Files of ours: below a package or a folder of tests, and by their bare name on the pages about the code.
_OUR_FILE = re.compile(
    r"(?<![\w/.-])((?:fcos_deploy|exporters|runtimes|calibration|benchmarks|examples|core|checkpoints|serving|model"
    r"|unit|contract|flow|golden|cli)/[\w./]*\.py)\b"
)
_BARE_FILE = re.compile(r"(?<![\w/])(\w+\.py)\b")
_OUR_NAME = re.compile(r"\b(?:fcos_deploy\.)?(core|pipeline|targets|checkpoints)\.([a-z]\w+)\.(\w+)\b")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_files_and_modules_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    names = set(_OUR_FILE.findall(text))
    if page.name in ("CONTRIBUTING.md", "architecture.md"):
        names |= set(_BARE_FILE.findall(text))
        assert names
    folders = [ROOT, ROOT / "fcos_deploy", ROOT / "tests"]
    missing = [name for name in sorted(names) if "/" in name and not any((f / name).is_file() for f in folders)]
    missing += [name for name in sorted(names) if "/" not in name and not any(next(f.rglob(name), "") for f in FOLDERS)]
    for package, module, name in _OUR_NAME.findall(text):
        file = ROOT / "fcos_deploy" / package / f"{module}.py"
        if not file.is_file() or not re.search(rf"^(def|class) {name}\b", file.read_text(encoding="utf-8"), re.M):
            missing.append(f"{package}.{module}.{name}")
    assert missing == []


def test_what_plans_print_can_be_typed() -> None:
    """The commands of every profile's plan, with a bundle and a folder in their places, are what the parser takes."""
    from fcos_deploy.targets.plan import plan
    from fcos_deploy.targets.profiles import load_profile, profile_names

    printed = []
    for name in profile_names():
        made = plan(load_profile(name))
        printed += [*made.commands, *(note.split(": ")[-1] for note in made.notes if "fcos-deploy " in note)]
    printed = [text for text in printed if text.startswith("fcos-deploy ")]
    assert any(text.startswith("fcos-deploy setup ") for text in printed)
    assert any("--for trtexec" in text for text in printed)
    for text in printed:
        command, *arguments = text.replace("BUNDLE", str(ROOT)).replace("DIR", "out").split()[1:]
        GROUP.commands[command].make_context(command, arguments)
