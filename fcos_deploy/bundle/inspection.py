"""Says what a bundle holds."""

from __future__ import annotations

from pathlib import Path

from fcos_deploy.bundle.manifest import Manifest
from fcos_deploy.bundle.store import open_bundle
from fcos_deploy.core.enums import Precision
from fcos_deploy.model.inspect import Inspection, contract_facts

__all__ = ["inspect_bundle"]


def inspect_bundle(path: Path, *, public_keys: tuple[Path | str, ...] = ()) -> Inspection:
    """Open a bundle, which checks every file of it and, with keys, its signature, and say what is in it.

    Raises:
        BundleError: when it is incomplete or was changed.
        SignatureError: when none of the keys signed it.
    """
    with open_bundle(path, public_keys=public_keys) as bundle:
        manifest = bundle.manifest
        artifacts = tuple(
            (artifact.path, f"{artifact.kind}, {artifact.precision}, {artifact.size:,} bytes, by {artifact.step.name}")
            for artifact in manifest.artifacts
        )
        facts = (
            ("name", manifest.name),
            ("checkpoint", f"{manifest.provenance.checkpoint} {manifest.provenance.checkpoint_sha256[:12]}"),
            ("ecosystem", manifest.contract.ecosystem or "unknown"),
            ("target", f"{manifest.target.backend}, {manifest.target.precision}"),
            ("signed by", bundle.signed_by or "not asked"),
            *contract_facts(manifest.contract),
            *artifacts,
            *_thresholds(manifest),
        )
        return Inspection(path, "bundle", facts, manifest.contract.decisions, manifest.contract)


def _thresholds(manifest: Manifest) -> tuple[tuple[str, str], ...]:
    """Which score threshold each INT8 variant needs for the float model's operating point."""
    return tuple(
        (
            f"threshold, {figure.backend} {figure.precision}",
            f"{figure.score_drift.threshold:.4g} where the float model has {figure.score_drift.float_threshold:.4g}",
        )
        for figure in manifest.accuracy
        if figure.precision is Precision.INT8 and figure.score_drift is not None
    )
