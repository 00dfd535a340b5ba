"""The record of a search for mixed precision, beside its result: the trade-offs, their speed, the ranking."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from calibration.mixed_precision import LayerSensitivity, Trial
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.files import MAX_TEXT_BYTES, read_file, write_text
from fcos_deploy.core.matching import ScoreDrift
from fcos_deploy.core.serialize import from_json, to_json

__all__ = [
    "SUFFIX",
    "TRADE_OFF_COLUMNS",
    "TradeOffs",
    "find_trade_offs",
    "read_trade_offs",
    "trade_off_rows",
    "write_trade_offs",
]

SUFFIX = ".mixed-precision.json"
TRADE_OFF_COLUMNS = ("layers in float", "in INT8, %", "score", "loss", "95% interval", "p50 ms", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class TradeOffs:
    """One search. Scores are ``quantity`` (0..1) on ``backend``, of which at most ``max_loss`` was to be lost.

    ``trials`` begin with most INT8; those on the Pareto front are timed.
    ``ranking`` is empty where all layers in INT8 reached the goal at once, so that nothing had to be ranked.
    """

    placement: str
    backend: str
    quantity: str
    max_loss: float
    float_score: float
    float_p50_ms: float | None
    ignored_layers: tuple[str, ...]
    trials: tuple[Trial, ...]
    ranking: tuple[LayerSensitivity, ...]
    drift: ScoreDrift
    schema_version: int = 2

    def __post_init__(self) -> None:
        if self.schema_version != 2:
            raise ConfigError(f"Trade-offs of schema version {self.schema_version}, this fcos-deploy reads 2.")


def write_trade_offs(trade_offs: TradeOffs, model: Path) -> Path:
    """Write them beside ``model``."""
    path = model.with_name(model.stem + SUFFIX)
    write_text(path, json.dumps(to_json(trade_offs), indent=1) + "\n")
    return path


def read_trade_offs(path: Path) -> TradeOffs:
    """The inverse.

    Raises:
        ConfigError: not such a file.
    """
    try:
        return from_json(TradeOffs, json.loads(read_file(path, limit=MAX_TEXT_BYTES)), where=path.name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot read the trade-offs '{path}': {error}.") from error


def find_trade_offs(models: Sequence[Path]) -> tuple[TradeOffs, ...]:
    """Those that lie beside these models, or in these bundles."""
    paths: dict[Path, None] = {}
    for model in models:
        beside = sorted(model.glob("*" + SUFFIX)) if model.is_dir() else [model.with_name(model.stem + SUFFIX)]
        paths.update(dict.fromkeys(path for path in beside if path.is_file()))
    return tuple(read_trade_offs(path) for path in paths)


def trade_off_rows(trade_offs: TradeOffs) -> list[tuple[str, ...]]:
    """For ``TRADE_OFF_COLUMNS``."""
    rows = [
        (
            str(len(trial.ignored_layers)),
            f"{100 * trial.int8_share:.1f}",
            f"{trial.score:.4f}",
            f"{trade_offs.float_score - trial.score:.4f}",
            f"{trial.loss_interval[0]:+.4f} to {trial.loss_interval[1]:+.4f}",
            _milliseconds(trial.p50_ms),
            "chosen" if trial.ignored_layers == trade_offs.ignored_layers else "",
        )
        for trial in trade_offs.trials
    ]
    return [
        *rows,
        ("all", "0.0", f"{trade_offs.float_score:.4f}", "-", "", _milliseconds(trade_offs.float_p50_ms), "float"),
    ]


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
