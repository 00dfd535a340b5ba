"""Writes the JSON Schemas of a bundle's manifest and of a model's contract: ``python docs/schema/generate.py``."""

from __future__ import annotations

import json
from pathlib import Path

from fcos_deploy.bundle import Manifest
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.serialize import json_schema

SCHEMAS = {"manifest.schema.json": Manifest, "contract.schema.json": ModelContract}


def schema_text(name: str) -> str:
    """The content of one of the files."""
    return json.dumps(json_schema(SCHEMAS[name]), indent=2) + "\n"


if __name__ == "__main__":
    for name in SCHEMAS:
        Path(__file__).with_name(name).write_text(schema_text(name), encoding="utf-8")
