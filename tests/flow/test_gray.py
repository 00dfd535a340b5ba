"""A detector of gray images, from the checkpoint to a bundle that holds on another run: one channel all the way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from fcos_deploy import Detector
from fcos_deploy.bundle import open_bundle
from fcos_deploy.checkpoints.load import CheckpointOptions, load_checkpoint
from fcos_deploy.cli.app import build_app
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.preprocess import ChannelOrder
from fcos_deploy.serving.gstreamer import preprocess_config
from fcos_deploy.serving.package import ServedModel, ServingOptions

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("short_measurements")]
PIXELS = ["--mean", "0.45", "--std", "0.25"]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny detector with one channel of weights in its stem."""
    with safe_open(tiny_checkpoint, "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  (not a mapping)
        metadata = stored.metadata()
    tensors["backbone.body.conv1.weight"] = tensors["backbone.body.conv1.weight"].sum(1, keepdim=True)
    path = tmp_path_factory.mktemp("gray") / "gray.safetensors"
    save_file(tensors, path, metadata=metadata)
    return path


def _invoke(*words: object) -> str:
    result = CliRunner().invoke(build_app(), [str(word) for word in words])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_mean_and_std_are_asked_for_and_the_order_follows_the_stem(checkpoint: Path) -> None:
    asked = CliRunner().invoke(build_app(), ["inspect", str(checkpoint)])
    assert asked.exit_code == 2
    assert "images of 1 channels: their mean" in asked.stderr
    assert "--mean A" in asked.stderr
    decisions = json.loads(_invoke("inspect", checkpoint, *PIXELS, "--json"))["decisions"]
    order = next(decision for decision in decisions if decision["name"] == "channel_order")
    assert (order["value"], order["source"]) == ("gray", "the shape of the stem's weights")
    refused = CliRunner().invoke(build_app(), ["inspect", str(checkpoint), *PIXELS, "--channel-order", "rgb"])
    assert "takes gray images, not rgb" in refused.stderr


def test_a_bundle_with_int8_is_proved_verified_and_predicts(
    checkpoint: Path, smooth_images: Path, tmp_path: Path
) -> None:
    bundle, picture = tmp_path / "bundle", tmp_path / "camera.png"
    words = ["--calibration-images", smooth_images, "--calibration-count", 8, "--backend", "onnxruntime"]
    proof = ["--min-match-rate", 0.5, "--allow-inconclusive"]
    _invoke("deploy", checkpoint, "-o", bundle, *words, *proof, *PIXELS)
    with open_bundle(bundle) as opened:
        manifest = opened.manifest
        assert manifest.contract.input_specs[0].shape == (None, 1, 128, 160)
        assert manifest.contract.preprocess.channel_order is ChannelOrder.GRAY
        assert {a.precision for a in manifest.artifacts} == {Precision.FP32, Precision.INT8}
        assert {golden.fingerprint.shape for golden in manifest.golden} == {(1, 128, 160)}
        artifact = next(a for a in manifest.artifacts if a.precision is Precision.FP32)
        path = opened.path(artifact.path)
        served = ServedModel(
            name="m", artifact=artifact, contract=manifest.contract, path=path, companions=(), options=ServingOptions()
        )
        assert "network-input-shape=1;1;128;160\n" in preprocess_config(served)
        assert "network-color-format=2\n" in preprocess_config(served)
    _invoke("verify", bundle, "--precision", "int8", "--allow-fallback")
    pixels = np.random.default_rng(2).integers(0, 256, (12, 15), np.uint8).repeat(8, 0).repeat(10, 1)
    Image.fromarray(pixels, "L").save(picture)
    (predicted,) = json.loads(_invoke("predict", bundle, picture, "--precision", "fp32", "--json"))
    loaded = load_checkpoint(checkpoint, options=CheckpointOptions(mean=(0.45,), std=(0.25,)))
    with Detector.of_network(loaded.model, loaded.contract) as detector:
        expected = detector.detect(picture)
    assert len(expected) > 3
    scores = [detection["score"] for detection in predicted["detections"]]
    np.testing.assert_allclose(scores, expected.scores, atol=1e-4)
