"""Files complete or not there, bounded reads, and copies that nobody can change."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fcos_deploy import Detector, SessionOptions, open_bundle
from fcos_deploy.bundle import ArtifactDraft, BundleWriter, Manifest, Provenance, RunDefaults, StepOutput
from fcos_deploy.bundle.manifest import MANIFEST_NAME
from fcos_deploy.core import files as atomic
from fcos_deploy.core.backend import Backend, Session, get_backend
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.enums import ArtifactKind, Precision
from fcos_deploy.core.errors import BundleError, ChecksumError, ConfigError
from fcos_deploy.core.files import (
    PrivateFiles,
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


def _write_over(path: Path) -> None:
    path.write_bytes(b"evil" + path.read_bytes()[4:])


def _swap(path: Path) -> None:
    evil = path.with_name("evil")
    evil.write_bytes(b"evil")
    evil.replace(path)


def _link(path: Path) -> None:
    path.rename(path.with_name("original"))
    path.symlink_to(path.with_name("original"))


@pytest.mark.parametrize("attack", [_write_over, _swap, _link, Path.unlink])
def test_a_file_that_changes_after_the_check_is_refused_or_changes_nothing(
    attack: Callable[[Path], None], make_bundle: Callable[[Path], Path], tmp_path: Path
) -> None:
    bundle = open_bundle(make_bundle(tmp_path / "cells"))
    name, golden = "model.fp32.onnx", bundle.manifest.golden[0].path
    content = (bundle.root / name).read_bytes()
    opened = bundle.path(name)
    attack(bundle.root / name)
    assert opened.read_bytes() == bundle.path(name).read_bytes() == content
    for file in (name, golden):
        bundle.release()
        if file is golden:
            attack(bundle.root / golden)
        with pytest.raises(BundleError):
            bundle.path(file)
        with pytest.raises(BundleError):
            bundle.read(file)
    bundle.close()


def test_the_copy_cannot_be_written_and_goes_when_it_is_released(
    make_bundle: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    with open_bundle(make_bundle(tmp_path / "cells")) as bundle:
        opened = bundle.path("model.fp32.onnx")
        assert opened.parent.stat().st_mode & 0o777 == 0o700
        with pytest.raises(OSError, match="not permitted"), opened.open("r+b") as stream:
            stream.write(b"evil")
        bundle.path("model.int8.engine")
    assert not opened.parent.exists()
    assert len(list(Path("/proc/self/fd").iterdir())) == open_files


def test_without_files_in_memory_the_copies_lie_in_the_private_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> int:
        raise OSError("not on this system")

    monkeypatch.setattr(os, "memfd_create", forbidden)
    (tmp_path / "a").write_text("a")
    files = PrivateFiles()
    copy = files.add("x/a", tmp_path / "a", sha256="ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb")
    assert copy.is_file()
    assert not copy.is_symlink()
    with pytest.raises(ChecksumError, match="changed after it was checked"):
        files.add("x/b", tmp_path / "a", sha256="0" * 64)
    files.close()
    assert not copy.exists()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_runtime_opens_what_was_checked_whatever_takes_its_place(
    backend: str,
    tiny_bundle: Path,
    tiny_ir_bundle: Path,
    blobs: list[NDArray[np.uint8]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The swap comes at the last moment: when the runtime is told to open the file."""
    pytest.importorskip(backend)
    source = tiny_ir_bundle if backend == "openvino" else tiny_bundle
    bundle = Path(shutil.copytree(source, tmp_path / "cells"))
    with Detector.open(bundle, backend=backend, options=SessionOptions(threads=1)) as detector:
        expected = detector.detect(blobs[0])
    kind = type(get_backend(backend))
    real = kind.open

    def swapped(self: Backend, path: Path, options: SessionOptions) -> Session:
        for file in bundle.iterdir():
            if file.name.startswith("model"):
                file.write_bytes(b"evil")
        return real(self, path, options)

    monkeypatch.setattr(kind, "open", swapped)
    with Detector.open(bundle, backend=backend, options=SessionOptions(threads=1)) as detector:
        found = detector.detect(blobs[0])
    np.testing.assert_array_equal(found.boxes, expected.boxes)
    assert len(found) > 0
    assert (bundle / MANIFEST_NAME).is_file()


def test_data_of_tensors_outside_of_the_graph_is_opened_from_the_copy(
    bundle_contract: ModelContract, tmp_path: Path
) -> None:
    """Such a graph and its data lie in the folder itself: ONNX Runtime follows no links to them."""
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")

    def export(folder: Path) -> StepOutput:
        weight = onnx.numpy_helper.from_array(np.arange(4096, dtype=np.float32), "w")
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("Add", ["x", "w"], ["y"])],
            "add",
            [onnx.helper.make_tensor_value_info("x", 1, [4096])],
            [onnx.helper.make_tensor_value_info("y", 1, [4096])],
            [weight],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=10)
        onnx.save(model, folder / "m.onnx", save_as_external_data=True, location="m.data")
        return StepOutput(
            artifacts=(
                ArtifactDraft(path="m.onnx", kind=ArtifactKind.ONNX, precision=Precision.FP32, parent="ab" * 32),
            )
        )

    with BundleWriter(tmp_path / "cells") as writer:
        writer.step("export", inputs={}, make=export)
        writer.finish(
            Manifest(
                name="cells",
                contract=bundle_contract,
                provenance=Provenance(checkpoint="cells.pth", checkpoint_sha256="ab" * 32),
                defaults=RunDefaults(backend="onnxruntime", precision=Precision.FP32),
            )
        )
    with open_bundle(tmp_path / "cells") as bundle:
        path = bundle.path("m.onnx")
        _write_over(tmp_path / "cells" / "m.data")
        (result,) = ort.InferenceSession(str(path)).run(None, {"x": np.zeros(4096, np.float32)})
        np.testing.assert_array_equal(result, np.arange(4096, dtype=np.float32))


def test_a_file_is_read_whole_and_asks_for_no_more_memory_than_it_needs(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"abc")
    assert atomic.read_file(tmp_path / "small", limit=1 << 60) == b"abc"
    assert atomic.read_file(Path("/proc/self/status"), limit=1 << 20).startswith(b"Name:"), "which has no size"
    with pytest.raises(OSError, match="larger than 2 bytes"):
        atomic.read_file(tmp_path / "small", limit=2)
