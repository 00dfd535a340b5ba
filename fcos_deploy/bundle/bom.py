"""The bill of materials of a bundle, as CycloneDX 1.6 with a model card (cyclonedx.org/docs/1.6/json)."""

from __future__ import annotations

import importlib.metadata
import json
import uuid
from typing import Any

from fcos_deploy.bundle.manifest import Artifact, FileRecord, Manifest

__all__ = ["BOM_NAME", "bill_of_materials"]

BOM_NAME = "bom.cdx.json"
_MODEL, _CHECKPOINT = "model", "checkpoint"  # references within the document; those of files are their paths

_Json = dict[str, Any]  # Any: JSON


def bill_of_materials(manifest: Manifest) -> str:
    """What the bundle of ``manifest``, which lists its files, is made of: JSON text, the same for the same manifest."""
    provenance = manifest.provenance
    tools = (provenance.tools, *(artifact.step.tools for artifact in manifest.artifacts))
    libraries = {(name, version) for versions in tools for name, version in versions.items() if version}
    files = {record.sha256: record.path for record in manifest.artifacts} | {provenance.checkpoint_sha256: _CHECKPOINT}
    dependencies = [
        {"ref": _MODEL, "dependsOn": sorted({artifact.path for artifact in manifest.artifacts})},
        *({"ref": a.path, "dependsOn": [files[a.parent]]} for a in manifest.artifacts if files.get(a.parent)),
    ]
    hashes = "".join(record.sha256 for record in manifest.all_files.values())
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, provenance.created + hashes)}",
        "version": 1,
        "metadata": {
            **({"timestamp": provenance.created} if provenance.created else {}),
            "tools": {"components": [_library("fcos-deploy", importlib.metadata.version("fcos-deploy"))]},
            "component": {
                "type": "machine-learning-model",
                "bom-ref": _MODEL,
                "name": manifest.name,
                "modelCard": _model_card(manifest),
            },
        },
        "components": [
            {
                "type": "machine-learning-model",
                "bom-ref": _CHECKPOINT,
                "name": provenance.checkpoint,
                "hashes": [{"alg": "SHA-256", "content": provenance.checkpoint_sha256}],
            },
            *(_artifact(artifact) for artifact in manifest.artifacts),
            *(_file(record) for record in manifest.files),
            *(_library(name, version) for name, version in sorted(libraries)),
        ],
        "dependencies": sorted(dependencies, key=lambda entry: str(entry["ref"])),
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _model_card(manifest: Manifest) -> _Json:
    contract = manifest.contract
    inputs = [f"{spec.name} {spec}" for spec in contract.input_specs]
    metrics = [
        {
            "type": name,
            "value": f"{value:.6g}",
            "slice": f"{figure.artifact} on {figure.backend}, {figure.images} images of {figure.dataset}",
        }
        for figure in manifest.accuracy
        for name, value in sorted(figure.metrics.items())
    ]
    return {
        "modelParameters": {
            "task": "object-detection",
            "architectureFamily": "FCOS",
            "modelArchitecture": f"FCOS of {contract.ecosystem}" if contract.ecosystem else "FCOS",
            "inputs": [{"format": text} for text in inputs],
            "outputs": [{"format": name} for name in contract.outputs],
        },
        "quantitativeAnalysis": {"performanceMetrics": metrics},
        "properties": [
            *_properties(classes=", ".join(contract.class_names)),
            *(_property(f"decision:{item.name}", f"{item.value} ({item.source})") for item in contract.decisions),
        ],
    }


def _artifact(artifact: Artifact) -> _Json:
    details = _properties(
        kind=artifact.kind, precision=artifact.precision, backend=artifact.backend, step=artifact.step.name
    )
    return {**_file(artifact), "properties": details}


def _file(record: FileRecord) -> _Json:
    return {
        "type": "file",
        "bom-ref": record.path,
        "name": record.path,
        "hashes": [{"alg": "SHA-256", "content": record.sha256}],
    }


def _library(name: str, version: str) -> _Json:
    return {"type": "library", "bom-ref": f"library:{name}@{version}", "name": name, "version": version}


def _properties(**values: str) -> list[_Json]:
    return [_property(name, str(value)) for name, value in values.items() if value]


def _property(name: str, value: str) -> _Json:
    return {"name": f"fcos-deploy:{name}", "value": value}
