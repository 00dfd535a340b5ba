"""Versions of a bundle on a device: whole folders behind one symbolic link, which is switched in one move.

Beside the link ``x`` lies the folder ``.x.versions``: a folder for each version, ``history.json`` with the order in
which they were switched to, and the lock. The link says which one is used; whoever opens ``x`` finds a whole bundle at
every moment, also after a power cut.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from fcos_deploy.bundle.device_layer import copy_layers
from fcos_deploy.bundle.manifest import LAYERS_FOLDER, LOG_NAME, MODEL_SIGNATURE_NAME, SIGNATURE_NAME
from fcos_deploy.bundle.store import Bundle, open_bundle
from fcos_deploy.bundle.writer import lock_folder
from fcos_deploy.core.errors import BundleError, ConfigError, DeviceError, FcosDeployError
from fcos_deploy.core.files import copy_file, read_file, require_name, sha256_file, sync_folder, sync_tree, write_text
from fcos_deploy.core.serialize import parse_json

__all__ = ["InstalledVersions"]

_HISTORY = "history.json"
_MAX_HISTORY_BYTES = 1 << 16
_MAX_SIGNATURE_BYTES = 1 << 20
_VERSION = re.compile(r"[0-9a-f]{16}(-\d{1,4})?", re.ASCII)
_STAGED = re.compile(r"\.[0-9a-f]{16}\.partial", re.ASCII)
_UNFINISHED = re.compile(r"\.(link|history|removed)[.-][0-9a-f]{8}\.partial(\.json)?", re.ASCII)


class InstalledVersions:
    """The versions behind ``link``; a context manager that holds their lock.

    Raises:
        ConfigError: from every method, where something cannot be written.
    """

    def __init__(self, link: Path) -> None:
        """Look at what is there.

        Raises:
            ConfigError: ``link`` is something that this class did not make.
        """
        require_name(link)
        self.link = link
        self.folder = link.with_name(f".{link.name}.versions")
        self._lock = -1
        with self._writing():
            _ = self.current

    def __enter__(self) -> InstalledVersions:
        with self._writing():
            self._lock = lock_folder(self.folder)
            self.folder.chmod(0o755)  # whatever the umask: services of other users open the versions
            self._remove_all(_UNFINISHED)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            if {path.name for path in self.folder.iterdir()} == {"lock"} and not os.path.lexists(self.link):
                (self.folder / "lock").unlink()  # nothing was installed
                self.folder.rmdir()
        os.close(self._lock)

    @property
    def current(self) -> str:
        """The version that the link leads to; '' when there is no link.

        Raises:
            ConfigError: something else has its name.
        """
        try:
            target = self.link.readlink()
        except FileNotFoundError:
            return ""
        except OSError as error:
            if not os.path.lexists(self.link):
                raise
            raise ConfigError(
                f"'{self.link}' is not a link that 'fcos-deploy install' made, so it is not replaced.",
                hint="choose another name, or move it away",
            ) from error
        if target.parent != Path(self.folder.name) or not _VERSION.fullmatch(target.name):
            raise ConfigError(
                f"'{self.link}' leads to '{target}', which 'fcos-deploy install' did not make.",
                hint="choose another name, or move it away",
            )
        return target.name

    def path(self, version: str) -> Path:
        """The folder of a version."""
        return self.folder / version

    def earlier(self) -> list[str]:
        """The versions before the current one, the last first."""
        order = dict.fromkeys(reversed(self._history()))
        return [version for version in order if version != self.current]

    def copies_of(self, bundle: Bundle) -> list[str]:
        """The versions that were made of the same manifest and signatures, the last first."""
        identity = _identity(bundle)
        return sorted((name for name in self._present() if name.partition("-")[0] == identity), key=_number)[::-1]

    def stage(self, bundle: Bundle) -> Path:
        """A copy of the checked ``bundle`` under a temporary name, with its layers that fit this device.

        What an interrupted run copied and built is kept, and copies of others that were interrupted are removed. An
        error leaves no copy.

        Raises:
            DeviceError: there is no room.
        """
        staged = self.folder / f".{_identity(bundle)}.partial"
        with self._writing():
            self._remove_all(_STAGED, but=staged)
            if staged.is_symlink() or (staged.exists() and not staged.is_dir()):
                staged.unlink()
            staged.mkdir(mode=0o755, exist_ok=True)
            try:
                self._copy(bundle, staged)
                if not bundle.is_archive:
                    copy_layers(bundle, staged / LAYERS_FOLDER)
                bundle.require_not_replaced()
            except Exception:  # not an interruption, after which the next run goes on
                self.discard(staged)
                raise
        return staged

    def _copy(self, bundle: Bundle, staged: Path) -> None:
        files = {name: sha256 for name, sha256 in bundle.shipped_files().items() if name != LOG_NAME}
        missing = [
            name
            for name, sha256 in files.items()
            if not sha256 or not (staged / name).is_file() or sha256_file(staged / name) != sha256
        ]
        needed = sum((bundle.root / name).stat().st_size for name in missing)
        free = shutil.disk_usage(staged).free
        if needed > free:
            raise DeviceError(
                f"Installing needs {needed >> 10} KiB in '{self.folder.parent}', {free >> 10} KiB are free.",
                hint="make room on the disk",
            )
        for name in missing:
            copy_file(bundle.root / name, staged / name)
        for path in staged.rglob("*"):
            if LAYERS_FOLDER not in path.relative_to(staged).parts[:1]:
                path.chmod(0o755 if path.is_dir() else 0o644)

    def publish(self, staged: Path) -> str:
        """Give what ``stage`` made, once it is checked, its name as a version, on the disk; returns that name."""
        identity = staged.name.split(".")[1]
        present = set(self._present())
        names = (identity, *(f"{identity}-{number}" for number in range(2, 10_000)))
        name = next(name for name in names if name not in present)
        with self._writing():
            sync_tree(staged)
            staged.rename(self.path(name))
            sync_folder(self.folder)
        return name

    def switch(self, version: str) -> None:
        """Let the link lead to ``version``; whatever happens, it leads to the old or to the new one."""
        with self._writing():
            if self.current != version:
                self._write_history([*self._history(), version])
                temporary = self.folder / f".link-{uuid.uuid4().hex[:8]}.partial"
                temporary.symlink_to(Path(self.folder.name, version), target_is_directory=True)
                temporary.replace(self.link)
                sync_folder(self.link.parent)

    def switch_back(self, version: str) -> None:
        """``switch`` to one of the ``earlier`` versions; those after it are forgotten."""
        history = self._history()
        self.switch(version)
        with self._writing():
            self._write_history(history[: len(history) - history[::-1].index(version)])

    def prune(self, *, keep: int) -> list[str]:
        """Remove all versions but the current one and the last ``keep`` whole ones before it; returns their names."""
        kept = [self.current, *itertools.islice(filter(self._is_whole, self.earlier()), keep)]
        removed = [version for version in self._present() if version not in kept]
        with self._writing():
            self._write_history([version for version in self._history() if version in kept])
            self._remove_all(_STAGED)
            for version in removed:
                self.discard(self.path(version))
        return removed

    def discard(self, folder: Path) -> None:
        """Remove a version or a staged copy; half of it is never found under a version's name."""
        temporary = self.folder / f".removed-{uuid.uuid4().hex[:8]}.partial"
        with contextlib.suppress(OSError):
            folder.rename(temporary)
            _remove(temporary)

    def _remove_all(self, names: re.Pattern[str], *, but: Path | None = None) -> None:
        """Remove what an interrupted run left under such names."""
        for entry in self.folder.iterdir():
            if entry != but and names.fullmatch(entry.name):
                _remove(entry)

    def _is_whole(self, version: str) -> bool:
        try:
            open_bundle(self.path(version)).close()
        except FcosDeployError:
            return False
        return True

    def _present(self) -> list[str]:
        return sorted(
            path.name
            for path in self.folder.iterdir()
            if _VERSION.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
        )

    def _history(self) -> list[str]:
        """The versions in the order in which they were switched to, up to the current one.

        It is written before the link is switched, so that what follows the current one was never reached, or left
        by ``switch_back``.
        """
        present, current = self._present(), self.current
        try:
            content = read_file(self.folder / _HISTORY, limit=_MAX_HISTORY_BYTES, follow_links=False)
            recorded = parse_json(content)
        except (OSError, ValueError):
            recorded = None
        if isinstance(recorded, list) and all(isinstance(name, str) and _VERSION.fullmatch(name) for name in recorded):
            history = [version for version in recorded if version in present]
        else:  # lost or damaged; the folders are still there
            history = sorted(present, key=lambda version: self.path(version).stat().st_mtime_ns)
            history = [version for version in history if version != current]
        if current in history:
            return history[: len(history) - history[::-1].index(current)]
        return [*history, *([current] if current in present else [])]

    def _write_history(self, versions: list[str]) -> None:
        write_text(self.folder / _HISTORY, json.dumps(versions) + "\n")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn an OSError into a sentence."""
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(
                f"Cannot install to '{self.link}': {reason or error}.",
                hint="choose a folder that exists and can be written, with room for the bundle",
            ) from error


def _identity(bundle: Bundle) -> str:
    """What tells versions apart: the manifest, which has the hash of every other file, and the signatures of it."""
    digest = hashlib.sha256(bundle.manifest_sha256.encode())
    for name in (SIGNATURE_NAME, MODEL_SIGNATURE_NAME):
        try:
            content = read_file(bundle.root / name, limit=_MAX_SIGNATURE_BYTES, follow_links=False)
        except FileNotFoundError:
            content = b""
        except OSError as error:
            raise BundleError(f"Cannot read '{bundle.root / name}': {error.strerror or error}.") from error
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]


def _number(version: str) -> int:
    return int(version.partition("-")[2] or 1)


def _remove(path: Path) -> None:
    """A folder or anything else that has its name, never what a link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
