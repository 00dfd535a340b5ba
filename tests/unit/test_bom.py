"""The bill of materials is CycloneDX by its own schema, names every file, and is the same for the same bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonschema import Draft7Validator, FormatChecker
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7

from fcos_deploy.bundle import AccuracyFigure, open_bundle
from fcos_deploy.bundle.manifest import bill_of_materials
from fcos_deploy.core.contract import Decision
from fcos_deploy.core.enums import Precision

_SCHEMAS = Path(__file__).parents[1] / "data" / "cyclonedx"  # cyclonedx.org/schema, Apache-2.0


def cyclonedx_errors(text: str) -> list[Any]:
    """What the schema of CycloneDX 1.6 has against a document."""
    schema = json.loads((_SCHEMAS / "bom-1.6.schema.json").read_text())
    parts = {
        f"http://cyclonedx.org/schema/{name}.SNAPSHOT.schema.json": Resource(
            json.loads((_SCHEMAS / f"{name}.schema.json").read_text()), DRAFT7
        )
        for name in ("spdx", "jsf-0.82")
    }
    validator = Draft7Validator(
        schema, registry=Registry().with_resources(parts.items()), format_checker=FormatChecker()
    )
    return list(validator.iter_errors(json.loads(text)))


def test_it_is_valid_and_names_every_file(make_bundle: Callable[[Path], Path], tmp_path: Path) -> None:
    with open_bundle(make_bundle(tmp_path / "cells")) as bundle:
        manifest = bundle.manifest
    figure = AccuracyFigure(
        artifact="model.fp32.onnx",
        backend="onnxruntime",
        precision=Precision.FP32,
        dataset="cells",
        images=3,
        metrics={"ap": 0.5, "ap50": 0.75},
    )
    manifest = replace(
        manifest,
        accuracy=(figure,),
        provenance=replace(manifest.provenance, created="2026-11-26T08:00:00+00:00", tools={"python": "3.11.2"}),
        contract=replace(manifest.contract, decisions=(Decision("variant", "r50", "--variant"),)),
    )
    text = bill_of_materials(manifest)
    assert cyclonedx_errors(text) == []
    assert cyclonedx_errors(text.replace('"SHA-256"', '"SHA-0"'))  # the schema does look
    document = json.loads(text)
    files = {c["name"]: c["hashes"][0]["content"] for c in document["components"] if c["type"] == "file"}
    assert files == {record.path: record.sha256 for record in manifest.all_files.values()}
    parents = {entry["ref"]: entry["dependsOn"] for entry in document["dependencies"]}
    assert parents["model.fp32.onnx"] == ["checkpoint"]
    assert parents["model.int8.engine"] == ["model.fp32.onnx"]
    metrics = document["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert [(metric["type"], metric["value"]) for metric in metrics] == [("ap", "0.5"), ("ap50", "0.75")]
    assert bill_of_materials(manifest) == text
