"""Configuration of OpenVINO Model Server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fcos_deploy.bundle import open_bundle
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.serving import ServingOptions, package_bundle


def test_repository_and_configuration_belong_together(tiny_bundle: Path, tmp_path: Path) -> None:
    with open_bundle(tiny_bundle) as bundle:
        package_bundle(bundle, server="ovms", output=tmp_path / "m", options=ServingOptions(name="cells", instances=4))
    (entry,) = json.loads((tmp_path / "m" / "config.json").read_text())["model_config_list"]
    assert entry["config"]["base_path"] == "/models/cells"
    assert entry["config"]["nireq"] == 4
    assert entry["config"]["plugin_config"]["INFERENCE_PRECISION_HINT"] == "f32"
    assert (tmp_path / "m" / "cells" / "1" / "model.onnx").is_file()
    contract = json.loads((tmp_path / "m" / "cells" / "contract.json").read_text())
    assert contract["class_names"] == ["red", "white", "platelet"]


@pytest.mark.parametrize("options", [ServingOptions(max_batch=4), ServingOptions(gpus=(0,))])
def test_what_the_server_cannot_do_is_refused(tiny_bundle: Path, tmp_path: Path, options: ServingOptions) -> None:
    with open_bundle(tiny_bundle) as bundle, pytest.raises(ConfigError, match="OpenVINO Model Server"):
        package_bundle(bundle, server="ovms", output=tmp_path / "m", options=options)
