"""``model.sig``: a bundle's signature in the format of OpenSSF Model Signing 1.0, which tools of others check.

A Sigstore bundle (docs.sigstore.dev/about/bundle) with a DSSE envelope around an in-toto statement that lists the hash
of every file (github.com/sigstore/model-transparency). Signed with a key, so that nothing is asked of the network.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from fcos_deploy.bundle.manifest import LAYERS_FOLDER, LOG_NAME, MODEL_SIGNATURE_NAME, SIGNATURE_NAME
from fcos_deploy.bundle.signature import sign_with_ec_key
from fcos_deploy.core.files import write_text

__all__ = ["model_statement", "write_model_signature"]

_PAYLOAD_TYPE = "application/vnd.in-toto+json"
# What may change, or appear, after signing; each has a check of its own.
_IGNORED = (LAYERS_FOLDER, LOG_NAME, MODEL_SIGNATURE_NAME, SIGNATURE_NAME)


def model_statement(name: str, files: Mapping[str, str]) -> bytes:
    """The in-toto statement about the model ``name``; ``files``: the SHA-256 of each, by its path."""
    # Characters beyond ASCII and the order are those of the reference implementation: UTF-8, by name.
    ordered = sorted(files.items())
    root = hashlib.sha256(b"".join(bytes.fromhex(sha256) for _, sha256 in ordered)).hexdigest()
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": root}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": list(_IGNORED),
            },
            "resources": [{"name": path, "algorithm": "sha256", "digest": sha256} for path, sha256 in ordered],
        },
    }
    return json.dumps(statement, ensure_ascii=False, indent=1).encode()


def write_model_signature(root: Path, *, name: str, files: Mapping[str, str], private_key: Path) -> None:
    """Write ``model.sig`` into the bundle in ``root``, signed with an EC key; an older one is replaced.

    Raises:
        ConfigError: the key file cannot be used.
    """
    payload = model_statement(name, files)
    # DSSE signs the payload behind its type and both lengths (PAE, github.com/secure-systems-lab/dsse, protocol.md).
    message = f"DSSEv1 {len(_PAYLOAD_TYPE)} {_PAYLOAD_TYPE} {len(payload)} ".encode() + payload
    hint, signature = sign_with_ec_key(message, private_key=private_key)
    bundle = {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": _PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    write_text(root / MODEL_SIGNATURE_NAME, json.dumps(bundle, indent=1) + "\n")
