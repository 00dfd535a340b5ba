"""Every quantizer makes a complete INT8 artifact, or refuses with a reason and leaves nothing."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from calibration.dataset import collect_images
from calibration.execution import Feeder
from calibration.placement import placement_for
from calibration.quantizers import QUANTIZERS, QuantizeRequest, get_quantizer
from fcos_deploy.core.contract import read_contract
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import CalibrationError, ConfigError
from fcos_deploy.core.onnx_graph import OnnxGraph

pytest.importorskip("onnx")
NAMES = sorted(QUANTIZERS)
NEEDS = {"qdq": "openvino", "nncf": "nncf"}


@pytest.fixture
def request_for(mini_graph: Any, mini_calibration: Any, smooth_images: Path, tmp_path: Path) -> Any:
    """A request that every quantizer can honour."""

    def make(name: str, **changes: Any) -> QuantizeRequest:
        pytest.importorskip(NEEDS[name])
        output = tmp_path / "out" / f"model{QUANTIZERS[name].suffix}"
        values = {"graph": mini_graph, "output": output, "placement": placement_for("openvino")}
        return QuantizeRequest(**{**values, "calibration": mini_calibration, "images": smooth_images, **changes})

    return make


@pytest.mark.parametrize("name", NAMES)
def test_contract_is_the_sources_in_int8(name: str, request_for: Any, mini_fcos: ModuleType) -> None:
    made = get_quantizer(name).quantize(request_for(name))
    contract = read_contract(made.files[0])
    assert contract.precision is Precision.INT8
    assert contract.placement == "openvino"
    assert contract.class_names == mini_fcos.CONTRACT.class_names
    assert made.record["quantizer"] == name
    assert all(file.is_file() for file in made.files)
    assert sorted(p.name for p in made.files[0].parent.iterdir()) == sorted(file.name for file in made.files)


@pytest.mark.parametrize("name", NAMES)
def test_openvino_runs_it_close_to_the_float_graph(
    name: str, request_for: Any, mini_onnx: Path, smooth_images: Path
) -> None:
    openvino = pytest.importorskip("openvino")
    made = get_quantizer(name).quantize(request_for(name))
    feeds = Feeder(OnnxGraph(mini_onnx))(collect_images(smooth_images).images[0].read())
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    wanted, got = (
        openvino.Core().compile_model(str(path), "CPU", config)(feeds) for path in (mini_onnx, made.files[0])
    )
    for output in ("cls_logits", "distances", "centerness"):
        noise = float(np.square(got[output] - wanted[output]).sum())
        assert 10 * np.log10(float(np.square(wanted[output]).sum()) / noise) > 15.0, output


@pytest.mark.parametrize(("name", "missing"), [("qdq", "calibration"), ("nncf", "images")])
def test_what_it_measures_with_is_demanded(name: str, missing: str, request_for: Any) -> None:
    with pytest.raises(CalibrationError):
        get_quantizer(name).quantize(request_for(name, **{missing: None}))


def test_nncf_is_for_openvino_only(request_for: Any) -> None:
    with pytest.raises(ConfigError, match="NNCF model is for OpenVINO, not for the placement 'portable'"):
        get_quantizer("nncf").quantize(request_for("nncf", placement=placement_for("tensorrt")))


def test_nncf_writes_an_ir(request_for: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must end in \.xml"):
        get_quantizer("nncf").quantize(request_for("nncf", output=tmp_path / "model.onnx"))


def test_unknown_quantizer() -> None:
    with pytest.raises(ConfigError, match="no quantizer 'magic'"):
        get_quantizer("magic")
