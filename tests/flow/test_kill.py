"""Power cuts, full disks and second processes while a bundle is being made.

The maker runs in a process of its own. An audit hook counts its file operations and kills it with SIGKILL at a chosen
one, so that every place where it could be interrupted is reachable, and the same ones each time.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from fcos_deploy.bundle import BundleWriter, StepOutput, open_bundle
from fcos_deploy.core.errors import BundleError, ChecksumError, ConfigError, FcosDeployError

KILLS = 50

# Forks a process per run, so that the libraries are imported once.
MAKER = r"""
import json, os, resource, signal, sys
from pathlib import Path
from fcos_deploy.bundle import *
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.decode import PROFILES, DecodeSpec
from fcos_deploy.core.enums import ArtifactKind, Precision
from fcos_deploy.core.preprocess import PreprocessSpec

WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree", "ctypes.dlsym"}
CONTRACT = ModelContract(
    class_names=("a",),
    preprocess=PreprocessSpec(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), height=64, width=64),
    decode=DecodeSpec(profile=PROFILES["torchvision"], score_threshold=0.1, iou_threshold=0.5),
)

def make(index, version, fill):
    def step(folder):
        os.write(1, f"run {index}\n".encode())
        (folder / "part").mkdir()
        path = f"part/{index}.engine"
        (folder / path).write_bytes(f"{version} {index}".encode() * fill)
        (folder / f"part/{index}.json").write_text(version)
        draft = ArtifactDraft(path=path, kind=ArtifactKind.TENSORRT_ENGINE, precision=Precision.FP16,
                              companions=(f"part/{index}.json",))
        return StepOutput(artifacts=(draft,), values=index)
    return step

def work(target, version, kill_at, fill, limit):
    count = 0
    def hook(event, arguments):
        nonlocal count
        if event in WATCHED:
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.addaudithook(hook)
    with BundleWriter(Path(target)) as writer:
        for index in range(5):
            writer.step(f"step {index}", inputs={"version": version}, make=make(index, version, fill))
            os.write(1, f"done {index}\n".encode())
        writer.finish(Manifest(
            name=version, contract=CONTRACT, defaults=RunDefaults(backend="tensorrt", precision=Precision.FP16),
            provenance=Provenance(checkpoint="c.pth", checkpoint_sha256="0" * 64)))
    os.write(1, f"operations {count}\n".encode())

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            work(**json.loads(line))
        except BaseException as error:
            os.write(1, f"error {type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    os.write(1, f"exit {os.waitstatus_to_exitcode(status)}\n".encode())
"""


@dataclass
class Run:
    """Exit code of one run of the maker, and what it printed."""

    code: int
    lines: list[str]

    def after(self, word: str) -> set[str]:
        return {line.partition(" ")[2] for line in self.lines if line.startswith(word + " ")}

    @property
    def error(self) -> str:
        return " ".join(line for line in self.lines if not line.startswith(("run ", "done ")))

    @property
    def operations(self) -> int:
        (count,) = self.after("operations")
        return int(count)


class Maker:
    """A process that makes bundles on request, each in a child of its own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", MAKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, target: Path, version: str, *, kill_at: int = 0, fill: int = 100, limit: int = 0) -> Run:
        order = {"target": str(target), "version": version, "kill_at": kill_at, "fill": fill, "limit": limit}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        lines = []
        while not (line := self._process.stdout.readline()).startswith("exit "):
            assert line, "the maker died"
            lines.append(line.rstrip("\n"))
        return Run(int(line.split()[1]), lines)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def maker() -> Iterator[Maker]:
    process = Maker()
    yield process
    process.close()


def test_killed_anywhere_the_old_bundle_stays_or_the_new_one_is_there(maker: Maker, tmp_path: Path) -> None:
    target = tmp_path / "out" / "cells"
    first = maker(target, "old")
    assert first.code == 0, first.error
    pristine = shutil.copytree(target, tmp_path / "pristine")
    second = maker(target, "count")
    rng = np.random.default_rng(50)
    seen = {"old": 0, "new": 0}
    redone = saved = 0
    for moment in sorted(rng.choice(np.arange(1, second.operations + 1), KILLS, replace=False).tolist()):
        shutil.rmtree(target)
        shutil.copytree(pristine, target)
        killed = maker(target, "new", kill_at=moment)
        assert killed.code == -signal.SIGKILL, (moment, killed.error)
        name = open_bundle(target).manifest.name
        seen[name] += 1
        again = maker(target, "new")
        assert again.code == 0, (moment, again.error)
        assert open_bundle(target).manifest.name == "new"
        assert sorted(p.name for p in target.parent.iterdir()) == ["cells"], moment
        if name == "old":
            redone += len(killed.after("done") & again.after("run"))
            saved += len(killed.after("done"))
    assert redone == 0
    assert saved > KILLS  # most kills came after several finished steps, none of which ran again
    assert seen["old"] > 0


def test_a_step_whose_file_was_damaged_meanwhile_runs_again(maker: Maker, tmp_path: Path) -> None:
    target = tmp_path / "cells"
    count = maker(tmp_path / "other", "v").operations
    killed = maker(target, "v", kill_at=count * 2 // 3)
    assert {"0", "1"} <= killed.after("done")
    damaged = tmp_path / ".cells.work" / "files" / "part" / "1.engine"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    again = maker(target, "v")
    assert "1" in again.after("run")
    assert "0" not in again.after("run")
    assert open_bundle(target)


def test_a_step_with_other_inputs_runs_again(tmp_path: Path) -> None:
    runs: list[str] = []

    def make(folder: Path) -> StepOutput:
        runs.append("run")
        (folder / "file").write_text(str(len(runs)))
        return StepOutput(values={"runs": len(runs)})

    for inputs in ({"a": "1"}, {"a": "1"}, {"a": "2"}):
        with BundleWriter(tmp_path / "b") as writer:
            result = writer.step("one", inputs=inputs, make=make)
    assert len(runs) == 2
    assert writer.path("file").read_text() == "2"
    assert (result.values, result.skipped) == ({"runs": 2}, False)


@pytest.mark.parametrize("position", [0.3, 0.6])
def test_a_torn_journal_only_costs_the_steps_behind_the_tear(maker: Maker, tmp_path: Path, position: float) -> None:
    target = tmp_path / "cells"
    count = maker(tmp_path / "other", "v").operations
    maker(target, "v", kill_at=count * 3 // 4)
    journal = tmp_path / ".cells.work" / "journal.jsonl"
    content = journal.read_bytes()
    journal.write_bytes(content[: int(len(content) * position)])
    again = maker(target, "v")
    assert again.code == 0, again.error
    assert open_bundle(target)


def test_a_second_process_is_sent_away_and_harms_nothing(maker: Maker, tmp_path: Path) -> None:
    target = tmp_path / "cells"
    with BundleWriter(target) as writer:
        writer.step("one", inputs={}, make=lambda folder: StepOutput(values=(folder / "f").write_text("x")))
        other = maker(target, "other")
        assert other.code == 1
        assert f"Process {os.getpid()} is already writing" in other.error
        assert writer.step("one", inputs={}, make=_never).skipped
    assert maker(target, "other").code == 0


def _never(folder: Path) -> StepOutput:
    raise AssertionError("this step was finished")


def test_a_full_disk_is_told_and_finished_steps_are_kept(maker: Maker, tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands in for the disk: writing beyond it fails as on a full one, with EFBIG for ENOSPC."""
    target = tmp_path / "cells"
    done = maker(target, "v", fill=40_000, limit=100_000)
    assert done.code == 1
    assert "BundleError: Cannot write the bundle" in done.error
    assert not target.exists()
    assert maker(target, "v", fill=100).code == 0


@pytest.mark.skipif(not Path("/dev/full").exists() or os.geteuid() != 0, reason="needs to mount a small tmpfs")
def test_a_really_full_file_system_is_told_and_can_be_resumed(maker: Maker, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        done = maker(small / "cells", "v", fill=10_000)
        assert done.code == 1
        assert "No space left on device" in done.error
        finished = done.after("done")
        assert finished
        subprocess.run(["mount", "-o", "remount,size=20m", str(small)], check=True)
        again = maker(small / "cells", "v", fill=10_000)
        assert again.code == 0, again.error
        assert not finished & again.after("run")
        assert open_bundle(small / "cells")
    finally:
        subprocess.run(["umount", "-l", str(small)], check=False)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("target", ["/proc/nowhere/cells", "/proc/cells", "/dev/null/cells"])
def test_a_place_that_cannot_be_written_is_told(target: str) -> None:
    with pytest.raises(FcosDeployError, match=r"annot (write|be written)"):
        BundleWriter(Path(target))


def test_a_step_that_throws_leaves_nothing_and_can_be_run_again(tmp_path: Path) -> None:
    def throw(folder: Path) -> StepOutput:
        (folder / "half").write_text("x")
        raise RuntimeError("the builder gave up")

    with pytest.raises(RuntimeError, match="gave up"), BundleWriter(tmp_path / "b") as writer:
        writer.step("build", inputs={}, make=throw)
    assert not list(tmp_path.rglob("half"))
    with BundleWriter(tmp_path / "b") as writer:
        assert writer.step("build", inputs={}, make=lambda _: StepOutput()).skipped is False


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    for _ in range(20):
        with BundleWriter(tmp_path / "b") as writer:
            writer.step("s", inputs={}, make=lambda folder: StepOutput(values=(folder / "f").write_text("x")))
        with pytest.raises((BundleError, ConfigError, ChecksumError)):
            open_bundle(tmp_path / "b")
    assert count() == before


def test_the_journal_is_json_lines(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b") as writer:
        writer.step("s", inputs={"x": "1"}, make=lambda folder: StepOutput(values=(folder / "f").write_text("x")))
    (line,) = (tmp_path / ".b.work" / "journal.jsonl").read_text().splitlines()
    assert json.loads(line)["files"][0]["path"] == "f"
