"""What verification is asked and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from fcos_deploy.accuracy.gate import Verdict
from fcos_deploy.bundle.preflight import StepDown
from fcos_deploy.bundle.records import Gate
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import AccuracyGateError

__all__ = [
    "GoldenResult",
    "PreprocessingResult",
    "VerificationRecord",
    "VerifyOptions",
    "record_verdicts",
    "require_verified",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """What is verified. Empty backend and None: what the bundle's target says.

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
    invented: int
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
    stepped_down: tuple[StepDown, ...] = ()
    signed_by: str = ""

    @property
    def summary(self) -> str:
        """One sentence."""
        if not self.preprocessing.passed:
            return f"preprocessing differs: {self.preprocessing.problem}"
        missed, invented = (sum(getattr(i, name) for i in self.images) for name in ("missed", "invented"))
        return (
            f"{self.matched:.1%} of the golden detections match (needed: {self.gate.min_matched:.1%}); "
            f"{missed} missed, {invented} invented"
        )


def record_verdicts(record: VerificationRecord) -> tuple[Verdict, ...]:
    """The judgements behind ``record.passed``: on preprocessing, and on the golden detections."""
    subject, prepared = f"{record.backend} {record.precision}", record.preprocessing
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
            name="min_matched",
            subject=subject,
            passed=prepared.passed and record.matched >= record.gate.min_matched,
            value=record.matched,
            limit=record.gate.min_matched,
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
            hint="see which stage departs with 'fcos-deploy parity', or make the bundle for this machine",
        )
