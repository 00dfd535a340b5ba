"""Writes a bundle step by step, so that an interrupted run resumes, and puts it in place complete in one move."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import importlib.metadata
import json
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from fcos_deploy.bundle.manifest import (
    DIGEST_NAME,
    MANIFEST_NAME,
    Artifact,
    FileRecord,
    Manifest,
    Requirements,
    StepRecord,
    manifest_text,
)
from fcos_deploy.bundle.store import check_folder, digest_line
from fcos_deploy.core.enums import ArtifactKind, Precision
from fcos_deploy.core.errors import BundleError, ConfigError, FcosDeployError
from fcos_deploy.core.files import (
    lock_file,
    open_flags,
    replace_folder,
    require_name,
    restore_folder,
    sha256_file,
    sync_folder,
    write_text,
)
from fcos_deploy.core.serialize import from_json, to_json
from fcos_deploy.core.trust import Trust, authenticate, own_file_bytes, own_folder, write_own_file

__all__ = [
    "ArtifactDraft",
    "BundleWriter",
    "Journal",
    "StepCache",
    "StepOutput",
    "StepResult",
    "artifact_of",
    "lock_folder",
    "record_files",
]

# What a working folder holds; see ``BundleWriter``.
_OWN_NAMES = re.compile(r"lock|files|scratch|journal\.(jsonl|partial)|step-[0-9a-f]{8}")


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
    values: Any = None  # Any: JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """A finished step, as the journal keeps it. ``key`` identifies its inputs; ``values`` is what it returned, as JSON.

    ``skipped``: an earlier run had finished it with the same inputs.
    """

    name: str
    key: str
    files: tuple[FileRecord, ...]
    artifacts: tuple[Artifact, ...]
    values: Any  # Any: JSON
    seconds: float
    skipped: bool = False


class BundleWriter:
    """The working folder ``.<name>.work`` beside the final one; a context manager that holds its lock.

    Leaving the block without ``finish`` keeps the working folder, so that the next run resumes.
    """

    def __init__(self, target: Path) -> None:
        require_name(target)
        self.target = target
        self._work = target.with_name(f".{target.name}.work")
        self._files = self._work / "files"
        self._used: set[str] = set()
        with _writing(target):
            if target.exists() and not (target / MANIFEST_NAME).is_file() and any(target.iterdir()):
                raise ConfigError(
                    f"'{target}' exists and is not a bundle, so it is not overwritten.", hint="choose another output"
                )
            self._lock = lock_folder(self._work)
            try:
                restore_folder(target)
                self._journal = self._recover()
            except BaseException:
                os.close(self._lock)
                raise

    def _recover(self) -> Journal:
        """The journal of an earlier run; whatever a killed step left behind is removed.

        Raises:
            ConfigError: the working folder holds what no run of ours made, and what is removed may be somebody's.
        """
        strange = sorted(path.name for path in self._work.iterdir() if not _OWN_NAMES.fullmatch(path.name))
        if strange or self._files.is_symlink():
            raise ConfigError(
                f"'{self._work}' is not a working folder of fcos-deploy: it holds '{(strange or ['files'])[0]}'.",
                hint="move it away, or choose another output",
            )
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

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def path(self, name: str) -> Path:
        """Where a file of the bundle lies while the bundle is being made."""
        return self._files / name

    @property
    def scratch(self) -> Path:
        """A folder in which an unfinished step keeps what its next run resumes from; gone with ``finish``."""
        folder = self._work / "scratch"
        with _writing(self.target):
            folder.mkdir(exist_ok=True)
        return folder

    @property
    def finished(self) -> tuple[StepResult, ...]:
        """The steps of this run so far, those of an earlier one that were still valid included."""
        return tuple(step for name, step in self._journal.steps.items() if name in self._used)

    def lineage(self, artifact: Artifact) -> Iterator[Artifact]:
        """``artifact``, what it was made from, and so on back to the first graph."""
        parents = {item.sha256: item for step in self.finished for item in step.artifacts}
        parent: Artifact | None = artifact
        while parent is not None:
            yield parent
            parent = parents.get(parent.parent)

    def step(
        self,
        name: str,
        *,
        inputs: Mapping[str, str],
        make: Callable[[Path], StepOutput],
        cache: StepCache | None = None,
    ) -> StepResult:
        """Run ``make(folder)`` and adopt every file it leaves in ``folder``, unless that was done with these inputs.

        ``inputs`` must name everything the result depends on, apart from the version of fcos-deploy: hashes of sources,
        options, versions. What another bundle has made from the same is taken from ``cache``, which also keeps what is
        made here.

        Raises:
            BundleError: the disk is full or was removed; finished steps are kept.
        """
        facts = [name, dict(inputs), importlib.metadata.version("fcos-deploy")]
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        with _writing(self.target):
            step = self._journal.steps.get(name)
            if step is not None and step.key == key and all(file.is_intact(self._files) for file in step.files):
                step = replace(step, skipped=True)
            else:
                self._forget(name)
                step = self._run(name, key, make, cache)
        self._used.add(name)
        return step

    def _forget(self, name: str) -> None:
        step = self._journal.drop(name)
        for record in step.files if step else ():
            self.path(record.path).unlink(missing_ok=True)

    def _run(self, name: str, key: str, make: Callable[[Path], StepOutput], cache: StepCache | None) -> StepResult:
        folder = self._work / f"step-{uuid.uuid4().hex[:8]}"
        folder.mkdir()
        try:
            cached = cache.load(key, folder) if cache else None
            step = cached or self._make(name, key, make, folder)
            records = [record.path for record in step.files]
            taken = {record.path for finished in self._journal.steps.values() for record in finished.files}
            if taken.intersection(records):
                raise BundleError(f"Two steps made the same files: {sorted(taken.intersection(records))}.")
            for path in records:
                target = self._files.joinpath(*PurePosixPath(path).parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                (folder / path).replace(target)
            # The names too, before the journal says that the step is finished.
            for parent in {self._files, *(self._files.joinpath(path).parent for path in records)}:
                sync_folder(parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if cache and not cached:
            cache.store(step, self._files)
        self._journal.add(step)
        return replace(step, skipped=cached is not None)

    def _make(self, name: str, key: str, make: Callable[[Path], StepOutput], folder: Path) -> StepResult:
        started = time.perf_counter()
        output = make(folder)
        seconds = round(time.perf_counter() - started, 3)
        records = record_files(folder)
        return StepResult(
            name=name,
            key=key,
            files=tuple(records.values()),
            artifacts=tuple(artifact_of(draft, records, step=name, seconds=seconds) for draft in output.artifacts),
            values=output.values,
            seconds=seconds,
        )

    def finish(self, manifest: Manifest, *, check: Callable[[Path], None] | None = None) -> Path:
        """Write the manifest, check the whole, and give it the final name in one move.

        ``manifest`` comes without artifacts and files: those of this run's steps are filled in. What only earlier runs
        made is dropped. ``check`` is given the finished folder before it gets its name; what it raises keeps the older
        bundle in place, and the steps for the next run.

        Raises:
            BundleError: the result is not consistent.
        """
        for name in sorted(set(self._journal.steps) - self._used):
            self._forget(name)
        steps = self._journal.steps.values()
        artifacts = tuple(artifact for step in steps for artifact in step.artifacts)
        models = {artifact.path for artifact in artifacts}
        files = sorted((r for step in steps for r in step.files if r.path not in models), key=lambda r: r.path)
        with _writing(self.target):
            text = manifest_text(replace(manifest, artifacts=artifacts, files=tuple(files)))
            write_text(self.path(MANIFEST_NAME), text)
            write_text(self.path(DIGEST_NAME), digest_line(sha256_file(self.path(MANIFEST_NAME))))
            check_folder(self._files, Trust())
        if check is not None:
            check(self._files)
        with _writing(self.target):
            replace_folder(self._files, self.target)
            shutil.rmtree(self._work)
        return self.target


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turn an OSError into a BundleError that says how to go on."""
    try:
        yield
    except FcosDeployError:
        raise
    except OSError as error:
        raise BundleError(
            f"Cannot write the bundle '{target}': {error.strerror or error}.",
            hint="finished steps are kept: make room or choose a folder you can write, then run the command again",
        ) from error


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Every file below ``folder`` by its relative path, after its contents have reached the disk."""
    records = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise BundleError(f"A step made the link '{path.name}'; a bundle holds plain files only.")
        if path.is_file():
            with path.open("rb+") as stream:
                os.fsync(stream.fileno())
            name = path.relative_to(folder).as_posix()
            records[name] = FileRecord(path=name, sha256=sha256_file(path), size=path.stat().st_size)
    return records


def artifact_of(draft: ArtifactDraft, records: Mapping[str, FileRecord], *, step: str, seconds: float) -> Artifact:
    """What a step of this name made, as the manifest has it; ``records``: the files that it left.

    Raises:
        BundleError: one of the files is not there.
    """
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
            name=step, config=dict(draft.config), tools=dict(draft.tools), seconds=seconds, platform=platform.platform()
        ),
        parent=draft.parent,
        backend=draft.backend,
        placement=draft.placement,
        companions=draft.companions,
        requires=draft.requires,
    )


def _sealed(step: StepResult, *, purpose: str, place: Path) -> str:
    """A finished step as JSON text, with a code that only this user can make, for this ``place``."""
    content = to_json(step)
    return json.dumps({**content, "hmac": _code(content, purpose=purpose, place=place)})


def _unsealed(text: bytes, *, purpose: str, place: Path) -> StepResult | None:
    """The step in such a text; None where another user, another version or another place made it, or it is cut off."""
    try:
        content = json.loads(text)
        code = content.pop("hmac", "")
        if code and hmac.compare_digest(code, _code(content, purpose=purpose, place=place)):
            return from_json(StepResult, content, where="a finished step")
    except (ValueError, TypeError, AttributeError, RecursionError, ConfigError, BundleError):
        pass
    return None


def _code(content: Mapping[str, Any], *, purpose: str, place: Path) -> str:  # Any: JSON
    """The code of a step; '' where this user has no place for a secret."""
    message = f"{place.absolute()}\n{json.dumps(content, sort_keys=True)}"
    try:
        return authenticate(purpose, message.encode())
    except ConfigError:
        return ""


_STEP_RECORD = "step.json"


class StepCache:
    """Finished steps of other bundles, in a folder of this user alone: the files of each under the hash of its inputs.

    Inputs are those of the step, and this machine's platform. A record is
    authenticated with the user's secret, and files are hashed when they are taken: what another user or a power cut
    left is made anew.

    Raises:
        ConfigError: the folder cannot be written, or others own it or can write it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = own_folder(folder)

    @property
    def predictions(self) -> Path:
        """Where the detections of artifacts are kept by content."""
        return own_folder(self.folder / "predictions")

    def load(self, key: str, into: Path) -> StepResult | None:
        """Copy a step's files into a folder; None where it is not there, or not as it was stored."""
        entry = self._entry(key)
        step = _unsealed(own_file_bytes(entry / _STEP_RECORD) or b"", purpose="step cache", place=entry)
        try:
            for file in step.files if step else ():
                target = into / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(entry / "files" / file.path, target)
                if sha256_file(target) != file.sha256:
                    raise OSError(f"'{file.path}' was changed")
        except OSError:
            for path in into.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            return None
        return step

    def store(self, step: StepResult, files: Path) -> None:
        """Keep a finished step whose files lie under ``files``, in the place of one that could not be loaded.

        Raises:
            OSError: the disk is full.
        """
        entry = self._entry(step.key)
        partial = own_folder(entry.with_name(f".{uuid.uuid4().hex[:8]}.partial"))
        try:
            for file in step.files:
                target = partial / "files" / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(files / file.path, target)
            write_own_file(partial / _STEP_RECORD, _sealed(step, purpose="step cache", place=entry).encode())
            shutil.rmtree(entry, ignore_errors=True)
            partial.rename(entry)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _entry(self, key: str) -> Path:
        facts = [key, platform.node(), platform.platform()]
        return self.folder / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


class Journal:
    """Finished steps by name, one JSON line each in the file ``path``, on the disk before a step counts as finished.

    Each line is authenticated with the user's secret, for this path: what another user planted, or what belongs to
    another bundle, is not resumed from. A user without a place for a secret begins anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.steps: dict[str, StepResult] = {}
        for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else ():
            step = _unsealed(line, purpose="journal", place=path)
            if step is None:
                break  # Not ours, or cut off by a power failure: that step and later ones run again.
            self.steps[step.name] = step

    def add(self, step: StepResult) -> None:
        """Record a step; one of the same name is replaced."""
        self.steps.pop(step.name, None)
        self.steps[step.name] = step
        self._write()

    def drop(self, name: str) -> StepResult | None:
        """Forget a step, and return what was known of it."""
        step = self.steps.pop(name, None)
        if step:
            self._write()
        return step

    def _write(self) -> None:
        # Rewritten whole and renamed: a line appended behind a half-written one would be lost.
        partial = self._path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as stream:
            for step in self.steps.values():
                stream.write(_sealed(step, purpose="journal", place=self._path) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(self._path)
        sync_folder(self._path.parent)


def lock_folder(folder: Path) -> int:
    """Lock ``folder`` for this process, and write the process' id into the lock file for others to see.

    Returns the file descriptor; the kernel releases the lock when it is closed, also by the death of the process.

    Raises:
        ConfigError: another user made the folder, or others can write it.
        BundleError: another process holds the lock.
        OSError: the folder's parent cannot be made, or the lock file.
    """
    path = folder / "lock"
    folder.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 1
    while True:
        try:
            own_folder(folder)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | open_flags("O_NOFOLLOW"), 0o600)
        except (ConfigError, FileNotFoundError) as error:
            # A holder that finishes removes the folder between two calls. Where a file system answers so for good, as
            # /proc does, it is an error like any other.
            missing = error.__cause__ if isinstance(error, ConfigError) else error
            if isinstance(missing, FileNotFoundError) and time.monotonic() < deadline:
                continue
            raise
        try:
            lock_file(descriptor, wait=False)
        except BlockingIOError as error:
            owner = os.read(descriptor, 32).decode(errors="replace").strip()
            os.close(descriptor)
            raise BundleError(
                f"Process {owner or '?'} is already writing '{folder}'.",
                hint="wait until it has finished, or choose another output",
            ) from error
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
                return descriptor
        os.close(descriptor)  # The holder finished and removed the file: try again with a new one.
