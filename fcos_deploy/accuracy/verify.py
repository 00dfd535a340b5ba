"""Verifies a bundle on this machine: the same tensors, and the same detections of its golden images, as certified."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.gate import Verdict
from fcos_deploy.accuracy.golden import (
    MIN_EVIDENCE,
    GoldenCheck,
    check_golden,
    fingerprint,
    fingerprint_difference,
    image_scale,
    judged_floor,
    read_golden_image,
)
from fcos_deploy.bundle.device_layer import Layer, device_facts, usable_layers
from fcos_deploy.bundle.manifest import Artifact, Manifest, TensorFingerprint
from fcos_deploy.bundle.selection import Fallback, Selection, select_artifact, select_runnable
from fcos_deploy.bundle.signature import (
    Envelope,
    check_bytes,
    device_public_key,
    public_key_text,
    sign_with_device_key,
)
from fcos_deploy.bundle.store import Bundle, append_log
from fcos_deploy.core.artifact import read_contract
from fcos_deploy.core.backend import Session, SessionOptions, Tensors, all_backends
from fcos_deploy.core.contract import ModelContract, TensorSpec
from fcos_deploy.core.decode import DecodeSpec
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import ComputeType, Precision
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
from fcos_deploy.core.gate import Gate, MatchOptions, Outcome, match_detections, overall_outcome
from fcos_deploy.core.libraries import library_versions
from fcos_deploy.core.machine import MachineFacts, read_machine
from fcos_deploy.core.preprocess import ChannelOrder, PreprocessSpec, preprocess
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.serialize import from_json, parse_json, to_json
from fcos_deploy.detector import Detector
from runtimes.kserve import RemoteModel, write_remote_model

__all__ = [
    "DeviceRecord",
    "GoldenResult",
    "GoldenStandard",
    "ReadRecord",
    "RecordedRun",
    "RecordedSession",
    "VerificationRecord",
    "VerifyOptions",
    "compare_golden",
    "export_record",
    "golden_standard",
    "read_recorded_run",
    "read_records",
    "record_verdicts",
    "require_verified",
    "verify_bundle",
    "write_record",
]


_FORMAT = "fcos-deploy trtexec record, version 1"
_MAX_BYTES = 1 << 30  # of a record: outputs of several images as text


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
                f"The record is of another bundle than '{bundle.source}'.",
                hint="give the bundle that 'fcos-deploy package --for trtexec' was called on",
            )
        return graphs[0]


def read_recorded_run(path: Path) -> RecordedRun:
    """Read a record.

    Raises:
        ConfigError: it is none.
    """
    try:
        run = from_json(RecordedRun, parse_json(read_file(path, limit=_MAX_BYTES)), where=path.name)
    except OSError as error:
        raise ConfigError(
            f"Cannot read the record '{path}': {error.strerror or error}.", hint="run_trtexec.py writes one"
        ) from error
    except (ValueError, TypeError, FcosDeployError) as error:
        raise ConfigError(f"'{path}' is not a record of trtexec: {error}.", hint="run_trtexec.py writes one") from error
    if run.format != _FORMAT:
        raise ConfigError(f"'{path}' is not a record of this version.", hint="package the bundle again")
    return run


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
    ``recorded``: outputs that trtexec computed on a device, in place of a runtime.
    """

    backend: str = ""
    server: str = ""
    precision: Precision | None = None
    allow_fallback: bool = False
    recorded: RecordedRun | None = None
    session: SessionOptions = field(default_factory=SessionOptions)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessingResult:
    """Preprocessed tensors against their fingerprints: ``exact`` of ``images`` have the same bytes.

    ``difference``, of the worst image, and ``allowed`` are in levels of an 8-bit image. ``problem`` names the fault.
    """

    exact: int
    images: int
    difference: float
    passed: bool
    problem: str = ""
    allowed: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenResult:
    """One golden image: how many detections were ``expected`` and ``detected``, and how far apart the pairs are.

    Only detections that score high enough to be judged count; see ``judged_floor``.
    """

    path: str
    expected: int
    detected: int
    missed: int
    extra: int
    lowest_iou: float
    largest_score_difference: float


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
        if _match_rate(self.images) is None:
            rate = "no golden detection is clear of the score threshold"
        # The plainest faults come first; what else follows from them fills no line.
        faults = self.values.problems[:_SHOWN_PROBLEMS] if self.values else ()
        return "; ".join((rate, *faults))


_SHOWN_PROBLEMS = 3
_FOUND_AGAIN = 0.97  # of what matched where the bundle was made, in other kernels (benchmarks/golden_faults.py)

# In levels of an 8-bit image, over cells of at least 64 pixels: other versions of OpenCV and Pillow round single
# pixels differently by one level; a wrong channel order, mean or offset moves a cell by several.
_MAX_CELL_DIFFERENCE = 0.5


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
    machine = read_machine()
    fallbacks: tuple[Fallback, ...] = ()
    if options.recorded is not None:
        selection = Selection(options.recorded.artifact(bundle), "tensorrt")
    elif options.server:  # It has a machine of its own, which preflight cannot see.
        precisions = (options.precision,) if options.precision else ()
        selection = select_artifact(bundle, backend=options.backend, precisions=precisions)
    else:
        selection, fallbacks = select_runnable(
            bundle,
            backend=options.backend,
            precision=options.precision,
            allow_fallback=options.allow_fallback,
            machine=machine,
        )
    manifest, artifact = bundle.manifest, selection.artifact
    standard = golden_standard(manifest, artifact, backend=selection.backend, compute=options.session.compute)
    images = [read_golden_image(bundle.read(golden.path), golden) for golden in manifest.golden]
    preprocessing = _check_preprocessing(manifest, images)
    results: tuple[GoldenResult, ...] = ()
    values: GoldenCheck | None = None
    session: dict[str, str] = {}
    if preprocessing.passed:
        detected = []
        with _opened(bundle.path(artifact.path), selection.backend, options) as detector:
            for index, image in enumerate(images, start=1):
                detected.append(detector.detect(image))
                progress("verify", index, len(images))
            session = dict(detector.session.description)
        decode = manifest.contract.decode
        results = _compare(standard.expected, detected, standard.paths, decode=decode, gate=standard.gate)
        values = check_golden(
            standard.expected,
            detected,
            baseline=standard.certified,
            same_artifact=standard.same_artifact,
            gate=standard.gate,
            decode=decode,
            names=manifest.contract.class_names,
            paths=standard.paths,
            scales=standard.scales,
        )
    bundle.require_not_replaced()
    matched = _match_rate(results)
    # What preprocessing, the share that matches and the values come to; a share of nothing decides nothing.
    outcome = Outcome.FAILED
    if values is not None:
        matching = [] if matched is None else [_match_outcome(matched, standard.gate)]
        outcome = overall_outcome([*matching, values.outcome]) or Outcome.INCONCLUSIVE
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
        time=options.recorded.time
        if options.recorded
        else datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - started, 3),
        session=session,
        machine=options.recorded.machine if options.recorded else _machine_text(machine),
        versions=library_versions("fcos-deploy", "numpy", "opencv-python-headless", "pillow"),
        fallbacks=fallbacks,
        signed_by=bundle.signed_by,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GoldenStandard:
    """What an artifact's golden detections are judged by; lists are in the order of the manifest's golden images.

    ``expected``: the reference's detections. ``certified``: those of the same artifact where the bundle was made
    (``same_artifact``, also for the graph that it was built from), or of its nearest relative; None without one.
    ``scales``: image pixels per network-input pixel.
    """

    gate: Gate
    expected: list[Detections]
    certified: list[Detections] | None
    same_artifact: bool
    paths: list[str]
    scales: list[float]


def golden_standard(manifest: Manifest, artifact: Artifact, *, backend: str, compute: ComputeType) -> GoldenStandard:
    """What ``verify_bundle`` holds ``artifact`` to, in ``backend`` with this compute type.

    Raises:
        BundleError: the bundle has no gate for the precision.
    """
    paths = [golden.path for golden in manifest.golden]
    expected = [golden.detections.to_detections() for golden in manifest.golden]
    run = manifest.golden_run(artifact, backend=backend, compute=compute)
    certified = None if run is None else [detections.to_detections() for detections in run.detections]
    gate = manifest.gate(_coarser(artifact.precision, compute))
    if run is not None and certified is not None and run.artifact == artifact.path:
        # Whether that accuracy is enough was judged where the bundle was made, by the limits of the deployment; here it
        # must be the same.
        rate = _match_rate(_compare(expected, certified, paths, decode=manifest.contract.decode, gate=gate))
        if rate is not None and rate < (gate.min_match_rate or 0.0):
            gate = replace(gate, min_match_rate=round(rate * _FOUND_AGAIN, 6))
    parents = {record.path for record in manifest.artifacts if record.sha256 == artifact.parent}
    return GoldenStandard(
        gate=gate,
        expected=expected,
        certified=certified,
        same_artifact=run is not None and run.artifact in {artifact.path, *parents},
        paths=paths,
        scales=[image_scale(manifest.contract, (golden.height, golden.width)) for golden in manifest.golden],
    )


def _coarser(own: Precision, compute: ComputeType) -> Precision:
    """The artifact's precision, or that of the format in which the runtime was asked to compute.

    bf16 has eight bits of mantissa, as many as int8 has in all.
    """
    by_compute = {ComputeType.F16: Precision.FP16, ComputeType.BF16: Precision.INT8}
    return own if own is Precision.INT8 else by_compute.get(compute, own)


def _match_rate(results: Sequence[GoldenResult]) -> float | None:
    """The share of the judged detections that match; None when there are none."""
    judged = sum(result.expected + result.detected for result in results)
    return 1.0 - sum(result.missed + result.extra for result in results) / judged if judged else None


def _match_outcome(rate: float | None, gate: Gate) -> Outcome:
    if rate is None:
        return Outcome.INCONCLUSIVE
    return Outcome.PASSED if rate >= (gate.min_match_rate or 0.0) else Outcome.FAILED


def _check_preprocessing(manifest: Manifest, images: Sequence[NDArray[np.uint8]]) -> PreprocessingResult:
    """Prepare every golden image and compare the tensors with their fingerprints; the largest fault is named."""
    spec = manifest.contract.preprocess
    exact, largest, problem = 0, 0.0, ""
    for golden, image in zip(manifest.golden, images, strict=True):
        actual = fingerprint(preprocess(image, spec)[0])
        difference = fingerprint_difference(actual, golden.fingerprint, spec=spec)
        exact += actual.sha256 == golden.fingerprint.sha256
        if difference > largest:
            largest = difference
            problem = f"'{golden.path}': {_name_fault(image, actual, golden.fingerprint, spec=spec)}"
    passed = largest <= _MAX_CELL_DIFFERENCE
    return PreprocessingResult(
        exact=exact,
        images=len(images),
        # JSON has no infinity: another shape or dtype is more than any difference of levels.
        difference=round(min(largest, 1e9), 4),
        passed=passed,
        problem="" if passed else problem,
        allowed=_MAX_CELL_DIFFERENCE,
    )


def _name_fault(
    image: NDArray[np.uint8], actual: TensorFingerprint, expected: TensorFingerprint, *, spec: PreprocessSpec
) -> str:
    """Say what is wrong with a tensor: its shape or type, swapped colour channels, or else how much differs."""
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        return f"the tensor must be {expected.dtype}{list(expected.shape)}, it is {actual.dtype}{list(actual.shape)}"
    swapped = {ChannelOrder.RGB: ChannelOrder.BGR, ChannelOrder.BGR: ChannelOrder.RGB}.get(spec.channel_order)
    tensor, _ = preprocess(image, replace(spec, channel_order=swapped or spec.channel_order))
    if swapped and fingerprint_difference(fingerprint(tensor), expected, spec=spec) <= _MAX_CELL_DIFFERENCE:
        return f"the colour channels are swapped: they are {spec.channel_order}, they must be {swapped}"
    difference = fingerprint_difference(actual, expected, spec=spec)
    return f"a region differs by {difference:.2f} of 255 levels (allowed: {_MAX_CELL_DIFFERENCE})"


@contextmanager
def _opened(path: Path, backend: str, options: VerifyOptions) -> Iterator[Detector]:
    """The artifact in its runtime, on a server, or as outputs that a device recorded."""
    if options.recorded is not None:
        contract = read_contract(path)
        with Detector(RecordedSession(options.recorded, contract), contract) as detector:
            yield detector
    elif options.server:
        with tempfile.TemporaryDirectory(prefix="fcos-deploy-") as folder:
            remote = Path(folder, "server.kserve")
            write_remote_model(remote, RemoteModel(url=options.server, contract=read_contract(path)))
            with Detector.open(remote, options=options.session) as detector:
                yield detector
    else:
        with Detector.open(path, backend=backend, options=options.session) as detector:
            yield detector


def _compare(
    expected: Sequence[Detections],
    detected: Sequence[Detections],
    paths: Sequence[str],
    *,
    decode: DecodeSpec,
    gate: Gate,
) -> tuple[GoldenResult, ...]:
    """Pair the detections of every golden image with the reference's.

    A detection is judged only where the gate's score difference cannot decide whether it is there at all
    (``judged_floor``).
    """
    rule = MatchOptions.of_gate(gate)
    results = []
    for reference, detections, path in zip(expected, detected, paths, strict=True):
        floor = judged_floor(decode, (reference, detections), margin=rule.max_score_delta)
        results.append(compare_golden(reference, detections, options=replace(rule, min_score=floor), path=path))
    return tuple(results)


def compare_golden(
    expected: Detections, detections: Detections, *, options: MatchOptions, path: str = ""
) -> GoldenResult:
    """Pair a detector's ``detections`` with the ``expected`` ones, both in image pixels."""
    match = match_detections(expected, detections, options=options)
    score = np.abs(expected.scores[match.reference] - detections.scores[match.candidate])
    judged_expected, judged = expected.scores >= options.min_score, detections.scores >= options.min_score
    counted = judged_expected[match.reference] | judged[match.candidate]
    return GoldenResult(
        path=path,
        expected=int(judged_expected.sum()),
        detected=int(judged.sum()),
        missed=len(match.missed),
        extra=len(match.extra),
        lowest_iou=round(float(match.iou[counted].min(initial=1.0)), 6),
        largest_score_difference=round(float(score[counted].max(initial=0.0)), 6),
    )


def _machine_text(machine: MachineFacts) -> dict[str, str]:
    texts = {
        "system": machine.system,
        "machine": machine.machine,
        "processor": machine.processor,
        "gpus": ", ".join(f"{name} ({capability})" for name, capability in machine.gpus),
        "driver": machine.nvidia_driver,
        "cuda_driver": machine.cuda_driver,
    }
    return {name: text for name, text in texts.items() if text}


def record_verdicts(record: VerificationRecord) -> tuple[Verdict, ...]:
    """The judgements behind ``record.passed``: on preprocessing, and on the golden detections."""
    subject, prepared = f"{record.backend} {record.precision}", record.preprocessing
    same = f"{prepared.exact} of {prepared.images} golden images give the same bytes, the others the same image"
    not_run = "the golden images were not run: preprocessing differs"
    replay = record.summary if prepared.passed else not_run
    values = record.values
    rate = None if _match_rate(record.images) is None else record.matched
    return (
        Verdict(
            name="preprocessing",
            subject=subject,
            outcome=Outcome.PASSED if prepared.passed else Outcome.FAILED,
            value=prepared.difference,
            limit=prepared.allowed,
            message=prepared.problem or same,
        ),
        Verdict(
            name="min_match_rate",
            subject=subject,
            outcome=_match_outcome(rate, record.gate) if prepared.passed else Outcome.FAILED,
            value=record.matched,
            limit=record.gate.min_match_rate or 0.0,
            message=replay,
        ),
        Verdict(
            name="values",
            subject=subject,
            outcome=values.outcome if values else Outcome.FAILED,
            value=values.evidence if values else 0,
            limit=MIN_EVIDENCE,
            message=values.summary if values else not_run,
        ),
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
    path: Path,
    verification: VerificationRecord,
    *,
    bundle: Bundle,
    latency_ms: dict[str, float] | None = None,
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
    try:
        signed = from_json(_Signed, parse_json(read_file(path, limit=_MAX_RECORD_BYTES)), where=path.name)
    except OSError as error:
        raise ConfigError(f"Cannot read the record '{path}': {error.strerror or error}.", hint=again) from error
    except (ValueError, TypeError, FcosDeployError) as error:
        raise ConfigError(f"'{path}' is not a device record: {error}.", hint=again) from error
    record = signed.record
    verification, layer = record.verification, record.layer
    if record.format != _RECORD_FORMAT:
        raise ConfigError(f"'{path}' is not a device record of this version.", hint=again)
    if verification.manifest_sha256 != bundle.manifest_sha256:
        raise ConfigError(
            f"'{path}' is of another bundle: its manifest is {verification.manifest_sha256[:16]}..., that of "
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
