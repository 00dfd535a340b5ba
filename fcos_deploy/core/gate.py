"""The limits that a deployed detector must keep: one type for an evaluation, for a comparison and for a bundle."""

from __future__ import annotations

from dataclasses import dataclass

from fcos_deploy.core.errors import ConfigError

__all__ = ["Gate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Limits; None leaves a quantity unjudged.

    ``max_map_drop``: AP of the reference minus AP of the candidate, in 0..1 (0.01 is one AP point).
    ``min_ap``: AP itself. ``certain``: the whole confidence interval of the drop must keep the limit, not only the
    measured drop.

    ``min_match_rate``: share of the detections of both detectors that are paired, in 0..1.
    ``min_iou``: overlap that a pair needs; None is 0.5. ``max_score_delta`` (in 0..1) and ``max_box_delta_px`` (image
    pixels): how far the two of a pair may differ. In an evaluation they bound percentiles, the 5th and 95th of the
    scores' differences and the 95th of the boxes'; golden detections whose scores differ by more are not paired at all.
    """

    max_map_drop: float | None = None
    min_ap: float | None = None
    min_match_rate: float | None = None
    min_iou: float | None = None
    max_score_delta: float | None = None
    max_box_delta_px: float | None = None
    certain: bool = False

    def __post_init__(self) -> None:
        for name in ("max_map_drop", "min_ap", "min_match_rate", "min_iou", "max_score_delta"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name} is a share of 1, so it must be in [0, 1], got {value}.")
        if self.max_box_delta_px is not None and self.max_box_delta_px < 0:
            raise ConfigError(f"max_box_delta_px must not be negative, got {self.max_box_delta_px}.")
