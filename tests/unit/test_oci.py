"""``package --for oci``: an OCI image layout by the rules of its specification, and a bundle again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import tarfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fcos_deploy.bundle import open_bundle, open_trusted
from fcos_deploy.bundle.archive import unpack
from fcos_deploy.cli.app import build_app
from fcos_deploy.core.errors import BundleError, FcosDeployError
from fcos_deploy.core.files import sha256_file
from fcos_deploy.core.trust import Trust

# opencontainers/image-spec 1.1: descriptor.md (RFC 6838 names, digests), annotations.md (the grammar of a reference).
MEDIA_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}")
DIGEST = re.compile(r"sha256:[a-f0-9]{64}")
REFERENCE = re.compile(r"[A-Za-z0-9]+([-._:@+]|--)?[A-Za-z0-9]*(/[A-Za-z0-9]+)*")
# modelpack/model-spec, docs/spec.md: what a layer of one plain file may be.
LAYER = re.compile(r"application/vnd\.cncf\.model\.(weight|weight\.config|doc|code|dataset)\.v1\.raw")

DEBIAN_TOOLS = Path(os.environ.get("FCOS_DEPLOY_DEBIAN_TOOLS", "nowhere"))


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(build_app(), [str(argument) for argument in arguments])


def _blob(layout: Path, descriptor: dict) -> bytes:
    """What a descriptor leads to, after the checks that the specification asks of whoever reads it."""
    assert {"mediaType", "digest", "size"} <= set(descriptor)
    assert MEDIA_TYPE.fullmatch(descriptor["mediaType"])
    assert DIGEST.fullmatch(descriptor["digest"])
    assert set(map(type, descriptor.get("annotations", {}).values())) <= {str}
    content = (layout / "blobs" / "sha256" / descriptor["digest"][7:]).read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (descriptor["size"], descriptor["digest"][7:])
    return content


def _read_layout(layout: Path) -> dict[str, bytes]:
    """The files of the one model in a layout, by a reader of its own; everything in the layout is referred to."""
    assert json.loads((layout / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((layout / "index.json").read_bytes())
    assert (index["schemaVersion"], index["mediaType"]) == (2, "application/vnd.oci.image.index.v1+json")
    (reference,) = index["manifests"]
    assert REFERENCE.fullmatch(reference["annotations"]["org.opencontainers.image.ref.name"])
    manifest = json.loads(_blob(layout, reference))
    assert (manifest["schemaVersion"], manifest["mediaType"]) == (2, reference["mediaType"])
    assert manifest["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert manifest["artifactType"] == reference["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert manifest["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    config = json.loads(_blob(layout, manifest["config"]))
    # schema/config-schema.json of modelpack/model-spec: the three required parts, and no others.
    assert set(config) == {"descriptor", "config", "modelfs"}
    assert set(config["config"]) <= {"architecture", "format", "paramSize", "precision", "quantization", "capabilities"}
    assert config["modelfs"] == {"type": "layers", "diffIds": [layer["digest"] for layer in manifest["layers"]]}
    assert all(LAYER.fullmatch(layer["mediaType"]) for layer in manifest["layers"])
    files = {layer["annotations"]["org.cncf.model.filepath"]: _blob(layout, layer) for layer in manifest["layers"]}
    assert len(files) == len(manifest["layers"])
    assert [layer["annotations"]["org.opencontainers.image.title"] for layer in manifest["layers"]] == list(files)
    digests = {descriptor["digest"][7:] for descriptor in (reference, manifest["config"], *manifest["layers"])}
    assert {path.relative_to(layout).as_posix() for path in layout.rglob("*") if path.is_file()} == {
        *("oci-layout", "index.json"),
        *(f"blobs/sha256/{digest}" for digest in digests),
    }
    return files


@pytest.fixture
def signed(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A signed bundle and the public key."""
    pytest.importorskip("cryptography")
    monkeypatch.setenv("FCOS_DEPLOY_STATE", str(tmp_path / "state"))
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    assert _run("sign", "--generate-key", "--key", tmp_path / "key.pem").exit_code == 0
    assert _run("sign", bundle, "--key", tmp_path / "key.pem", "--version", 7).exit_code == 0
    return bundle, tmp_path / "key.pub.pem"


def test_the_layout_is_by_the_specification_and_a_signed_bundle_again(
    signed: tuple[Path, Path], tmp_path: Path
) -> None:
    bundle, public = signed
    layout, again = tmp_path / "layout", tmp_path / "again"
    for output in (layout, again):
        done = _run("package", bundle, "-o", output, "--for", "oci", "--version", 3, "--public-key", public)
        assert done.exit_code == 0, done.stderr
    files = _read_layout(layout)
    assert files == {p.relative_to(bundle).as_posix(): p.read_bytes() for p in bundle.rglob("*") if p.is_file()}
    assert "SIGNATURE" in files
    assert {p.relative_to(layout): p.read_bytes() for p in layout.rglob("*") if p.is_file()} == {
        p.relative_to(again): p.read_bytes() for p in again.rglob("*") if p.is_file()
    }
    archive = tmp_path / "layout.tar"
    with tarfile.open(archive, "w") as tar:  # as 'skopeo copy oci:layout oci-archive:layout.tar' writes it
        for name in ("blobs", "index.json", "oci-layout"):
            tar.add(layout / name, name)
    for form in (layout, archive):
        with open_trusted(form, Trust(public_keys=(public,), min_version=7)) as opened:
            assert (opened.version, opened.manifest.name) == (7, "tiny")
        link = tmp_path / f"installed-{form.suffix[1:]}"
        done = _run("install", form, link, "--public-key", public, "--require-signature")
        assert done.exit_code == 0, done.stderr
        assert {name: (link / name).read_bytes() for name in files} == files


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """The address of a registry of Docker's distribution on this machine."""
    program = DEBIAN_TOOLS / "bin" / "docker-registry"
    if not program.is_file():
        pytest.skip("FCOS_DEPLOY_DEBIAN_TOOLS names no registry: make debian-tools")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    settings = {
        "version": "0.1",
        "storage": {"filesystem": {"rootdirectory": str(tmp_path / "registry")}},
        "http": {"addr": address},
    }
    (tmp_path / "registry.json").write_text(json.dumps(settings))  # YAML is a superset of JSON
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([program, "serve", tmp_path / "registry.json"], **quiet) as process:
        try:
            for _ in range(300):
                assert process.poll() is None, "the registry ended"
                try:
                    urllib.request.urlopen(f"http://{address}/v2/").close()
                    break
                except OSError:
                    time.sleep(0.1)
            yield address
        finally:
            process.terminate()


def test_oras_takes_the_model_through_a_registry_to_a_device(
    registry: str, signed: tuple[Path, Path], tmp_path: Path
) -> None:
    """The digest and the signature are those of before, and what is pulled is the bundle's folder."""
    bundle, public = signed
    layout, pulled, copied = tmp_path / "layout", tmp_path / "pulled", tmp_path / "copied"
    assert _run("package", bundle, "-o", layout, "--for", "oci", "--version", 3).exit_code == 0

    def oras(*arguments: object) -> str:
        command = [DEBIAN_TOOLS / "bin" / "oras", *arguments]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    address = f"{registry}/cells:3"
    oras("cp", "--from-oci-layout", "--to-plain-http", f"{layout}:3", address)
    (reference,) = json.loads((layout / "index.json").read_text())["manifests"]
    assert (
        json.loads(oras("manifest", "fetch", "--descriptor", "--plain-http", address))["digest"] == reference["digest"]
    )
    oras("pull", "--plain-http", address, "-o", pulled)
    assert {path.relative_to(pulled): path.read_bytes() for path in pulled.rglob("*") if path.is_file()} == {
        path.relative_to(bundle): path.read_bytes() for path in bundle.rglob("*") if path.is_file()
    }
    oras("cp", "--from-plain-http", "--to-oci-layout", address, f"{copied}:3")
    for form, link in ((pulled, tmp_path / "installed"), (copied, tmp_path / "installed-copy")):
        done = _run("install", form, link, "--public-key", public, "--require-signature")
        assert done.exit_code == 0, done.stderr


def _edit_index(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    def change(layout: Path) -> None:
        index = json.loads((layout / "index.json").read_text())
        edit(index)
        (layout / "index.json").write_text(json.dumps(index))

    return change


def _edit_image(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    """Change the image's manifest, with its digest, so that what is refused is what it says."""

    def change(layout: Path) -> None:
        index = json.loads((layout / "index.json").read_text())
        blobs, reference = layout / "blobs" / "sha256", index["manifests"][0]
        image = json.loads((blobs / reference["digest"][7:]).read_text())
        edit(image)
        content = json.dumps(image).encode()
        digest = hashlib.sha256(content).hexdigest()
        (blobs / digest).write_bytes(content)
        reference |= {"digest": f"sha256:{digest}", "size": len(content)}
        (layout / "index.json").write_text(json.dumps(index))

    return change


def _name_layer(name: object) -> Callable[[dict], None]:
    return lambda image: image["layers"][0].update(annotations={"org.cncf.model.filepath": name})


def _damage_largest_blob(layout: Path) -> None:
    path = max((layout / "blobs" / "sha256").iterdir(), key=lambda blob: blob.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def _damage_image(layout: Path) -> None:
    digest = json.loads((layout / "index.json").read_text())["manifests"][0]["digest"][7:]
    path = layout / "blobs" / "sha256" / digest
    path.write_bytes(path.read_bytes().replace(b"cncf", b"CNCF", 1))


def _link_blob(layout: Path) -> None:
    path = max((layout / "blobs" / "sha256").iterdir(), key=lambda blob: blob.stat().st_size)
    shutil.copyfile(path, layout / "elsewhere")
    path.unlink()
    path.symlink_to(layout / "elsewhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_damage_largest_blob, "was changed"),
        (_damage_image, "was changed"),
        (_link_blob, "in another size|it is a link"),
        (lambda layout: (layout / "index.json").write_text("[" * 100_000), "is not JSON"),
        (lambda layout: (layout / "index.json").write_text("[]"), "is not an object"),
        (lambda layout: (layout / "index.json").unlink(), "No such file"),
        (lambda layout: shutil.rmtree(layout / "blobs"), "No such file"),
        (_edit_index(lambda index: index.pop("manifests")), "no list 'manifests'"),
        (_edit_index(lambda index: index["manifests"].clear()), "has 0 models"),
        (_edit_index(lambda index: index["manifests"].append(index["manifests"][0])), "has 2 models"),
        (_edit_index(lambda index: index["manifests"][0].update(digest="sha256:../../../etc/passwd")), "lacks a blob"),
        (_edit_index(lambda index: index["manifests"][0].update(size=1)), "in another size"),
        (_edit_image(lambda image: image["layers"].append(image["layers"][0])), "two of one name"),
        (_edit_image(lambda image: image["layers"].append("x")), "lacks a blob"),
        (_edit_image(_name_layer("../../escaped")), "is not a path inside a bundle"),
        (_edit_image(_name_layer("/etc/passwd")), "is not a path inside a bundle"),
        (_edit_image(_name_layer(None)), "without a file's name"),
        (_edit_image(_name_layer("unlisted.txt")), "not what its manifest lists"),
        (_edit_image(lambda image: image["layers"].clear()), "so that it is no bundle"),
    ],
)
def test_a_layout_that_is_not_as_written_is_refused(
    change: Callable[[Path], object], message: str, tiny_layout: Path, tmp_path: Path
) -> None:
    layout = Path(shutil.copytree(tiny_layout, tmp_path / "layout"))
    change(layout)
    with pytest.raises(FcosDeployError, match=message):
        open_bundle(layout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layout"]


@pytest.fixture(scope="module")
def tiny_layout(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    layout = tmp_path_factory.mktemp("layout") / "layout"
    assert _run("package", tiny_bundle, "-o", layout, "--for", "oci").exit_code == 0
    return layout


def test_every_command_that_opens_a_bundle_opens_a_layout(tiny_layout: Path, tmp_path: Path) -> None:
    before = {path: sha256_file(path) for path in tiny_layout.rglob("*") if path.is_file()}
    assert _run("verify", tiny_layout).exit_code == 0
    assert _run("package", tiny_layout, "-o", tmp_path / "packed.tar").exit_code == 0
    assert _run("sign", tiny_layout, "--key", tmp_path / "key.pem").exit_code == 2
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    unpack(tmp_path / "packed.tar", unpacked)
    assert open_bundle(unpacked)
    assert before == {path: sha256_file(path) for path in tiny_layout.rglob("*") if path.is_file()}
    with pytest.raises(BundleError):
        open_bundle(tmp_path)
