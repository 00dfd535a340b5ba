"""The journal of a bundle in the making, and the lock that keeps a second process away."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fcos_deploy.bundle.artifact import Artifact, FileRecord
from fcos_deploy.core.errors import BundleError, ConfigError
from fcos_deploy.core.serialize import from_json, to_json

__all__ = ["FinishedStep", "Journal", "WorkLock", "step_key"]


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
