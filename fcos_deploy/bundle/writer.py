"""Makes a bundle step by step; survives being killed at any moment, and goes on where it was."""

from __future__ import annotations

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

from fcos_deploy.bundle.artifact import Artifact, FileRecord, Requirements, StepRecord
from fcos_deploy.bundle.exchange import replace_folder, restore_folder
from fcos_deploy.bundle.integrity import check_files, digest_line, read_manifest
from fcos_deploy.bundle.manifest import DIGEST_NAME, MANIFEST_NAME, Manifest, manifest_text
from fcos_deploy.bundle.resume import FinishedStep, Journal, WorkLock, step_key
from fcos_deploy.core.atomic import sha256_file, write_text
from fcos_deploy.core.enums import ArtifactKind, Precision
from fcos_deploy.core.errors import BundleError, ConfigError, FcosDeployError

__all__ = ["ArtifactDraft", "BundleWriter", "StepOutput", "StepResult"]


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
