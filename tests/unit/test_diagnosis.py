"""What diverges is named, with PyTorch on both sides: mistakes that an ONNX file cannot have, and other tails."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fcos_deploy.accuracy.diagnosis import explain, shifted  # noqa: E402
from fcos_deploy.accuracy.parity import (  # noqa: E402
    ParityImage,
    ParityReport,
    compare_stages,
    tolerance_for,
)
from fcos_deploy.core.backend import SessionOptions  # noqa: E402
from fcos_deploy.core.contract import ModelContract  # noqa: E402
from fcos_deploy.core.decode import PROFILES, DecodeSpec  # noqa: E402
from fcos_deploy.core.enums import (  # noqa: E402
    ComputeType,
    Precision,
    Tail,
)
from fcos_deploy.core.image import read_image  # noqa: E402
from fcos_deploy.core.network import BoxActivation, FcosConfig  # noqa: E402
from fcos_deploy.core.preprocess import PreprocessSpec  # noqa: E402
from fcos_deploy.detector import Detector  # noqa: E402
from fcos_deploy.model.fcos import Fcos  # noqa: E402

ROOT = Path(__file__).parents[2]
CONFIG = FcosConfig(
    num_classes=3,
    blocks=(1, 1, 1, 1),
    stem_channels=8,
    width_per_group=8,
    fpn_channels=32,
    cls_convs=2,
    reg_convs=2,
)
CONTRACT = ModelContract(
    class_names=("a", "b", "c"),
    preprocess=PreprocessSpec(
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), pixel_scale=255.0, height=256, width=320
    ),
    decode=DecodeSpec(profile=PROFILES["torchvision"], score_threshold=0.2, iou_threshold=0.6),
)
OPTIONS = SessionOptions(threads=1)


def fill() -> Any:
    path = ROOT / "tests/golden/_fill_weights.py"
    spec = importlib.util.spec_from_file_location("_fill_weights", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fill


def network(**changes: Any) -> Fcos:
    """The tiny network with its deterministic weights, in another configuration if told."""
    model = Fcos(replace(CONFIG, **changes)).eval()
    filler = fill()
    model.load_state_dict(
        {k: torch.from_numpy(np.array(filler(k, tuple(v.shape)))) for k, v in model.state_dict().items()}
    )
    return model


@pytest.fixture(scope="module")
def images() -> Sequence[ParityImage]:
    paths = sorted((ROOT / "fcos_deploy/demo_data/evaluation").glob("*.jpg"))[:2]
    return [ParityImage(path.name, read_image(path)) for path in paths]


@pytest.fixture(scope="module")
def reference() -> Detector:
    return Detector.of_network(network(), CONTRACT, options=OPTIONS)


def parity(reference: Detector, candidate: Detector, images: Sequence[ParityImage], **changes: Any) -> ParityReport:
    with candidate:
        report = compare_stages(reference, candidate, images, **changes)
        return explain(report, reference, candidate, network=network())


def named(report: ParityReport, *, stage: str, cause: str) -> str:
    """The sentence of the first cause, after checking where and what it is."""
    assert report.first is not None
    assert report.first.stage == stage, [(s.stage, s.passed, s.detail) for s in report.stages]
    assert report.causes, report.first
    assert report.causes[0].name == cause, report.causes
    return report.causes[0].sentence


class _Tampered(Detector):
    """A detector whose input tensor is spoilt behind its contract's back."""

    def prepare(self, images: Any) -> Any:
        feeds, letterboxes = super().prepare(images)
        return {**feeds, "images": self.spoil(feeds["images"])}, letterboxes

    def spoil(self, tensor: Any) -> Any:
        raise NotImplementedError


class _Swapped(_Tampered):
    def spoil(self, tensor: Any) -> Any:
        return np.ascontiguousarray(tensor[:, ::-1])


class _HalfPixel(_Tampered):
    def spoil(self, tensor: Any) -> Any:
        return np.stack([shifted(image.astype(np.float32), 0.5, 0.5).round().astype(np.uint8) for image in tensor])


def tampered(kind: type[Detector]) -> Detector:
    plain = Detector.of_network(network(), CONTRACT, options=OPTIONS)
    return kind(plain.session, plain.contract)


def test_channels_swapped_behind_the_contract(reference: Detector, images: Sequence[ParityImage]) -> None:
    report = parity(reference, tampered(_Swapped), images)
    assert "RGB/BGR" in named(report, stage="preprocess", cause="channel-order")


def test_half_pixel_shift(reference: Detector, images: Sequence[ParityImage]) -> None:
    report = parity(reference, tampered(_HalfPixel), images)
    sentence = named(report, stage="preprocess", cause="shift")
    assert "+0.5" in sentence
    assert "right" in sentence


def test_wrong_mean(reference: Detector, images: Sequence[ParityImage]) -> None:
    contract = CONTRACT.with_preprocess(replace(CONTRACT.preprocess, mean=(0.485, 0.456, 0.5)))
    report = parity(reference, Detector.of_network(network(), contract, options=OPTIONS), images)
    sentence = named(report, stage="preprocess", cause="preprocess.mean")
    assert "(0.485, 0.456, 0.5) in place of (0.485, 0.456, 0.406)" in sentence
    # The pixels alone tell it too: -0.094 / 0.225 standard deviations in the third channel.
    pixels = next(c for c in report.causes if c.name == "normalisation")
    assert "-0.418" in pixels.sentence
    assert pixels.explained > 0.999


def test_relu_for_exp(images: Sequence[ParityImage]) -> None:
    right = network(box_activation=BoxActivation.EXP)
    mine = Detector.of_network(right, CONTRACT, options=OPTIONS)
    with Detector.of_network(network(), CONTRACT, options=OPTIONS) as candidate:
        report = explain(compare_stages(mine, candidate, images), mine, candidate)
    assert "relu in place of exp" in named(report, stage="P3 box", cause="activation")


def test_nms_threshold_in_the_graph(reference: Detector, images: Sequence[ParityImage]) -> None:
    claims = replace(CONTRACT, tail=Tail.NMS)
    does = replace(claims, decode=replace(CONTRACT.decode, iou_threshold=0.4))
    session = Detector.of_network(network(), does, options=OPTIONS).session
    report = parity(reference, Detector(session, claims), images)
    sentence = named(report, stage="detections", cause="decode.iou_threshold")
    assert "IoU threshold of 0.4," in sentence


def test_bf16_in_place_of_f32(reference: Detector, images: Sequence[ParityImage]) -> None:
    options = SessionOptions(threads=1, compute=ComputeType.BF16)
    strict = tolerance_for(Precision.FP32, ComputeType.F32)
    report = parity(reference, Detector.of_network(network(), CONTRACT, options=options), images, tolerance=strict)
    assert "bf16 in place of f32" in named(report, stage="P3 class", cause="compute-type")


def test_bf16_is_within_its_own_tolerance(reference: Detector, images: Sequence[ParityImage]) -> None:
    options = SessionOptions(threads=1, compute=ComputeType.BF16)
    report = parity(reference, Detector.of_network(network(), CONTRACT, options=options), images)
    heads = [s for s in report.stages if s.difference is not None]
    assert all(s.passed for s in heads), [(s.stage, s.detail) for s in heads if not s.passed]
