"""What is built on a device: recorded beside the certified files, believed for good reasons only."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fcos_deploy.bundle import device_layer, open_bundle
from fcos_deploy.bundle.device_layer import LayerState, describe_layers, find_layers, usable_layers
from fcos_deploy.bundle.signature import generate_key
from fcos_deploy.bundle.store import pack, sign
from fcos_deploy.cli.app import build_app
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.errors import BundleError, BundleReplacedError, ConfigError, DeviceError
from fcos_deploy.core.files import sha256_file
from fcos_deploy.detector import Detector

pytest.importorskip("openvino")


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(build_app(), [str(argument) for argument in arguments])


def _hashes(bundle: Path) -> dict[str, str]:
    """Of the certified files."""
    return {
        path.relative_to(bundle).as_posix(): sha256_file(path)
        for path in sorted(bundle.rglob("*"))
        if path.is_file() and path.relative_to(bundle).parts[0] not in ("device", "verification.jsonl")
    }


@pytest.fixture(scope="module")
def built(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_bundle`` with an OpenVINO layer; read-only by agreement."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("built") / "bundle"))
    before = _hashes(bundle)
    done = _run("build", bundle, "--backend", "openvino", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["record"]["layer"].startswith("device/openvino-fp32-")
    assert _hashes(bundle) == before
    return bundle


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def _layer(bundle: Path) -> Path:
    (folder,) = (bundle / "device").glob("openvino-*")
    return folder


def _artifact(bundle: Path, **options: object) -> str:
    with Detector.open(bundle, backend="openvino", options=SessionOptions(**options)) as detector:  # type: ignore[arg-type]
        return detector.session.description["artifact"]


def test_a_layer_is_used_and_named_by_every_command(bundle: Path, blobs: list[object]) -> None:
    before = _hashes(bundle)
    verified = _run("verify", bundle, "--backend", "openvino", "--json")
    assert verified.exit_code == 0, verified.stderr
    name = f"device/{_layer(bundle).name}/model.fp32.openvino.xml"
    assert json.loads(verified.stdout)["artifact"] == name
    image = next((bundle / "golden").iterdir())
    predicted = _run("predict", bundle, image, "--backend", "openvino", "--json")
    assert json.loads(predicted.stdout)[0]["artifact"] == name
    inspected = _run("inspect", bundle)
    assert "used, built by this user" in " ".join((inspected.stdout + inspected.stderr).split())
    # The bundle's own default needs no layer, and is not changed by one.
    with Detector.open(bundle) as detector:
        assert detector.session.description["artifact"] == "model.fp32.onnx"
    assert _hashes(bundle) == before


def test_an_output_inside_a_bundle_is_refused_with_the_way_out(bundle: Path, tiny_onnx: Path) -> None:
    for source in (bundle, tiny_onnx):
        refused = _run("build", source, "--backend", "openvino", "-o", bundle / "golden" / "model.xml")
        assert refused.exit_code == 2
        assert "leave -o out" in refused.stderr
    refused = _run("build", tiny_onnx, "--backend", "openvino")
    assert refused.exit_code == 2
    assert "name the file to write with -o" in refused.stderr
    assert open_bundle(bundle)


def _change_a_byte(layer: Path) -> None:
    path = next(layer.glob("*.bin"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _change_the_record(layer: Path) -> None:
    path = layer / "layer.json"
    path.write_text(path.read_text().replace('"created": "2', '"created": "3'))


def _of_another_parent(layer: Path) -> None:
    path = layer / "layer.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "parent": "ab" * 32}))


def _of_another_graph(layer: Path) -> None:
    path = layer / "layer.json"
    record = json.loads(path.read_text())
    record["artifacts"][0]["parent"] = "ab" * 32
    path.write_text(json.dumps(record))


def _cut(layer: Path) -> None:
    os.truncate(layer / "layer.json", 40)


def _empty(layer: Path) -> None:
    (layer / "layer.json").write_bytes(b"")


def _without_record(layer: Path) -> None:
    (layer / "layer.json").unlink()


def _without_mac(layer: Path) -> None:
    (layer / "layer.mac").unlink()


def _linked(layer: Path) -> None:
    path = next(layer.glob("*.xml"))
    path.rename(layer.parent.parent.parent / "aside.xml")
    path.symlink_to(layer.parent.parent.parent / "aside.xml")


def _writable(layer: Path) -> None:
    layer.chmod(0o777)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_change_a_byte, ".bin' was changed"),
        (_change_the_record, "it was changed, or built by another user"),
        (_of_another_parent, "it was built from another bundle"),
        (_of_another_graph, "it was not built from a graph of this bundle"),
        (_cut, "it is not complete"),
        (_empty, "it is not complete"),
        (_without_record, "it is not complete"),
        (_without_mac, "it was changed, or built by another user"),
        (_linked, ".xml' was changed"),
        (_writable, "others can write it"),
    ],
)
def test_a_layer_that_cannot_be_believed_is_dropped_by_name_and_renewed(
    bundle: Path, damage: Callable[[Path], None], reason: str
) -> None:
    before = _hashes(bundle)
    damage(_layer(bundle))
    assert _artifact(bundle) == "model.fp32.onnx"
    with open_bundle(bundle) as opened:
        ((name, text),) = describe_layers(opened)
        assert name == f"device/{_layer(bundle).name}"
        assert reason in text
    again = _run("build", bundle, "--backend", "openvino")
    assert again.exit_code == 0, again.stderr
    assert _artifact(bundle).startswith("device/")
    assert _hashes(bundle) == before


def test_versions_that_changed_drop_a_layer_and_other_devices_are_no_fault(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    facts = device_layer.device_facts

    def device(**changes: str) -> None:
        monkeypatch.setattr(device_layer, "device_facts", lambda backend: {**facts(backend), **changes})

    with open_bundle(bundle) as opened:
        device(processor="another one")
        (state,) = find_layers(opened)
        assert state.other_device
        assert "of another device (processor: '" in state.problem
        assert usable_layers(opened, backend="openvino") == []
        assert not caplog.text  # another device's layer is no fault
        device(runtime="2099.1")
        (state,) = find_layers(opened)
        assert "no longer fits this device (runtime: '" in state.problem
        assert state.renew == f"fcos-deploy build {bundle} --backend openvino"
        assert usable_layers(opened, backend="openvino") == []
        assert "Renew it: fcos-deploy build" in caplog.text


def test_half_written_layers_are_ignored_and_cleaned(bundle: Path) -> None:
    leftover = bundle / "device" / f".{_layer(bundle).name}.0a1b2c3d.partial"
    shutil.copytree(_layer(bundle), leftover)
    (bundle / "device" / "notes.txt").write_text("not ours, and no reason to refuse the bundle")
    assert _artifact(bundle).startswith("device/")
    assert _run("build", bundle, "--backend", "openvino").exit_code == 0
    assert not leftover.exists()


def test_the_device_folder_itself_is_no_way_around_the_check(bundle: Path, tmp_path: Path) -> None:
    (bundle / "device").rename(tmp_path / "device")
    (bundle / "device").symlink_to(tmp_path / "device")
    with pytest.raises(BundleError, match="not a plain file"):
        open_bundle(bundle)


def test_an_archive_and_a_read_only_bundle_keep_their_layers_with_the_user(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FCOS_DEPLOY_STATE", str(tmp_path / "state"))
    pack(tiny_bundle, tmp_path / "tiny.tar")
    done = _run("build", tmp_path / "tiny.tar", "--backend", "openvino")
    assert done.exit_code == 0, done.stderr
    assert len(list((tmp_path / "state" / "layers").rglob("layer.json"))) == 1
    assert _artifact(tmp_path / "tiny.tar").startswith("device/")
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    assert _artifact(bundle).startswith("device/")  # the same manifest, the same user and device
    shutil.rmtree(tmp_path / "state")
    monkeypatch.setattr(device_layer.os, "access", lambda path, mode: mode != os.W_OK or Path(path) != bundle)
    done = _run("build", bundle, "--backend", "openvino")
    assert done.exit_code == 0, done.stderr
    assert not (bundle / "device").exists()
    assert _artifact(bundle).startswith("device/")


def test_where_a_signature_is_required_a_layer_needs_one_or_an_explicit_word(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    generate_key(tmp_path / "key.pem", public=tmp_path / "key.pub.pem")
    sign(bundle, private_key=tmp_path / "key.pem")
    keys = (tmp_path / "key.pub.pem",)
    assert _artifact(bundle).startswith("device/")
    assert _artifact(bundle, public_keys=keys) == "model.fp32.onnx"
    assert _artifact(bundle, public_keys=keys, trust_local_builds=True).startswith("device/")
    signed = _run("sign", "--device", bundle, "--json")
    assert signed.exit_code == 0, signed.stderr
    assert _artifact(bundle, public_keys=keys).startswith("device/")
    public = Path(json.loads(signed.stdout)["public_key"])
    assert public.with_name("device-key.pem").stat().st_mode & 0o777 == 0o600
    # The signature is over the record: a record that was changed is not the one that was signed.
    _change_the_record(_layer(bundle))
    assert _artifact(bundle, public_keys=keys) == "model.fp32.onnx"


def test_another_user_believes_a_layer_by_the_device_key_only(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cryptography")
    signed = _run("sign", "--device", bundle, "--json")
    public = json.loads(signed.stdout)["public_key"]
    generate_key(tmp_path / "key.pem", public=tmp_path / "key.pub.pem")
    sign(bundle, private_key=tmp_path / "key.pem")
    monkeypatch.setenv("FCOS_DEPLOY_STATE", str(tmp_path / "of-another-user"))
    assert _artifact(bundle) == "model.fp32.onnx"
    assert _artifact(bundle, public_keys=(tmp_path / "key.pub.pem", public)).startswith("device/")


def test_a_bundle_that_lacks_an_engine_says_how_to_build_it(tiny_bundle: Path) -> None:
    refused = _run("verify", tiny_bundle, "--backend", "tensorrt-rtx")
    assert refused.exit_code == 2
    assert f"fcos-deploy setup {tiny_bundle} --backend tensorrt-rtx" in " ".join(refused.stderr.split())


def test_an_engine_of_tensorrt_rtx_becomes_a_layer_without_a_gpu(bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    before = _hashes(bundle)
    done = _run("build", bundle, "--backend", "tensorrt-rtx")
    assert done.exit_code == 0, done.stderr
    assert _hashes(bundle) == before
    with open_bundle(bundle) as opened:
        names = [state.name for state in find_layers(opened) if not state.problem]
    assert [name.split("-fp32-")[0] for name in names] == ["device/openvino", "device/tensorrt-rtx"]


def test_an_artifact_that_does_not_fit_is_rebuilt_into_a_layer(bundle: Path) -> None:
    """The hint of the refusal, typed as it stands, makes the bundle run here."""
    shutil.rmtree(bundle / "device")
    with open_bundle(bundle) as opened:
        (artifact,) = opened.manifest.artifacts
        needs = replace(artifact.requires, backend_version="2099.1.0")
        opened.manifest = replace(opened.manifest, artifacts=(replace(artifact, requires=needs),))
        from fcos_deploy.bundle.selection import select_runnable

        with pytest.raises(DeviceError, match="2099") as refused:
            select_runnable(opened, backend="openvino")
        command = refused.value.hint.split("rebuild it here: ")[1].split(";")[0]
        assert _run(*command.split()[1:]).exit_code == 0
        selection, _ = select_runnable(opened, backend="openvino")
        assert selection.artifact.path.startswith("device/")


def test_a_redeploy_under_a_reader_never_mixes_two_bundles(
    bundle: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every point at which the folder is swapped: the reader opens one of the two, whole, or says so."""
    from fcos_deploy.bundle import store
    from fcos_deploy.core.files import replace_folder

    new = Path(shutil.copytree(built, tmp_path / "new"))
    real, left = store.sha256_file, 0

    def swapping(path: Path) -> str:
        nonlocal left
        left -= 1
        if left == 0:
            replace_folder(new, bundle)
        return real(path)

    monkeypatch.setattr(store, "sha256_file", swapping)
    for at in range(1, 6):
        left = at
        with open_bundle(bundle) as opened:
            opened.require_not_replaced()
            assert opened._inode == (bundle.stat().st_dev, bundle.stat().st_ino)
    monkeypatch.undo()
    with open_bundle(bundle) as opened:
        replace_folder(new, bundle)
        with pytest.raises(BundleReplacedError, match="was replaced"):
            opened.require_not_replaced()


def test_nothing_to_sign_is_said(tiny_bundle: Path) -> None:
    with open_bundle(tiny_bundle) as opened, pytest.raises(ConfigError, match="has no layer"):
        device_layer.sign_layers(opened)


def test_a_layer_without_its_record_has_no_artifacts(tmp_path: Path) -> None:
    assert LayerState(name="device/x", folder=tmp_path, layer=None).artifacts == ()
