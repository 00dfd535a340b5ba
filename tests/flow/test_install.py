"""``fcos-deploy install`` and ``rollback``: a link that always leads to a whole, verified bundle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fcos_deploy import Detector
from fcos_deploy.bundle import open_bundle
from fcos_deploy.bundle.versions import InstalledVersions
from fcos_deploy.cli.app import build_app

pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parents[2]
Rename = Callable[[Path, str], Path]


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(build_app(), [str(argument) for argument in arguments])


def _name(link: Path) -> str:
    with open_bundle(link) as opened:
        return opened.manifest.name


def _edit_manifest(bundle: Path, edit: Callable[[dict], object]) -> Path:
    """Change the manifest of a bundle, which is then another bundle."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))
    (bundle / "manifest.sha256").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  manifest.json\n")
    return bundle


def _move_golden_boxes(manifest: dict) -> None:
    for golden in manifest["golden"]:
        golden["detections"]["boxes"] = [[x + 40 for x in box] for box in golden["detections"]["boxes"]]


@pytest.fixture
def link(tmp_path: Path) -> Path:
    return tmp_path / "models" / "cells"


@pytest.fixture
def versions(link: Path) -> Callable[[], set[str]]:
    """What lies in the folder of the versions, without the lock and the history."""
    return lambda: {path.name for path in link.with_name(".cells.versions").iterdir()} - {"lock", "history.json"}


@pytest.fixture(scope="module")
def bundles(renamed_bundle: Rename, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    return {name: renamed_bundle(folder / name, name) for name in ("one", "two", "three")}


def test_versions_are_switched_kept_pruned_and_gone_back_to(
    bundles: dict[str, Path], link: Path, versions: Callable[[], set[str]], smooth_images: Path
) -> None:
    names, reports = [], []
    for bundle in bundles.values():
        done = _run("install", bundle, link, "--json")
        assert done.exit_code == 0, done.stderr
        reports.append(json.loads(done.stdout))
        names.append(_name(link))
    assert names == ["one", "two", "three"]
    first, second, third = (report["version"] for report in reports)
    assert [report["previous"] for report in reports] == ["", first, second]
    assert [report["removed"] for report in reports] == [[], [], [first]]
    assert versions() == {second, third}, "one earlier version is kept"
    image = next(smooth_images.rglob("*.png"))
    with Detector.open(link) as installed, Detector.open(bundles["three"]) as source:
        assert installed.detect(image).boxes.tolist() == source.detect(image).boxes.tolist()
    assert _run("verify", link).exit_code == 0
    assert [path.stat().st_mode & 0o777 for path in (link, link / "manifest.json")] == [0o755, 0o644]

    again = _run("install", bundles["three"], link, "--json")
    assert json.loads(again.stdout)["version"] == third, "what is there is verified again, and not copied"
    back = _run("rollback", link, "--json")
    assert back.exit_code == 0, back.stderr
    assert (json.loads(back.stdout)["version"], _name(link)) == (second, "two")
    none = _run("rollback", link)
    assert (none.exit_code, _name(link)) == (1, "two")
    assert "no earlier version" in none.stderr
    assert _run("install", bundles["one"], link, "--keep", 3).exit_code == 0
    assert third not in versions(), "what was gone back from is no version to go back to"
    assert _run("rollback", link).exit_code == 0
    assert _name(link) == "two"


def test_after_every_step_of_a_switch_the_link_leads_to_a_version(
    bundles: dict[str, Path], link: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _run("install", bundles["one"], link).exit_code == 0
    seen: list[str] = []

    def watched(step: Callable[..., Any]) -> Callable[..., Any]:
        def take(*arguments: Any, **options: Any) -> Any:
            result = step(*arguments, **options)
            seen.append(_name(link))
            return result

        return take

    with open_bundle(bundles["two"]) as opened, InstalledVersions(link) as versions:
        version = versions.publish(versions.stage(opened))
        for step in ("replace", "rename", "unlink", "symlink_to"):
            monkeypatch.setattr(Path, step, watched(getattr(Path, step)))
        versions.switch(version)
        monkeypatch.undo()
    assert list(dict.fromkeys(seen)) == ["one", "two"]


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_a_bundle_that_is_not_the_certified_detector_here_changes_nothing(
    form: str, bundles: dict[str, Path], link: Path, versions: Callable[[], set[str]], tmp_path: Path
) -> None:
    assert _run("install", bundles["one"], link).exit_code == 0
    before = versions()
    wrong = _edit_manifest(Path(shutil.copytree(bundles["two"], tmp_path / "wrong")), _move_golden_boxes)
    if form == "archive":
        assert _run("package", wrong, "-o", tmp_path / "wrong.tar").exit_code == 0
        wrong = tmp_path / "wrong.tar"
    done = _run("install", wrong, link)
    assert done.exit_code == 4
    assert "is not the certified detector" in done.stderr
    assert (_name(link), versions()) == ("one", before)
    fresh = link.with_name("fresh")
    assert _run("install", wrong, fresh).exit_code == 4
    assert not os.path.lexists(fresh)
    assert not fresh.with_name(".fresh.versions").exists()


def test_what_does_not_run_here_is_built_here(tiny_ir_bundle: Path, link: Path, tmp_path: Path) -> None:
    """The IRs claim a newer OpenVINO than any; ``setup`` builds them anew."""
    pytest.importorskip("openvino")

    def require_newer(manifest: dict) -> None:
        for artifact in manifest["artifacts"]:
            if artifact["backend"] == "openvino":
                artifact["requires"]["backend_version"] = "2999.1.0"

    newer = _edit_manifest(Path(shutil.copytree(tiny_ir_bundle, tmp_path / "newer")), require_newer)
    done = _run("install", newer, link, "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report["built"]) == 2
    assert report["record"]["artifact"].startswith("device/openvino-")
    assert not (newer / "device").exists()
    other = json.loads(_run("install", link, link.with_name("other"), "--json").stdout)
    assert other["built"] == [], "what was built on this device travels along"
    assert other["record"]["artifact"].startswith("device/openvino-")


def test_a_damaged_version_is_installed_anew_and_passed_over(
    bundles: dict[str, Path], link: Path, versions: Callable[[], set[str]]
) -> None:
    for name in ("one", "two"):
        assert _run("install", bundles[name], link).exit_code == 0
    (link / "model.fp32.onnx").write_bytes(b"damaged")
    done = _run("install", bundles["two"], link, "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["version"].endswith("-2")
    assert report["removed"] == [report["version"][:16]], "damaged, so it does not count as the version that is kept"
    assert _name(link) == "two"
    assert len(versions()) == 2
    assert _run("install", bundles["three"], link, "--keep", 2).exit_code == 0
    (link.parent / ".cells.versions" / report["version"] / "model.fp32.onnx").write_bytes(b"damaged")
    back = _run("rollback", link, "--json")
    assert back.exit_code == 0, back.stderr
    assert list(json.loads(back.stdout)["passed_over"]) == [report["version"]]
    assert _name(link) == "one"


def test_signatures_versions_and_names_are_required_as_elsewhere(
    bundles: dict[str, Path], link: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cryptography")
    monkeypatch.setenv("FCOS_DEPLOY_STATE", str(tmp_path / "state"))
    key, public = tmp_path / "key.pem", tmp_path / "key.pub.pem"
    assert _run("sign", "--generate-key", "--key", key).exit_code == 0
    signed = {}
    for version in (1, 2, 3):
        bundle = Path(shutil.copytree(bundles["one"], tmp_path / f"version-{version}"))
        if version == 3:
            _edit_manifest(bundle, _move_golden_boxes)
        assert _run("sign", bundle, "--key", key, "--version", version).exit_code == 0
        signed[version] = bundle
    trusting = ("--require-signature", "--public-key", public)
    refused = _run("install", bundles["one"], link, *trusting)
    assert (refused.exit_code, os.path.lexists(link)) == (1, False)
    for version in (1, 2):
        done = _run("install", signed[version], link, *trusting, "--min-version", version, "--json")
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["signed_version"] == version
    assert "2 of it was opened here before" in _run("install", signed[1], link, *trusting).stderr
    assert "3 or later is needed" in _run("install", signed[2], link, *trusting, "--min-version", 3).stderr
    assert "not 'two'" in _run("install", signed[2], link, "--expect-name", "two").stderr
    assert _run("install", signed[3], link, *trusting).exit_code == 4
    # A version that was not switched to is not remembered: the one in use still opens.
    assert _run("verify", link, *trusting).exit_code == 0
    assert _run("rollback", link, *trusting, "--min-version", 2).exit_code == 1
    back = _run("rollback", link, *trusting, "--json")
    assert json.loads(back.stdout)["signed_version"] == 1, back.stderr
    assert _run("verify", link, *trusting).exit_code == 0
    assert _run("install", signed[2], link, *trusting).exit_code == 0


def _foreign_link(place: Path) -> Path:
    place.symlink_to("elsewhere")
    return place


def _foreign_file(place: Path) -> Path:
    place.write_text("mine")
    return place


def _foreign_folder(place: Path) -> Path:
    place.mkdir()
    (place / "mine").write_text("mine")
    return place


def _linked_versions(place: Path) -> Path:
    (place.parent / "others").mkdir()
    (place.parent / f".{place.name}.versions").symlink_to("others", target_is_directory=True)
    return place


def _shared_versions(place: Path) -> Path:
    (place.parent / f".{place.name}.versions").mkdir()
    (place.parent / f".{place.name}.versions").chmod(0o777)
    return place


@pytest.mark.parametrize(
    ("prepare", "code", "message"),
    [
        (_foreign_file, 2, "is not a link that 'fcos-deploy install' made"),
        (_foreign_folder, 2, "is not a link that 'fcos-deploy install' made"),
        (_foreign_link, 2, "which 'fcos-deploy install' did not make"),
        (_linked_versions, 2, "is a link, so nothing in it can be trusted"),
        (_shared_versions, 2, "can be written by others"),
        (lambda place: place / "..", 2, "has no name to write under"),
        (lambda _: Path("/"), 2, "has no name to write under"),
        (lambda _: Path("/dev/null"), 2, "is a device or a pipe"),
        (lambda _: Path("/proc/cells"), 2, "annot be written"),
        (lambda _: Path("/dev/null/cells"), 2, "Not a directory"),
        (lambda place: place.with_name("x" * 300), 2, "File name too long"),
        (lambda place: place.with_name("a\0b"), 2, "null"),
        (lambda place: place.parent / "source" / "cells", 2, "lies in the bundle itself"),
    ],
)
def test_places_that_are_not_ours_stay_as_they_are(
    prepare: Callable[[Path], Path], code: int, message: str, bundles: dict[str, Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(bundles["one"], tmp_path / "source"))
    place = prepare(tmp_path / "cells")
    before = sorted(tmp_path.rglob("*"))
    for command in (("install", source, place), ("rollback", place)):
        done = _run(*command)
        assert done.exit_code in (code, 1), done.output
        assert message in " ".join(done.stderr.split()) or command[0] == "rollback", done.stderr
        assert sorted(tmp_path.rglob("*")) == before
    assert open_bundle(source)


@pytest.mark.parametrize("name", ["-rf", "a\nb", "[x]*?", "\x1b[2J", "ä" * 100, ".x"])
def test_any_name_that_a_file_may_have_is_a_link(name: str, bundles: dict[str, Path], tmp_path: Path) -> None:
    for bundle in ("one", "two"):
        with InstalledVersions(tmp_path / name) as versions, open_bundle(bundles[bundle]) as opened:
            versions.switch(versions.publish(versions.stage(opened)))
    assert _name(tmp_path / name) == "two"
    with InstalledVersions(tmp_path / name) as versions:
        versions.switch_back(versions.earlier()[0])
    assert _name(tmp_path / name) == "one"


@pytest.mark.parametrize("content", [None, "{", "[1, {}, null]", '["../../x", "/etc"]', '{"a": 1}', "[" * 60_000])
def test_a_lost_or_damaged_history_loses_no_version(content: str | None, bundles: dict[str, Path], link: Path) -> None:
    for name in ("one", "two"):
        with InstalledVersions(link) as versions, open_bundle(bundles[name]) as opened:
            versions.switch(versions.publish(versions.stage(opened)))
    history = link.with_name(".cells.versions") / "history.json"
    if content is None:
        history.unlink()
    else:
        history.write_text(content)
    with InstalledVersions(link) as versions, open_bundle(bundles["three"]) as opened:
        (before,) = versions.earlier()
        versions.switch(versions.publish(versions.stage(opened)))
        versions.prune(keep=2)
        assert versions.earlier()[1:] == [before]
        assert [_name(versions.path(version)) for version in versions.earlier()] == ["two", "one"]


def test_two_installs_at_a_time_take_turns_or_say_so(bundles: dict[str, Path], link: Path) -> None:
    assert _run("install", bundles["one"], link).exit_code == 0
    with InstalledVersions(link):
        for command in (("install", bundles["two"], link), ("rollback", link)):
            busy = _run(*command)
            assert busy.exit_code == 1
            assert f"Process {os.getpid()} is already writing" in busy.stderr
    program = "from fcos_deploy.cli.app import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, "install", str(bundles[name]), str(link)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("two", "three")
    ]
    messages = [process.communicate()[1] for process in started]
    codes = [process.returncode for process in started]
    assert 0 in codes, messages
    assert all(code == 0 or "is already writing" in text for code, text in zip(codes, messages, strict=True)), messages
    assert _name(link) in ("two", "three")
    assert _run("rollback", link).exit_code == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with room for one version and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4500k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


def test_a_full_or_read_only_disk_leaves_the_version_in_use(bundles: dict[str, Path], small_disk: Path) -> None:
    link = small_disk / "cells"
    assert _run("install", bundles["one"], link).exit_code == 0
    (small_disk / "fill").touch()
    before, free = sorted(small_disk.rglob("*")), shutil.disk_usage(small_disk).free
    for room in (1 << 20, 4096, 0):
        (small_disk / "fill").write_bytes(bytes(free - room))
        full = _run("install", bundles["two"], link)
        assert full.exit_code in (1, 2), full.output
        assert "are free" in full.stderr or "No space left" in full.stderr, full.stderr
        assert (_name(link), sorted(small_disk.rglob("*"))) == ("one", before)
    (small_disk / "fill").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for command in (("install", bundles["two"], link), ("rollback", link)):
        assert "annot be written" in _run(*command).stderr
    subprocess.run(["mount", "-o", "remount,rw,size=20m", str(small_disk)], check=True)
    assert _run("install", bundles["two"], link).exit_code == 0
    assert _name(link) == "two"
