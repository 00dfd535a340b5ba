"""Fills the templates and writes the files: reports on a model and on bundles, and the page that signs one off."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calibration.mixed_precision import TradeOffs
from fcos_deploy.accuracy.bundle_comparison import BundleTable
from fcos_deploy.accuracy.evaluate import size_cell
from fcos_deploy.accuracy.operating_point import OPERATING_COLUMNS, Confusion, operating_rows
from fcos_deploy.accuracy.verify import ReadRecord
from fcos_deploy.bundle.store import Bundle
from fcos_deploy.core.errors import printable
from fcos_deploy.core.files import write_text
from fcos_deploy.core.gate import Outcome, overall_outcome
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.core.serialize import to_json
from fcos_deploy.report.data import ReportData, ReportVariant, dataset_sentence, key_figures, report_verdict
from fcos_deploy.report.figures import fault_panels, image_panels, make_charts

__all__ = ["write_bundle_table", "write_pages", "write_report", "write_sign_off"]


jinja2 = lazy_import("jinja2", extra="report")

_MARKDOWN = re.compile(r"[\\`|<>\[\]]")
_MAX_CONFUSED = 12  # classes of a confusion matrix
_NOTHING = "–"  # noqa: RUF001  (a dash where a table has no figure)


def write_report(data: ReportData, path: Path) -> tuple[Path, Path]:
    """Write ``path`` (HTML, one file that needs no other) and the same in Markdown beside it, without its images.

    Raises:
        MissingDependencyError: jinja2 or matplotlib is not installed.
        ImageError: an image of the data set can no longer be read.
        ConfigError: the folder cannot be written.
    """
    per_class = zip(*(variant.evaluation.scores.per_class for variant in data.variants), strict=True)
    classes = [
        (name, [_number(score.ap, 3) for score in scores])
        for name, scores in zip(data.dataset.class_names, per_class, strict=True)
    ]
    for size in ("small", "medium", "large"):
        by_size = [getattr(variant.evaluation.scores, f"ap_{size}") for variant in data.variants]
        if any(ap is not None for ap in by_size):
            classes.append((f"{size} objects", [_number(ap, 3) for ap in by_size]))
    values = {
        "data": data,
        "verdict": report_verdict(data),
        "figures": key_figures(data),
        "dataset": dataset_sentence(data),
        "variants": [_variant_cells(variant) for variant in data.variants],
        "has_int8": any(variant.int8_share is not None for variant in data.variants),
        "has_memory": any(v.result is not None and v.result.cold_start is not None for v in data.variants),
        "classes": classes,
        "operating_columns": OPERATING_COLUMNS,
        "operating": [
            (variant.label, row)
            for variant in data.variants
            for row in operating_rows(variant.evaluation.operating_points)
        ],
        "confusions": [
            (variant.label, *_confusion_cells(variant.evaluation.confusion))
            for variant in data.variants
            if variant.evaluation.confusion is not None
        ],
        **_score_tables(data),
        "searches": [_search_cells(search) for search in data.searches],
        "machine": _machine_cells(data),
        "versions": sorted(data.versions.items()),
    }
    panels, faults = image_panels(data), fault_panels(data)
    shown = [*(panel.image for panel in panels), *(panel.image for worst in faults.values() for panel in worst)]
    images = {image.identifier: image for image in shown}.values()
    return write_pages("report", path, values, charts=make_charts(data), panels=panels, faults=faults, images=images)


def write_pages(name: str, path: Path, values: Mapping[str, Any], **of_html: Any) -> tuple[Path, Path]:
    """Write ``path`` (HTML) and the same in Markdown beside it, from the templates of this name; Any: their values.

    Raises:
        MissingDependencyError: jinja2 is not installed.
        ConfigError: the folder cannot be written.
    """
    html = _fill_template(f"{name}.html.j2", **values, **of_html)
    markdown = path.with_suffix(".md")
    text = _fill_template(f"{name}.md.j2", **values)
    write_text(path, html)
    write_text(markdown, text)
    return path, markdown


def _fill_template(name: str, /, **values: Any) -> str:  # Any: what a template is given
    """One of this package's templates, filled; HTML is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fcos_deploy.report", "templates"),
        autoescape=name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        finalize=_plain if name.endswith(".html.j2") else _markdown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(typeset=_typeset, mebibytes=_mebibytes)
    text: str = environment.get_template(name).render(**values)
    return text


def _plain(value: Any) -> Any:  # Any: what a template shows; HTML of our own is a subclass of str
    return printable(value, lines=True) if type(value) is str else value


def _markdown(value: Any) -> Any:  # Any: as above
    """Names of files and classes as text: what opens a cell, a link, code or HTML is escaped."""
    return _MARKDOWN.sub(r"\\\g<0>", printable(value)) if type(value) is str else value


def _variant_cells(variant: ReportVariant) -> dict[str, str]:
    """A row of the large table."""
    evaluation, result = variant.evaluation, variant.result
    scores, interval, drop = evaluation.scores, evaluation.interval, evaluation.drop
    agreement = evaluation.agreement
    latency, cold_start = (result.latency, result.cold_start) if result else (None, None)
    return {
        "label": variant.label,
        "reference": "reference" if variant.reference else "",
        "ap": _number(scores.ap, 3),
        "ap_interval": f"{interval.low:.3f} to {interval.high:.3f}" if interval else "",
        "ap50": _number(scores.ap50, 3),
        "drop": _signed(drop.value if drop else None, 3),
        "drop_interval": f"{_signed(drop.low, 3)} to {_signed(drop.high, 3)}" if drop and drop.resamples else "",
        "match_rate": _percent(agreement.match_rate if agreement and not agreement.empty else None),
        "p50": _number(latency.p50 if latency else None, 1),
        "p90": _number(latency.p90 if latency else None, 1),
        "p99": _number(latency.p99 if latency else None, 1),
        "times": str(latency.count) if latency else "",
        "rate": _number(result.throughput_fps if result else None, 1),
        "size": _mebibytes(result.file_bytes if result else None),
        "memory": _number(cold_start.peak_memory_mib if cold_start else None, 0),
        "int8_share": _percent(variant.int8_share),
        "gate": variant.outcome or _NOTHING,
    }


def _confusion_cells(confused: Confusion) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Names of the columns, and the rows; of many classes those with most faults."""
    counts, classes = confused.counts, len(confused.class_names)
    faults = counts.sum(0) + counts.sum(1) - 2 * np.diag(counts)
    shown = sorted(np.argsort(-faults[:classes], kind="stable")[:_MAX_CONFUSED].tolist())
    names = [confused.class_names[k] for k in shown]
    cells = counts[np.ix_([*shown, classes], [*shown, classes])]
    rows = [(name, [str(count) for count in row]) for name, row in zip([*names, "nothing"], cells, strict=True)]
    rows[-1][1][-1] = ""  # what is neither an object nor detected is not counted
    return [*names, "missed"], rows


def _score_tables(data: ReportData) -> dict[str, Any]:  # Any: rows for a template
    """Equivalent thresholds, and the shift by class, of the variants whose classes are the reference's."""
    drifts = {v.label: drift for v in data.candidates if (drift := v.evaluation.score_drift) is not None}
    by_threshold = [dict(drift.equivalents) for drift in drifts.values()]
    by_class = [
        {c.name: f"{_signed(c.mean_shift, 3)}; {c.threshold:.3f}" for c in drift.classes} for drift in drifts.values()
    ]
    return {
        "drifts": drifts,
        "thresholds": [
            (f"{threshold:.2f}", [_number(column.get(threshold), 3) for column in by_threshold])
            for threshold in sorted({threshold for column in by_threshold for threshold in column})
        ],
        "shifts": [
            (name, [column.get(name, _NOTHING) for column in by_class])
            for name in dict.fromkeys(name for column in by_class for name in column)
        ],
    }


def _search_cells(search: TradeOffs) -> dict[str, Any]:  # Any: rows for a template
    """The trials of a search, and the layers that it ranked, in percent."""
    trials = [
        {
            "float_layers": len(trial.ignored_layers),
            "int8_share": _percent(trial.int8_share),
            "ap": _number(trial.score, 4),
            "drop": _signed(search.float_score - trial.score, 4),
            "interval": " to ".join(_signed(end, 4) for end in trial.loss_interval),
            "p50": _number(trial.p50_ms, 1),
            "chosen": trial.ignored_layers == search.ignored_layers,
            "missed": trial.loss_interval[0] > search.max_loss,
        }
        for trial in search.trials
    ]
    layers = [
        {
            "name": layer.layer.removesuffix(".weight"),
            "errors": [f"{100 * e:.2f}" for e in (layer.effect.classes, layer.effect.boxes, layer.effect.centerness)],
            "runs_in": "float" if layer.layer in search.ignored_layers else "INT8",
        }
        for layer in search.ranking
    ]
    return {
        "placement": search.placement,
        "backend": search.backend,
        "quantity": search.quantity,
        "max_loss": _number(search.max_loss, 4),
        "float_ap": _number(search.float_score, 4),
        "float_p50": _number(search.float_p50_ms, 1),
        "trials": trials,
        "layers": layers,
    }


def _machine_cells(data: ReportData) -> list[tuple[str, str]]:
    machine = data.machine
    if machine is None:
        return []
    return [
        ("processor", machine.processor),
        ("cores used", str(machine.cores)),
        ("memory", f"{machine.memory_mib} MiB"),
        ("system", machine.system),
        ("other load meanwhile", data.contention.problem or "none that counts"),
        ("load before", "unknown" if machine.load is None else f"{machine.load:.2f}"),
    ]


def _number(value: float | None, digits: int) -> str:
    return _NOTHING if value is None else f"{value:.{digits}f}"


def _signed(value: float | None, digits: int) -> str:
    if value is None:
        return _NOTHING
    # What rounds to 0 has no sign.
    return f"{value:+.{digits}f}" if round(value, digits) else f"{0:.{digits}f}"


def _mebibytes(value: int | None) -> str:
    return _number(None if value is None else value / 2**20, 1)


def _percent(value: float | None) -> str:
    return _number(None if value is None else 100 * value, 1)


def _typeset(text: str) -> str:
    """Arrows and comparisons as signs."""
    return text.replace(" -> ", " → ").replace(" <= ", " ≤ ").replace(" >= ", " ≥ ")


def write_sign_off(bundle: Bundle, records: Sequence[ReadRecord], path: Path) -> tuple[tuple[Path, Path], Outcome]:
    """Write ``path`` and the same in Markdown as ``write_pages``; the files, and what all records come to."""
    outcome = overall_outcome(item.record.verification.outcome for item in records) or Outcome.INCONCLUSIVE
    manifest = bundle.manifest
    values = {
        "name": manifest.name,
        "manifest": bundle.manifest_sha256,
        "signed_by": bundle.signed_by,
        "outcome": outcome,
        "checkpoint": f"{manifest.provenance.checkpoint} {manifest.provenance.checkpoint_sha256}",
        "created": manifest.provenance.created,
        "figures": [
            (
                f.backend,
                str(f.precision),
                f.dataset,
                str(f.images),
                f"{f.metrics['ap']:.3f}",
                size_cell(f.metrics.get(name) for name in ("ap_small", "ap_medium", "ap_large")),
                "" if f.drop is None else f"{f.drop:+.4f}",
            )
            for f in manifest.accuracy
            if "ap" in f.metrics
        ],
        "devices": [_device_cells(item) for item in records],
    }
    return write_pages("sign_off", path, values), outcome


def _device_cells(item: ReadRecord) -> dict[str, str]:
    """A row: one record of one device."""
    record, verification = item.record, item.record.verification
    latency = (record.latency_ms or {}).get(verification.precision)
    facts = record.device
    return {
        "device": item.device,
        "processor": facts.get("processor", ""),
        "system": " ".join(filter(None, [facts.get("jetpack", ""), facts.get("l4t", ""), facts.get("driver", "")])),
        "engine": verification.artifact,
        "built": record.layer.created if record.layer else "with the bundle",
        "sha256": verification.artifact_sha256[:16],
        "precision": str(verification.precision),
        "runtime": f"{verification.backend} {facts.get('runtime') or verification.session.get('version', '')}",
        "outcome": str(verification.outcome),
        "summary": verification.summary,
        "latency": "" if latency is None else f"{latency:.1f}",
        "time": verification.time,
        "signed_by": f"{item.signed_by[:16]}..." if item.signed_by else "not signed",
        "file": item.path.name,
    }


def write_bundle_table(bundles: BundleTable, path: Path, *, title: str, command: str) -> tuple[Path, Path]:
    """The table of the bundles, as ``write_pages`` writes it."""
    return write_pages("bundles", path, {**to_json(bundles), "title": title, "command": command})
