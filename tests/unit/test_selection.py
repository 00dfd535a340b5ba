"""Which artifact of a bundle is taken: one rule for running, building and packaging."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fcos_deploy.bundle import Artifact, Bundle, Selection, open_bundle, select_artifact
from fcos_deploy.bundle.selection import tuned_options
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.contract import METADATA_KEY, ModelContract, contract_to_text
from fcos_deploy.core.enums import ArtifactKind, Precision, Tail
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.serialize import to_json
from fcos_deploy.serving import ServingOptions, all_packagers, package_bundle

MakeBundle = Callable[[Path], Path]
Stock = Callable[..., Bundle]


@pytest.fixture
def stock(make_bundle: MakeBundle, bundle_contract: ModelContract, tmp_path: Path) -> Stock:
    """A bundle with artifacts that are named after what they are: ``int8.portable.onnx``, ``fp16.openvino.xml``."""
    onnx = pytest.importorskip("onnx")
    bundle = open_bundle(make_bundle(tmp_path / "cells"))
    (example,) = (a for a in bundle.manifest.artifacts if a.kind is ArtifactKind.ONNX)
    graph = onnx.load(bundle.path(example.path))

    def artifact(name: str) -> Artifact:
        precision, *placement, suffix = name.split(".")
        tail = Tail(placement.pop()) if placement and placement[-1] in set(Tail) else Tail.RAW
        contract = replace(bundle_contract, tail=tail)
        onnx.helper.set_model_props(graph, {METADATA_KEY: contract_to_text(contract)})
        onnx.save(graph, bundle.root / name)
        kind = {
            "onnx": ArtifactKind.ONNX,
            "xml": ArtifactKind.OPENVINO_IR,
            "engine": ArtifactKind.TENSORRT_ENGINE,
        }[suffix]
        backend = {"onnx": "", "xml": "openvino", "engine": "tensorrt"}[suffix]
        content = (bundle.root / name).read_bytes()
        return replace(
            example,
            path=name,
            sha256=hashlib.sha256(content).hexdigest(),
            size=len(content),
            kind=kind,
            precision=Precision(precision),
            backend=backend,
            placement="" if not placement or backend else placement[0],
        )

    def make(*names: str, backend: str = "onnxruntime", precision: Precision = Precision.INT8) -> Bundle:
        defaults = replace(bundle.manifest.defaults, backend=backend, precision=precision)
        for old in bundle.manifest.artifacts:
            (bundle.root / old.path).unlink(missing_ok=True)
        manifest = replace(bundle.manifest, artifacts=tuple(map(artifact, names)), defaults=defaults)
        text = json.dumps(to_json(manifest))
        (bundle.root / "manifest.json").write_text(text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        (bundle.root / "manifest.sha256").write_text(f"{digest}  manifest.json\n")
        return open_bundle(bundle.root)

    return make


def _path(selection: Selection) -> str:
    return selection.artifact.path


TUNED: dict[str, Any] = {"compute": "bf16", "hint": "throughput", "threads": 2, "streams": 1, "batch": 4}


@pytest.mark.parametrize(
    ("asked", "cores", "backend", "taken"),
    [
        ({}, 2, "onnxruntime", TUNED),
        ({}, 1, "onnxruntime", {"compute": "bf16", "hint": "throughput", "batch": 4}),
        ({"hint": "throughput"}, 2, "onnxruntime", TUNED),
        ({"compute": "f32", "batch": 1}, 2, "onnxruntime", {**TUNED, "compute": "f32", "batch": 1}),
        (
            {"threads": 1},
            2,
            "onnxruntime",
            {"compute": "bf16", "hint": "throughput", "threads": 1, "batch": 4},
        ),
        ({"hint": "latency"}, 2, "onnxruntime", {"compute": "bf16", "hint": "latency"}),
        ({}, 2, "openvino", {}),
    ],
)
def test_a_bundle_runs_as_it_was_tuned_unless_something_else_is_asked_for(
    asked: dict[str, Any],
    cores: int,
    backend: str,
    taken: dict[str, Any],
    stock: Stock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fcos_deploy.bundle.selection.usable_cpus", lambda: cores)
    bundle = stock("fp32.onnx", "int8.xml", precision=Precision.FP32)
    bundle.manifest = replace(bundle.manifest, defaults=replace(bundle.manifest.defaults, **TUNED))
    selection = select_artifact(bundle, backend=backend)
    assert tuned_options(bundle, selection, SessionOptions(**asked)) == SessionOptions(**taken)


ALL = ("fp32.onnx", "int8.portable.onnx", "int8.openvino.onnx", "int8.onnxruntime-cpu.onnx", "int8.xml", "fp16.engine")


def test_the_manifests_defaults_say_which_artifact_is_run(make_bundle: MakeBundle, tmp_path: Path) -> None:
    with open_bundle(make_bundle(tmp_path / "cells")) as bundle:
        selection = select_artifact(bundle)
        assert (_path(selection), selection.backend) == ("model.int8.engine", "tensorrt")
        selection = select_artifact(bundle, backend="openvino")
        assert (_path(selection), selection.backend) == ("model.fp32.onnx", "openvino")
        with pytest.raises(ConfigError, match=r"no artifact for backend 'openvino' in int8") as caught:
            select_artifact(bundle, backend="openvino", precisions=[Precision.INT8])
    assert "model.int8.engine (int8, tensorrt)" in caught.value.hint


@pytest.mark.parametrize(
    ("backend", "precision", "expected"),
    [
        ("onnxruntime", Precision.INT8, "int8.onnxruntime-cpu.onnx"),  # the placement that is fastest there
        ("openvino", Precision.INT8, "int8.xml"),  # built for it, before an ONNX file that it reads as well
        ("openvino", Precision.FP32, "fp32.onnx"),
        ("tensorrt", None, "fp16.engine"),  # the default precision is int8, and the bundle has no such engine
    ],
)
def test_a_backend_gets_what_suits_it_best(
    stock: Stock, backend: str, precision: Precision | None, expected: str
) -> None:
    precisions = [precision] if precision else []
    assert _path(select_artifact(stock(*ALL), backend=backend, precisions=precisions)) == expected


def test_the_tail_of_the_bundle_goes_before_a_device_profiles(stock: Stock) -> None:
    bundle = stock("fp32.candidates.onnx", "fp32.onnx", "fp32.nms.onnx", precision=Precision.FP32)
    assert _path(select_artifact(bundle)) == "fp32.onnx"
    assert _path(select_artifact(bundle, tail=Tail.NMS)) == "fp32.nms.onnx"


def test_what_nothing_tells_apart_is_refused_with_what_there_is(stock: Stock) -> None:
    bundle = stock("fp32.onnx", "fp16.onnx", precision=Precision.INT8)
    with pytest.raises(ConfigError, match="several artifacts for backend 'openvino'") as caught:
        select_artifact(bundle, backend="openvino")
    assert caught.value.hint == "it has: fp32.onnx (fp32, onnx), fp16.onnx (fp16, onnx)"


def test_a_builder_reads_the_placement_that_its_backend_executes(stock: Stock) -> None:
    def source(backend: str) -> str:
        readers = {ArtifactKind.ONNX: backend}
        return _path(select_artifact(stock(*ALL), backend=backend, precisions=[Precision.INT8], readers=readers))

    assert source("tensorrt") == "int8.portable.onnx"
    assert source("openvino") == "int8.openvino.onnx"


@pytest.mark.parametrize(
    ("server", "backend", "precision", "expected"),
    [
        ("triton", "", None, "int8.onnxruntime-cpu.onnx"),
        ("triton", "", Precision.FP32, "fp32.onnx"),
        ("triton", "onnxruntime", Precision.INT8, "int8.onnxruntime-cpu.onnx"),
        ("triton", "openvino", None, "int8.xml"),
        ("triton", "tensorrt", None, "fp16.engine"),
        ("ovms", "", None, "int8.xml"),
        ("ovms", "openvino", Precision.FP32, "fp32.onnx"),
    ],
)
def test_a_server_gets_what_its_own_backends_execute(
    stock: Stock, server: str, backend: str, precision: Precision | None, expected: str
) -> None:
    selection = select_artifact(
        stock(*ALL),
        backend=backend,
        precisions=[precision] if precision else [],
        readers=all_packagers()[server].readers,
    )
    assert _path(selection) == expected


def test_an_int8_graph_is_packaged_where_it_is_asked_for(stock: Stock, tmp_path: Path) -> None:
    bundle = stock("fp32.onnx", "int8.portable.onnx", precision=Precision.FP32)
    for server, model in (("triton", "cells/1/model.onnx"), ("ovms", "cells/1/model.onnx")):
        options = ServingOptions(precision=Precision.INT8)
        packaged = package_bundle(bundle, server=server, output=tmp_path / server, options=options)
        assert packaged.artifact.path == "int8.portable.onnx"
        assert (tmp_path / server / model).read_bytes() == bundle.path("int8.portable.onnx").read_bytes()
    options = ServingOptions(backend="tensorrt", precision=Precision.INT8)
    with pytest.raises(ConfigError, match="no artifact for server 'triton' with backend 'tensorrt' in int8"):
        package_bundle(bundle, server="triton", output=tmp_path / "none", options=options)
