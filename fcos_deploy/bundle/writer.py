"""Puts a finished folder in the place of an older one, so that at every moment one of the two is there."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from fcos_deploy.bundle.manifest import DIGEST_NAME, MANIFEST_NAME, Manifest, manifest_text
from fcos_deploy.bundle.records import Artifact, FileRecord, Requirements, StepRecord
from fcos_deploy.bundle.store import check_files, digest_line, read_manifest
from fcos_deploy.core.enums import ArtifactKind, Precision
from fcos_deploy.core.errors import BundleError, ConfigError, FcosDeployError
from fcos_deploy.core.files import sha256_file, write_text
from fcos_deploy.core.serialize import from_json, to_json

__all__ = [
    "ArtifactDraft",
    "BundleWriter",
    "FinishedStep",
    "Journal",
    "StepOutput",
    "StepResult",
    "WorkLock",
    "replace_folder",
    "restore_folder",
    "step_key",
]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def replace_folder(new: Path, target: Path) -> None:
    """Move ``new`` to ``target``; an older ``target`` is swapped with it and afterwards lies at ``new``.

    Where the file system cannot swap (NFS, some overlays) it takes two moves; ``restore_folder`` repairs what a power
    cut between them leaves.

    Raises:
        OSError: both folders are then where they were.
    """
    if not target.exists():
        new.rename(target)
    elif not _exchange(new, target):
        target.rename(_aside(target))
        new.rename(target)
        _aside(target).rename(new)
    _sync(target.parent)


def restore_folder(target: Path) -> None:
    """Bring back the older folder when ``replace_folder`` was interrupted between its two moves."""
    aside = _aside(target)
    if aside.exists() and not target.exists():
        aside.rename(target)
    elif aside.exists():
        shutil.rmtree(aside)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _exchange(first: Path, second: Path) -> bool:
    """``renameat2`` with RENAME_EXCHANGE, for which Python has no function; False where it is not supported."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        if code in (errno.ENOSYS, errno.EINVAL, errno.EXDEV):
            return False
        raise OSError(code, os.strerror(code), str(second))
    return True


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedStep:
    """One line of the journal. ``key`` identifies the step's inputs; ``values`` is what it returned, as JSON."""

    name: str
    key: str
    files: tuple[FileRecord, ...]
    artifacts: tuple[Artifact, ...]
    values: Any
    seconds: float


def step_key(name: str, inputs: Mapping[str, str]) -> str:
    """SHA-256 over the step's name and inputs."""
    return hashlib.sha256(json.dumps([name, dict(inputs)], sort_keys=True).encode()).hexdigest()


class Journal:
    """Finished steps, one JSON line each, flushed to the disk before a step counts as finished."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.steps: dict[str, FinishedStep] = {}
        self._load()

    def _load(self) -> None:
        lines = self._path.read_bytes().split(b"\n")[:-1] if self._path.is_file() else []
        for line in lines:
            try:
                step = from_json(FinishedStep, json.loads(line), where=self._path.name)
            except (ValueError, ConfigError, BundleError):
                break  # A line of another version or cut off by a power failure: that step and later ones run again.
            self.steps[step.name] = step

    def add(self, step: FinishedStep) -> None:
        """Record a step; one of the same name is replaced."""
        self.steps.pop(step.name, None)
        self.steps[step.name] = step
        self._write()

    def drop(self, name: str) -> None:
        """Forget a step."""
        if self.steps.pop(name, None):
            self._write()

    def _write(self) -> None:
        # Rewritten whole and renamed: a line appended behind a half-written one would be lost.
        partial = self._path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(to_json(step)) + "\n" for step in self.steps.values())
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(self._path)


class WorkLock:
    """An exclusive lock on a working folder, released by the kernel when the process dies."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "lock"
        self._descriptor = self._acquire()

    def _acquire(self) -> int:
        while True:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                continue  # The holder removed the folder between the two calls.
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                owner = os.read(descriptor, 32).decode(errors="replace").strip()
                os.close(descriptor)
                raise BundleError(
                    f"Process {owner or '?'} is already writing '{self._path.parent}'.",
                    hint="wait until it has finished, or choose another output",
                ) from error
            if self._is_current(descriptor):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
                return descriptor
            os.close(descriptor)  # The holder finished and removed the file: try with a new one.

    def _is_current(self, descriptor: int) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return self._path.stat().st_ino == os.fstat(descriptor).st_ino
        return False

    def release(self) -> None:
        """Let others in; may be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactDraft:
    """What a step says of a model file that it made; hash, size, seconds and platform are added by the writer.

    ``path`` and ``companions`` are relative to the step's folder; ``parent`` is the SHA-256 of what it was made from.
    """

    path: str
    kind: ArtifactKind
    precision: Precision
    parent: str = ""
    backend: str = ""
    placement: str = ""
    companions: tuple[str, ...] = ()
    requires: Requirements = field(default_factory=Requirements)
    config: Mapping[str, str] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What a step hands over beside the files that it left in its folder. ``values`` must be JSON."""

    artifacts: tuple[ArtifactDraft, ...] = ()
    values: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """A finished step. ``skipped``: its result was there already; ``folder`` holds the files of all steps."""

    name: str
    folder: Path
    skipped: bool
    artifacts: tuple[Artifact, ...]
    files: tuple[FileRecord, ...]
    values: Any

    def path(self, name: str) -> Path:
        """Where a file of the bundle lies while the bundle is being made."""
        return self.folder / name


class BundleWriter:
    """The working folder ``.<name>.work`` beside the final one; a context manager that holds its lock.

    Leaving the block without ``finish`` keeps the working folder, so that the next run resumes.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self._work = target.with_name(f".{target.name}.work")
        self._files = self._work / "files"
        self._used: set[str] = set()
        with _writing(target):
            if target.exists() and not (target / MANIFEST_NAME).is_file() and any(target.iterdir()):
                raise ConfigError(
                    f"'{target}' exists and is not a bundle, so it is not overwritten.", hint="choose another output"
                )
            self._lock = WorkLock(self._work)
            restore_folder(target)
        try:
            with _writing(target):
                self._journal = self._recover()
        except BaseException:
            self._lock.release()
            raise

    def _recover(self) -> Journal:
        self._files.mkdir(parents=True, exist_ok=True)
        for leftover in self._work.glob("step-*"):
            shutil.rmtree(leftover)
        journal = Journal(self._work / "journal.jsonl")
        known = {record.path for step in journal.steps.values() for record in step.files}
        for path in sorted(self._files.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(self._files).as_posix() not in known:
                path.unlink()  # moved here by a step that was killed before it was recorded
        return journal

    def __enter__(self) -> BundleWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def path(self, name: str) -> Path:
        """Where a file of the bundle lies while the bundle is being made."""
        return self._files / name

    @property
    def scratch(self) -> Path:
        """A folder for what an unfinished step goes on from in the next run; gone with ``finish``."""
        folder = self._work / "scratch"
        with _writing(self.target):
            folder.mkdir(exist_ok=True)
        return folder

    @property
    def finished(self) -> tuple[FinishedStep, ...]:
        """The steps of this run so far, those of an earlier one that were still valid included."""
        return tuple(step for name, step in self._journal.steps.items() if name in self._used)

    def step(self, name: str, *, inputs: Mapping[str, str], make: Callable[[Path], StepOutput]) -> StepResult:
        """Run ``make(folder)`` and adopt every file it leaves in ``folder``, unless that was done with these inputs.

        ``inputs`` must name everything the result depends on: hashes of sources, options, versions.

        Raises:
            BundleError: the disk is full or was removed; finished steps are kept.
        """
        key = step_key(name, inputs)
        finished = self._journal.steps.get(name)
        skipped = finished is not None and finished.key == key and self._intact(finished)
        with _writing(self.target):
            if finished is None or not skipped:
                self._forget(name)
                finished = self._run(name, key, make)
        self._used.add(name)
        return StepResult(
            name=name,
            folder=self._files,
            skipped=skipped,
            artifacts=finished.artifacts,
            files=finished.files,
            values=finished.values,
        )

    def _intact(self, step: FinishedStep) -> bool:
        return all(
            (self._files / record.path).is_file()
            and (self._files / record.path).stat().st_size == record.size
            and sha256_file(self._files / record.path) == record.sha256
            for record in step.files
        )

    def _forget(self, name: str) -> None:
        step = self._journal.steps.get(name)
        if step:
            self._journal.drop(name)
            for record in step.files:
                (self._files / record.path).unlink(missing_ok=True)

    def _run(self, name: str, key: str, make: Callable[[Path], StepOutput]) -> FinishedStep:
        folder = self._work / f"step-{uuid.uuid4().hex[:8]}"
        folder.mkdir()
        started = time.perf_counter()
        try:
            output = make(folder)
            seconds = time.perf_counter() - started
            records = {record.path: record for record in (_record(folder, path) for path in _files_below(folder))}
            artifacts = tuple(_artifact(draft, records, name, seconds) for draft in output.artifacts)
            self._adopt(folder, records)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        step = FinishedStep(
            name=name,
            key=key,
            files=tuple(records.values()),
            artifacts=artifacts,
            values=output.values,
            seconds=round(seconds, 3),
        )
        self._journal.add(step)
        return step

    def _adopt(self, folder: Path, records: Mapping[str, FileRecord]) -> None:
        taken = {record.path for step in self._journal.steps.values() for record in step.files}
        clash = sorted(taken & set(records))
        if clash:
            raise BundleError(f"Two steps made the same files: {clash}.")
        for name in records:
            target = self._files.joinpath(*PurePosixPath(name).parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            (folder / name).replace(target)

    def finish(self, manifest: Manifest) -> Path:
        """Write the manifest, check the whole, and give it the final name in one move.

        ``manifest`` comes without artifacts and files; those of the steps of this run are filled in, and what earlier
        runs left behind is dropped.

        Raises:
            BundleError: when the result is not consistent.
        """
        for name in sorted(set(self._journal.steps) - self._used):
            self._forget(name)
        steps = self._journal.steps.values()
        artifacts = tuple(artifact for step in steps for artifact in step.artifacts)
        made = {artifact.path for artifact in artifacts}
        files = tuple(record for step in steps for record in step.files if record.path not in made)
        full = replace(manifest, artifacts=artifacts, files=tuple(sorted(files, key=lambda record: record.path)))
        with _writing(self.target):
            write_text(self._files / MANIFEST_NAME, manifest_text(full))
            write_text(self._files / DIGEST_NAME, digest_line(sha256_file(self._files / MANIFEST_NAME)))
            check_files(self._files, read_manifest(self._files))
            replace_folder(self._files, self.target)
            shutil.rmtree(self._work)
        return self.target


def _files_below(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise BundleError(f"A step made the link '{path.name}'; a bundle holds plain files only.")
        if path.is_file():
            yield path


def _record(folder: Path, path: Path) -> FileRecord:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
    return FileRecord(path=path.relative_to(folder).as_posix(), sha256=sha256_file(path), size=path.stat().st_size)


def _artifact(draft: ArtifactDraft, records: Mapping[str, FileRecord], step: str, seconds: float) -> Artifact:
    absent = [name for name in (draft.path, *draft.companions) if name not in records]
    if absent:
        raise BundleError(f"Step '{step}' did not make {absent}.")
    return Artifact(
        path=draft.path,
        kind=draft.kind,
        precision=draft.precision,
        sha256=records[draft.path].sha256,
        size=records[draft.path].size,
        step=StepRecord(
            name=step,
            config=dict(draft.config),
            tools=dict(draft.tools),
            seconds=round(seconds, 3),
            platform=platform.platform(),
        ),
        parent=draft.parent,
        backend=draft.backend,
        placement=draft.placement,
        companions=draft.companions,
        requires=draft.requires,
    )


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except FcosDeployError:
        raise
    except OSError as error:
        raise BundleError(
            f"Cannot write the bundle '{target}': {error.strerror or error}.",
            hint="finished steps are kept: make room or choose a folder you can write, then run the command again",
        ) from error
