"""A Triton model repository: every field that the server reads follows from the bundle."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fcos_deploy.bundle import open_bundle
from fcos_deploy.core.enums import ArtifactKind
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.serving import ServingOptions, package_bundle
from fcos_deploy.serving.package import ServedModel
from fcos_deploy.serving.triton import config_text


def _config(bundle: Path, output: Path, options: ServingOptions | None = None) -> str:
    with open_bundle(bundle) as opened:
        package_bundle(opened, server="triton", output=output, options=options)
    return (output / "tiny" / "config.pbtxt").read_text()


def test_the_repository_has_the_layout_that_triton_loads(tiny_bundle: Path, tmp_path: Path) -> None:
    _config(tiny_bundle, tmp_path / "models", ServingOptions(version=3))
    files = sorted(p.relative_to(tmp_path / "models").as_posix() for p in (tmp_path / "models").rglob("*"))
    assert files == ["tiny", "tiny/3", "tiny/3/model.onnx", "tiny/config.pbtxt", "tiny/labels.txt"]
    assert (tmp_path / "models/tiny/3/model.onnx").read_bytes() == (tiny_bundle / "model.fp32.onnx").read_bytes()
    assert (tmp_path / "models/tiny/labels.txt").read_text() == "red\nwhite\nplatelet\n"


def test_a_fixed_batch_is_written_into_the_dimensions(tiny_bundle: Path, tmp_path: Path) -> None:
    config = _config(tiny_bundle, tmp_path / "m", ServingOptions(instances=2))
    assert "max_batch_size: 0\n" in config
    assert 'input { name: "images", data_type: TYPE_UINT8, dims: [1, 3, 128, 160] }' in config
    # 128x160 has 16*20 + 8*10 + 4*5 + 2*3 + 1*2 locations.
    assert 'output { name: "distances", data_type: TYPE_FP32, dims: [1, 428, 4] }' in config
    assert "dims: [1, 428, 3], label_filename" in config
    assert "instance_group { count: 2, kind: KIND_CPU }" in config
    assert "dynamic_batching" not in config
    assert "model_warmup" in config


def test_batches_are_refused_where_the_model_takes_none(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at most 1, 8 was asked for"):
        _config(tiny_bundle, tmp_path / "m", ServingOptions(max_batch=8))
    assert not (tmp_path / "m").exists()


def test_gpus_are_named(tiny_bundle: Path, tmp_path: Path) -> None:
    config = _config(tiny_bundle, tmp_path / "m", ServingOptions(gpus=(0, 2)))
    assert "kind: KIND_GPU, gpus: [0, 2]" in config


def test_a_tensorrt_engine_is_served_on_gpus_without_a_number(tiny_bundle: Path, tmp_path: Path) -> None:
    """Triton refuses a model of its tensorrt backend on KIND_CPU."""
    path = Path(shutil.copytree(tiny_bundle, tmp_path / "engine"))
    with open_bundle(path) as opened:
        (artifact,) = opened.manifest.artifacts
        model = ServedModel(
            name="tiny",
            path=opened.path(artifact.path),
            companions=(),
            artifact=replace(artifact, kind=ArtifactKind.TENSORRT_ENGINE, backend="tensorrt"),
            contract=opened.manifest.contract,
            options=ServingOptions(),
        )
    assert "instance_group { count: 1, kind: KIND_GPU }" in config_text(model)


def test_tritons_own_definition_accepts_the_text(tiny_bundle: Path, tmp_path: Path) -> None:
    """With NVIDIA's client installed, its protobuf of the model configuration parses what was written."""
    if importlib.util.find_spec("tritonclient") is None:
        pytest.skip("tritonclient is not installed")
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    message = text_format.Parse(_config(tiny_bundle, tmp_path / "m"), model_config_pb2.ModelConfig())
    assert (message.name, message.backend) == ("tiny", "onnxruntime")
    assert list(message.input[0].dims) == [1, 3, 128, 160]
    assert message.model_warmup[0].inputs["images"].random_data
    assert "class_names" in message.parameters["fcos_deploy.contract"].string_value


def test_a_folder_in_use_and_an_unknown_server_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "x").touch()
    with pytest.raises(ConfigError, match="not empty"):
        _config(tiny_bundle, tmp_path / "m")
    with open_bundle(tiny_bundle) as opened, pytest.raises(ConfigError, match="no packager 'torchserve'"):
        package_bundle(opened, server="torchserve", output=tmp_path / "n")


@pytest.mark.parametrize("name", ["../up", "a/b", " ", ".hidden"])
def test_a_name_that_is_a_path_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        ServingOptions(name=name)
