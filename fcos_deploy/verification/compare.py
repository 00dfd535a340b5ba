"""Golden detections against those of this machine."""

from __future__ import annotations

import numpy as np

from fcos_deploy.accuracy.matching import assign
from fcos_deploy.accuracy.overlap import detection_iou
from fcos_deploy.bundle.records import Gate
from fcos_deploy.core.detections import Detections
from fcos_deploy.verification.records import GoldenResult

__all__ = ["compare_golden"]


def compare_golden(wanted: Detections, found: Detections, *, gate: Gate, floor: float, path: str = "") -> GoldenResult:
    """Hold ``found`` to ``wanted``, both in image pixels.

    Those with at least ``floor`` must have a counterpart of the same label on the other side (which may score less)
    within the gate's overlap and score difference; each is counterpart once, best overlap first.
    """
    iou = detection_iou(wanted.boxes, found.boxes)
    score = np.abs(wanted.scores[:, None] - found.scores[None])
    fits = (iou >= gate.min_iou) & (score <= gate.max_score_difference)
    fits &= wanted.labels[:, None] == found.labels[None]
    rows, columns = assign(np.where(fits, 1.0 + iou, 0.0))
    due_rows, due_columns = wanted.scores >= floor, found.scores >= floor
    missed = int(due_rows.sum() - due_rows[rows].sum())
    invented = int(due_columns.sum() - due_columns[columns].sum())
    counted = due_rows[rows] | due_columns[columns]
    return GoldenResult(
        path=path,
        expected=int(due_rows.sum()),
        found=int(due_columns.sum()),
        missed=missed,
        invented=invented,
        lowest_iou=round(float(iou[rows, columns][counted].min(initial=1.0)), 6),
        largest_score_difference=round(float(score[rows, columns][counted].max(initial=0.0)), 6),
    )
