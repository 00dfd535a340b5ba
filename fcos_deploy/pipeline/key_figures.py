"""The few numbers that stand beside a report's verdict."""

from __future__ import annotations

from collections.abc import Sequence

from fcos_deploy.report import KeyFigure, VariantRow

__all__ = ["key_figures"]


def key_figures(rows: Sequence[VariantRow]) -> tuple[KeyFigure, ...]:
    """Accuracy lost at most, speed gained, size saved, share in INT8: those that were measured."""
    reference = next((row for row in rows if row.reference), None)
    others = [row for row in rows if not row.reference]
    found = (_drop(others), _speed(reference, others), _size(reference, others), _int8(others))
    return tuple(figure for figure in found if figure is not None)


def _drop(rows: Sequence[VariantRow]) -> KeyFigure | None:
    drops = [(row.drop, row.label) for row in rows if row.drop is not None]
    if not drops:
        return None
    worst, label = max(drops)
    return KeyFigure(f"{100 * max(worst, 0.0):.1f}", f"points of AP lost at most ({label})")


def _speed(reference: VariantRow | None, rows: Sequence[VariantRow]) -> KeyFigure | None:
    timed = [(row.p50_ms, row.label) for row in rows if row.p50_ms is not None]
    if reference is None or reference.p50_ms is None or not timed:
        return None
    best, label = min(timed)
    return KeyFigure(
        f"{reference.p50_ms / best:.1f} times", f"as fast as {reference.label}: {best:.1f} ms an image ({label})"
    )


def _size(reference: VariantRow | None, rows: Sequence[VariantRow]) -> KeyFigure | None:
    sizes = [(row.file_bytes, row.label) for row in rows if row.file_bytes]
    if reference is None or not reference.file_bytes or not sizes:
        return None
    least, label = min(sizes)
    return KeyFigure(f"{least / 2**20:.1f} MiB", f"smallest model ({label}); the checkpoint has {_mib(reference)}")


def _mib(row: VariantRow) -> str:
    return f"{(row.file_bytes or 0) / 2**20:.1f} MiB"


def _int8(rows: Sequence[VariantRow]) -> KeyFigure | None:
    shares = [(row.int8_share, row.label) for row in rows if row.int8_share is not None]
    if not shares:
        return None
    least, label = min(shares)
    return KeyFigure(f"{100 * least:.1f} %", f"of the multiply-accumulates run in INT8 at least ({label})")
