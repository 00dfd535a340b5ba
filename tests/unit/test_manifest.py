"""The manifest: read as it was written, its bill of materials, and the published JSON Schemas."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator, Draft202012Validator, FormatChecker
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7

from fcos_deploy.bundle import DEFAULT_GATES, AccuracyFigure, FileRecord, open_bundle
from fcos_deploy.bundle.manifest import Manifest, bill_of_materials, check_relative_path, manifest_text, parse_manifest
from fcos_deploy.core.contract import Decision
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import BundleError, FcosDeployError, ManifestVersionError
from fcos_deploy.core.gate import Gate
from fcos_deploy.core.serialize import to_json


@pytest.fixture
def manifest(make_bundle: Callable[[Path], Path], tmp_path: Path) -> Manifest:
    return open_bundle(make_bundle(tmp_path / "cells")).manifest


def _changed(manifest: Manifest, change: Callable[[dict[str, Any]], object]) -> str:
    value = json.loads(manifest_text(manifest))
    change(value)
    return json.dumps(value)


def test_text_and_back_is_the_same(manifest: Manifest) -> None:
    assert parse_manifest(manifest_text(manifest), where="m") == manifest


def test_a_newer_schema_says_what_to_do(manifest: Manifest) -> None:
    text = _changed(manifest, lambda m: m.update(schema_version=2, something_new=1))
    with pytest.raises(ManifestVersionError, match="schema version 2, this fcos-deploy reads up to 1") as caught:
        parse_manifest(text, where="m")
    assert "upgrade" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(extra=1), "unknown keys"),
        (lambda m: m.pop("provenance"), "lacks"),
        (lambda m: m.update(schema_version=True), "no schema version"),
        (lambda m: m.update(name=7), r"manifest\.json\.name must be str"),
        (lambda m: m["artifacts"][0].update(sha256="0" * 63), "in place of a SHA-256"),
        (lambda m: m["artifacts"][0].update(size=-1), "cannot have -1 bytes"),
        (lambda m: m["artifacts"][1].update(parent="cd" * 32), "not in the chain"),
        (lambda m: m["artifacts"][1].update(companions=["gone.json"]), "needs"),
        (lambda m: m["files"].append(m["files"][0]), "more than once"),
        (lambda m: m["files"][0].update(path="manifest.json"), "cannot list"),
        (lambda m: m["files"][0].update(path="../../etc/passwd"), "not a path inside"),
        (lambda m: m["golden"][0].update(path="golden/009.png"), "not among"),
        (lambda m: m["golden"][0].update(height=1 << 30), "cannot be"),
        (lambda m: m["golden"][0]["detections"]["labels"].append(1), "as many boxes"),
        (lambda m: m["gates"]["int8"].update(min_iou=2.0), r"must be in \[0, 1\]"),
        (lambda m: m["defaults"].update(precision="fp8"), "one of fp32"),
    ],
)
def test_a_wrong_manifest_is_refused_with_the_place(
    manifest: Manifest, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        parse_manifest(_changed(manifest, change), where="m")


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "NaN", "[" * 100_000, '{"a": 1, "a": 2}', '{"size": 1e999}'])
def test_text_that_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(BundleError):
        parse_manifest(text, where="m")


def test_a_figure_that_is_not_finite_is_not_written(manifest: Manifest) -> None:
    figure = AccuracyFigure(
        artifact="a", backend="b", precision=Precision.FP32, dataset="d", images=1, metrics={"ap": float("nan")}
    )
    with pytest.raises(BundleError, match="not finite"):
        manifest_text(dataclasses.replace(manifest, accuracy=(figure,)))


@pytest.mark.parametrize(
    "path",
    ["", "/a", "../a", "a/../b", "a//b", "./a", "a/", "a\\b", "c:a", "a\nb", "a\0b", "x" * 241, "\ud800"],
)
def test_a_path_that_is_not_plain_is_refused(path: str) -> None:
    with pytest.raises(BundleError):
        check_relative_path(path)


@pytest.mark.parametrize("path", ["model.onnx", "golden/000.png", "a b/..c", "größe.json"])
def test_a_plain_path_is_accepted(path: str) -> None:
    assert FileRecord(path=path, sha256="0" * 64, size=0).path == path


def test_the_gate_of_a_precision_without_one_is_an_error(manifest: Manifest) -> None:
    assert manifest.gate(Precision.FP16) == DEFAULT_GATES[Precision.FP16]
    for gate in (Gate(), Gate(max_map_drop=0.0, min_iou=0.9, max_score_delta=0.1)):
        with pytest.raises(BundleError, match="no complete accuracy gate for 'int8'"):
            dataclasses.replace(manifest, gates={Precision.INT8: gate}).gate(Precision.INT8)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(data=st.data())
def test_any_value_anywhere_is_accepted_or_refused_but_never_crashes(manifest: Manifest, data: st.DataObject) -> None:
    value = json.loads(manifest_text(manifest))
    place: Any = value
    while True:
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner or data.draw(st.booleans()):
            break
        place = inner
    place[key] = data.draw(_JSON)
    with contextlib.suppress(FcosDeployError):
        parse_manifest(json.dumps(value), where="m")


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


_FOLDER = Path(__file__).parents[2] / "docs" / "schema"


def _validator(name: str) -> Draft202012Validator:
    schema = json.loads((_FOLDER / name).read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize("name", ["manifest.schema.json", "contract.schema.json"])
def test_the_files_are_up_to_date(name: str) -> None:
    expected = runpy.run_path(str(_FOLDER / "generate.py"))["schema_text"](name)
    assert (_FOLDER / name).read_text() == expected, "run: python docs/schema/generate.py"


def test_a_real_manifest_and_its_contracts_fit(make_bundle: Callable[[Path], Path], tmp_path: Path) -> None:
    manifest = open_bundle(make_bundle(tmp_path / "b")).manifest
    _validator("manifest.schema.json").validate(json.loads(manifest_text(manifest)))
    _validator("contract.schema.json").validate(json.loads(json.dumps(to_json(manifest.contract))))


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda m: m.update(extra=1), []),
        (lambda m: m.pop("provenance"), []),
        (lambda m: m["artifacts"][0].update(size="1"), ["artifacts", 0, "size"]),
        (lambda m: m["defaults"].update(precision="fp8"), ["defaults", "precision"]),
    ],
)
def test_what_the_reader_refuses_does_not_fit(
    change: Callable[[Any], object], place: list[Any], make_bundle: Callable[[Path], Path], tmp_path: Path
) -> None:
    value = json.loads(manifest_text(open_bundle(make_bundle(tmp_path / "b")).manifest))
    change(value)
    (error,) = _validator("manifest.schema.json").iter_errors(value)
    assert list(error.absolute_path) == place
