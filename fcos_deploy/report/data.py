"""What a report is made of: the measurements of each variant, and where its files come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from calibration.trade_offs import TradeOffs
from fcos_deploy.accuracy.dataset import Dataset
from fcos_deploy.accuracy.evaluate import Evaluation
from fcos_deploy.benchmark.machine import Contention
from fcos_deploy.benchmark.measure import Speedup
from fcos_deploy.benchmark.run import BenchmarkResult, doubted_speedup
from fcos_deploy.core.contract import Decision
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.gate import Outcome, overall_outcome
from fcos_deploy.core.machine import MachineFacts

__all__ = ["ReportData", "ReportFile", "ReportVariant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportVariant:
    """One artifact on one backend. ``result`` None: it was not timed.

    ``int8_share``: share (0..1) of the convolutions' multiply-accumulates that the runtime executes in INT8; None: the
    runtime does not tell, or the artifact is not INT8.
    """

    label: str
    evaluation: Evaluation
    result: BenchmarkResult | None = None
    reference: bool = False
    int8_share: float | None = None

    @property
    def outcome(self) -> Outcome | None:
        """What judging this variant came to; None: nothing was judged."""
        return overall_outcome(verdict.outcome for verdict in self.evaluation.verdicts)

    @property
    def p50_ms(self) -> float | None:
        """Median latency of one image in milliseconds."""
        return self.result.latency.p50 if self.result else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFile:
    """A file behind the report: its size in bytes, and the step that made it from ``parent``."""

    path: str
    kind: str
    sha256: str
    size: int
    parent: str = ""
    step: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """A whole report.

    ``variants`` were evaluated on ``dataset``; one of them may be the reference of the others. ``searches``: those for
    mixed precision. ``machine``: where the variants were timed, ``contention``: what else ran there. ``decisions``:
    what the checkpoint does not tell. ``command`` makes it all again. ``notes``: sentences that belong beside the
    verdict.
    """

    title: str
    dataset: Dataset
    variants: tuple[ReportVariant, ...]
    searches: tuple[TradeOffs, ...] = ()
    created: str = ""
    files: tuple[ReportFile, ...] = ()
    machine: MachineFacts | None = None
    contention: Contention = field(default_factory=Contention)
    versions: Mapping[str, str] = field(default_factory=dict)
    decisions: tuple[Decision, ...] = ()
    command: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        labels = [variant.label for variant in self.variants]
        if not labels or len(set(labels)) < len(labels):
            raise ConfigError(f"A report needs variants with different labels, got {labels}.")

    @property
    def reference(self) -> ReportVariant | None:
        """What the others are compared with."""
        return next((variant for variant in self.variants if variant.reference), None)

    def speedup(self, variant: ReportVariant) -> Speedup | None:
        """How many times as fast as the reference; None where one of the two was not timed."""
        reference = self.reference
        if reference is None or reference.result is None or variant.result is None:
            return None
        return doubted_speedup(variant.result, reference=reference.result, contention=self.contention)

    @property
    def candidates(self) -> tuple[ReportVariant, ...]:
        """All but the reference."""
        return tuple(variant for variant in self.variants if not variant.reference)
