"""Verifies a bundle on this machine: the same tensors, and the same detections of its golden images, as certified."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.gate import Verdict
from fcos_deploy.accuracy.golden import (
    MIN_EVIDENCE,
    GoldenCheck,
    GoldenResult,
    PreprocessingResult,
    check_golden,
    check_preprocessing,
    compare_golden,
    golden_standard,
    match_rate,
    read_golden_image,
)
from fcos_deploy.bundle.device_layer import Layer, device_facts, machine_words, usable_layers
from fcos_deploy.bundle.manifest import Artifact
from fcos_deploy.bundle.selection import Fallback, Selection, select_artifact, select_runnable, tuned_options
from fcos_deploy.bundle.signature import Envelope, check_bytes, device_public_key, public_key_text, sign_with_device_key
from fcos_deploy.bundle.store import Bundle, append_log
from fcos_deploy.core.artifact import read_contract
from fcos_deploy.core.backend import Session, SessionOptions, Tensors, all_backends
from fcos_deploy.core.contract import ModelContract, TensorSpec
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import (
    AccuracyGateError,
    BackendError,
    BundleError,
    ConfigError,
    FcosDeployError,
    InconclusiveError,
    SignatureError,
)
from fcos_deploy.core.files import read_file, write_text
from fcos_deploy.core.gate import Gate, Outcome, compare_detections, overall_outcome
from fcos_deploy.core.libraries import recorded_versions
from fcos_deploy.core.machine import read_machine, utc_now
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.serialize import from_json, parse_json, to_json
from fcos_deploy.detector import Detector
from runtimes import kserve

__all__ = [
    "DeviceRecord",
    "ReadRecord",
    "RecordedRun",
    "RecordedSession",
    "VerificationRecord",
    "VerifyOptions",
    "export_record",
    "read_recorded_run",
    "read_records",
    "record_verdicts",
    "require_verified",
    "verify_bundle",
    "write_record",
]


_FORMAT = "fcos-deploy trtexec record, version 1"
_MAX_RUN_BYTES = 1 << 30  # outputs of several images as text


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedTensor:
    """A tensor's shape, and its values as little-endian float32 in base64."""

    shape: tuple[int, ...]
    float32: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedImage:
    """The outputs for the input tensor with this SHA-256."""

    inputs_sha256: str
    outputs: dict[str, RecordedTensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
    """What ``run_trtexec.py`` wrote on the device; ``median_ms`` is trtexec's, of the network alone."""

    format: str
    manifest_sha256: str
    onnx_sha256: str
    engine_sha256: str
    images: tuple[RecordedImage, ...]
    time: str
    version: str
    machine: dict[str, str]
    median_ms: float | None = None

    def artifact(self, bundle: Bundle) -> Artifact:
        """The graph of the bundle that the engine was built from.

        Raises:
            ConfigError: the record is of another bundle.
        """
        graphs = [artifact for artifact in bundle.manifest.artifacts if artifact.sha256 == self.onnx_sha256]
        if self.manifest_sha256 != bundle.manifest_sha256 or not graphs:
            raise ConfigError(
                f"The record belongs to another bundle, not to '{bundle.source}'.",
                hint="give the bundle that 'fcos-deploy package --for trtexec' was called on",
            )
        return graphs[0]


def read_recorded_run(path: Path) -> RecordedRun:
    """Read a record.

    Raises:
        ConfigError: it is none.
    """
    run = _read_json(
        RecordedRun, path, limit=_MAX_RUN_BYTES, what="a record of trtexec", hint="run_trtexec.py writes one"
    )
    if run.format != _FORMAT:
        raise ConfigError(f"'{path}' is not a record of this version.", hint="package the bundle again")
    return run


_T = TypeVar("_T")


def _read_json(kind: type[_T], path: Path, *, limit: int, what: str, hint: str) -> _T:
    """The ``kind`` in a JSON file of at most ``limit`` bytes, which is called ``what`` in errors."""
    try:
        return from_json(kind, parse_json(read_file(path, limit=limit)), where=path.name)
    except OSError as error:
        raise ConfigError(f"Cannot read the record '{path}': {error.strerror or error}.", hint=hint) from error
    except (ValueError, TypeError, FcosDeployError) as error:
        raise ConfigError(f"'{path}' is not {what}: {error}.", hint=hint) from error


class RecordedSession(Session):
    """Answers with the recorded outputs of the tensor that it is given."""

    def __init__(self, run: RecordedRun, contract: ModelContract) -> None:
        self._outputs = {image.inputs_sha256: image.outputs for image in run.images}
        self._dtypes = {spec.name: spec.dtype for spec in contract.output_specs}
        description = {"backend": "trtexec", "version": run.version, "device": run.machine.get("board", "")}
        super().__init__(
            inputs=tuple(TensorSpec(spec.name, spec.dtype, (1, *spec.shape[1:])) for spec in contract.input_specs),
            outputs=contract.output_specs,
            description={**description, "engine_sha256": run.engine_sha256, "median_ms": str(run.median_ms or "")},
        )

    def _run(self, feeds: Tensors) -> Tensors:
        key = hashlib.sha256(feeds["images"].tobytes()).hexdigest()
        if key not in self._outputs:
            raise BackendError(
                "The record has no outputs for this image as it is preprocessed here.",
                hint="package the bundle again on this machine, and run run_trtexec.py on the device",
            )
        return {name: self._tensor(name, tensor) for name, tensor in self._outputs[key].items() if name in self._dtypes}

    def _tensor(self, name: str, tensor: RecordedTensor) -> Any:  # Any: an array of the output's own dtype
        try:
            values = np.frombuffer(base64.b64decode(tensor.float32, validate=True), "<f4")
            if len(values) != math.prod(tensor.shape):
                raise ValueError(f"{len(values)} values for the shape {list(tensor.shape)}")
            return values.reshape(tensor.shape).astype(self._dtypes[name])
        except ValueError as error:
            raise BackendError(f"The recorded output '{name}' is damaged: {error}.") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """What is verified. Empty backend and None: the defaults of the manifest.

    ``server`` is the address of a model on a server of the Open Inference Protocol; it is then asked in place of a
    local runtime, and has to give the certified detections of the artifact that ``backend`` and ``precision`` choose.
    ``recorded``: outputs that trtexec computed on a device, in place of a runtime. ``detected``: by SHA-256 of an
    artifact what it gave, in this process with this ``session``, for the golden images; it is opened, and not run again
    if they are preprocessed to the very bytes that were certified.
    """

    backend: str = ""
    server: str = ""
    precision: Precision | None = None
    allow_fallback: bool = False
    recorded: RecordedRun | None = None
    session: SessionOptions = field(default_factory=SessionOptions)
    detected: Mapping[str, Sequence[Detections]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationRecord:
    """What was verified where, and the verdict; one line of a bundle's log. Times are UTC; ``seconds`` wall clock."""

    bundle: str
    manifest_sha256: str
    artifact: str
    artifact_sha256: str
    backend: str
    precision: Precision
    outcome: Outcome
    matched: float
    gate: Gate
    preprocessing: PreprocessingResult
    images: tuple[GoldenResult, ...]
    time: str
    seconds: float
    session: dict[str, str]
    machine: dict[str, str]
    versions: dict[str, str]
    values: GoldenCheck | None = None
    fallbacks: tuple[Fallback, ...] = ()
    signed_by: str = ""

    @property
    def passed(self) -> bool:
        """Whether this machine was shown to give the certified detections."""
        return self.outcome is Outcome.PASSED

    @property
    def summary(self) -> str:
        """One sentence."""
        if not self.preprocessing.passed:
            return f"preprocessing differs: {self.preprocessing.problem}"
        if self.outcome is Outcome.INCONCLUSIVE:
            problems = self.values.problems if self.values else ()
            return "; ".join(problems) or "the golden images have no detection that could be compared"
        missed, extra = (sum(getattr(i, name) for i in self.images) for name in ("missed", "extra"))
        needed = self.gate.min_match_rate or 0.0
        rate = (
            f"{self.matched:.1%} of the golden detections match (needed: {needed:.1%}); {missed} missed, {extra} extra"
        )
        if match_rate(self.images) is None:
            rate = "no golden detection is clear of the score threshold"
        # The plainest faults come first; what else follows from them fills no line.
        faults = self.values.problems[:_SHOWN_PROBLEMS] if self.values else ()
        return "; ".join((rate, *faults))


_SHOWN_PROBLEMS = 3


def verify_bundle(
    bundle: Bundle, *, options: VerifyOptions | None = None, progress: ProgressFn = no_progress
) -> VerificationRecord:
    """Preflight, then preprocessing, then the golden images through the runtime.

    The record says whether all of it passed; ``require_verified`` turns a failure into an error.

    Raises:
        DeviceError: this machine cannot run the artifact.
        BundleError: the bundle has no golden images, or no gate for the precision.
    """
    options = options or VerifyOptions()
    started = time.perf_counter()
    if not bundle.manifest.golden:
        raise BundleError(f"The bundle '{bundle.source}' has no golden images to verify with.")
    selection, fallbacks = _selected(bundle, options)
    if options.recorded is None and not options.server:
        options = replace(options, session=tuned_options(bundle, selection, options.session))
    manifest, artifact = bundle.manifest, selection.artifact
    standard = golden_standard(manifest, artifact, backend=selection.backend, compute=options.session.compute_type)
    images = [read_golden_image(bundle.read(golden.path), golden) for golden in manifest.golden]
    preprocessing = check_preprocessing(manifest, images)
    same_tensors = preprocessing.exact == preprocessing.images
    detected = list(options.detected.get(artifact.sha256, ())) if same_tensors else []
    session: dict[str, str] = {}
    if preprocessing.passed:
        with _open(bundle.path(artifact.path), selection.backend, options) as detector:
            for index, image in enumerate(images[len(detected) :], start=len(detected) + 1):
                detected.append(_detect_in_every_place(detector, image))
                progress("verify", index, len(images))
            session = dict(detector.session.description)
    bundle.require_not_replaced()
    results: tuple[GoldenResult, ...] = ()
    values, matched, outcome = None, None, Outcome.FAILED
    if preprocessing.passed:
        results, values = compare_golden(standard, detected), check_golden(standard, detected)
        matched = match_rate(results)
        # A share of nothing decides nothing.
        matching = [] if matched is None else [_match_outcome(matched, standard.gate)]
        outcome = overall_outcome([*matching, values.outcome]) or Outcome.INCONCLUSIVE
    machine = read_machine()
    return VerificationRecord(
        bundle=manifest.name,
        manifest_sha256=bundle.manifest_sha256,
        artifact=artifact.path,
        artifact_sha256=artifact.sha256,
        backend="kserve" if options.server else selection.backend,
        precision=artifact.precision,
        outcome=outcome,
        matched=round(matched or 0.0, 6),
        gate=standard.gate,
        preprocessing=preprocessing,
        images=results,
        values=values,
        time=options.recorded.time if options.recorded else utc_now(),
        seconds=round(time.perf_counter() - started, 3),
        session=session,
        machine=options.recorded.machine if options.recorded else {"system": machine.system, **machine_words(machine)},
        versions=recorded_versions(),
        fallbacks=fallbacks,
        signed_by=bundle.signed_by,
    )


def _selected(bundle: Bundle, options: VerifyOptions) -> tuple[Selection, tuple[Fallback, ...]]:
    """What is verified: what a device recorded, what a server runs, or what this machine would run."""
    if options.recorded is not None:
        return Selection(options.recorded.artifact(bundle), "tensorrt"), ()
    if options.server:  # It has a machine of its own, which preflight cannot see.
        precisions = (options.precision,) if options.precision else ()
        return select_artifact(bundle, backend=options.backend, precisions=precisions), ()
    return select_runnable(
        bundle, backend=options.backend, precision=options.precision, allow_fallback=options.allow_fallback
    )


def _match_outcome(rate: float | None, gate: Gate) -> Outcome:
    if rate is None:
        return Outcome.INCONCLUSIVE
    return Outcome.PASSED if rate >= (gate.min_match_rate or 0.0) else Outcome.FAILED


def _open(path: Path, backend: str, options: VerifyOptions) -> Detector:
    """The artifact in its runtime, on a server, or as outputs that a device recorded."""
    if options.recorded is None and not options.server:
        return Detector.open(path, backend=backend, options=options.session)
    contract = read_contract(path)
    if options.recorded is not None:
        return Detector(RecordedSession(options.recorded, contract), contract)
    remote = kserve.RemoteModel(url=options.server, contract=contract)
    return Detector(kserve.open_model(remote, options.session), contract)


def _detect_in_every_place(detector: Detector, image: NDArray[np.uint8]) -> Detections:
    """What is detected in ``image`` at the first place of a request, or at another one where that is something else.

    A model of a fixed batch computes all places anyway; of an open one the second shows whether places are told apart.
    """
    fixed = next(spec.shape[0] for spec in detector.session.inputs if spec.name == "images")
    places = fixed or min(detector.batch, 2)
    if places == 1:
        return detector.detect(image)
    feeds, letterboxes = detector.prepare([image] * places)
    first, *others = detector.finish(detector.infer(feeds), letterboxes)
    agreements = ((compare_detections({0: first}, {0: place}), place) for place in others)
    return next((place for agreement, place in agreements if not agreement.same_outputs), first)


def record_verdicts(record: VerificationRecord) -> tuple[Verdict, ...]:
    """The judgements behind ``record.passed``: on preprocessing, and on the golden detections."""
    subject, prepared = f"{record.backend} {record.precision}", record.preprocessing
    same = f"{prepared.exact} of {prepared.images} golden images give the same bytes, the others the same image"
    not_run = "the golden images were not run: preprocessing differs"
    replay = record.summary if prepared.passed else not_run
    values = record.values
    rate = None if match_rate(record.images) is None else record.matched
    passed = Outcome.PASSED if prepared.passed else Outcome.FAILED
    matched = _match_outcome(rate, record.gate) if prepared.passed else Outcome.FAILED
    verdicts = (
        ("preprocessing", passed, prepared.difference, prepared.allowed, prepared.problem or same),
        ("min_match_rate", matched, record.matched, record.gate.min_match_rate or 0.0, replay),
        ("values", values.outcome, values.evidence, MIN_EVIDENCE, values.summary)
        if values
        else ("values", Outcome.FAILED, 0, MIN_EVIDENCE, not_run),
    )
    return tuple(
        Verdict(name=name, subject=subject, outcome=outcome, value=value, limit=limit, message=message)
        for name, outcome, value, limit, message in verdicts
    )


def require_verified(record: VerificationRecord, *, allow_inconclusive: bool = False) -> None:
    """Raise when the machine does not give the certified detections.

    Raises:
        AccuracyGateError: with the figures.
        InconclusiveError: there is nothing to compare, and that was not allowed.
    """
    if record.outcome is Outcome.INCONCLUSIVE and not allow_inconclusive:
        raise InconclusiveError(
            f"Inconclusive: '{record.artifact}' on '{record.backend}': {record.summary}.",
            hint="make the bundle with images that show objects: 'fcos-deploy deploy' with --images",
        )
    if record.outcome is Outcome.FAILED:
        raise AccuracyGateError(
            f"'{record.artifact}' on '{record.backend}' is not the certified detector: {record.summary}.",
            hint="see which stage diverges with 'fcos-deploy parity', or make the bundle for this machine",
        )


def write_record(record: VerificationRecord, *, bundle: Bundle, log: Path | None = None) -> Path | None:
    """Append ``record`` to ``log``, or to the bundle's own; None when that cannot be written (archive, read-only).

    Raises:
        ConfigError: ``log`` cannot be written.
    """
    path = log or bundle.log_path
    if path is None:
        return None
    try:
        append_log(path, to_json(record))
    except OSError as error:
        if log is None:
            return None
        raise ConfigError(
            f"Cannot write '{log}': {error.strerror or error}.", hint="choose a folder that exists and can be written"
        ) from error
    return path


# Device records: what a device verified, as one file that comes home to the person who signs a bundle off.

_RECORD_FORMAT = "fcos-deploy device record, version 1"
_RECORD_PREFIX = f"{_RECORD_FORMAT}\n".encode()
_MAX_RECORD_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRecord:
    """``verification`` on the device that ``device`` describes; ``layer`` where the artifact was built there.

    ``latency_ms``: medians that ``setup`` measured, by precision. ``public_key`` is the device's, in PEM form.
    """

    verification: VerificationRecord
    device: dict[str, str]
    layer: Layer | None = None
    latency_ms: dict[str, float] | None = None
    public_key: str = ""
    format: str = _RECORD_FORMAT


@dataclass(frozen=True, slots=True, kw_only=True)
class _Signed:
    record: DeviceRecord
    signature: Envelope | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRecord:
    """A record that was read and belongs to the bundle; ``signed_by`` is '' for one that nobody signed."""

    path: Path
    record: DeviceRecord
    signed_by: str = ""

    @property
    def device(self) -> str:
        """The device in words."""
        facts = self.record.device
        return facts.get("board") or facts.get("gpus") or facts.get("processor", "unknown")


def export_record(
    path: Path, verification: VerificationRecord, *, bundle: Bundle, latency_ms: dict[str, float] | None = None
) -> str:
    """Write the record; signed, and the key's id returned, where this user has a device key.

    Raises:
        ConfigError: the file cannot be written.
    """
    known = verification.backend in all_backends()
    layers = usable_layers(bundle, backend=verification.backend) if known else []
    layer = next((s.layer for s in layers if verification.artifact in {a.path for a in s.artifacts}), None)
    key = device_public_key()
    record = DeviceRecord(
        verification=verification,
        device=device_facts(verification.backend) if known else dict(verification.machine),
        layer=layer,
        latency_ms=latency_ms or None,
        public_key=public_key_text(key) if key else "",
    )
    signature = sign_with_device_key(_RECORD_PREFIX + _content(record)) if key else None
    signed = _Signed(record=record, signature=signature)
    write_text(path, json.dumps(to_json(signed), indent=1, sort_keys=True, allow_nan=False) + "\n")
    return signature.key_id if signature else ""


def _content(record: DeviceRecord) -> bytes:
    """What is signed: the record in one spelling of its JSON."""
    return json.dumps(to_json(record), sort_keys=True, allow_nan=False, separators=(",", ":")).encode()


def read_records(
    paths: Sequence[Path], *, bundle: Bundle, public_keys: tuple[Path | str, ...] = ()
) -> list[ReadRecord]:
    """Read the records of several devices, all of this bundle; with ``public_keys`` one of them must have signed each.

    Raises:
        ConfigError: naming a file that is no record, is of another bundle or artifact, or contradicts another one.
        SignatureError: naming one whose signature does not fit, or is not of a given key.
    """
    records = [_read(path, bundle=bundle, public_keys=public_keys) for path in paths]
    seen: dict[tuple[str, ...], ReadRecord] = {}
    for item in records:
        verification = item.record.verification
        key = (
            json.dumps(item.record.device, sort_keys=True),
            item.record.public_key,
            verification.artifact_sha256,
            verification.backend,
        )
        earlier = seen.setdefault(key, item)
        if earlier is not item and earlier.record.verification.outcome is not verification.outcome:
            raise ConfigError(
                f"'{earlier.path}' and '{item.path}' contradict each other: the same device and artifact, "
                f"{earlier.record.verification.outcome} and {verification.outcome}.",
                hint="verify again on the device, and give its last record alone",
            )
    return records


def _read(path: Path, *, bundle: Bundle, public_keys: tuple[Path | str, ...]) -> ReadRecord:
    again = "write it on the device: fcos-deploy verify BUNDLE --export record.json"
    signed = _read_json(_Signed, path, limit=_MAX_RECORD_BYTES, what="a device record", hint=again)
    record = signed.record
    verification, layer = record.verification, record.layer
    if record.format != _RECORD_FORMAT:
        raise ConfigError(f"'{path}' is not a device record of this version.", hint=again)
    if verification.manifest_sha256 != bundle.manifest_sha256:
        raise ConfigError(
            f"'{path}' belongs to another bundle: its manifest is {verification.manifest_sha256[:16]}..., that of "
            f"'{bundle.source}' is {bundle.manifest_sha256[:16]}....",
            hint="give the records of this bundle",
        )
    _require_known_artifact(path, verification, layer, bundle)
    signed_by = ""
    if signed.signature is not None:
        keys: tuple[Path | str, ...] = public_keys or (record.public_key,)
        try:
            signed_by = check_bytes(
                _RECORD_PREFIX + _content(record), signed.signature, public_keys=keys, subject=f"'{path}'"
            )
        except ConfigError as error:
            raise SignatureError(f"'{path}': {error.message}") from error
    elif public_keys:
        raise SignatureError(
            f"'{path}' is not signed.", hint="make a device key on the device: fcos-deploy sign --device BUNDLE"
        )
    return ReadRecord(path=path, record=record, signed_by=signed_by)


def _require_known_artifact(path: Path, verification: VerificationRecord, layer: Layer | None, bundle: Bundle) -> None:
    """Refuse a record of an artifact that is neither the bundle's nor built from a graph of it."""
    certified = bundle.manifest.artifacts
    hashes = {artifact.sha256 for artifact in certified}
    if layer is not None and layer.parent == bundle.manifest_sha256:
        hashes |= {artifact.sha256 for artifact in layer.artifacts if artifact.parent in hashes}
    if verification.artifact_sha256 not in hashes:
        raise ConfigError(
            f"'{path}' is of an artifact, '{verification.artifact}', that is neither the bundle's nor built from one "
            "of its graphs.",
            hint="give the records of this bundle",
        )
