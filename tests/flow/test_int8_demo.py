"""The demo detector in INT8: executed in INT8, and still the same detector."""

from __future__ import annotations

from pathlib import Path

import pytest

import fcos_deploy
from calibration.calibrate import CalibrationRequest, StatisticsOptions, calibrate, load_calibration
from calibration.execution import executed_share
from calibration.placement import open_graph, placement_for
from calibration.quantizers import quantize_qdq
from fcos_deploy.accuracy.evaluate import EvaluationRequest, evaluate
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.detector import DetectorSpec

DEMO = Path(fcos_deploy.__file__).parent / "demo_data"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo_calibration(demo_onnx: Path) -> Path:
    output = demo_onnx.with_name("calibration.json")
    request = CalibrationRequest(
        model=demo_onnx,
        images=DEMO / "calibration",
        output=output,
        statistics=StatisticsOptions(threads=2),
        evaluation_images=DEMO / "evaluation",
    )
    report = calibrate(request)
    assert not [finding.kind for finding in report.images.findings if finding.kind.endswith(("overlap", "copies"))]
    return output


def average_precision(model: Path, backend: str) -> float:
    request = EvaluationRequest(
        candidates=(DetectorSpec(model=model, backend=backend, options=SessionOptions(threads=2)),),
        images=DEMO / "evaluation",
        annotations=DEMO / "evaluation.json",
        limit=40,
        resamples=0,
    )
    ap = evaluate(request).candidates[0].scores.ap
    assert ap is not None
    return ap


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_int8_executes_and_keeps_average_precision(
    backend: str, demo_onnx: Path, demo_calibration: Path, tmp_path: Path
) -> None:
    pytest.importorskip(backend)
    pytest.importorskip("faster_coco_eval")
    graph, calibration = open_graph(demo_onnx), load_calibration(demo_calibration)
    quantized = quantize_qdq(graph, calibration, tmp_path / "q.onnx", placement=placement_for(backend))
    assert executed_share(graph, quantized.path, backend).share >= 0.95
    before, after = (average_precision(path, backend) for path in (demo_onnx, quantized.path))
    assert before > 0.4
    # A few dozen images: one detection more or less moves AP by tenths of a point.
    assert before - after <= 0.01
