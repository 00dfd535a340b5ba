"""What is ONNX Runtime's own: providers, threads, placements."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fcos_deploy.core.backend import SessionOptions, get_backend
from fcos_deploy.core.enums import ComputeType, PerformanceHint
from fcos_deploy.core.errors import BackendLoadError, ConfigError, DeviceError
from runtimes.onnxruntime import GraphOptimization, _create, _settings, executed_kernels, open_model

onnxruntime = pytest.importorskip("onnxruntime")

_RUNTIME = get_backend("onnxruntime")


def test_only_the_provider_that_was_asked_for_runs(tiny_onnx: Path) -> None:
    with _RUNTIME.open(tiny_onnx, SessionOptions(device="cpu", threads=1)) as opened:
        assert opened._session.get_providers() == ["CPUExecutionProvider"]  # type: ignore[attr-defined]


def test_a_provider_of_another_build_is_an_error_that_names_those_there(tiny_onnx: Path) -> None:
    absent = {"cuda", "tensorrt", "openvino", "dml", "coreml"} - {
        name.removesuffix("ExecutionProvider").lower() for name in onnxruntime.get_available_providers()
    }
    for device in absent:
        with pytest.raises(DeviceError, match=f"no device '{device}'") as caught:
            _RUNTIME.open(tiny_onnx, SessionOptions(device=device))
        assert caught.value.hint == f"devices: {', '.join(_RUNTIME.probe().devices)}"


def test_operators_that_would_leave_the_provider_are_refused(tiny_onnx: Path) -> None:
    # The only other provider of the CPU's build: it has no operator of the graph, so that all would move to the CPU.
    with pytest.raises(DeviceError, match=r"'azure' does not have all operators of .* would run on the CPU"):
        _create(tiny_onnx, settings=_settings(1), provider=("AzureExecutionProvider", {}))


def test_a_web_service_is_not_a_device(tiny_onnx: Path) -> None:
    assert "azure" not in _RUNTIME.probe().devices
    with pytest.raises(DeviceError):
        _RUNTIME.open(tiny_onnx, SessionOptions(device="azure"))


def test_threads_are_as_asked_and_stop_spinning_after_a_run(tiny_onnx: Path) -> None:
    with _RUNTIME.open(tiny_onnx, SessionOptions(threads=2)) as opened:
        used = opened._session.get_session_options()  # type: ignore[attr-defined]
        assert used.intra_op_num_threads == 2
        assert used.get_session_config_entry("session.force_spinning_stop") == "1"
    with _RUNTIME.open(tiny_onnx, SessionOptions()) as opened:
        assert opened.description["threads"] == "all cores"


def test_throughput_divides_the_threads_among_requests(tiny_onnx: Path) -> None:
    options = SessionOptions(hint=PerformanceHint.THROUGHPUT, threads=4, streams=2)
    with _RUNTIME.open(tiny_onnx, options) as opened:
        assert (opened.description["streams"], opened.description["threads"]) == ("2", "2")
        feeds = [{"images": np.full((1, 3, 128, 160), value, np.uint8)} for value in range(0, 250, 25)]
        for found, feed in zip(opened.run_many(feeds), feeds, strict=True):
            np.testing.assert_array_equal(found["distances"], opened.run(feed)["distances"])


def test_a_compute_type_on_request_is_refused_with_the_way_out(tiny_onnx: Path) -> None:
    with pytest.raises(ConfigError, match="not in f16 on request") as caught:
        _RUNTIME.open(tiny_onnx, SessionOptions(compute=ComputeType.F16))
    assert "--precision fp16" in caught.value.hint


def test_an_opset_of_the_future_is_a_load_error(tiny_onnx: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(str(tiny_onnx))
    model.opset_import[0].version = 999
    path = tmp_path / "future.onnx"
    onnx.save(model, str(path))
    with pytest.raises(BackendLoadError, match=r"cannot open .*future\.onnx"):
        _RUNTIME.open(path, SessionOptions())


def test_a_graph_of_elsewhere_opens_without_a_contract(tiny_onnx: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(str(tiny_onnx))
    model.ClearField("metadata_props")
    path = tmp_path / "elsewhere.onnx"
    onnx.save(model, str(path))
    with _RUNTIME.open(path, SessionOptions(threads=1)) as opened:
        assert opened.contract is None
        assert [spec.name for spec in opened.outputs] == ["cls_logits", "distances", "centerness"]


def test_a_graph_in_memory_opens_for_a_check(tiny_onnx: Path) -> None:
    feed = {"images": np.full((1, 3, 128, 160), 7, np.uint8)}
    plain = open_model(tiny_onnx.read_bytes(), threads=1, optimization=GraphOptimization.DISABLED)
    with plain, _RUNTIME.open(tiny_onnx, SessionOptions(threads=1)) as opened:
        assert plain.inputs == opened.inputs
        np.testing.assert_allclose(plain.run(feed)["distances"], opened.run(feed)["distances"], rtol=1e-3, atol=1e-3)
    with pytest.raises(BackendLoadError, match="cannot open the graph"):
        open_model(b"not a graph")


def test_executed_kernels_hold_every_convolution_once(tiny_onnx: Path) -> None:
    onnx = pytest.importorskip("onnx")
    operators = [node.op_type for node in onnx.load(str(tiny_onnx)).graph.node]
    kernels = executed_kernels(tiny_onnx, {"images": np.zeros((1, 3, 128, 160), np.uint8)})
    assert sum(operator in ("Conv", "FusedConv") for _, operator in kernels) == operators.count("Conv")
