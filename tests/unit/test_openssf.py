"""``model.sig`` is what OpenSSF Model Signing describes: checked byte by byte, and by its own verifier where it is."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fcos_deploy.bundle import open_bundle, pack
from fcos_deploy.bundle.signature import generate_ec_key, generate_key
from fcos_deploy.bundle.store import sign
from fcos_deploy.core.errors import BundleError, ConfigError

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
