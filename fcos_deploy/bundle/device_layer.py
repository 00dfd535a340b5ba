"""Device layers: what was built on this device from a bundle's own graphs, recorded beside the certified files.

A layer is a folder with one artifact, its companions and ``layer.json``, which names the parent manifest, the device
and the hashes. ``layer.mac`` authenticates that text with the secret of the user who built it, ``SIGNATURE`` with the
device key. The certified files never change: a layer lies in ``BUNDLE/device/``, which the manifest does not list, or
in a folder of the user where the bundle cannot be written.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import shlex
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from fcos_deploy.bundle.manifest import LAYERS_FOLDER, SIGNATURE_NAME, Artifact, FileRecord
from fcos_deploy.bundle.signature import check_bytes, check_envelope, device_public_key, sign_with_device_key
from fcos_deploy.bundle.store import Bundle
from fcos_deploy.bundle.writer import ArtifactDraft, artifact_of, lock_folder, record_files
from fcos_deploy.core.backend import get_backend
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import BundleError, ConfigError, FcosDeployError, SignatureError
from fcos_deploy.core.files import copy_file, read_file, replace_folder, sync_folder
from fcos_deploy.core.machine import MachineFacts, read_machine, utc_now
from fcos_deploy.core.serialize import from_json, parse_json, to_json
from fcos_deploy.core.trust import Trust, authenticate, is_own, own_folder, state_folder, write_own_file

__all__ = [
    "Choice",
    "Layer",
    "LayerState",
    "copy_layers",
    "describe_layers",
    "device_facts",
    "find_layers",
    "layer_room",
    "machine_words",
    "renew_command",
    "sign_layers",
    "usable_layers",
    "write_layer",
]

_LOG = logging.getLogger(__name__)

_LAYER_NAME, _MAC_NAME = "layer.json", "layer.mac"
_PURPOSE = "device layer"
_PREFIX = b"fcos-deploy device layer, version 1\n"
_MAX_BYTES = 1 << 20
_IDENTITY = ("machine", "processor", "gpus", "board")  # of the device; its other facts are versions, which change


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The precision that ``setup`` chose by latency on this device; ``latency_ms`` has the median of each candidate."""

    precision: Precision
    latency_ms: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Contents of ``layer.json``. Paths are relative to the layer.

    ``parent`` is the SHA-256 of the bundle's manifest, ``device`` what ``device_facts`` says of the device. A layer has
    an artifact, or the choice between artifacts.
    """

    parent: str
    backend: str
    device: dict[str, str]
    artifacts: tuple[Artifact, ...] = ()
    files: tuple[FileRecord, ...] = ()
    choice: Choice | None = None
    created: str = ""
    schema_version: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerState:
    """A layer that lies beside a bundle. ``problem`` says why it is not used; empty for one that is.

    ``other_device``: it was built on another device, which is no fault. ``renew``: the command that builds it anew.
    ``trusted_by``: 'this user', or the id of the device key that signed it.
    """

    name: str
    folder: Path
    layer: Layer | None
    problem: str = ""
    other_device: bool = False
    renew: str = ""
    trusted_by: str = ""

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """With paths relative to the layer."""
        return (*self.layer.artifacts, *self.layer.files) if self.layer else ()

    def fault(self) -> str:
        """Why it may not be used, after its files were hashed; '' when it may."""
        for record in self.files if not self.problem else ():
            try:
                if not record.is_intact(self.folder):
                    return f"'{record.path}' was changed."
            except OSError as error:
                return f"'{record.path}' cannot be read: {error.strerror or error}."
        return self.problem

    @property
    def choice(self) -> Choice | None:
        """What ``setup`` chose on this device, if it did."""
        return self.layer.choice if self.layer else None

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """With paths as the bundle knows them: ``device/NAME/model.engine``."""
        return tuple(
            replace(
                artifact,
                path=f"{self.name}/{artifact.path}",
                companions=tuple(f"{self.name}/{companion}" for companion in artifact.companions),
            )
            for artifact in (self.layer.artifacts if self.layer else ())
        )


def machine_words(machine: MachineFacts) -> dict[str, str]:
    """The device and the versions of its drivers, as far as they are known."""
    facts = {
        "machine": machine.machine,
        "processor": machine.processor,
        "gpus": ", ".join(f"{name} ({capability})" for name, capability in machine.gpus),
        "board": machine.jetson.model if machine.jetson else "",
        "l4t": machine.jetson.l4t if machine.jetson else "",
        "jetpack": machine.jetson.jetpack if machine.jetson else "",
        "driver": machine.nvidia_driver,
        "cuda_driver": machine.cuda_driver,
    }
    return {name: text for name, text in facts.items() if text}


def device_facts(backend: str) -> dict[str, str]:
    """What a build depends on: the device, and the versions of its drivers and of the runtime."""
    version = get_backend(backend).probe().version
    return machine_words(read_machine()) | ({"runtime": version} if version else {})


def renew_command(bundle: Bundle, *, backend: str, precision: Precision) -> str:
    """What to type to build, on this machine, the layer of a backend and precision."""
    words = ["fcos-deploy", "build", str(bundle.source), "--backend", backend]
    if precision is not bundle.manifest.defaults.precision:
        words += ["--precision", str(precision)]
    return shlex.join(words)


def write_layer(
    bundle: Bundle,
    *,
    backend: str,
    make: Callable[[Path], ArtifactDraft] | None = None,
    choice: Choice | None = None,
    label: str = "",
) -> LayerState:
    """Build a layer with ``make``, which leaves its files in the folder it is given, or record a ``choice``.

    It takes its name complete and in one move; an older layer of the same name is replaced. ``label`` tells layers of
    a backend apart.

    Raises:
        BundleError: another process builds a layer of this bundle, or the disk is full.
        ConfigError: there is no place where this user can write one.
    """
    place, facts = _writable_place(bundle), device_facts(backend)
    identity = json.dumps({name: facts.get(name, "") for name in _IDENTITY}, sort_keys=True)
    name = f"{backend}-{label or 'choice'}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    lock = lock_folder(place)
    try:
        for leftover in (*place.glob(".*.partial"), *place.glob(".*.old")):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = place / f".{name}.{uuid.uuid4().hex[:8]}.partial"
        temporary.mkdir(mode=0o755)
        temporary.chmod(0o755)  # whatever the umask: a layer that others can write is not used
        try:
            layer = Layer(
                parent=bundle.manifest_sha256,
                backend=backend,
                device=facts,
                choice=choice,
                created=utc_now(),
            )
            _fill(temporary, layer, make=make, step=f"build-{backend}-{label}")
            replace_folder(temporary, place / name)
        except OSError as error:
            raise BundleError(
                f"Cannot write the layer '{place / name}': {error.strerror or error}.",
                hint="is there room on the disk?",
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    finally:
        os.close(lock)
    return _state(bundle, place / name, Trust(local_builds=True))


def _fill(folder: Path, layer: Layer, *, make: Callable[[Path], ArtifactDraft] | None, step: str) -> None:
    """Build what ``layer`` records, as ``step``, and write its record and the code of this user."""
    started = time.perf_counter()
    draft = make(folder) if make else None
    seconds, records = round(time.perf_counter() - started, 3), record_files(folder)
    if draft is not None:
        layer = replace(layer, artifacts=(artifact_of(draft, records, step=step, seconds=seconds),))
        del records[draft.path]
    layer = replace(layer, files=tuple(records.values()))
    content = (json.dumps(to_json(layer), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
    write_own_file(folder / _LAYER_NAME, content)
    write_own_file(folder / _MAC_NAME, authenticate(_PURPOSE, content).encode())
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    sync_folder(folder)


def _writable_place(bundle: Bundle) -> Path:
    """``BUNDLE/device`` where this user may write it, else a folder of the user for this manifest."""
    for place in _places(bundle):
        try:
            if place.parent == bundle.root:
                if not os.access(bundle.root, os.W_OK):
                    continue
                place.mkdir(mode=0o755, exist_ok=True)
                if is_own(place.stat(), others=0):
                    place.chmod(0o755)
            return own_folder(place)
        except (OSError, ConfigError):
            if place.parent != bundle.root:
                raise
    raise ConfigError(f"There is no place for a layer of '{bundle.source}'.")


def _places(bundle: Bundle) -> Iterator[Path]:
    """Where layers of the bundle may lie; an archive is unpacked into a folder that goes away."""
    if not bundle.is_archive:
        yield bundle.root / LAYERS_FOLDER
    with contextlib.suppress(ConfigError):
        yield state_folder() / "layers" / bundle.manifest_sha256[:32]


def layer_room(bundle: Bundle) -> int:
    """Free bytes where a layer of the bundle would be written.

    Raises:
        ConfigError: there is no place where this user can write one.
    """
    return shutil.disk_usage(_writable_place(bundle)).free


def find_layers(bundle: Bundle) -> list[LayerState]:
    """Every complete layer beside the bundle, with the reason why it is not used, if so; files are not hashed."""
    states = []
    for place in _places(bundle):
        with contextlib.suppress(OSError):
            for folder in sorted(place.iterdir()):
                if not folder.name.startswith(".") and folder.name != "lock":
                    states.append(_state(bundle, folder, bundle.trust))
    return states


def usable_layers(bundle: Bundle, *, backend: str) -> list[LayerState]:
    """The layers of this backend that may be used here; their files are checked, and known to ``bundle`` from now on.

    One that no longer fits is named in a warning with the command that renews it; one of another device is passed over.
    """
    usable = []
    for state in find_layers(bundle):
        if state.layer is None or state.layer.backend != backend:
            continue
        problem = state.fault()
        if not problem:
            bundle.adopt(state.name, state.files, folder=state.folder)
            usable.append(state)
        elif not state.other_device:
            _LOG.warning("The layer '%s' is not used: %s Renew it: %s", state.folder, problem, state.renew)
    return usable


def _state(bundle: Bundle, folder: Path, trust: Trust) -> LayerState:
    name = f"{LAYERS_FOLDER}/{folder.name}"
    try:
        mode = folder.lstat().st_mode
        if not stat.S_ISDIR(mode):
            return LayerState(name=name, folder=folder, layer=None, problem="it is not a folder.")
        content = read_file(folder / _LAYER_NAME, limit=_MAX_BYTES, follow_links=False)
        layer = from_json(Layer, parse_json(content), where=_LAYER_NAME)
    except (OSError, ValueError, TypeError, OverflowError, FcosDeployError) as error:
        return LayerState(name=name, folder=folder, layer=None, problem=f"it is not complete: {error}.")
    precision = layer.artifacts[0].precision if layer.artifacts else bundle.manifest.defaults.precision
    state = LayerState(
        name=name, folder=folder, layer=layer, renew=renew_command(bundle, backend=layer.backend, precision=precision)
    )
    if layer.parent != bundle.manifest_sha256:
        return replace(state, problem="it was built from another bundle.")
    hashes = {record.sha256 for record in bundle.manifest.all_files.values()}
    if any(artifact.parent not in hashes for artifact in layer.artifacts):
        return replace(state, problem="it was not built from a graph of this bundle.")
    try:
        facts = device_facts(layer.backend)
    except ConfigError as error:
        return replace(state, problem=error.message)
    differences = [
        f"{fact}: '{layer.device.get(fact, '')}' then, '{facts.get(fact, '')}' now"
        for fact in sorted({*layer.device, *facts})
        if layer.device.get(fact, "") != facts.get(fact, "")
    ]
    if any(layer.device.get(fact, "") != facts.get(fact, "") for fact in _IDENTITY):
        return replace(state, problem=f"it is of another device ({'; '.join(differences)}).", other_device=True)
    if differences:
        return replace(state, problem=f"it no longer fits this device ({'; '.join(differences)}).")
    try:
        return replace(state, trusted_by=_trusted_by(folder, content, trust))
    except FcosDeployError as error:
        return replace(state, problem=error.message)


def _trusted_by(folder: Path, content: bytes, trust: Trust) -> str:
    """Whose word a layer has: the id of a trusted device key, or 'this user'.

    Raises:
        SignatureError: nobody's who counts.
    """
    signature = folder / SIGNATURE_NAME
    problem = ""
    if os.path.lexists(signature):
        try:
            own = device_public_key()
            keys = (*trust.public_keys, *([own] if own else []))
            return check_bytes(_PREFIX + content, check_envelope(signature), public_keys=keys)
        except FcosDeployError as error:
            problem = error.message
    if trust.public_keys and not trust.local_builds:
        raise SignatureError(
            problem
            or "it is not signed by a device key ('fcos-deploy sign --device BUNDLE'), and local builds are not "
            "trusted (--trust-local-builds)."
        )
    facts = folder.stat()
    if not is_own(facts):
        raise SignatureError("its folder belongs to another user, or others can write it.")
    try:
        mac = read_file(folder / _MAC_NAME, limit=1024, follow_links=False)
        known = hmac.compare_digest(mac, authenticate(_PURPOSE, content).encode())
    except (OSError, ConfigError):
        known = False
    if not known:
        raise SignatureError("it was changed, or built by another user or on another machine.")
    return "this user"


def copy_layers(bundle: Bundle, folder: Path) -> None:
    """Copy the layers that fit this device to ``folder``, the place of layers beside a copy of the bundle.

    Raises:
        OSError: one cannot be read, or there is no room.
    """
    for leftover in folder.glob(".*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    for state in find_layers(bundle):
        target = folder / state.folder.name
        if state.layer is not None and not state.problem and not target.exists():
            temporary = folder / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
            records = (record.path for record in state.files)
            for name in (_LAYER_NAME, _MAC_NAME, SIGNATURE_NAME, *records):
                if os.path.lexists(state.folder / name):
                    copy_file(state.folder / name, temporary / name)
            for path in (folder, temporary, *temporary.rglob("*")):
                path.chmod(0o755 if path.is_dir() else 0o644)
            temporary.rename(target)


def sign_layers(bundle: Bundle) -> list[str]:
    """Sign the layers that this user built on this device with the device key, made on first use; their names.

    Raises:
        ConfigError: there is none.
    """
    signed = []
    for state in find_layers(bundle):
        if not state.fault():
            content = read_file(state.folder / _LAYER_NAME, limit=_MAX_BYTES, follow_links=False)
            _trusted_by(state.folder, content, Trust(local_builds=True))
            envelope = sign_with_device_key(_PREFIX + content)
            write_own_file(state.folder / SIGNATURE_NAME, envelope.text().encode())
            (state.folder / SIGNATURE_NAME).chmod(0o644)
            signed.append(state.name)
    if not signed:
        raise ConfigError(
            f"'{bundle.source}' has no layer of this user and device to sign.",
            hint=f"make one: fcos-deploy setup {shlex.quote(str(bundle.source))}",
        )
    return signed


def describe_layers(bundle: Bundle) -> list[tuple[str, str]]:
    """Name and state of every layer, for people."""
    rows = []
    for state in find_layers(bundle):
        problem = state.fault()
        text = f"not used: {problem}" if problem else f"used, built by {state.trusted_by}"
        rows.append((state.name, text + (f" Renew it: {state.renew}" if problem and not state.other_device else "")))
    return rows
