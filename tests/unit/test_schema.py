"""The published JSON Schemas are those of the code, and describe what the code writes."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from fcos_deploy.bundle import open_bundle
from fcos_deploy.bundle.manifest import manifest_text
from fcos_deploy.core.serialize import to_json

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
