"""A comparison of bundles as rows for tables and as plain data for ``--json``."""

from __future__ import annotations

from typing import Any

from fcos_deploy.core.serialize import to_json
from fcos_deploy.verification.bundles import BundleComparison, ComparedFigure

__all__ = ["FIGURE_COLUMNS", "bundles_json", "fact_rows", "figure_rows"]

FIGURE_COLUMNS = ("backend", "precision", "figure", "first", "second", "difference")

_DIGITS = {"AP": 4, "ms": 1, "images/s": 1, "MB": 1}


def fact_rows(found: BundleComparison) -> list[tuple[str, str, str]]:
    """Name, first, second."""
    return list(found.facts)


def figure_rows(found: BundleComparison) -> list[tuple[str, ...]]:
    """As ``FIGURE_COLUMNS`` names them; times and sizes with their ratio."""
    return [
        (
            figure.backend,
            str(figure.precision),
            figure.name if figure.unit == "AP" else f"{figure.name}, {figure.unit}",
            _number(figure.first, figure.unit),
            _number(figure.second, figure.unit),
            _difference(figure),
        )
        for figure in found.figures
    ]


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.{_DIGITS[unit]}f}"


def _difference(figure: ComparedFigure) -> str:
    if figure.difference is None or figure.first is None or figure.second is None:
        return "-"
    text = f"{figure.difference:+.{_DIGITS[figure.unit]}f}"
    return text if figure.unit == "AP" or not figure.first else f"{text} (x {figure.second / figure.first:.2f})"


def bundles_json(found: BundleComparison) -> dict[str, Any]:
    """Everything, with the differences."""
    agreement = to_json(found.agreement)
    del agreement["score_pairs"]  # many numbers, for plots only
    return {
        "facts": {name: {"first": first, "second": second} for name, first, second in found.facts},
        "contract": list(found.contract),
        "figures": [{**to_json(figure), "difference": figure.difference} for figure in found.figures],
        "golden": {"first": found.subjects[0], "second": found.subjects[1], **agreement},
        "verdicts": [to_json(verdict) for verdict in found.verdicts],
    }
