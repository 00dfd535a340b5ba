"""What is OpenVINO's own: precision, cache, requests."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

import runtimes.openvino
from fcos_deploy.core.backend import Session, SessionOptions, Tensors, get_backend
from fcos_deploy.core.enums import ComputeType, PerformanceHint, Tail
from fcos_deploy.core.errors import BackendLoadError, ConfigError, DeviceError
from runtimes.openvino import executed_primitives, open_model

openvino = pytest.importorskip("openvino")

_OPENVINO = get_backend("openvino")


@pytest.fixture(scope="module")
def feed() -> Tensors:
    return {"images": np.random.default_rng(0).integers(0, 256, (1, 3, 128, 160), np.uint8)}


@pytest.fixture(scope="module")
def session(tiny_ir: Path) -> Iterator[Session]:
    with _OPENVINO.open(tiny_ir, SessionOptions(threads=1)) as opened:
        yield opened


def test_fp32_is_computed_in_f32_whatever_the_processor_prefers(session: Session) -> None:
    assert session.compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32  # type: ignore[attr-defined]


@pytest.mark.parametrize(("compute", "capability"), [(ComputeType.BF16, "BF16"), (ComputeType.F16, "FP16")])
def test_a_type_is_computed_in_or_refused(tiny_ir: Path, feed: Tensors, compute: ComputeType, capability: str) -> None:
    has = capability in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if not has:
        with pytest.raises(DeviceError, match=f"does not compute in {compute}") as caught:
            _OPENVINO.open(tiny_ir, SessionOptions(compute=compute))
        assert "f32" in caught.value.hint
        return
    with _OPENVINO.open(tiny_ir, SessionOptions(compute=compute)) as lower:
        assert lower.description["compute"] == str(compute)
        assert np.isfinite(lower.run(feed)["cls_logits"]).all()


def test_hints_threads_and_streams_reach_the_runtime(tiny_ir: Path) -> None:
    options = SessionOptions(hint=PerformanceHint.THROUGHPUT, threads=2, streams=2)
    with _OPENVINO.open(tiny_ir, options) as opened:
        assert opened.description["hint"] == "throughput"
        assert opened.description["threads"] == "2"
        assert opened.description["streams"] == "2"


def test_devices_are_taken_in_any_case(tiny_ir: Path) -> None:
    for name in ("CPU", "cpu"):
        with _OPENVINO.open(tiny_ir, SessionOptions(device=name, threads=1)) as opened:
            assert opened.description["device"] == "CPU"


@pytest.mark.parametrize("device", ["AUTO", "MULTI:CPU", "HETERO:CPU", "BATCH:CPU"])
def test_devices_that_choose_by_themselves_are_refused(tiny_ir: Path, device: str) -> None:
    with pytest.raises(DeviceError, match="has no device"):
        _OPENVINO.open(tiny_ir, SessionOptions(device=device))


def test_a_compiled_model_is_kept_and_found_again(tiny_ir: Path, feed: Tensors, tmp_path: Path) -> None:
    options = SessionOptions(threads=1, cache_dir=tmp_path / "cache")
    with _OPENVINO.open(tiny_ir, options) as first:
        assert first.description["model_cache"] == "miss"
        expected = first.run(feed)
    with _OPENVINO.open(tiny_ir, options) as second:
        assert second.description["model_cache"] == "hit"
        found = second.run(feed)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_kept_model_that_this_user_did_not_write_is_dropped_before_it_is_executed(
    tiny_ir: Path, feed: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SessionOptions(threads=1, cache_dir=tmp_path / "cache")
    with _OPENVINO.open(tiny_ir, options) as first:
        expected = first.run(feed)
    (kept,) = (tmp_path / "cache").glob("*.kept")
    content = kept.read_bytes()
    spoiled = bytearray(content)
    spoiled[len(content) // 2 : len(content) // 2 + 60] = bytes(60)
    for damaged in (bytes(spoiled), content[:-1], content + b"\0", b"", content[64:]):
        kept.write_bytes(damaged)
        with _OPENVINO.open(tiny_ir, options) as opened:
            assert opened.description["model_cache"] == "miss"
            np.testing.assert_array_equal(opened.run(feed)["cls_logits"], expected["cls_logits"])
        with _OPENVINO.open(tiny_ir, options) as again:
            assert again.description["model_cache"] == "hit"
    monkeypatch.setenv("FCOS_DEPLOY_STATE", str(tmp_path / "of-another-user"))
    with _OPENVINO.open(tiny_ir, options) as opened:
        assert opened.description["model_cache"] == "miss"
    assert (tmp_path / "of-another-user" / "secret").stat().st_mode & 0o777 == 0o600


def test_another_model_under_the_same_name_is_not_served_from_the_cache(
    tiny_ir: Path, tiny_onnx: Path, feed: Tensors, tmp_path: Path
) -> None:
    path, options = tmp_path / "model.xml", SessionOptions(threads=1, cache_dir=tmp_path / "cache")
    _copy_ir(tiny_ir, path)
    date = path.stat().st_mtime_ns
    with _OPENVINO.open(path, options) as first:
        before = first.run(feed)
    _copy_ir(_with_other_biases(tiny_onnx, tmp_path / "other"), path)
    for suffix in (".xml", ".bin"):
        os.utime(path.with_suffix(suffix), ns=(date, date))  # as after unpacking an archive
    with _OPENVINO.open(path, options) as second:
        assert second.description["model_cache"] == "miss"
        assert not np.array_equal(second.run(feed)["cls_logits"], before["cls_logits"])


def _copy_ir(source: Path, target: Path) -> None:
    for suffix in (".xml", ".bin", ".json"):
        target.with_suffix(suffix).write_bytes(source.with_suffix(suffix).read_bytes())


def _with_other_biases(source: Path, folder: Path) -> Path:
    """An IR of the same graph and size in which the vectors of three numbers are larger by one."""
    onnx = pytest.importorskip("onnx")
    from exporters.openvino_ir import EXPORTER
    from fcos_deploy.core.exporter import BuildRequest

    model = onnx.load(str(source))
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.shape == (3,) and array.dtype == np.float32:
            tensor.CopyFrom(onnx.numpy_helper.from_array(array + 1, tensor.name))
    folder.mkdir()
    onnx.save(model, str(folder / "other.onnx"))
    return EXPORTER.build(BuildRequest(source=folder / "other.onnx", output=folder / "other.xml")).files[0]


def test_the_users_cache_is_used_for_irs_and_can_be_turned_off(
    tiny_ir: Path, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FCOS_DEPLOY_CACHE", str(tmp_path))
    _OPENVINO.open(tiny_onnx, SessionOptions(threads=1)).close()
    assert list(tmp_path.iterdir()) == []
    _OPENVINO.open(tiny_ir, SessionOptions(threads=1)).close()
    assert len(list((tmp_path / "openvino").glob("*.kept"))) == 1
    monkeypatch.setenv("FCOS_DEPLOY_CACHE", "")
    with _OPENVINO.open(tiny_ir, SessionOptions(threads=1)) as opened:
        assert opened.description["model_cache"] == "miss"


def test_compiled_models_stay_in_memory_while_that_is_asked_for(
    tiny_ir: Path, tiny_onnx: Path, feed: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FCOS_DEPLOY_CACHE", "")
    _copy_ir(tiny_ir, tmp_path / "copy.xml")
    _copy_ir(_with_other_biases(tiny_onnx, tmp_path / "other"), tmp_path / "changed.xml")

    def opened(path: Path, threads: int = 1) -> tuple[str, Tensors]:
        with _OPENVINO.open(path, SessionOptions(threads=threads)) as session:
            return session.description["model_cache"], session.run(feed)

    with _OPENVINO.keeping_models():
        first, again = opened(tiny_ir), opened(tmp_path / "copy.xml")
        assert (first[0], again[0]) == ("miss", "hit")
        np.testing.assert_array_equal(first[1]["cls_logits"], again[1]["cls_logits"])
        with _OPENVINO.open(tiny_ir, SessionOptions(threads=1)) as beside:
            opened(tiny_ir)  # and closed, which takes nothing from the session beside it
            np.testing.assert_array_equal(beside.run(feed)["cls_logits"], first[1]["cls_logits"])
        assert opened(tiny_ir, threads=2)[0] == "miss"
        _copy_ir(tmp_path / "changed.xml", tmp_path / "copy.xml")
        cached, outputs = opened(tmp_path / "copy.xml")
        assert cached == "miss"
        assert not np.array_equal(outputs["cls_logits"], first[1]["cls_logits"])
    assert opened(tiny_ir)[0] == "miss"


@pytest.fixture(scope="module")
def int8_ir(mini_graph: Any, mini_calibration: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph of convolutions in INT8 and in float, as IR."""
    from calibration.placement import placement_for
    from calibration.quantizers import quantize_qdq
    from exporters.openvino_ir import EXPORTER
    from fcos_deploy.core.exporter import BuildRequest

    source = tmp_path_factory.mktemp("int8") / "model.onnx"
    quantize_qdq(mini_graph, mini_calibration, source, placement=placement_for("openvino"))
    return EXPORTER.build(BuildRequest(source=source, output=source.with_suffix(".xml"))).files[0]


@pytest.mark.parametrize("fixture", ["tiny_ir", "int8_ir"])
@pytest.mark.parametrize("changed", [{"hint": "throughput"}, {"threads": 2}, {"compute": "bf16"}], ids=str)
def test_other_settings_take_what_was_compiled_and_compute_the_same(
    changed: dict[str, Any], fixture: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    path: Path = request.getfixturevalue(fixture)
    if "compute" in changed and "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor does not compute in bf16")
    monkeypatch.setenv("FCOS_DEPLOY_CACHE", "")
    compilations = Mock(wraps=runtimes.openvino._compile)
    monkeypatch.setattr(runtimes.openvino, "_compile", compilations)
    settings = SessionOptions(**{"threads": 1, "hint": PerformanceHint.LATENCY, **changed})

    def opened() -> tuple[dict[str, str], list[str], Tensors]:
        with _OPENVINO.open(path, settings) as session:
            facts = ("layerType", "primitiveType", "runtimePrecision", "outputPrecisions", "outputLayouts")
            primitives = [" ".join(map(primitive.get, facts)) for primitive in executed_primitives(session)]
            generator = np.random.default_rng(0)
            feed = {s.name: generator.integers(0, 255, s.shape).astype(s.dtype) for s in session.inputs}
            return dict(session.description), primitives, session.run(feed)

    with _OPENVINO.keeping_models():
        _OPENVINO.open(path, SessionOptions(threads=1, hint=PerformanceHint.LATENCY)).close()
        imported = opened()
    assert compilations.call_count == 1
    compiled = opened()
    assert compilations.call_count == 2
    assert imported[:2] == compiled[:2]
    for name, values in compiled[2].items():
        np.testing.assert_array_equal(imported[2][name], values)


def test_a_cache_that_cannot_be_written_is_an_error_when_asked_for(tiny_ir: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        _OPENVINO.open(tiny_ir, SessionOptions(cache_dir=Path("/proc/nowhere")))


def test_weights_that_are_missing_or_short_are_named(tiny_ir: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.xml"
    path.write_bytes(tiny_ir.read_bytes())
    with pytest.raises(BackendLoadError, match=r"has no 'model\.bin' beside it"):
        _OPENVINO.open(path, SessionOptions())
    content = tiny_ir.with_suffix(".bin").read_bytes()
    for share in (0.0, 0.5, 0.999):
        path.with_suffix(".bin").write_bytes(content[: int(len(content) * share)])
        with pytest.raises(BackendLoadError, match=r"cannot open .*model\.xml"):
            _OPENVINO.open(path, SessionOptions())


def test_each_thread_has_its_own_request_over_one_compiled_model(session: Session, feed: Tensors) -> None:
    requests: list[object] = []

    def work() -> None:
        session.run(feed)
        requests.append(session._requests.get())  # type: ignore[attr-defined]

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(request) for request in requests}) == 3


def test_a_reused_buffer_is_shared_not_copied(session: Session, feed: Tensors) -> None:
    buffer = {"images": feed["images"].copy()}
    session.borrow(buffer)
    tensor = session._requests.get()._request.get_tensor("images")  # type: ignore[attr-defined]
    assert tensor.data.ctypes.data == buffer["images"].ctypes.data


def test_outputs_have_the_models_names_though_compiling_adds_others(
    tiny_export: Callable[..., Path], tmp_path: Path
) -> None:
    from exporters.openvino_ir import EXPORTER
    from fcos_deploy.core.exporter import BuildRequest

    onnx = tiny_export(tail=Tail.NMS, batch=2)
    ir = EXPORTER.build(BuildRequest(source=onnx, output=tmp_path / "nms.xml")).files[0]
    options = SessionOptions(threads=1, cache_dir=tmp_path / "cache")
    for path in (onnx, ir, ir):  # the last from the cache
        with _OPENVINO.open(path, options) as opened:
            assert [spec.name for spec in opened.outputs] == ["boxes", "scores", "labels", "num_detections"]
            assert opened.outputs[2].dtype == "int32"


def test_a_graph_in_memory_opens_for_a_check(tiny_onnx: Path, feed: Tensors) -> None:
    with open_model(tiny_onnx.read_bytes(), threads=1) as plain, _OPENVINO.open(tiny_onnx, SessionOptions()) as opened:
        assert (plain.inputs, plain.outputs) == (opened.inputs, opened.outputs)
        np.testing.assert_allclose(plain.run(feed)["distances"], opened.run(feed)["distances"], rtol=1e-4, atol=1e-4)
        layers = {layer["layerType"] for layer in executed_primitives(plain)}
    assert "Convolution" in layers
    with pytest.raises(BackendLoadError, match="cannot open the graph"):
        open_model(b"not a graph")


def test_a_description_of_a_terabyte_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "m.xml"
    path.touch()
    os.truncate(path, 1 << 40)  # sparse: nothing of it is on the disk
    with pytest.raises(BackendLoadError, match="is larger than"):
        _OPENVINO.open(path, SessionOptions())
