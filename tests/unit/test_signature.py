"""Signatures over a bundle, ours and OpenSSF's."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fcos_deploy.bundle import open_bundle, pack, required_keys
from fcos_deploy.bundle.signature import PASSPHRASE_VARIABLE, check_signature, generate_ec_key, generate_key
from fcos_deploy.bundle.store import sign
from fcos_deploy.core.errors import BundleError, ConfigError, SignatureError

pytest.importorskip("cryptography")


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    generate_key(tmp_path / "key.pem", public=tmp_path / "key.pub.pem")
    return tmp_path / "key.pem", tmp_path / "key.pub.pem"


@pytest.fixture
def signed(make_bundle: Callable[[Path], Path], keys: tuple[Path, Path], tmp_path: Path) -> Path:
    bundle = make_bundle(tmp_path / "cells")
    sign(bundle, private_key=keys[0])
    return bundle


def test_the_private_key_is_its_owners_alone(keys: tuple[Path, Path]) -> None:
    assert stat.S_IMODE(keys[0].stat().st_mode) == 0o600


def test_keys_are_never_overwritten(keys: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="not overwritten"):
        generate_key(keys[0], public=keys[1])


def test_a_signed_bundle_opens_with_the_key(signed: Path, keys: tuple[Path, Path]) -> None:
    bundle = open_bundle(signed, public_keys=(keys[1],))
    assert len(bundle.signed_by) == 64


def test_openssl_accepts_the_signature(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    """The envelope is documented, so that others can check it without this package."""
    import base64
    import json
    import shutil
    import subprocess

    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    envelope = json.loads((signed / "SIGNATURE").read_text())
    (tmp_path / "sig").write_bytes(base64.b64decode(envelope["signature"]))
    message = b"fcos-deploy bundle manifest, version 1\n" + (signed / "manifest.json").read_bytes()
    (tmp_path / "message").write_bytes(message)
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(keys[1]), "-rawin"]
    command += ["-in", str(tmp_path / "message"), "-sigfile", str(tmp_path / "sig")]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_another_key_is_refused(signed: Path, tmp_path: Path) -> None:
    generate_key(tmp_path / "b.pem", public=tmp_path / "b.pub.pem")
    with pytest.raises(SignatureError, match="was signed by key"):
        open_bundle(signed, public_keys=(tmp_path / "b.pub.pem",))


def test_one_of_several_trusted_keys_is_enough(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    generate_key(tmp_path / "b.pem", public=tmp_path / "b.pub.pem")
    assert open_bundle(signed, public_keys=(tmp_path / "b.pub.pem", keys[1])).signed_by


def test_an_unsigned_bundle_is_refused_when_a_key_is_given(
    make_bundle: Callable[[Path], Path], keys: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(SignatureError, match="not signed"):
        open_bundle(make_bundle(tmp_path / "plain"), public_keys=(keys[1],))


def test_a_manifest_remade_consistently_does_not_pass(signed: Path, keys: tuple[Path, Path]) -> None:
    """An attacker can make all hashes fit again, but not the signature."""
    import hashlib

    text = (signed / "manifest.json").read_text().replace('"name": "cells"', '"name": "cellz"')
    (signed / "manifest.json").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (signed / "manifest.sha256").write_text(f"{digest}  manifest.json\n")
    assert open_bundle(signed).manifest.name == "cellz"
    with pytest.raises(SignatureError, match="does not match the manifest"):
        open_bundle(signed, public_keys=(keys[1],))


def test_a_key_id_that_was_exchanged_does_not_pass(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    from fcos_deploy.bundle.signature import Envelope, check_envelope

    other = generate_key(tmp_path / "b.pem", public=tmp_path / "b.pub.pem")
    old = check_envelope(signed / "SIGNATURE")
    draft = Envelope(algorithm="ed25519", key_id=other, signature=old.signature, sha256="")
    forged = Envelope(algorithm="ed25519", key_id=other, signature=old.signature, sha256=draft.digest())
    (signed / "SIGNATURE").write_text(forged.text())
    with pytest.raises(SignatureError, match="does not match"):
        check_signature(signed, manifest=(signed / "manifest.json").read_bytes(), public_keys=(tmp_path / "b.pub.pem",))


def test_requiring_a_signature_without_a_key_is_a_mistake_of_the_caller(keys: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="needs a key"):
        required_keys((), required=True)
    assert required_keys((), required=False) == ()
    assert required_keys((keys[1],), required=True) == (keys[1],)


@pytest.mark.parametrize("content", [b"", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", b"\xff\0"])
def test_a_file_that_is_no_key_is_named(signed: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.pem").write_bytes(content)
    (tmp_path / "bad.pem").chmod(0o600)
    with pytest.raises(ConfigError, match=r"bad\.pem"):
        open_bundle(signed, public_keys=(tmp_path / "bad.pem",))
    with pytest.raises(ConfigError, match=r"bad\.pem"):
        sign(signed, private_key=tmp_path / "bad.pem")


def test_a_private_key_of_another_kind_is_refused(signed: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "ec.pem").write_bytes(pem)
    (tmp_path / "ec.pem").chmod(0o600)
    with pytest.raises(ConfigError, match="not an Ed25519 key"):
        sign(signed, private_key=tmp_path / "ec.pem")


@pytest.mark.parametrize("mode", [0o666, 0o640, 0o604, 0o620])
def test_a_private_key_that_others_can_read_or_write_is_refused(
    signed: Path, keys: tuple[Path, Path], mode: int
) -> None:
    before = (signed / "SIGNATURE").read_bytes()
    keys[0].chmod(mode)
    with pytest.raises(ConfigError, match=f"{mode:04o}") as refused:
        sign(signed, private_key=keys[0])
    assert "chmod 600" in refused.value.hint
    assert (signed / "SIGNATURE").read_bytes() == before


def test_a_pipe_in_place_of_a_private_key_is_refused_at_once(signed: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "key.fifo", 0o600)
    with pytest.raises(ConfigError, match="not a regular file"):
        sign(signed, private_key=tmp_path / "key.fifo")


def test_an_encrypted_private_key_signs_with_its_passphrase_only(
    signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "correct horse")
    identity = generate_key(tmp_path / "locked.pem", public=tmp_path / "locked.pub.pem")
    assert b"ENCRYPTED" in (tmp_path / "locked.pem").read_bytes()
    assert sign(signed, private_key=tmp_path / "locked.pem") == identity
    assert open_bundle(signed, public_keys=(tmp_path / "locked.pub.pem",)).signed_by == identity
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "battery staple")
    with pytest.raises(ConfigError, match="does not open it"):
        sign(signed, private_key=tmp_path / "locked.pem")
    monkeypatch.delenv(PASSPHRASE_VARIABLE)
    with pytest.raises(ConfigError, match="is encrypted"):
        sign(signed, private_key=tmp_path / "locked.pem")


def test_a_passphrase_in_the_environment_does_not_hinder_a_plain_key(
    signed: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "of another key")
    assert sign(signed, private_key=keys[0])


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_sign_that_is_killed_leaves_nothing_that_blocks(
    signed: Path, keys: tuple[Path, Path], call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """As SIGKILL: no clean-up runs behind it."""

    def kill(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(
            {"open": "pathlib.Path.write_text", "fsync": "os.fsync", "replace": "pathlib.Path.replace"}[call], kill
        )
        patch.setattr("pathlib.Path.unlink", lambda *_, **__: None)
        with pytest.raises(Killed):
            sign(signed, private_key=keys[0])
    assert open_bundle(signed, public_keys=(keys[1],)).signed_by
    sign(signed, private_key=keys[0])
    assert not list(signed.glob(".*"))


def test_a_broken_bundle_is_not_signed(
    make_bundle: Callable[[Path], Path], keys: tuple[Path, Path], tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "cells")
    (bundle / "model.int8.engine").write_bytes(b"x")
    with pytest.raises(BundleError):
        sign(bundle, private_key=keys[0])
    assert not (bundle / "SIGNATURE").exists()


def test_a_version_that_was_opened_is_not_rolled_back(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FCOS_DEPLOY_STATE", str(tmp_path / "state"))
    for version in (3, 4):
        sign(signed, private_key=keys[0], version=version)
        assert open_bundle(signed, public_keys=(keys[1],)).version == version
    for version in (3, 0):
        sign(signed, private_key=keys[0], version=version)
        with pytest.raises(SignatureError, match=f"is version {version}, and version 4 of it"):
            open_bundle(signed, public_keys=(keys[1],))
    assert open_bundle(signed).version == 0  # no key, no promise


def test_what_is_claimed_beside_the_manifest_is_signed(signed: Path, keys: tuple[Path, Path]) -> None:
    import json
    from dataclasses import replace

    from fcos_deploy.bundle.signature import check_envelope

    sign(signed, private_key=keys[0], version=1, expires="2020-01-31")
    with pytest.raises(SignatureError, match="expired on 2020-01-31"):
        open_bundle(signed, public_keys=(keys[1],))
    claimed = replace(check_envelope(signed / "SIGNATURE"), expires="2999-01-31", version=9)
    forged = replace(claimed, sha256=claimed.digest())
    (signed / "SIGNATURE").write_text(forged.text())
    assert json.loads((signed / "SIGNATURE").read_text())["version"] == 9
    with pytest.raises(SignatureError, match="does not match"):
        open_bundle(signed, public_keys=(keys[1],))
    with pytest.raises(ConfigError, match="is not a date"):
        sign(signed, private_key=keys[0], expires="soon")


def test_another_bundle_of_the_same_signer_does_not_pass_for_the_one_that_is_meant(
    signed: Path, keys: tuple[Path, Path]
) -> None:
    for wanted in ({"expect_name": "cells"}, {"expect_name": "cells", "min_version": 2}):
        sign(signed, private_key=keys[0], version=2)
        assert open_bundle(signed, public_keys=(keys[1],), **wanted).version == 2
    with pytest.raises(SignatureError, match="is 'cells', not 'plates'"):
        open_bundle(signed, expect_name="plates")
    with pytest.raises(SignatureError, match="as version 2, 3 or later is needed"):
        open_bundle(signed, public_keys=(keys[1],), min_version=3)
    with pytest.raises(ConfigError, match="needs a key"):
        open_bundle(signed, min_version=1)


pytest.importorskip("cryptography")

VERIFIER = os.environ.get("FCOS_DEPLOY_MODEL_SIGNING_PYTHON", "")


@pytest.fixture
def home(make_bundle: Callable[[Path], Path], tmp_path: Path) -> Path:
    """``cells``, signed in both formats; the public halves beside it."""
    bundle = make_bundle(tmp_path / "cells")
    generate_key(tmp_path / "key.pem", public=tmp_path / "key.pub.pem")
    generate_ec_key(tmp_path / "ec.pem", public=tmp_path / "ec.pub.pem")
    sign(bundle, private_key=tmp_path / "key.pem", openssf_key=tmp_path / "ec.pem")
    return tmp_path


def test_the_signature_is_of_every_file_and_the_manifest(home: Path) -> None:
    """By the specifications alone: Sigstore bundle 0.3, DSSE 1.0, in-toto statement 1, model signature 1.0."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    bundle = json.loads((home / "cells" / "model.sig").read_text())
    public = serialization.load_pem_public_key((home / "ec.pub.pem").read_bytes())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert bundle["mediaType"] == "application/vnd.dev.sigstore.bundle.v0.3+json"
    hint = hashlib.sha256((home / "ec.pub.pem").read_bytes()).hexdigest()
    assert bundle["verificationMaterial"] == {"publicKey": {"hint": hint}, "tlogEntries": []}
    envelope = bundle["dsseEnvelope"]
    payload = base64.b64decode(envelope["payload"])
    message = b"DSSEv1 28 application/vnd.in-toto+json %d %s" % (len(payload), payload)
    public.verify(base64.b64decode(envelope["signatures"][0]["sig"]), message, ec.ECDSA(hashes.SHA256()))
    statement = json.loads(payload)
    resources = {item["name"]: item["digest"] for item in statement["predicate"]["resources"]}
    ignored = set(statement["predicate"]["serialization"]["ignore_paths"])
    files = {path.relative_to(home / "cells").as_posix(): path for path in (home / "cells").rglob("*")}
    expected = {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files.items()
        if path.is_file() and name not in ignored
    }
    assert resources == expected
    assert list(resources) == sorted(resources)
    root = hashlib.sha256(b"".join(map(bytes.fromhex, resources.values()))).hexdigest()
    assert statement["subject"] == [{"name": "cells", "digest": {"sha256": root}}]


def test_it_travels_with_the_bundle_and_blocks_nothing(home: Path) -> None:
    bundle = home / "cells"
    pack(bundle, home / "cells.tar")
    (bundle / ".model.0123abcd.partial.sig").write_text("of a process that was killed")
    for path in (bundle, home / "cells.tar"):
        with open_bundle(path, public_keys=(home / "key.pub.pem",)) as opened:
            assert (opened.root / "model.sig").is_file()
    sign(bundle, private_key=home / "key.pem")
    assert not list(bundle.glob(".*"))
    (bundle / "model.sig").unlink()
    (bundle / "model.sig").symlink_to("/dev/zero")
    with pytest.raises(BundleError, match="not a plain file"):
        open_bundle(bundle)
    (bundle / "model.sig").unlink()
    with pytest.raises(ConfigError, match="is not an EC key"):
        sign(bundle, private_key=home / "key.pem", openssf_key=home / "key.pem")


@pytest.mark.skipif(not VERIFIER, reason="'make model-signing-env' makes the environment of the verifier")
def test_the_verifier_of_openssf_accepts_the_bundle_and_refuses_a_changed_one(home: Path) -> None:
    bundle = home / "cells"
    (bundle / "verification.jsonl").write_text("")  # what comes later is not signed
    command = [VERIFIER, "-m", "model_signing", "verify", "key", str(bundle), "--signature", str(bundle / "model.sig")]
    command += ["--public_key", str(home / "ec.pub.pem")]
    accepted = subprocess.run(command, capture_output=True, text=True, check=False)
    assert accepted.returncode == 0, accepted.stdout + accepted.stderr
    if shutil.which("unshare") and os.geteuid() == 0:  # without a network
        alone = subprocess.run(["unshare", "-n", *command], capture_output=True, text=True, check=False)
        assert alone.returncode == 0 or "unshare" in alone.stderr, alone.stderr
    with (bundle / "model.fp32.onnx").open("ab") as stream:
        stream.write(b"\0")
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "model.fp32.onnx" in refused.stdout + refused.stderr
