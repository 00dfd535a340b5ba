"""What every builder promises, tried on those that work without the device."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fcos_deploy.core.artifact import read_contract
from fcos_deploy.core.backend import SessionOptions, backends_for
from fcos_deploy.core.enums import ArtifactKind, Precision
from fcos_deploy.core.errors import BackendLoadError, BuildError, ConfigError, FcosDeployError, StepCheckError
from fcos_deploy.core.exporter import BuildOptions, BuildRequest, Exporter, SizeRange, all_exporters, get_exporter

_SUFFIXES = {ArtifactKind.ONNX: ".onnx", ArtifactKind.OPENVINO_IR: ".xml"}
_NAMES = [e.name for e in all_exporters().values() if e.produces in _SUFFIXES]  # engines have tests of their own


@pytest.fixture(scope="module", params=_NAMES)
def exporter(request: pytest.FixtureRequest) -> Exporter:
    pytest.importorskip(request.param)
    return get_exporter(request.param)


def _output(exporter: Exporter, folder: Path, name: str = "built") -> Path:
    return folder / f"{name}{_SUFFIXES[exporter.produces]}"


def test_the_result_computes_what_its_source_does(exporter: Exporter, tiny_onnx: Path, tmp_path: Path) -> None:
    result = exporter.build(BuildRequest(source=tiny_onnx, output=_output(exporter, tmp_path)))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f.name for f in result.files)
    assert result.record["onnx_sha256"] == hashlib.sha256(tiny_onnx.read_bytes()).hexdigest()
    assert "largest difference" in result.record["check"]
    feeds = {"images": np.random.default_rng(5).integers(0, 256, (1, 3, 128, 160), np.uint8)}
    backend = next(b for b in backends_for(exporter.produces) if b.name == exporter.name)
    source_backend = next(b for b in backends_for(ArtifactKind.ONNX) if b.name == exporter.name)
    options = SessionOptions(threads=1)
    with backend.open(result.files[0], options) as built, source_backend.open(tiny_onnx, options) as source:
        expected, found = source.run(feeds), built.run(feeds)
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-3)


def test_the_contract_goes_with_it(exporter: Exporter, tiny_onnx: Path, tmp_path: Path) -> None:
    result = exporter.build(BuildRequest(source=tiny_onnx, output=_output(exporter, tmp_path)))
    assert read_contract(result.files[0]) == read_contract(tiny_onnx)


def test_progress_is_told_to_the_end(exporter: Exporter, tiny_onnx: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    exporter.build(
        BuildRequest(
            source=tiny_onnx,
            output=_output(exporter, tmp_path),
            progress=lambda _, done, total: told.append((done, total)),
        )
    )
    assert told[-1][0] == told[-1][1] > 0


@pytest.mark.parametrize(
    "options",
    [
        BuildOptions(dla_core=0),
        BuildOptions(batch=SizeRange(1, 2, 4)),
        BuildOptions(workspace_mib=64),
        BuildOptions(compute_capabilities=("8.6",)),
        BuildOptions(height_range=(32, 64, 96)),
    ],
)
def test_an_option_that_a_builder_does_not_have_is_refused(
    exporter: Exporter, tiny_onnx: Path, tmp_path: Path, options: BuildOptions
) -> None:
    with pytest.raises(ConfigError, match="has no option"):
        exporter.build(BuildRequest(source=tiny_onnx, output=_output(exporter, tmp_path), options=options))
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_suffix_is_refused(exporter: Exporter, tiny_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is named"):
        exporter.build(BuildRequest(source=tiny_onnx, output=tmp_path / "built.bin"))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.98])
def test_a_damaged_source_leaves_nothing(exporter: Exporter, tiny_onnx: Path, tmp_path: Path, share: float) -> None:
    content = tiny_onnx.read_bytes()
    source = tmp_path / "cut.onnx"
    source.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(FcosDeployError) as caught:
        exporter.build(BuildRequest(source=source, output=_output(exporter, tmp_path / "out")))
    assert "cut.onnx" in caught.value.message
    assert not (tmp_path / "out").exists()


def test_a_source_without_a_contract_is_refused(exporter: Exporter, tiny_onnx: Path, tmp_path: Path) -> None:
    source = _changed(tiny_onnx, tmp_path / "bare.onnx", lambda model: model.ClearField("metadata_props"))
    with pytest.raises(BackendLoadError, match="carries no fcos-deploy contract"):
        exporter.build(BuildRequest(source=source, output=_output(exporter, tmp_path)))


def test_a_graph_that_the_runtime_does_not_know_is_a_build_error(
    exporter: Exporter, tiny_onnx: Path, tmp_path: Path
) -> None:
    def make_foreign(model: Any) -> None:
        model.graph.node[-1].op_type = "NobodysOperator"

    source = _changed(tiny_onnx, tmp_path / "foreign.onnx", make_foreign)
    with pytest.raises(BuildError):
        exporter.build(BuildRequest(source=source, output=_output(exporter, tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["foreign.onnx"]


def test_a_graph_quantized_for_another_runtime_is_refused(exporter: Exporter, tiny_onnx: Path, tmp_path: Path) -> None:
    from fcos_deploy.core.onnx_file import save_onnx, with_contract

    onnx = pytest.importorskip("onnx")
    foreign = replace(read_contract(tiny_onnx), precision=Precision.INT8, placement="of-nobody")
    source = tmp_path / "foreign.onnx"
    save_onnx(with_contract(onnx.load(str(tiny_onnx)), foreign), source)
    with pytest.raises(BackendLoadError, match="'of-nobody'"):
        exporter.build(BuildRequest(source=source, output=_output(exporter, tmp_path)))


def test_a_folder_that_cannot_be_written_is_a_config_error(exporter: Exporter, tiny_onnx: Path) -> None:
    with pytest.raises(ConfigError, match="Cannot write"):
        exporter.build(BuildRequest(source=tiny_onnx, output=_output(exporter, Path("/proc/nowhere"))))


def test_an_fp16_ir_is_half_the_size_and_close(tiny_onnx: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    sizes = {}
    for precision in (None, Precision.FP16):
        options = BuildOptions(precision=precision)
        request = BuildRequest(source=tiny_onnx, output=tmp_path / f"{precision}.xml", options=options)
        result = get_exporter("openvino").build(request)
        sizes[precision] = result.files[1].stat().st_size
        sidecar = json.loads(result.files[2].read_text())
        assert sidecar["record"] == dict(result.record)
        assert read_contract(result.files[0]).precision is (precision or Precision.FP32)
    assert sizes[Precision.FP16] < 0.55 * sizes[None]


def test_what_no_longer_computes_the_same_never_gets_its_name(
    tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    module = __import__("exporters.openvino_ir", fromlist=["EXPORTER"])
    monkeypatch.setattr(module, "_HALF_TOLERANCE", 1e-9)  # half-precision weights cannot meet it
    request = BuildRequest(
        source=tiny_onnx, output=tmp_path / "half.xml", options=BuildOptions(precision=Precision.FP16)
    )
    with pytest.raises(StepCheckError, match="differs from its source"):
        get_exporter("openvino").build(request)
    assert list(tmp_path.iterdir()) == []


def test_an_optimised_model_is_fused_and_never_overwrites_its_source(tiny_onnx: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    builder = get_exporter("onnxruntime")
    (output,) = builder.build(BuildRequest(source=tiny_onnx, output=tmp_path / "built.onnx")).files
    operators = {node.op_type for node in onnx.load(str(output)).graph.node}
    assert "FusedConv" in operators
    with pytest.raises(ConfigError, match="overwrite its source"):
        builder.build(BuildRequest(source=tiny_onnx, output=tiny_onnx))


def _changed(source: Path, output: Path, change: Any) -> Path:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(str(source))
    change(model)
    onnx.save(model, str(output))
    return output
