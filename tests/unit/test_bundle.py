"""A bundle is written step by step, opened whole, and refused when anything does not fit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fcos_deploy.bundle import BundleWriter, StepOutput, is_bundle, open_bundle
from fcos_deploy.core.errors import BundleError, ChecksumError, ConfigError
from fcos_deploy.core.files import replace_folder, restore_folder

MakeBundle = Callable[[Path], Path]


def test_a_bundle_opens_with_what_was_written(make_bundle: MakeBundle, tmp_path: Path) -> None:
    bundle = open_bundle(make_bundle(tmp_path / "cells"))
    assert [a.path for a in bundle.manifest.artifacts] == ["model.fp32.onnx", "model.int8.engine"]
    fp32, int8 = bundle.manifest.artifacts
    assert (fp32.parent, int8.parent) == ("ab" * 32, fp32.sha256)
    assert sorted(bundle.manifest.all_files) == [
        "golden/000.png",
        "golden/001.png",
        "model.fp32.onnx",
        "model.int8.engine",
        "model.int8.json",
    ]
    assert bundle.manifest.golden[0].detections.scores == (0.75,)
    assert is_bundle(bundle.root)
    assert not list(tmp_path.glob(".*"))


def test_the_same_steps_make_the_same_manifest_but_for_seconds(make_bundle: MakeBundle, tmp_path: Path) -> None:
    first, second = (open_bundle(make_bundle(tmp_path / name)).manifest for name in ("a", "b"))
    assert first.files == second.files
    assert [a.sha256 for a in first.artifacts] == [a.sha256 for a in second.artifacts]


def test_sha256sum_agrees_with_the_manifest_digest(make_bundle: MakeBundle, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "cells")
    done = subprocess.run(["sha256sum", "--check", "manifest.sha256"], cwd=bundle, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["model.int8.json", "golden/001.png", "manifest.json", "manifest.sha256"])
def test_a_missing_file_is_named(make_bundle: MakeBundle, tmp_path: Path, name: str) -> None:
    bundle = make_bundle(tmp_path / "cells")
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=name):
        open_bundle(bundle)


def test_an_extra_file_is_named(make_bundle: MakeBundle, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "cells")
    (bundle / "golden" / "evil.so").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"golden/evil\.so"):
        open_bundle(bundle)


def test_a_link_is_refused_even_when_it_leads_to_the_right_bytes(make_bundle: MakeBundle, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "cells")
    (bundle / "model.int8.engine").rename(tmp_path / "elsewhere")
    (bundle / "model.int8.engine").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="link"):
        open_bundle(bundle)


def test_a_size_that_differs_is_told_before_any_hash(make_bundle: MakeBundle, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "cells")
    with (bundle / "model.int8.engine").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(ChecksumError, match="must have 2048 bytes, it has 2049"):
        open_bundle(bundle)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no 'manifest\.json'"):
        open_bundle(tmp_path)
    with pytest.raises(BundleError, match="There is no bundle"):
        open_bundle(tmp_path / "nothing")


def test_a_folder_that_is_not_a_bundle_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="not a bundle"):
        BundleWriter(tmp_path / "home")
    assert (tmp_path / "home" / "thesis.tex").is_file()


def test_an_older_bundle_is_replaced(make_bundle: MakeBundle, tmp_path: Path) -> None:
    make_bundle(tmp_path / "cells")
    (tmp_path / "cells" / "verification.jsonl").write_text("")
    make_bundle(tmp_path / "cells")
    assert not (tmp_path / "cells" / "verification.jsonl").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["cells"]


def test_what_a_step_goes_on_from_outlives_a_run_and_goes_with_the_bundle(
    make_bundle: MakeBundle, tmp_path: Path
) -> None:
    with BundleWriter(tmp_path / "cells") as writer:
        (writer.scratch / "state").write_text("half")
    with BundleWriter(tmp_path / "cells") as writer:
        assert (writer.scratch / "state").read_text() == "half"
    make_bundle(tmp_path / "cells")
    assert [path.name for path in tmp_path.iterdir()] == ["cells"]


def test_a_file_made_by_two_steps_is_refused(tmp_path: Path) -> None:
    def make(folder: Path) -> StepOutput:
        (folder / "same").write_text("x")
        return StepOutput()

    with BundleWriter(tmp_path / "b") as writer:
        writer.step("one", inputs={}, make=make)
        with pytest.raises(BundleError, match="same"):
            writer.step("two", inputs={}, make=make)


def test_a_swap_interrupted_between_two_moves_is_repaired(tmp_path: Path) -> None:
    target, aside = tmp_path / "b", tmp_path / ".b.old"
    aside.mkdir()
    (aside / "old").touch()
    restore_folder(target)
    assert (target / "old").is_file()
    assert not aside.exists()


def test_replacing_a_folder_keeps_the_old_one_at_the_new_place(tmp_path: Path) -> None:
    for name in ("new", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace_folder(tmp_path / "new", tmp_path / "target")
    assert (tmp_path / "target" / "new").is_file()
    assert (tmp_path / "new" / "target").is_file()


def test_opening_a_bundle_imports_no_framework(make_bundle: MakeBundle, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "cells")
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'scipy', 'cryptography', 'onnxruntime', 'openvino'): sys.modules[name] = None\n"
        "from pathlib import Path\n"
        "from fcos_deploy.bundle import open_bundle\n"
        f"print(open_bundle(Path({str(bundle)!r})).manifest.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "cells\n"), done.stderr
