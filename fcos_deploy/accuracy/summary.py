"""Evaluations as plain data for ``--json`` and as rows for a table."""

from __future__ import annotations

import math
from typing import Any

from fcos_deploy.accuracy.evaluate import Evaluation
from fcos_deploy.accuracy.intervals import ApInterval
from fcos_deploy.accuracy.layers import LayerFinding
from fcos_deploy.accuracy.matching import DetectionAgreement
from fcos_deploy.accuracy.parity import ParityReport
from fcos_deploy.core.serialize import to_json

__all__ = ["TABLE_COLUMNS", "evaluation_json", "evaluation_row", "parity_json"]

TABLE_COLUMNS = ("backend", "precision", "AP", "AP50", "AP75", "95% interval", "drop", "agree", "images", "ms/image")


def evaluation_json(evaluation: Evaluation) -> dict[str, Any]:
    """The scores under COCO's names (in 0..1, null where the data has no such object), and how they came about."""
    run, scores = evaluation.run, evaluation.scores
    per_class = [
        {"name": c.name, "ap": c.ap, "ap50": c.ap50, "ar": c.ar, "precision": list(c.precision)}
        for c in scores.per_class
    ]
    return {
        "ap": scores.ap,
        "ap50": scores.ap50,
        "ap75": scores.ap75,
        "ap_small": scores.ap_small,
        "ap_medium": scores.ap_medium,
        "ap_large": scores.ap_large,
        "ar": scores.ar,
        "images": scores.images,
        "objects": scores.objects,
        "backend": run.backend,
        "precision": run.precision,
        "model": run.model,
        "per_class": per_class,
        "interval": _interval_json(evaluation.interval),
        "drop": _interval_json(evaluation.drop),
        "agreement": _agreement_json(evaluation.agreement),
        "verdicts": [to_json(verdict) for verdict in evaluation.verdicts],
        "seconds": to_json(run.seconds),
        "resumed_images": run.resumed,
        "session": dict(run.description),
    }


def _interval_json(interval: ApInterval | None) -> Any:  # Any: an object or null
    return None if interval is None else to_json(interval)


def _agreement_json(agreement: DetectionAgreement | None) -> dict[str, Any] | None:
    if agreement is None:
        return None
    content: dict[str, Any] = to_json(agreement)
    del content["score_pairs"]  # thousands of numbers, for plots only
    return content


def parity_json(report: ParityReport, layer: LayerFinding | None = None) -> dict[str, Any]:
    """All stages, the first that diverges, what explains it, and the first layer that diverges if that was asked."""
    first = report.first
    return {
        "passed": report.passed,
        "first": None if first is None else first.stage,
        "stages": _finite([to_json(stage) for stage in report.stages]),
        "causes": [to_json(cause) for cause in report.causes],
        "agreement": _agreement_json(report.agreement),
        "layer": None if layer is None else _finite(to_json(layer)),
    }


def _finite(value: Any) -> Any:  # Any: JSON, which has no infinity
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evaluation_row(evaluation: Evaluation) -> tuple[str, ...]:
    """One line of the table, as ``TABLE_COLUMNS`` names it."""
    run, scores, drop = evaluation.run, evaluation.scores, evaluation.drop
    interval, agreement = evaluation.interval, evaluation.agreement
    timed = scores.images - run.resumed
    return (
        run.backend,
        run.precision,
        _three(scores.ap),
        _three(scores.ap50),
        _three(scores.ap75),
        f"{interval.low:.3f}-{interval.high:.3f}" if interval else "",
        f"{drop.value:+.3f} ({drop.low:+.3f} to {drop.high:+.3f})" if drop else "",
        f"{agreement.match_rate:.1%}" if agreement else "",
        str(scores.images),
        f"{1000 * run.seconds.total / timed:.1f}" if timed else "",
    )


def _three(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
