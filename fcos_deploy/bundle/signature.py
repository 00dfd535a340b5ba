"""Ed25519 signatures over a bundle's manifest, and so over every file whose hash it lists; and ``model.sig``.

``model.sig`` is the signature that other tools check (OpenSSF Model Signing 1.0): a Sigstore bundle
(docs.sigstore.dev/about/bundle) with a DSSE envelope around an in-toto statement that lists the hash of every file
(github.com/sigstore/model-transparency). Signed with a key, so that nothing is asked of the network.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fcos_deploy.bundle.manifest import LAYERS_FOLDER, LOG_NAME, MODEL_SIGNATURE_NAME, SIGNATURE_NAME
from fcos_deploy.core.errors import ConfigError, SignatureError
from fcos_deploy.core.files import open_regular, read_file, write_text
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.core.serialize import from_json, to_json
from fcos_deploy.core.trust import VersionMemory, own_file_bytes, own_folder, state_folder, write_own_file

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

__all__ = [
    "PASSPHRASE_VARIABLE",
    "Envelope",
    "check_bytes",
    "check_envelope",
    "check_signature",
    "device_public_key",
    "generate_ec_key",
    "generate_key",
    "key_id",
    "public_key_text",
    "remember_version",
    "require_no_rollback",
    "required_keys",
    "sign_manifest",
    "sign_with_device_key",
    "write_model_signature",
]

ec = lazy_import("cryptography.hazmat.primitives.asymmetric.ec", extra="sign")
ed25519 = lazy_import("cryptography.hazmat.primitives.asymmetric.ed25519", extra="sign")
exceptions = lazy_import("cryptography.exceptions", extra="sign")
hashes = lazy_import("cryptography.hazmat.primitives.hashes", extra="sign")
serialization = lazy_import("cryptography.hazmat.primitives.serialization", extra="sign")

_LOG = logging.getLogger(__name__)

# Binds the signature to its purpose, so that a signature made for something else cannot be reused.
_PREFIX = b"fcos-deploy bundle manifest, version 1\n"
_MAX_BYTES = 4096
PASSPHRASE_VARIABLE = "FCOS_DEPLOY_KEY_PASSPHRASE"  # noqa: S105  (the name of a variable)
_ED25519, _EC = "Ed25519", "EC"
_NEW_KEY = "make one with 'fcos-deploy sign --generate-key'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """Contents of SIGNATURE. ``key_id`` is the SHA-256 of the raw public key; ``sha256`` is over the other fields.

    ``version``, which rises from release to release, and ``expires``, a date, are signed with the manifest; 0 and ''
    claim nothing.
    """

    algorithm: str
    key_id: str
    signature: str
    sha256: str
    version: int = 0
    expires: str = ""

    def digest(self) -> str:
        """What ``sha256`` must be."""
        claims = f"\n{self.version}\n{self.expires}" if self.version or self.expires else ""
        return hashlib.sha256(f"{self.algorithm}\n{self.key_id}\n{self.signature}{claims}".encode()).hexdigest()

    def text(self) -> str:
        """As it stands in the file."""
        fields = {name: value for name, value in to_json(self).items() if value or name not in ("version", "expires")}
        return json.dumps(fields, indent=1, sort_keys=True) + "\n"


def generate_key(private: Path, *, public: Path) -> str:
    """Write a new key pair as PEM files, the private one readable by its owner only; returns the key's id.

    The private key is encrypted when FCOS_DEPLOY_KEY_PASSPHRASE is set.

    Raises:
        ConfigError: one of the files exists or cannot be written.
    """
    key = ed25519.Ed25519PrivateKey.generate()
    _write_key_pair(key, private, public=public)
    return key_id(key.public_key())


def generate_ec_key(private: Path, *, public: Path) -> None:
    """As ``generate_key``, an EC key on the curve P-256, for signatures in the OpenSSF format."""
    _write_key_pair(ec.generate_private_key(ec.SECP256R1()), private, public=public)


def _write_key_pair(key: Ed25519PrivateKey | EllipticCurvePrivateKey, private: Path, *, public: Path) -> None:
    for path in (private, public):
        if path.exists():
            raise ConfigError(f"'{path}' exists and is not overwritten.", hint="choose another name")
    passphrase = os.environ.get(PASSPHRASE_VARIABLE, "").encode()
    encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    try:
        private.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigError(
            f"Cannot write '{private}': {error.strerror}.", hint="choose a folder you can write"
        ) from error
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(secret)
        stream.flush()
        os.fsync(stream.fileno())
    write_text(public, _public_pem(key.public_key()).decode())


def key_id(public: Ed25519PublicKey) -> str:
    """SHA-256 of the raw 32 bytes, in hexadecimal."""
    return hashlib.sha256(public.public_bytes_raw()).hexdigest()


def _message(manifest: bytes, *, version: int, expires: str) -> bytes:
    """What is signed: the manifest behind a line of its purpose and, where there are any, the claims beside it."""
    if not version and not expires:
        return _PREFIX + manifest
    return b"fcos-deploy bundle manifest, version 2\n" + f"{version}\n{expires}\n".encode() + manifest


def sign_manifest(root: Path, *, manifest: bytes, private_key: Path, version: int = 0, expires: str = "") -> Envelope:
    """Sign ``manifest``, the bytes that were checked, into the bundle in ``root``; an older signature is replaced.

    Raises:
        ConfigError: the key file cannot be used.
    """
    if expires:
        try:
            expires = datetime.date.fromisoformat(expires).isoformat()
        except ValueError as error:
            raise ConfigError(f"'{expires}' is not a date.", hint="for example 2027-12-31") from error
    envelope = _sign_bytes(_message(manifest, version=version, expires=expires), private_key=private_key)
    envelope = replace(envelope, version=version, expires=expires)
    envelope = replace(envelope, sha256=envelope.digest())
    write_text(root / SIGNATURE_NAME, envelope.text())
    return envelope


def _sign_bytes(message: bytes, *, private_key: Path) -> Envelope:
    """The signature of ``message``, which must begin with the line that names its purpose."""
    key = _private_key(private_key, _ED25519)
    signature = base64.b64encode(key.sign(message)).decode()
    draft = Envelope(algorithm="ed25519", key_id=key_id(key.public_key()), signature=signature, sha256="")
    return replace(draft, sha256=draft.digest())


def _private_key(path: Path, kind: str) -> Any:
    """The key in a PEM file that nobody else can read or write, decrypted with the passphrase if need be."""
    try:
        with open_regular(path) as stream:
            mode = os.fstat(stream.fileno()).st_mode
            content = stream.read(_MAX_BYTES)
    except OSError as error:
        raise ConfigError(f"Cannot read the private key '{path}': {error.strerror or error}.", hint=_NEW_KEY) from error
    # Windows has no such permissions: there the folder that the key lies in decides.
    if hasattr(os, "geteuid") and mode & 0o077:
        raise ConfigError(
            f"The private key '{path}' can be read or written by others (its mode is {mode & 0o777:04o}).",
            hint=f"chmod 600 '{path}'; if others had access, make a new key with 'fcos-deploy sign --generate-key'",
        )
    passphrase = None  # The library refuses one that is not needed.
    if b"ENCRYPTED" in content:
        passphrase = os.environ.get(PASSPHRASE_VARIABLE, "").encode()
    if passphrase == b"":
        raise ConfigError(
            f"The private key '{path}' is encrypted.", hint=f"give its passphrase in the variable {PASSPHRASE_VARIABLE}"
        )
    try:
        key = serialization.load_pem_private_key(content, password=passphrase)
    except (ValueError, TypeError) as error:
        reason = f"the passphrase in {PASSPHRASE_VARIABLE} does not open it" if passphrase else str(error)
        raise ConfigError(f"'{path}' is not a usable private key in PEM form: {reason}.", hint=_NEW_KEY) from error
    if not isinstance(key, ed25519.Ed25519PrivateKey if kind == _ED25519 else ec.EllipticCurvePrivateKey):
        raise ConfigError(f"'{path}' is not an {kind} key.", hint=_NEW_KEY)
    return key


def required_keys(public_keys: tuple[Path | str, ...], *, required: bool) -> tuple[Path | str, ...]:
    """The keys of which one must have signed a bundle: those given; none given asks for no signature.

    Raises:
        ConfigError: a signature is required and there is no key to check it with.
    """
    if required and not public_keys:
        raise ConfigError(
            "A required signature needs a key to check it with.",
            hint="give the signer's public key: --public-key KEY.pub.pem",
        )
    return public_keys


def check_envelope(path: Path) -> Envelope:
    """Read SIGNATURE and check that it is intact; needs no key and no library, and proves nothing about the signer.

    Raises:
        SignatureError: it is not what was written.
    """
    try:
        content = read_file(path, limit=_MAX_BYTES, follow_links=False)
        envelope = from_json(Envelope, json.loads(content), where=SIGNATURE_NAME)
    except (OSError, ValueError, RecursionError, ConfigError) as error:
        raise SignatureError(f"'{path}' is not a signature: {getattr(error, 'strerror', None) or error}.") from error
    if envelope.sha256 != envelope.digest() or envelope.text().encode() != content:
        raise SignatureError(f"'{path}' was changed.", hint="sign the bundle again with 'fcos-deploy sign'")
    return envelope


def check_signature(root: Path, *, manifest: bytes, public_keys: tuple[Path | str, ...]) -> Envelope:
    """Require that one of ``public_keys`` signed ``manifest``, the bytes that were read in ``root``.

    Raises:
        SignatureError: there is no signature, none of these keys made it, or it has expired.
    """
    path = root / SIGNATURE_NAME
    if not os.path.lexists(path):
        raise SignatureError(f"The bundle '{root}' is not signed.", hint="sign it with 'fcos-deploy sign'")
    envelope = check_envelope(path)
    message = _message(manifest, version=envelope.version, expires=envelope.expires)
    check_bytes(message, envelope, public_keys=public_keys, subject=f"the manifest of '{root}'")
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    if envelope.expires and today > envelope.expires:
        raise SignatureError(
            f"The bundle '{root}' expired on {envelope.expires}.", hint="get a newer one from the one who signed it"
        )
    return envelope


def require_no_rollback(name: str, envelope: Envelope, *, memory: VersionMemory = VersionMemory.RAISE) -> None:
    """Refuse an older version of a bundle than this user has opened; ``memory`` says whether this one is remembered.

    What is remembered is the highest version for each key and name, in the user's state folder.

    Raises:
        SignatureError: naming both versions.
    """
    if memory is VersionMemory.IGNORE:
        return
    mark = _version_mark(name, key_id=envelope.key_id)
    if mark is None:
        return
    text = (own_file_bytes(mark, private=True) or b"0").decode(errors="replace")
    highest = int(text) if text.isdecimal() and len(text) < 20 else 0
    if envelope.version < highest:
        raise SignatureError(
            f"The bundle '{name}' is version {envelope.version}, and version {highest} of it was opened here before.",
            hint=f"get the newer one; to go back on purpose, remove '{mark}'",
        )
    if memory is VersionMemory.RAISE and envelope.version > highest:
        write_own_file(mark, str(envelope.version).encode())


def remember_version(name: str, *, key_id: str, version: int) -> None:
    """Make ``version`` the highest that this user has opened, also where it was higher: somebody goes back on purpose.

    Raises:
        OSError: it cannot be written.
    """
    mark = _version_mark(name, key_id=key_id)
    if mark is not None:
        write_own_file(mark, str(version).encode())


def _version_mark(name: str, *, key_id: str) -> Path | None:
    """The file that remembers the version of a bundle; None where this user has no place for it."""
    identity = hashlib.sha256(f"{key_id}\n{name}".encode()).hexdigest()[:32]
    try:
        return own_folder(state_folder() / "versions") / identity
    except ConfigError as error:
        _LOG.info("the versions of bundles are not remembered: %s", error.message)
        return None


def check_bytes(message: bytes, envelope: Envelope, *, public_keys: tuple[Path | str, ...], subject: str = "it") -> str:
    """Require that ``envelope`` is the signature of ``message`` by one of ``public_keys``; returns the key's id.

    Raises:
        SignatureError: none of these keys made it, or not for this message, which is called ``subject``.
    """
    keys = {key_id(key): key for key in map(_public_key, public_keys)}
    if envelope.key_id not in keys:
        raise SignatureError(
            f"{subject[0].upper()}{subject[1:]} was signed by key {envelope.key_id[:16]}..., not by "
            f"{', '.join(f'{identity[:16]}...' for identity in sorted(keys)) or 'a trusted one'}.",
            hint="use the public key of the one who signed it",
        )
    if envelope.algorithm != "ed25519":
        raise SignatureError(f"Signatures of type '{envelope.algorithm[:20]}' are not supported.")
    try:
        signature = base64.b64decode(envelope.signature, validate=True)
        keys[envelope.key_id].verify(signature, message)
    except (exceptions.InvalidSignature, ValueError) as error:
        raise SignatureError(
            f"The signature does not match {subject}: one of the two was changed after signing.",
            hint="get it again from the one who signed it",
        ) from error
    return envelope.key_id


def device_public_key() -> Path | None:
    """The public half of this user's device key, where there is one; both are in the user's state folder."""
    try:
        public = state_folder() / "device-key.pub.pem"
    except ConfigError:
        return None
    return public if own_file_bytes(public) else None


def public_key_text(path: Path) -> str:
    """A public key in PEM form, after checking that it is one."""
    return _public_pem(_public_key(path)).decode()


def _public_pem(key: Ed25519PublicKey | EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def sign_with_device_key(message: bytes) -> Envelope:
    """The signature of this user's device key, which is made on first use.

    Raises:
        ConfigError: there is no place for the key, or others can read it.
    """
    private = state_folder() / "device-key.pem"
    if device_public_key() is None:
        private.unlink(missing_ok=True)  # without its public half: what a power cut left
        generate_key(private, public=private.with_suffix(".pub.pem"))
    return _sign_bytes(message, private_key=private)


def _public_key(source: Path | str) -> Ed25519PublicKey:
    """From a file in PEM form, or from such text."""
    is_text = isinstance(source, str) and source.lstrip().startswith("-----BEGIN")
    name = "The given text" if is_text else f"'{source}'"
    try:
        content = str(source).strip().encode() if is_text else read_file(Path(source), limit=_MAX_BYTES)
        key = serialization.load_pem_public_key(content)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{name} is not a public key in PEM form: {error}.",
            hint="'fcos-deploy sign --generate-key' writes one as *.pub.pem",
        ) from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise ConfigError(f"{name} is not an Ed25519 key.", hint=_NEW_KEY)
    return cast("Ed25519PublicKey", key)


_PAYLOAD_TYPE = "application/vnd.in-toto+json"
# What may change, or appear, after signing; each has a check of its own.
_IGNORED = (LAYERS_FOLDER, LOG_NAME, MODEL_SIGNATURE_NAME, SIGNATURE_NAME)


def _model_statement(name: str, files: Mapping[str, str]) -> bytes:
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

    The hash is the one that belongs to the curve: SHA-256 for P-256, SHA-384 for P-384, SHA-512 for P-521.

    Raises:
        ConfigError: the key file cannot be used.
    """
    key = _private_key(private_key, _EC)
    digests = {"secp256r1": hashes.SHA256, "secp384r1": hashes.SHA384, "secp521r1": hashes.SHA512}
    if key.curve.name not in digests:
        raise ConfigError(
            f"'{private_key}' is a key of the curve '{key.curve.name}'.", hint="use P-256, P-384 or P-521"
        )
    payload = _model_statement(name, files)
    # DSSE signs the payload behind its type and both lengths (PAE, github.com/secure-systems-lab/dsse, protocol.md).
    message = f"DSSEv1 {len(_PAYLOAD_TYPE)} {_PAYLOAD_TYPE} {len(payload)} ".encode() + payload
    signature = key.sign(message, ec.ECDSA(digests[key.curve.name]()))
    hint = hashlib.sha256(_public_pem(key.public_key())).hexdigest()
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
