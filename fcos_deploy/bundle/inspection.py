"""Says what a bundle holds."""

from __future__ import annotations

from pathlib import Path

from fcos_deploy.bundle.store import open_bundle
from fcos_deploy.model.inspect import Inspection, contract_facts

__all__ = ["inspect_bundle"]


def inspect_bundle(path: Path) -> Inspection:
    """Open a bundle, which checks every file of it, and say what is in it.

    Raises:
        BundleError: when it is incomplete or was changed.
    """
    with open_bundle(path) as bundle:
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
        )
        return Inspection(path, "bundle", facts, manifest.contract.decisions, manifest.contract)
