"""One flipped bit anywhere in a bundle, and it is not opened."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fcos_deploy.benchmark.measure import peak_memory_mib
from fcos_deploy.bundle import open_bundle
from fcos_deploy.bundle.signature import generate_key
from fcos_deploy.bundle.store import append_log, read_log, sign
from fcos_deploy.core.errors import BundleError

FLIPS = 1000


@pytest.fixture
def full_bundle(make_bundle: Callable[[Path], Path], tmp_path: Path) -> Path:
    """With a signature and a verification log, so that every kind of file is there."""
    pytest.importorskip("cryptography")
    bundle = make_bundle(tmp_path / "cells")
    generate_key(tmp_path / "key.pem", public=tmp_path / "key.pub.pem")
    sign(bundle, private_key=tmp_path / "key.pem")
    for number in range(3):
        append_log(bundle / "verification.jsonl", {"run": number, "text": "grün"})
    return bundle


def test_a_thousand_flipped_bits_are_all_refused(full_bundle: Path) -> None:
    files = sorted(path for path in full_bundle.rglob("*") if path.is_file() and path.name != "verification.jsonl")
    assert len(files) == 8
    rng = np.random.default_rng(1000)
    refused: Counter[str] = Counter()
    for number in range(FLIPS):
        path = files[number % len(files)]  # every file gets its share, however small it is
        content = path.read_bytes()
        place = int(rng.integers(len(content) * 8))
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(BundleError):
            open_bundle(full_bundle)
        path.write_bytes(content)
        refused[path.name] += 1
    assert refused.total() == FLIPS
    assert open_bundle(full_bundle).manifest.name == "cells"


def test_every_byte_of_the_small_files_counts(full_bundle: Path) -> None:
    rng = np.random.default_rng(8)
    for name in ("manifest.sha256", "SIGNATURE"):
        path = full_bundle / name
        content = path.read_bytes()
        for place in range(len(content)):
            damaged = bytearray(content)
            damaged[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            with pytest.raises(BundleError):
                open_bundle(full_bundle)
        path.write_bytes(content)


def test_files_cut_short_or_emptied_are_refused(full_bundle: Path) -> None:
    for path in sorted(p for p in full_bundle.rglob("*") if p.is_file() and p.name != "verification.jsonl"):
        content = path.read_bytes()
        for keep in (0, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:keep])
            with pytest.raises(BundleError):
                open_bundle(full_bundle)
        path.write_bytes(content)


def test_every_cut_of_the_log_opens_and_is_mended(full_bundle: Path) -> None:
    log = full_bundle / "verification.jsonl"
    content = log.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    record = {"run": 9, "nested": {"a": {"b": [1]}}}
    for cut in range(last + 1, len(content)):
        for tail in (b"", bytes(64), bytes(64) + b"\n"):
            log.write_bytes(content[:cut] + tail)
            assert len(read_log(log)) == 2
            append_log(log, record)
            assert [r["run"] for r in read_log(log)] == [0, 1, 9]
    log.write_bytes(content[:last] + b'{"not": "ours"')
    assert open_bundle(full_bundle).manifest.name == "cells"


def test_a_log_that_was_changed_is_noticed_when_it_is_used_and_stops_nothing_else(full_bundle: Path) -> None:
    log = full_bundle / "verification.jsonl"
    content = log.read_bytes()
    first, _, third = content.splitlines(keepends=True)
    flipped = bytearray(content)
    flipped[len(first) // 2] ^= 1
    for damaged in (first + third, bytes(flipped)):
        log.write_bytes(damaged)
        assert open_bundle(full_bundle).manifest.name == "cells"
        with pytest.raises(BundleError, match=r"Line [12]"):
            read_log(log)
        with pytest.raises(BundleError, match=r"Line [12]"):
            append_log(log, {"run": 9})
        assert log.read_bytes() == damaged


def _open_and_read_log(bundle: Path, keys: tuple[Path, ...]) -> None:
    """Opening leaves the log to those who need it."""
    read_log(open_bundle(bundle, public_keys=keys).root / "verification.jsonl")


@pytest.mark.parametrize("with_key", [False, True])
@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256", "SIGNATURE", "verification.jsonl"])
@pytest.mark.parametrize("kind", ["endless", "pipe", "link", "folder", "huge"])
def test_what_is_no_plain_file_is_refused_at_once(full_bundle: Path, name: str, kind: str, with_key: bool) -> None:
    """Neither reads without end nor waits; with a key nothing is read that would not be without."""
    path, keys = full_bundle / name, (full_bundle.parent / "key.pub.pem",) if with_key else ()
    path.rename(full_bundle.parent / "aside")
    if kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(full_bundle.parent / "aside")
    elif kind == "folder":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, 20 << 30)
    before = peak_memory_mib()
    with pytest.raises(BundleError):
        _open_and_read_log(full_bundle, keys)
    assert peak_memory_mib() - before < 50
