"""Fixtures that every test may use: the golden references and small real models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fcos_deploy.bundle import (
    DEFAULT_GATES,
    Artifact,
    ArtifactDraft,
    BundleWriter,
    GoldenImage,
    Manifest,
    Provenance,
    StepOutput,
    Target,
    make_golden,
)
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.decode_spec import PROFILES, DecodeSpec
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import ArtifactKind, Precision
from fcos_deploy.core.preprocess_spec import PreprocessSpec
from fcos_deploy.core.serialize import from_json, to_json

TESTS = Path(__file__).parent


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Outputs of the original libraries on deterministic weights."""
    return TESTS / "golden" / "data"


@pytest.fixture(scope="session")
def state_dict_keys_dir() -> Path:
    """Names and shapes of the tensors of real checkpoints."""
    return TESTS / "data" / "state_dict_keys"


@pytest.fixture(scope="session")
def bundle_contract() -> ModelContract:
    """Two classes, 64x96 uint8 input: the contract of the bundles that tests make."""
    return ModelContract(
        class_names=("cell", "platelet"),
        preprocess=PreprocessSpec(
            mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), pixel_scale=1 / 255, height=64, width=96
        ),
        decode=DecodeSpec(profile=PROFILES["torchvision"], score_threshold=0.2, iou_threshold=0.6),
    )


@pytest.fixture
def make_bundle(bundle_contract: ModelContract) -> Callable[[Path], Path]:
    """Writes a small bundle: a real ONNX graph of one convolution, a second artifact, two golden images."""

    def make(target: Path) -> Path:
        with BundleWriter(target) as writer:
            export = writer.step("export", inputs={"checkpoint": "a"}, make=_export_step)
            (onnx,) = export.artifacts
            writer.step("quantize", inputs={"onnx": onnx.sha256}, make=lambda folder: _quantize_step(folder, onnx))
            golden = writer.step("golden", inputs={}, make=lambda folder: _golden_step(folder, bundle_contract))
            manifest = Manifest(
                name="cells",
                contract=bundle_contract,
                provenance=Provenance(checkpoint="cells.pth", checkpoint_sha256="ab" * 32),
                target=Target(backend="onnxruntime", precision=Precision.INT8, fallback=("openvino",)),
                gates=DEFAULT_GATES,
                golden=tuple(from_json(GoldenImage, value) for value in golden.values),
            )
            return writer.finish(manifest)

    return make


def _export_step(folder: Path) -> StepOutput:
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    node = helper.make_node("Conv", ["images", "weight"], ["out"])
    weight = onnx.numpy_helper.from_array(np.linspace(-1, 1, 27, dtype=np.float32).reshape(1, 3, 3, 3), "weight")
    graph = helper.make_graph(
        [node],
        "conv",
        [helper.make_tensor_value_info("images", 1, [1, 3, 64, 96])],
        [helper.make_tensor_value_info("out", 1, [1, 1, 62, 94])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, folder / "model.fp32.onnx")
    draft = ArtifactDraft(
        path="model.fp32.onnx",
        kind=ArtifactKind.ONNX,
        precision=Precision.FP32,
        parent="ab" * 32,
        config={"opset": "17"},
    )
    return StepOutput(artifacts=(draft,))


def _quantize_step(folder: Path, parent: Artifact) -> StepOutput:
    (folder / "model.int8.engine").write_bytes(bytes(range(256)) * 8)
    (folder / "model.int8.json").write_text('{"contract": null}\n')
    draft = ArtifactDraft(
        path="model.int8.engine",
        kind=ArtifactKind.TENSORRT_ENGINE,
        precision=Precision.INT8,
        parent=parent.sha256,
        backend="onnxruntime",
        companions=("model.int8.json",),
    )
    return StepOutput(artifacts=(draft,), values={"layers": 3})


def _golden_step(folder: Path, contract: ModelContract) -> StepOutput:
    images = [np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8) for seed in (1, 2)]
    found = Detections(np.float32([[1, 2, 30, 40]]), np.float32([0.75]), np.int64([1]))
    records = make_golden(images, folder=folder, contract=contract, detect=lambda _: found)
    return StepOutput(values=to_json(records))
