"""Checkpoints in the ecosystems' own keys, through ``export`` and ``predict``, give the original libraries' detections.

Each ecosystem with one exported tail; ``benchmarks/golden_parity.py`` runs all of them.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fcos_deploy.core.enums import Tail

pytest.importorskip("torch")
pytest.importorskip("onnx")

EXPORTED = {
    "torchvision_fcos_resnet50_fpn_91": Tail.RAW,
    "mmdet_fcos_r18_fpn": Tail.NMS,
    "adelaidet_FCOS-RT": Tail.CANDIDATES,
    "detectron2_fcos_R_50": Tail.NMS,
    # Of reduced width; stride 2 and grouped 3x3 convolutions, DCN with two groups of offsets, DCNv2, VoVNet.
    "tianzhi_fcos_imprv_dcnv2_small": Tail.CANDIDATES,
    "adelaidet_MS_X_small_dcn": Tail.NMS,
    "adelaidet_MS_V_small": Tail.RAW,
}


@pytest.fixture(scope="module")
def parity() -> Iterator[ModuleType]:
    """The benchmark script, whose steps are tested here."""
    path = Path(__file__).parents[2] / "benchmarks" / "golden_parity.py"
    spec = importlib.util.spec_from_file_location("golden_parity", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their own module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module", params=EXPORTED)
def reference(request: pytest.FixtureRequest, parity: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    (found,) = parity.references(tmp_path_factory.mktemp("golden"), part=request.param)
    return found


@pytest.mark.parametrize("tail", list(Tail))
def test_pytorch_gives_the_detections_of_the_library(parity: ModuleType, reference: Any, tail: Tail) -> None:
    wanted = parity.wanted_of(reference)
    found = parity.largest(parity.predict_with_tail(reference, tail), wanted, backend="pytorch")
    score, pixels = parity.BOUNDS["pytorch"]
    assert found.detections >= 95
    assert found.score <= score
    assert found.pixels <= pixels


def test_exported_graphs_give_the_detections_of_the_library(parity: ModuleType, reference: Any) -> None:
    pytest.importorskip("openvino")
    tail = next(tail for name, tail in EXPORTED.items() if name in reference.name)
    for backend, found in parity.measure_exported(reference, tail):
        score, pixels = parity.BOUNDS[backend]
        assert found.score <= score, backend
        assert found.pixels <= pixels, backend
