"""Files and folders are complete under their name, or not there."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

import pytest

from fcos_deploy.core import files as atomic
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.files import (
    atomic_directory,
    atomic_file,
    require_writable,
    sha256_file,
    write_text,
)


def _write_half(path: Path) -> None:
    path.write_text("half")
    raise KeyError("what stops the other half")


def test_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "model.onnx"
    with atomic_file(path) as temporary:
        assert temporary.suffix == ".onnx"
        assert temporary.parent == path.parent
        temporary.write_bytes(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]


def test_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_file(path) as temporary:
        _write_half(temporary)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_writer_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Cannot write"), atomic_file(tmp_path / "a.txt"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_unwritable_place_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"Cannot write '.*a\.txt'"):
        write_text(tmp_path / "file" / "a.txt", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="Cannot write"):
        write_text(tmp_path / "folder", "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("writer", [atomic_file, atomic_directory])
def test_error_about_another_file_is_not_called_unwritable(writer: object, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"source\.bin"), writer(tmp_path / "out" / "a.bin"):  # type: ignore[operator]
        (tmp_path / "source.bin").read_bytes()


def test_full_disk_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No space left"), atomic_file(tmp_path / "a.txt"):
        raise OSError(28, "No space left on device")


def test_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    for content in ("one", "two"):
        with atomic_directory(path) as temporary:
            (temporary / content).touch()
        assert [p.name for p in path.iterdir()] == [content]
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(KeyError), atomic_directory(path) as temporary:
        _write_half(temporary / "half")
    assert [p.name for p in path.iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(ConfigError, match="Cannot write"), atomic_directory(path) as temporary:
        temporary.rmdir()  # so that the last rename fails
    assert [p.name for p in path.iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_folder_does_not_replace_a_file(tmp_path: Path) -> None:
    (tmp_path / "bundle").write_text("keep")
    with pytest.raises(ConfigError, match="is a file"), atomic_directory(tmp_path / "bundle"):
        pass
    assert (tmp_path / "bundle").read_text() == "keep"


def test_file_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bool] = []
    real = os.fsync

    def record(descriptor: int) -> None:
        synced.append((tmp_path / "a.txt").exists())
        real(descriptor)

    monkeypatch.setattr(atomic.os, "fsync", record)
    write_text(tmp_path / "a.txt", "x")
    assert synced == [False, True]  # the contents, and then the name


def test_hash_of_a_file_larger_than_a_block(tmp_path: Path) -> None:
    content = os.urandom((1 << 20) + 17)
    (tmp_path / "a").write_bytes(content)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("kind", ["pipe", "link to a device", "socket"])
def test_what_is_no_file_is_never_replaced(kind: str, tmp_path: Path) -> None:
    """Root could replace /dev/null, and every program of the machine would write into a file."""
    target = tmp_path / "target"
    if kind == "pipe":
        os.mkfifo(target)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(target))
    else:
        target.symlink_to("/dev/null")
    before = target.lstat().st_ino
    with pytest.raises(ConfigError, match="a device or a pipe"):
        require_writable(target)
    with pytest.raises(ConfigError, match="a device or a pipe"):
        write_text(target, "x")
    with pytest.raises(ConfigError, match="a device or a pipe"), atomic_directory(target):
        pass
    assert target.lstat().st_ino == before
