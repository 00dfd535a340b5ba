"""What was checked is what is opened: a file that is swapped, written or removed afterwards changes nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fcos_deploy import Detector, SessionOptions, open_bundle
from fcos_deploy.bundle import ArtifactDraft, BundleWriter, Manifest, Provenance, RunDefaults, StepOutput
from fcos_deploy.bundle.manifest import MANIFEST_NAME
from fcos_deploy.core.backend import Backend, Session
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.enums import ArtifactKind, Precision
from fcos_deploy.core.errors import BundleError, ChecksumError
from fcos_deploy.core.files import PrivateFiles
from fcos_deploy.core.registry import get_backend


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
