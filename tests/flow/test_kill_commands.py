"""kill -9 at seeded moments of the commands themselves: the old state or the finished one, and the rerun completes.

``FCOS_DEPLOY_KILLS=50`` kills each command 50 times (``-s`` shows what was counted), ``FCOS_DEPLOY_KILLS_SEED`` chooses
other moments; without them, twice each. Half of the moments are file operations
below the output's folder, counted by an audit hook; the others are points in time, anywhere in the computation.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from fcos_deploy.bundle import open_bundle
from fcos_deploy.bundle.writer import Journal

KILLS = int(os.environ.get("FCOS_DEPLOY_KILLS", "2"))
SEED = int(os.environ.get("FCOS_DEPLOY_KILLS_SEED", "50"))

# Runs commands in children of its own, so that the frameworks are imported once.
LAUNCHER = r"""
import json, os, signal, sys, time
from pathlib import Path
import onnx, onnxruntime, onnxscript, onnxsim, torch
import calibration.calibrate, exporters.torch_onnx, fcos_deploy.pipeline
from fcos_deploy.cli.app import build_app

WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree", "ctypes.dlsym",
           "os.symlink", "os.chmod"}

def run(arguments, folder, operation, log, **_):
    count = 0
    def hook(event, values):
        nonlocal count
        if event in WATCHED and (event == "ctypes.dlsym" or str(values[0]).startswith(folder)):
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 2)
    try:
        build_app()(arguments, standalone_mode=True)
    finally:
        os.write(1, f"operations {count}\n".encode())

for line in sys.stdin:
    order = json.loads(line)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 0
        try:
            run(**order)
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            code = 99
        os._exit(code)
    status = None
    while status is None:
        done, value = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(value)
        elif 0 < order["seconds"] <= time.monotonic() - started:
            os.kill(child, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        else:
            time.sleep(0.002)
    os.write(1, f"exit {status} {time.monotonic() - started}\n".encode())
"""


@dataclass(frozen=True)
class Ended:
    """Exit code, seconds, and how many file operations were counted (0 for a killed one)."""

    code: int
    seconds: float
    operations: int
    log: str


class Launcher:
    """A process that runs ``fcos-deploy`` commands on request, and kills them at the moment that it is told."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, arguments: list[str], *, folder: Path, operation: int = 0, seconds: float = 0.0) -> Ended:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"arguments": arguments, "folder": str(folder), "operation": operation, "seconds": seconds}
        self._process.stdin.write(json.dumps({**order, "log": str(self._log)}) + "\n")
        self._process.stdin.flush()
        operations = 0
        while not (line := self._process.stdout.readline()).startswith("exit "):
            assert line, "the launcher died"
            if line.startswith("operations "):
                operations = int(line.split()[1])
        _, code, took = line.split()
        return Ended(int(code), float(took), operations, self._log.read_text(errors="replace"))

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path_factory.mktemp("launcher"))
    yield launcher
    launcher.close()


def _kill_again_and_again(
    launch: Launcher, arguments: list[str], *, folder: Path, whole: Ended, check: Callable[[], str]
) -> Counter[str]:
    """Start the command, kill it, look at what is there, start it again, ... until ``KILLS`` kills were made.

    A start that outlives its moment has completed; ``check`` says what state is there, and sets up a new one when it
    is the finished one.
    """
    rng = np.random.default_rng(SEED)
    seen: Counter[str] = Counter()
    while seen["kills"] < KILLS or seen["open"]:
        wanted = seen["kills"] < KILLS
        share = float(rng.uniform(0, 0.7)) if wanted else 0.0
        by_time = bool(seen["kills"] % 2)
        moment = {"seconds": share * whole.seconds} if by_time else {"operation": int(share * whole.operations)}
        ended = launch(arguments, folder=folder, **moment)
        assert ended.code in (0, -signal.SIGKILL), ended.log
        killed = ended.code != 0
        state = check()
        seen["kills"] += killed
        seen[f"{state} after a kill" if killed else "completed"] += 1
        seen["open"] = int(killed and state == "old")
        assert killed or state == "old -> new", "a run that exits with 0 has finished"
    return seen


def test_deploy(launch: Launcher, tiny_checkpoint: Path, smooth_images: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    target = output / "cells"

    def arguments(threshold: float) -> list[str]:
        data = ["--calibration-images", str(smooth_images), "--calibration-count", "8", "--backend", "onnxruntime"]
        made = [
            "deploy",
            str(tiny_checkpoint),
            "-o",
            str(target),
            *data,
            "--min-match-rate",
            "0",
            "--judge",
            "point",
            "--allow-inconclusive",
        ]
        return [*made, "--score-threshold", str(threshold)]

    def threshold() -> float:
        return open_bundle(target).manifest.contract.decode.score_threshold

    def kept() -> dict[str, int]:
        """When the files of the finished steps were written."""
        files = output / ".cells.work" / "files"
        journal = output / ".cells.work" / "journal.jsonl"
        steps = Journal(journal).steps.values() if journal.exists() else ()
        return {record.path: (files / record.path).stat().st_mtime_ns for step in steps for record in step.files}

    whole = launch(arguments(0.3), folder=output)
    assert whole.code == 0, whole.log
    wanted, finished = 0.25, dict[str, int]()
    reused = 0

    def check() -> str:
        nonlocal finished, reused
        old = threshold() != wanted
        root = output / ".cells.work" / "files" if old else target
        now = {name: (root / name).stat().st_mtime_ns for name in finished}
        assert now == finished, "a finished step ran again"
        reused += len(now)
        finished = kept() if old else {}
        return "old" if old else _complete()

    def _complete() -> str:
        nonlocal wanted
        leftovers = {path.name for path in output.iterdir()} - {"cells"}
        if leftovers:  # killed between the move and the clearing up: the next run clears up
            assert launch(arguments(wanted), folder=output).code == 0
        assert {path.name for path in output.iterdir()} == {"cells"}
        wanted = round(wanted + 0.001, 3)  # another one is to be made over this one
        commands[:] = arguments(wanted)
        return "old -> new"

    commands = arguments(wanted)
    seen = _kill_again_and_again(launch, commands, folder=output, whole=whole, check=check)
    sys.stdout.write(f"deploy: {dict(seen)}, {reused} files of finished steps found as they were\n")
    assert seen["kills"] == KILLS
    assert seen["completed"] >= 1


def test_calibrate(launch: Launcher, tiny_onnx: Path, smooth_images: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    ranges = output / "ranges.json"
    made = ["calibrate", str(tiny_onnx), "--images", str(smooth_images), "-o", str(ranges), "--threads", "1"]
    contents = {}
    for count in (8, 10):
        whole = launch([*made, "--count", str(count)], folder=output)
        assert whole.code == 0, whole.log
        contents[count] = ranges.read_bytes()
    assert contents[8] != contents[10]
    ranges.write_bytes(contents[8])

    def check() -> str:
        content = ranges.read_bytes()
        if content == contents[8]:
            return "old"
        assert content == contents[10], "neither the old ranges nor those of an undisturbed run"
        ranges.write_bytes(contents[8])
        for path in output.iterdir():
            if path != ranges:
                path.unlink()
        return "old -> new"

    seen = _kill_again_and_again(launch, [*made, "--count", "10"], folder=output, whole=whole, check=check)
    sys.stdout.write(f"calibrate: {dict(seen)}\n")
    assert seen["kills"] == KILLS
    assert seen["completed"] >= 1


def test_install_and_rollback(launch: Launcher, renamed_bundle: Callable[[Path, str], Path], tmp_path: Path) -> None:
    """The link leads to a whole version after every kill; the rerun completes, and nothing is left over."""
    place, pristine = tmp_path / "models", tmp_path / "pristine"
    link, versions = place / "x", place / ".x.versions"
    bundles = [renamed_bundle(tmp_path / name, name) for name in ("a", "b", "c")]

    def current() -> str:
        assert {path.name for path in place.iterdir()} == {"x", ".x.versions"}
        with open_bundle(link) as opened:
            return opened.manifest.name

    for bundle in bundles[:2]:
        assert launch(["install", str(bundle), str(link)], folder=place).code == 0
    shutil.copytree(place, pristine, symlinks=True)
    seen: Counter[str] = Counter()
    for command, new in ((["install", str(bundles[2]), str(link)], "c"), (["rollback", str(link)], "a")):
        shutil.rmtree(place)
        shutil.copytree(pristine, place, symlinks=True)
        whole = launch(command, folder=place)
        assert (whole.code, current()) == (0, new), whole.log
        moments = np.random.default_rng(SEED).permutation(np.arange(1, whole.operations + 1))
        for moment in moments[:KILLS].tolist():
            shutil.rmtree(place)
            shutil.copytree(pristine, place, symlinks=True)
            killed = launch(command, folder=place, operation=moment)
            assert killed.code == -signal.SIGKILL, killed.log
            state = current()
            assert state in ("b", new), moment
            seen[f"{command[0]}: {state}"] += 1
            if state == "b" or command[0] == "install":
                again = launch(command, folder=place)
                assert again.code == 0, (moment, again.log)
            assert current() == new
            names = {path.name for path in versions.iterdir()} - {"lock", "history.json"}
            assert len(names) == 2 or command[0] == "rollback", (moment, names)
            if command[0] == "install" and state == "b":
                assert launch(["rollback", str(link)], folder=place).code == 0
                assert current() == "b", "the last good one was kept"
    sys.stdout.write(f"install and rollback: {dict(seen)}\n")
