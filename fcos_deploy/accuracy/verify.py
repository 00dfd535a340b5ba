"""What verification is asked and what it answers."""

from __future__ import annotations

import datetime
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.gate import Verdict
from fcos_deploy.accuracy.matching import MatchOptions, match_detections
from fcos_deploy.bundle.golden import GoldenImage, fingerprint, fingerprint_difference, read_golden_image
from fcos_deploy.bundle.log import append_log
from fcos_deploy.bundle.preflight import Fallback, select_runnable
from fcos_deploy.bundle.selection import Selection, select_artifact
from fcos_deploy.bundle.store import Bundle
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.contract import read_contract
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import AccuracyGateError, BundleError, ConfigError
from fcos_deploy.core.gate import Gate
from fcos_deploy.core.libraries import library_versions
from fcos_deploy.core.machine import MachineFacts, read_machine
from fcos_deploy.core.preprocess import ChannelOrder, PreprocessSpec, preprocess
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.serialize import to_json
from fcos_deploy.detector import Detector
from runtimes.kserve import RemoteModel, write_remote_model

__all__ = [
    "GoldenResult",
    "PreprocessingResult",
    "VerificationRecord",
    "VerifyOptions",
    "check_preprocessing",
    "compare_golden",
    "record_verdicts",
    "require_verified",
    "verify_bundle",
    "write_record",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """What is verified. Empty backend and None: the defaults of the manifest.

    ``server`` is the address of a model on a server of the Open Inference Protocol; it is then asked in place of a
    local runtime, and has to give the certified detections of the artifact that ``backend`` and ``precision`` choose.
    """

    backend: str = ""
    server: str = ""
    precision: Precision | None = None
    allow_fallback: bool = False
    session: SessionOptions = field(default_factory=SessionOptions)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessingResult:
    """Preprocessed tensors against their fingerprints. ``difference`` in levels of an 8-bit image."""

    exact: int
    images: int
    difference: float
    passed: bool
    problem: str = ""
    allowed: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenResult:
    """One golden image: detections that had to find a counterpart, how many did, how far apart the pairs are."""

    path: str
    expected: int
    found: int
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
    passed: bool
    matched: float
    gate: Gate
    preprocessing: PreprocessingResult
    images: tuple[GoldenResult, ...]
    time: str
    seconds: float
    session: dict[str, str]
    machine: dict[str, str]
    versions: dict[str, str]
    fallbacks: tuple[Fallback, ...] = ()
    signed_by: str = ""

    @property
    def summary(self) -> str:
        """One sentence."""
        if not self.preprocessing.passed:
            return f"preprocessing differs: {self.preprocessing.problem}"
        missed, extra = (sum(getattr(i, name) for i in self.images) for name in ("missed", "extra"))
        return (
            f"{self.matched:.1%} of the golden detections match (needed: {self.gate.min_match_rate or 0.0:.1%}); "
            f"{missed} missed, {extra} extra"
        )


def record_verdicts(record: VerificationRecord) -> tuple[Verdict, ...]:
    """The judgements behind ``record.passed``: on preprocessing, and on the golden detections."""
    subject, prepared = f"{record.backend} {record.precision}", record.preprocessing
    needed = record.gate.min_match_rate or 0.0
    seen = f"{prepared.exact} of {prepared.images} golden images give the same bytes, the others the same picture"
    replay = record.summary if prepared.passed else "the golden images were not run: preprocessing differs"
    return (
        Verdict(
            name="preprocessing",
            subject=subject,
            passed=prepared.passed,
            value=prepared.difference,
            limit=prepared.allowed,
            message=prepared.problem or seen,
        ),
        Verdict(
            name="min_match_rate",
            subject=subject,
            passed=prepared.passed and record.matched >= needed,
            value=record.matched,
            limit=needed,
            message=replay,
        ),
    )


def require_verified(record: VerificationRecord) -> None:
    """Raise when the machine does not give the certified detections.

    Raises:
        AccuracyGateError: with the figures.
    """
    if not record.passed:
        raise AccuracyGateError(
            f"'{record.artifact}' on '{record.backend}' is not the certified detector: {record.summary}.",
            hint="see which stage diverges with 'fcos-deploy parity', or make the bundle for this machine",
        )


def compare_golden(wanted: Detections, found: Detections, *, options: MatchOptions, path: str = "") -> GoldenResult:
    """Pair ``found`` with ``wanted``, both in image pixels."""
    match = match_detections(wanted, found, options=options)
    score = np.abs(wanted.scores[match.reference] - found.scores[match.candidate])
    due, due_found = wanted.scores >= options.min_score, found.scores >= options.min_score
    counted = due[match.reference] | due_found[match.candidate]
    return GoldenResult(
        path=path,
        expected=int(due.sum()),
        found=int(due_found.sum()),
        missed=len(match.missed),
        extra=len(match.extra),
        lowest_iou=round(float(match.iou[counted].min(initial=1.0)), 6),
        largest_score_difference=round(float(score[counted].max(initial=0.0)), 6),
    )


def write_record(record: VerificationRecord, *, bundle: Bundle, log: Path | None = None) -> Path | None:
    """Append ``record`` to ``log``, or to the bundle's own; None when that cannot be written (archive, read-only).

    Raises:
        ConfigError: ``log`` cannot be written.
    """
    if log is not None:
        try:
            append_log(log, to_json(record))
        except OSError as error:
            raise ConfigError(
                f"Cannot write '{log}': {error.strerror or error}.",
                hint="choose a folder that exists and can be written",
            ) from error
        return log
    if bundle.log_path is None:
        return None
    try:
        append_log(bundle.log_path, to_json(record))
    except OSError:
        return None
    return bundle.log_path


# In levels of an 8-bit image, over cells of at least 64 pixels: other versions of OpenCV and Pillow round single
# pixels differently by one level; a wrong channel order, mean or offset moves a cell by several.
_MAX_CELL_DIFFERENCE = 0.5


def check_preprocessing(bundle: Bundle) -> PreprocessingResult:
    """Prepare every golden image and compare the tensors with their fingerprints; the largest fault is named."""
    spec = bundle.manifest.contract.preprocess
    exact, largest, problem = 0, 0.0, ""
    for golden in bundle.manifest.golden:
        image = read_golden_image(bundle.path(golden.path), golden)
        tensor, _ = preprocess(image, spec)
        found = fingerprint(tensor)
        difference = fingerprint_difference(found, golden.fingerprint, spec=spec)
        exact += found.sha256 == golden.fingerprint.sha256
        if difference > largest:
            largest = difference
            problem = f"'{golden.path}': {_name_fault(image, golden, spec=spec)}"
    passed = largest <= _MAX_CELL_DIFFERENCE
    return PreprocessingResult(
        exact=exact,
        images=len(bundle.manifest.golden),
        # JSON has no infinity: another shape or dtype is more than any difference of levels.
        difference=round(min(largest, 1e9), 4),
        passed=passed,
        problem="" if passed else problem,
        allowed=_MAX_CELL_DIFFERENCE,
    )


def _name_fault(image: NDArray[np.uint8], golden: GoldenImage, *, spec: PreprocessSpec) -> str:
    """Try the usual suspects, so that the message can name the culprit."""
    tensor, _ = preprocess(image, spec)
    wanted, found = golden.fingerprint, fingerprint(tensor)
    if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
        return f"the tensor must be {wanted.dtype}{list(wanted.shape)}, it is {found.dtype}{list(found.shape)}"
    other = ChannelOrder.BGR if spec.channel_order is ChannelOrder.RGB else ChannelOrder.RGB
    swapped, _ = preprocess(image, replace(spec, channel_order=other))
    if fingerprint_difference(fingerprint(swapped), wanted, spec=spec) <= _MAX_CELL_DIFFERENCE:
        return f"the colour channels are swapped: they are {spec.channel_order}, they must be {other}"
    difference = fingerprint_difference(found, wanted, spec=spec)
    return f"a region differs by {difference:.2f} of 255 levels (allowed: {_MAX_CELL_DIFFERENCE})"


def verify_bundle(
    bundle: Bundle,
    *,
    options: VerifyOptions | None = None,
    signed_by: str = "",
    progress: ProgressFn = no_progress,
) -> VerificationRecord:
    """Preflight, then preprocessing, then the golden images through the runtime.

    The record says whether it held; ``require_verified`` turns a failure into an error.

    Raises:
        DeviceError: this machine cannot run the artifact.
        BundleError: the bundle has no golden images, or no gate for the precision.
    """
    options = options or VerifyOptions()
    started = time.perf_counter()
    golden = bundle.manifest.golden
    if not golden:
        raise BundleError(f"The bundle '{bundle.source}' has no golden images to verify with.")
    machine = read_machine()
    selection, fallbacks = _select(bundle, options, machine)
    gate = bundle.manifest.gate(selection.artifact.precision)
    session: Mapping[str, str] = {}
    results: tuple[GoldenResult, ...] = ()
    preprocessing = check_preprocessing(bundle)
    if preprocessing.passed:
        results, session = _replay(bundle, selection, gate=gate, options=options, progress=progress)
    matched = _matched_fraction(results)
    return VerificationRecord(
        bundle=bundle.manifest.name,
        manifest_sha256=bundle.manifest_sha256,
        artifact=selection.artifact.path,
        artifact_sha256=selection.artifact.sha256,
        backend="kserve" if options.server else selection.backend,
        precision=selection.artifact.precision,
        passed=preprocessing.passed and matched >= (gate.min_match_rate or 0.0),
        matched=round(matched, 6),
        gate=gate,
        preprocessing=preprocessing,
        images=results,
        time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - started, 3),
        session=dict(session),
        machine=_machine_text(machine),
        versions=library_versions("fcos-deploy", "numpy", "opencv-python-headless", "pillow"),
        fallbacks=fallbacks,
        signed_by=signed_by,
    )


def _select(bundle: Bundle, options: VerifyOptions, machine: MachineFacts) -> tuple[Selection, tuple[Fallback, ...]]:
    """A server has its own machine, which preflight cannot see."""
    if options.server:
        precisions = (options.precision,) if options.precision else ()
        return select_artifact(bundle, backend=options.backend, precisions=precisions), ()
    return select_runnable(
        bundle,
        backend=options.backend,
        precision=options.precision,
        allow_fallback=options.allow_fallback,
        machine=machine,
    )


@contextmanager
def _opened(bundle: Bundle, selection: Selection, options: VerifyOptions) -> Iterator[Detector]:
    path = bundle.path(selection.artifact.path)
    if not options.server:
        with Detector.open(path, backend=selection.backend, options=options.session) as detector:
            yield detector
        return
    with tempfile.TemporaryDirectory(prefix="fcos-deploy-") as folder:
        remote = Path(folder, "server.kserve")
        write_remote_model(remote, RemoteModel(url=options.server, contract=read_contract(path)))
        with Detector.open(remote, options=options.session) as detector:
            yield detector


def _replay(
    bundle: Bundle, selection: Selection, *, gate: Gate, options: VerifyOptions, progress: ProgressFn
) -> tuple[tuple[GoldenResult, ...], Mapping[str, str]]:
    golden_images = bundle.manifest.golden
    rule = MatchOptions.of_gate(gate)
    decode = bundle.manifest.contract.decode
    results = []
    with _opened(bundle, selection, options) as detector:
        for index, golden in enumerate(golden_images):
            found = detector.detect(read_golden_image(bundle.path(golden.path), golden))
            wanted = golden.detections.to_detections()
            floors = [_cut_score(d, decode.max_detections) for d in (wanted, found)]
            floor = max(decode.score_threshold, *floors) + rule.max_score_delta
            results.append(
                compare_golden(wanted, found, options=replace(rule, min_score=min(floor, 1.0)), path=golden.path)
            )
            progress("verify", index + 1, len(golden_images))
        return tuple(results), dict(detector.session.description)


def _cut_score(detections: Detections, limit: int) -> float:
    """The score from which on a full list is cut off: there, the last ones may be others."""
    return float(detections.scores.min()) if len(detections) >= limit else 0.0


def _matched_fraction(results: tuple[GoldenResult, ...]) -> float:
    due = sum(r.expected + r.found for r in results)
    return 1.0 - sum(r.missed + r.extra for r in results) / due if due else 0.0


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
