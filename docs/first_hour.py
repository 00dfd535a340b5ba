"""Repeats the sessions of docs/first-hour.md in bare environments, and writes what they print into the page.

    python docs/first_hour.py [--work DIR] [--only NAME]

The page has the commands. A comment before a session names its folder, its Python and what is installed there
first: ``<!-- workstation: python3.10 [all] -->``, with ``jetson`` at the end for a machine that looks like a Jetson
Orin Nano. Every exit code has to be the one on the page, and what a person types after an error has to be what its
hint says. Environments in which nothing is installed later are kept in DIR and used again.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "first-hour.md"

_SESSION = re.compile(
    r"<!-- (?P<name>[\w-]+): (?P<python>python[\d.]+) \[(?P<extras>[\w,-]*)\](?P<jetson> jetson)? -->\n"
    r"```console\n(?P<text>.*?)^```$",
    re.M | re.S,
)
_LINES = (9, 3)  # of a long output, at its beginning and end
_HINTED = re.compile(r"(?:pip install '[^']+'|fcos-deploy (?:[a-z]|--)[^';|\n]*)")
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")

# What a Jetson Orin Nano with JetPack 6.2 has in place of these files, and the names of the processor.
JETSON = {
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
    "proc/meminfo": "MemTotal:        7802092 kB\n",
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: ARMv8 Processor rev 1 (v8l)\n"
    "Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp\n",
}
LOOKS_LIKE_A_JETSON = """
import functools, pathlib, platform
platform.machine = lambda: "aarch64"
try:
    from fcos_deploy.core import machine
except ImportError:  # not installed yet
    pass
else:
    board, is_jetson, read_machine = pathlib.Path({board!r}), machine.is_jetson, machine.read_machine
    machine.is_jetson = lambda root=None: is_jetson(board)
    machine.read_machine = lambda root=None: read_machine(board)
"""


@dataclass(frozen=True)
class Step:
    """What was typed, what it printed on both streams, and its exit code."""

    command: str
    output: str = ""
    exit_code: int = 0


@dataclass(frozen=True)
class Session:
    """``extras``: what is installed at first, such as ``openvino``; ``jetson``: the machine looks like one."""

    name: str
    python: str
    extras: tuple[str, ...]
    jetson: bool
    steps: tuple[Step, ...]


def sessions(text: str) -> Iterator[tuple[re.Match[str], Session]]:
    """Those of a page, each with its place."""
    for match in _SESSION.finditer(text):
        steps = []
        for part in re.split(r"^\$ ", match["text"], flags=re.M)[1:]:
            command, _, output = part.partition("\n")
            code = re.search(r"^\[exit code (\d+)\]\n?\Z", output, re.M)
            steps.append(Step(command, output[: code.start()] if code else output, int(code[1]) if code else 0))
        extras = tuple(filter(None, match["extras"].split(",")))
        yield match, Session(match["name"], match["python"], extras, bool(match["jetson"]), tuple(steps))


def not_followed(steps: tuple[Step, ...]) -> list[str]:
    """Errors whose hint is not what is typed next: a command that it prints, or else an option that it names."""
    problems = []
    for step, following in pairwise(steps):
        said = step.output.partition("hint:")[2] or step.output.partition("Error:")[2] if step.exit_code else ""
        said = re.sub(r"'fcos-deploy [a-z]+' (?:made|wrote)", "", said)  # where a file is from, nothing to type
        commands = [text.strip(" .") for text in _HINTED.findall(said)]
        options = set(_OPTION.findall(said.partition("No such option: ")[2].partition(" ")[2] or said))
        if "sudo apt" in said:  # the page says that it is not run
            continue
        followed = any(following.command.startswith(command) for command in commands)
        if not (followed or (options and not commands and options & set(_OPTION.findall(following.command)))):
            problems += [f"{step.command}\n{said}\nis followed by: {following.command}"] if commands or options else []
    return problems


def make_environment(session: Session, folder: Path, wheels: Path) -> Path:
    """A virtual environment with the wheel and its extras; the folder of its programs."""
    environment = folder / "venv"
    installs = any(step.command.startswith("pip ") for step in session.steps)  # what is kept would have it already
    if installs or not environment.exists():
        subprocess.run([session.python, "-m", "venv", *(["--clear"] if installs else []), environment], check=True)
    # -I: a package that is on the path of this process is not one of the environment
    pip = [environment / "bin" / "python", "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    (wheel,) = wheels.glob("*.whl")
    extras = f"[{','.join(session.extras)}]" if session.extras else ""
    subprocess.run([*pip, f"fcos-deploy{extras} @ {wheel.as_uri()}"], check=True)
    subprocess.run([*pip, "--no-deps", "--force-reinstall", wheel], check=True)
    if session.jetson:
        for name, text in JETSON.items():
            path = folder / "board" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (packages,) = (environment / "lib").glob("python*/site-packages")
        (packages / "sitecustomize.py").write_text(LOOKS_LIKE_A_JETSON.format(board=str(folder / "board")))
    return environment / "bin"


def repeat(session: Session, work: Path, wheels: Path) -> Session:
    """The session with what its commands print now.

    Raises:
        SystemExit: a command ends with another exit code than on the page.
    """
    folder = work / session.name
    folder.mkdir(parents=True, exist_ok=True)
    programs = make_environment(session, folder, wheels)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FCOS_DEPLOY_"))},
        **{"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(folder), "COLUMNS": "110"},
        **{"PIP_FIND_LINKS": str(wheels), "PIP_QUIET": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    }
    steps = []
    for step in session.steps:
        print(f"{session.name} $ {step.command}", file=sys.stderr, flush=True)
        command = ["bash", "-c", step.command]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        done = subprocess.run(command, cwd=folder, env=environment, text=True, check=False, **streams)
        steps.append(replace(step, output=_short(done.stdout.replace(f"{folder}/", "")), exit_code=done.returncode))
        if done.returncode != step.exit_code:
            sys.exit(f"exit code {done.returncode}, not {step.exit_code}\n{done.stdout}")
    return replace(session, steps=tuple(steps))


def _short(output: str) -> str:
    lines = [line.rstrip() for line in output.splitlines() if line.strip() and not line.startswith("WARNING: Location")]
    first, last = _LINES
    kept = lines if len(lines) <= first + last + 1 else [*lines[:first], "...", *lines[-last:]]
    return "".join(f"{line}\n" for line in kept)


def shown(step: Step) -> str:
    """As the page has it."""
    code = f"[exit code {step.exit_code}]\n" if step.exit_code else ""
    return f"$ {step.command}\n{step.output}{code}"


def make_files(folder: Path) -> None:
    """The files that the tutorials begin with."""
    tutorials = ROOT / "tests" / "docs" / "test_tutorials.py"
    spec = importlib.util.spec_from_file_location("tutorials", tutorials)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["tutorials"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder.mkdir()
    module.make_files(folder)


def main() -> None:
    """Repeat the sessions and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "first-hour")
    parser.add_argument("--only", help="name of a session")
    options = parser.parse_args()
    work = options.work.resolve()
    wheels = work / "wheels"
    for old in wheels.glob("*"):
        old.unlink()
    subprocess.run([sys.executable, "-I", "-m", "build", "--outdir", wheels, ROOT], check=True, stdout=sys.stderr)
    if not (work / "files").exists():
        make_files(work / "files")
    for match, session in list(sessions(PAGE.read_text(encoding="utf-8"))):
        if options.only not in (None, session.name):
            continue
        repeated = repeat(session, work, wheels)
        block = match[0].replace(match["text"], "".join(map(shown, repeated.steps)))
        PAGE.write_text(PAGE.read_text(encoding="utf-8").replace(match[0], block), encoding="utf-8")
        if problems := not_followed(repeated.steps):
            sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
