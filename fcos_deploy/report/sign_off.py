"""One page for the person who signs a bundle off: which devices verified it, with which engines, and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fcos_deploy.accuracy.device_record import ReadRecord
from fcos_deploy.bundle.store import Bundle
from fcos_deploy.core.files import write_text
from fcos_deploy.core.gate import Outcome, overall_outcome
from fcos_deploy.report.render import fill_template, read_template

__all__ = ["write_sign_off"]


def write_sign_off(bundle: Bundle, records: Sequence[ReadRecord], path: Path) -> tuple[tuple[Path, Path], Outcome]:
    """Write ``path`` (HTML) and the same in Markdown beside it; the files, and what all records come to.

    Raises:
        MissingDependencyError: jinja2 is not installed.
        ConfigError: the folder cannot be written.
    """
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
            (f.backend, str(f.precision), f.dataset, str(f.images), f"{f.metrics['ap']:.3f}", _drop(f.drop))
            for f in manifest.accuracy
            if "ap" in f.metrics
        ],
        "devices": [_cells(item) for item in records],
    }
    write_text(path, fill_template("sign_off.html.j2", css=read_template("report.css"), **values))
    markdown = path.with_suffix(".md")
    write_text(markdown, fill_template("sign_off.md.j2", **values))
    return (path, markdown), outcome


def _drop(drop: float | None) -> str:
    return "" if drop is None else f"{drop:+.4f}"


def _cells(item: ReadRecord) -> dict[str, str]:
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
