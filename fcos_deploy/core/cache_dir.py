"""Where runtimes keep what they compiled, between processes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

__all__ = ["CACHE_VARIABLE", "model_cache_dir"]

CACHE_VARIABLE = "FCOS_DEPLOY_CACHE"  # a folder; empty turns the caches off
_KEPT = 16  # compiled models per backend; a bundle has one to three, and each takes about what its engine does


def model_cache_dir(backend: str, *, key: str) -> Path | None:
    """A folder of this backend and model, made if need be, or None where caching is off or has no place.

    ``key`` names the model by its contents, so that another one under the same path never meets a stale entry. Of each
    backend the most recently used entries remain.
    """
    root = _root()
    if root is None:
        return None
    folder = root / backend / key
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.touch()
        _drop_oldest(folder.parent)
    except OSError:
        return None  # A read-only home only costs the time to compile.
    return folder if os.access(folder, os.W_OK) else None


def _root() -> Path | None:
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen is not None:
        return Path(chosen) if chosen else None
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fcos-deploy"


def _drop_oldest(parent: Path) -> None:
    entries = sorted((e for e in parent.iterdir() if e.is_dir()), key=lambda e: e.stat().st_mtime, reverse=True)
    for entry in entries[_KEPT:]:
        shutil.rmtree(entry, ignore_errors=True)
