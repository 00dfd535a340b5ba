"""The verification log of a bundle: one JSON record a line, each bound to the one before by a hash."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from fcos_deploy.core.errors import BundleError, ChecksumError
from fcos_deploy.core.files import lock_file, read_file

__all__ = ["append_log", "read_log"]

_MAX_BYTES = 256 << 20
_FIRST = "0" * 64


def append_log(path: Path, record: dict[str, Any]) -> None:
    """Add ``record``, with the hash that binds it to the log so far, and flush it to the disk.

    Raises:
        OSError: the file cannot be written; the log is then as it was.
        ChecksumError: the log so far was changed.
    """
    with path.open("a+b") as stream:
        lock_file(stream.fileno())
        stream.seek(0)
        lines, complete = _split(stream.read(_MAX_BYTES + 1), path)
        text = json.dumps({**record, "previous": _check_chain(lines, path)}, sort_keys=True, allow_nan=False)
        line = json.dumps({**json.loads(text), "sha256": _digest(text)}, sort_keys=True) + "\n"
        stream.truncate(complete)  # drops what a power cut left of the last append
        try:
            stream.write(line.encode())
            stream.flush()
            os.fsync(stream.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(stream.fileno(), complete)
            raise


def read_log(path: Path) -> list[dict[str, Any]]:
    """All records, oldest first, without what an interrupted append left behind them.

    Raises:
        BundleError: the file is too large, or no plain file.
        ChecksumError: a line was changed, inserted or removed.
    """
    try:
        content = read_file(path, limit=_MAX_BYTES, follow_links=False)
    except OSError as error:
        raise BundleError(f"Cannot read '{path}': {error.strerror}.", hint="move it away") from error
    lines, _ = _split(content, path)
    _check_chain(lines, path)
    return [json.loads(line) for line in lines]


def _split(content: bytes, path: Path) -> tuple[list[bytes], int]:
    """Complete lines, and how many bytes they take.

    What a power cut leaves of the last append is not among them: a line without its end, in any state, and one that
    has bytes of zero, which JSON never has: a block of the file that was allocated and not written.
    """
    if len(content) > _MAX_BYTES:
        raise BundleError(f"'{path}' is larger than {_MAX_BYTES >> 20} MiB.", hint="move it away")
    *lines, rest = content.split(b"\n")
    complete = len(content) - len(rest)
    if lines and b"\0" in lines[-1]:
        complete -= len(lines.pop()) + 1
    return lines, complete


def _check_chain(lines: list[bytes], path: Path) -> str:
    """The hash of the last line, after checking that every line holds the hash of the one before and its own."""
    previous = _FIRST
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            claimed = record.pop("sha256")
            text = json.dumps(record, sort_keys=True, allow_nan=False)
            intact = record["previous"] == previous and claimed == _digest(text)
            # Another spelling of the same JSON (spaces, escapes) is a change as well.
            exact = json.dumps({**record, "sha256": claimed}, sort_keys=True).encode() == line
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise _changed(path, number) from error
        if not (intact and exact):
            raise _changed(path, number)
        previous = claimed
    return previous


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _changed(path: Path, number: int) -> ChecksumError:
    return ChecksumError(
        f"Line {number} of '{path}' is not what was written.", hint="move the log away to start a new one"
    )
