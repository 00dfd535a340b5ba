"""Fixtures that every test may use: the golden references and small real models."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import settings
from numpy.typing import NDArray

from fcos_deploy.accuracy.golden import make_golden
from fcos_deploy.bundle import (
    DEFAULT_GATES,
    Artifact,
    ArtifactDraft,
    BundleWriter,
    GoldenImage,
    Manifest,
    Provenance,
    RunDefaults,
    StepOutput,
)
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.decode import PROFILES, DecodeSpec
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import ArtifactKind, Precision
from fcos_deploy.core.native import SWITCH, library_problem
from fcos_deploy.core.preprocess import PreprocessSpec
from fcos_deploy.core.serialize import from_json, to_json

# Read by PyTorch's OpenMP when it is loaded, here and in child processes. By default its threads spin while they wait,
# and on a machine whose cores are all taken by other tests they spin instead of them: 2.4 times the CPU time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

TESTS = Path(__file__).parent
# Folders and files that export, build or run whole models: left out of the quick loop.
_SLOW = frozenset(
    (
        *("contract", "docs", "flow", "golden"),
        *("test_torch_onnx", "test_tails", "test_detector", "test_ecosystems", "test_simplify", "test_onnx_fp16"),
        *("test_wrap", "test_evaluate", "test_sign", "test_benchmark", "test_predict", "test_export"),
        *("test_argument_fuzz", "test_diagnosis", "test_report"),
    )
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what the quick loop leaves out; ``FCOS_DEPLOY_FUZZ=N`` takes N times the examples of property tests."""
    factor = int(os.environ.get("FCOS_DEPLOY_FUZZ", "1"))
    for item in items:
        if _SLOW & {*item.path.parent.parts, item.path.stem}:
            item.add_marker(pytest.mark.slow)
        test = getattr(item, "obj", None)
        if factor > 1 and getattr(test, "is_hypothesis_test", False):
            chosen = test._hypothesis_internal_use_settings
            longer = settings(chosen, max_examples=factor * chosen.max_examples, derandomize=False)
            test._hypothesis_internal_use_settings = longer


def pytest_runtest_setup() -> None:
    """ONNX Script parses the source of each of its operators anew for each export, a quarter of a small model's.

    What it reads there is their signatures, which stay what they are: they are read once a process.
    """
    traced = getattr(getattr(sys.modules.get("onnxscript"), "values", None), "TracedOnnxFunction", None)
    signature = getattr(traced, "function_ir", None)
    if isinstance(signature, property) and signature.fget and not hasattr(signature.fget, "cache_info"):
        traced.function_ir = property(cache(signature.fget))


@pytest.fixture(scope="module", params=["0", "1"], ids=["numpy", "compiled"])
def host_path(request: pytest.FixtureRequest) -> Iterator[None]:
    """The host path's loops in NumPy, and compiled; with ``FCOS_DEPLOY_REQUIRE=native`` a missing library fails."""
    if request.param == "1" and library_problem() and "native" not in os.environ.get("FCOS_DEPLOY_REQUIRE", ""):
        pytest.skip(library_problem())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, request.param)
        yield


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Outputs of the original libraries on deterministic weights."""
    return TESTS / "golden" / "data"


@pytest.fixture(scope="session")
def fill_weights() -> ModuleType:
    """The script that gives each tensor of a reference its deterministic values: ``fill(name, shape)``."""
    return _module_of("golden/_fill_weights")


def _module_of(name: str) -> ModuleType:
    """The module of ``tests/NAME.py``."""
    path = TESTS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
            mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), pixel_scale=255.0, height=64, width=96
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
                defaults=RunDefaults(backend="tensorrt", precision=Precision.INT8, fallback=("openvino",)),
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
        backend="tensorrt",
        companions=("model.int8.json",),
    )
    return StepOutput(artifacts=(draft,), values={"layers": 3})


def _golden_step(folder: Path, contract: ModelContract) -> StepOutput:
    images = [np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8) for seed in (1, 2)]
    detections = Detections(np.float32([[1, 2, 30, 40]]), np.float32([0.75]), np.int64([1]))
    records = make_golden(images, [detections] * len(images), folder=folder, contract=contract)
    return StepOutput(values=to_json(records))


@pytest.fixture(scope="session", autouse=True)
def private_model_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps compiled models, keys and layers out of the user's own folders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FCOS_DEPLOY_STATE", str(tmp_path_factory.mktemp("state")))
        patch.setenv("FCOS_DEPLOY_CACHE", str(tmp_path_factory.mktemp("model-cache")))
        yield


@pytest.fixture(scope="module")
def short_measurements() -> Iterator[None]:
    """Speed is measured briefly and without new processes, for the tests of a module that look at no time."""
    with pytest.MonkeyPatch.context() as patch:
        _module_of("brief").measure_briefly(patch.setattr)
        yield


MakeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """``make_once(name, make)``: a folder that ``make(folder)`` fills once for all workers; each gets its own copy."""
    own = tmp_path_factory.getbasetemp()
    # As pytest-xdist's documentation says under "Making session-scoped fixtures execute only once".
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder = shared / f"{name}-made"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                unfinished = shared / f"{name}-unfinished"
                shutil.rmtree(unfinished, ignore_errors=True)  # what a failure left
                unfinished.mkdir()
                make(unfinished)
                unfinished.rename(folder)
        return Path(shutil.copytree(folder, own / name))

    return once


@pytest.fixture(scope="session")
def tiny_checkpoint(make_once: MakeOnce) -> Path:
    """A real FCOS of 1.6 MB, random but not silent: ResNet-18 of reduced width, three classes, 128x160 uint8 input."""
    return make_once("tiny-checkpoint", _write_tiny_checkpoint) / "tiny.safetensors"


@pytest.fixture(scope="session")
def deformable_checkpoint(make_once: MakeOnce) -> Path:
    """``tiny_checkpoint`` with deformable convolutions of both versions in backbone and head, and one class."""
    from fcos_deploy.core.network import DeformableLayer

    layers = (
        DeformableLayer("backbone.body.layer3.0.conv1", groups=1, modulated=True),  # of stride 2
        DeformableLayer("backbone.body.layer4.1.conv2", groups=1, modulated=False),
        DeformableLayer("head.classification_head.conv.9", groups=1, modulated=True),
        DeformableLayer("head.regression_head.conv.9", groups=1, modulated=True),
    )
    make = partial(_write_tiny_checkpoint, classes=("cell",), deformable=layers)
    return make_once("deformable-checkpoint", make) / "tiny.safetensors"


def _write_tiny_checkpoint(
    folder: Path, *, classes: tuple[str, ...] = ("red", "white", "platelet"), deformable: tuple[Any, ...] = ()
) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    from fcos_deploy.core.network import resnet_config
    from fcos_deploy.model.fcos import Fcos

    torch.manual_seed(0)
    config = resnet_config(18, num_classes=len(classes), stem_channels=8, fpn_channels=32)
    model = Fcos(replace(config, deformable=deformable))
    with torch.no_grad():
        model.head.classification_head.cls_logits.weight.normal_(std=0.15)
        model.head.classification_head.cls_logits.bias.fill_(-4.7)
        model.head.regression_head.bbox_reg.weight.normal_(std=0.1)
        model.head.regression_head.bbox_reg.bias.fill_(1.5)
        model.head.regression_head.bbox_ctrness.bias.fill_(1.0)
        for name, parameter in model.named_parameters():
            if ".offset." in name:
                parameter.normal_(std=0.3 if name.endswith("bias") else 0.02)
    metadata = {"ecosystem": "torchvision", "classes": json.dumps(classes), "input_size": "128x160"}
    text = json.dumps({**metadata, "score_threshold": "0.2"})
    save_file(model.state_dict(), folder / "tiny.safetensors", metadata={"fcos_deploy": text})


@pytest.fixture(scope="session")
def deformable_onnx(deformable_checkpoint: Path, make_once: MakeOnce) -> Path:
    """``deformable_checkpoint`` as ONNX in plain operators, raw tail, batch 1."""
    from exporters.torch_onnx import export_onnx
    from fcos_deploy.checkpoints.load import load_checkpoint

    def make(folder: Path) -> object:
        return export_onnx(load_checkpoint(deformable_checkpoint), folder / "tiny.onnx")

    return make_once("deformable-onnx", make) / "tiny.onnx"


@pytest.fixture(scope="session")
def tiny_export(tiny_checkpoint: Path, make_once: MakeOnce) -> Callable[..., Path]:
    """``tiny_checkpoint`` as ONNX, once for each set of ``ExportOptions``; read-only by agreement."""
    from exporters.torch_onnx import ExportOptions, export_onnx
    from fcos_deploy.checkpoints.load import load_checkpoint

    paths: dict[str, Path] = {}

    def export(**options: Any) -> Path:
        def make(folder: Path) -> object:
            loaded = load_checkpoint(tiny_checkpoint)
            return export_onnx(loaded, folder / "tiny.onnx", options=ExportOptions(**options))

        name = "-".join(["tiny-onnx", *(f"{option}={value}" for option, value in sorted(options.items()))])
        if name not in paths:
            paths[name] = make_once(name, make) / "tiny.onnx"
        return paths[name]

    return export


@pytest.fixture(scope="session")
def tiny_onnx(tiny_export: Callable[..., Path]) -> Path:
    """``tiny_checkpoint`` as ONNX, raw tail, batch 1."""
    return tiny_export()


@pytest.fixture(scope="session")
def demo_onnx(make_once: MakeOnce) -> Path:
    """The bundled blood-cell detector as ONNX.

    A trained one: an untrained one's scores nearly tie, so that rounding decides which boxes win.
    """
    pytest.importorskip("torch")
    from exporters.torch_onnx import export_onnx
    from fcos_deploy.checkpoints.load import load_checkpoint
    from fcos_deploy.pipeline.deploy import DEMO_DATA

    checkpoint = DEMO_DATA / "fcos_bccd.safetensors"
    return (
        make_once("demo-onnx", lambda folder: export_onnx(load_checkpoint(checkpoint), folder / "demo.onnx"))
        / "demo.onnx"
    )


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tiny_onnx: Path, blobs: list[NDArray[np.uint8]], make_once: MakeOnce) -> Path:
    """A bundle of ``tiny_onnx`` whose golden detections PyTorch made; read-only by agreement, copy it to change it."""
    from fcos_deploy.core.artifact import read_contract
    from fcos_deploy.core.files import sha256_file
    from fcos_deploy.detector import Detector

    contract, source = read_contract(tiny_onnx), sha256_file(tiny_checkpoint)

    def export(folder: Path) -> StepOutput:
        shutil.copyfile(tiny_onnx, folder / "model.fp32.onnx")
        draft = ArtifactDraft(
            path="model.fp32.onnx", kind=ArtifactKind.ONNX, precision=Precision.FP32, parent=source, backend=""
        )
        return StepOutput(artifacts=(draft,))

    def golden(folder: Path) -> StepOutput:
        with Detector.open(tiny_checkpoint, backend="pytorch") as reference:
            records = make_golden(blobs, [*map(reference.detect, blobs)], folder=folder, contract=contract)
        return StepOutput(values=to_json(records))

    def make(folder: Path) -> None:
        with BundleWriter(folder / "bundle") as writer:
            writer.step("export", inputs={}, make=export)
            records = writer.step("golden", inputs={}, make=golden).values
            writer.finish(
                Manifest(
                    name="tiny",
                    contract=contract,
                    provenance=Provenance(checkpoint="tiny.safetensors", checkpoint_sha256=source),
                    defaults=RunDefaults(backend="onnxruntime", precision=Precision.FP32, fallback=("openvino",)),
                    gates=DEFAULT_GATES,
                    golden=tuple(from_json(GoldenImage, value) for value in records),
                )
            )

    return make_once("tiny-bundle", make) / "bundle"


@pytest.fixture(scope="session")
def renamed_bundle(tiny_bundle: Path) -> Callable[[Path, str], Path]:
    """``renamed_bundle(path, name)``: a copy of ``tiny_bundle`` with another name, so that it is another bundle."""

    def rename(path: Path, name: str) -> Path:
        shutil.copytree(tiny_bundle, path)
        manifest = path / "manifest.json"
        manifest.write_text(
            manifest.read_text().replace('"name": "tiny"', json.dumps("name") + ": " + json.dumps(name))
        )
        digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
        (path / "manifest.sha256").write_text(f"{digest}  manifest.json\n")
        return path

    return rename


@pytest.fixture(scope="session")
def tiny_ir(tiny_onnx: Path, make_once: MakeOnce) -> Path:
    """``tiny_onnx`` as OpenVINO IR, in a folder of its own."""
    pytest.importorskip("openvino")
    from exporters.openvino_ir import EXPORTER
    from fcos_deploy.core.exporter import BuildRequest

    def make(folder: Path) -> None:
        EXPORTER.build(BuildRequest(source=tiny_onnx, output=folder / "tiny.xml"))

    return make_once("tiny-ir", make) / "tiny.xml"


@pytest.fixture(scope="session")
def tiny_ir_bundle(tiny_checkpoint: Path, tiny_onnx: Path, blobs: list[NDArray[np.uint8]], make_once: MakeOnce) -> Path:
    """A bundle for OpenVINO: ``tiny_onnx``, its IR in fp32 and fp16, golden detections; read-only by agreement."""
    pytest.importorskip("openvino")
    from exporters.openvino_ir import EXPORTER
    from fcos_deploy.core.artifact import read_contract
    from fcos_deploy.core.backend import get_backend
    from fcos_deploy.core.exporter import BuildOptions, BuildRequest
    from fcos_deploy.core.files import sha256_file
    from fcos_deploy.detector import Detector
    from fcos_deploy.pipeline.build import engine_requirements

    contract, source = read_contract(tiny_onnx), sha256_file(tiny_checkpoint)

    def graphs(folder: Path) -> StepOutput:
        shutil.copyfile(tiny_onnx, folder / "model.fp32.onnx")
        onnx = ArtifactDraft(path="model.fp32.onnx", kind=ArtifactKind.ONNX, precision=Precision.FP32, parent=source)
        drafts = [onnx]
        version = get_backend("openvino").probe().version
        for precision in (Precision.FP32, Precision.FP16):
            name = f"model.{precision}.openvino.xml"
            options = BuildOptions(precision=precision if precision is Precision.FP16 else None)
            result = EXPORTER.build(BuildRequest(source=tiny_onnx, output=folder / name, options=options))
            drafts.append(
                ArtifactDraft(
                    path=name,
                    kind=ArtifactKind.OPENVINO_IR,
                    precision=precision,
                    parent=sha256_file(tiny_onnx),
                    backend="openvino",
                    companions=tuple(file.name for file in result.files if file.name != name),
                    requires=engine_requirements("openvino", version=version, record=result.record),
                )
            )
        return StepOutput(artifacts=tuple(drafts))

    def golden(folder: Path) -> StepOutput:
        with Detector.open(tiny_checkpoint, backend="pytorch") as reference:
            records = make_golden(blobs, [*map(reference.detect, blobs)], folder=folder, contract=contract)
        return StepOutput(values=to_json(records))

    def make(folder: Path) -> None:
        with BundleWriter(folder / "bundle") as writer:
            writer.step("graphs", inputs={}, make=graphs)
            records = writer.step("golden", inputs={}, make=golden).values
            writer.finish(
                Manifest(
                    name="tiny",
                    contract=contract,
                    provenance=Provenance(checkpoint="tiny.safetensors", checkpoint_sha256=source),
                    defaults=RunDefaults(backend="openvino", precision=Precision.FP32),
                    gates=DEFAULT_GATES,
                    golden=tuple(from_json(GoldenImage, value) for value in records),
                )
            )

    return make_once("tiny-ir-bundle", make) / "bundle"


@pytest.fixture(scope="session")
def blobs() -> list[NDArray[np.uint8]]:
    """Four images (h, w, 3) uint8 of different sizes, coarse colour blobs and a gradient."""
    generator = np.random.default_rng(1)
    sizes = [(96, 128), (128, 160), (200, 120), (64, 300)]
    coarse = [generator.integers(0, 256, (h // 8, w // 4, 3), np.uint8) for h, w in sizes]
    return [np.repeat(np.repeat(c, 8, axis=0), 4, axis=1) for c in coarse]


@pytest.fixture(scope="session")
def mini_fcos() -> ModuleType:
    """``tests/mini_fcos.py``: ``write(path, seed=, spoil=)`` makes a hand-made float FCOS graph with known names."""
    pytest.importorskip("onnx")
    return _module_of("mini_fcos")


@pytest.fixture(scope="session")
def mini_onnx(mini_fcos: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph of ``mini_fcos``."""
    return mini_fcos.write(tmp_path_factory.mktemp("mini") / "mini.onnx")


@pytest.fixture(scope="session")
def smooth_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve PNG files with soft discs on a gradient, in two subfolders."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("smooth")
    rng = np.random.default_rng(5)
    rows, columns = np.mgrid[0:80, 0:96]
    for index in range(12):
        image = np.stack([rows * 2, columns * 2, (rows + columns)], 2).astype(np.float64)
        for _ in range(4):
            y, x, radius = rng.uniform(0, 80), rng.uniform(0, 96), rng.uniform(6, 24)
            disc = 1 / (1 + np.exp((np.hypot(rows - y, columns - x) - radius) / 1.5))
            image = image * (1 - disc[..., None]) + disc[..., None] * rng.uniform(0, 255, 3)
        path = folder / ("a" if index % 3 else "b") / f"{index:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image.astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="session")
def mini_graph(mini_onnx: Path) -> Any:
    """``mini_onnx``, opened: a ``calibration.placement.ConvGraph``."""
    from calibration.placement import open_graph

    return open_graph(mini_onnx)


@pytest.fixture(scope="session")
def mini_calibration(mini_graph: Any, smooth_images: Path) -> Any:
    """Ranges of ``mini_graph`` on ``smooth_images``: a ``calibration.calibrate.Calibration``."""
    from calibration.calibrate import StatisticsOptions, collect_ranges
    from calibration.dataset import collect_images

    options = StatisticsOptions(engine="onnxruntime", threads=1)
    return collect_ranges(mini_graph, collect_images(smooth_images), options=options)


@pytest.fixture(scope="session")
def deformable_loaded() -> Any:
    """A small detector with deformable convolutions of both versions: grouped, in two offset groups, in the head."""
    torch = pytest.importorskip("torch")
    from types import SimpleNamespace

    from fcos_deploy.core.network import DeformableLayer, FcosConfig
    from fcos_deploy.model.fcos import Fcos

    torch.manual_seed(0)
    layers = (
        DeformableLayer("backbone.body.layer3.0.conv2", groups=2, modulated=True),  # of stride 2
        DeformableLayer("backbone.body.layer3.1.conv2", groups=1, modulated=False),
        DeformableLayer("head.classification_head.conv.3", groups=1, modulated=True),
        DeformableLayer("head.regression_head.conv.3", groups=1, modulated=True),
    )
    resnext = {"blocks": (1, 1, 2, 1), "stem_channels": 16, "groups": 4, "width_per_group": 8}
    head = {"num_classes": 3, "fpn_channels": 32, "cls_convs": 2, "reg_convs": 2}
    model = Fcos(FcosConfig(**resnext, **head, deformable=layers)).eval()
    for name, parameter in model.named_parameters():
        if ".offset." in name:
            torch.nn.init.normal_(parameter, std=0.3 if name.endswith("bias") else 0.1)
    for name, statistic in model.named_buffers():
        if name.endswith("running_var"):
            statistic.uniform_(0.5, 1.5)
    contract = ModelContract(
        class_names=("red", "white", "platelet"),
        preprocess=PreprocessSpec(
            mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), pixel_scale=255.0, height=128, width=160
        ),
        decode=DecodeSpec(profile=PROFILES["torchvision"], score_threshold=0.2, iou_threshold=0.6),
    )
    return SimpleNamespace(model=model, contract=contract)
