"""What of a deployment's evidence is measured, and what stands for something else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fcos_deploy import SessionOptions
from fcos_deploy.accuracy.dataset import EvaluationImage
from fcos_deploy.accuracy.predictions import DetectionRun, DetectionRuns, StageSeconds
from fcos_deploy.bundle import Artifact, open_bundle
from fcos_deploy.core.backend import get_backend
from fcos_deploy.core.enums import ArtifactKind, ComputeType, Precision
from fcos_deploy.pipeline import proof
from fcos_deploy.pipeline.steps import Variant

pytest.importorskip("onnxruntime")


@pytest.fixture
def graph(tiny_bundle: Path) -> Artifact:
    """A float32 graph."""
    with open_bundle(tiny_bundle) as bundle:
        (artifact,) = bundle.manifest.artifacts
        return artifact


def _variant(
    artifact: Artifact, *, backend: str = "onnxruntime", compute: ComputeType = ComputeType.F32, **options: Any
) -> Variant:
    return Variant(
        model=Path(artifact.path),
        backend=backend,
        precision=artifact.precision,
        artifact=artifact,
        options=SessionOptions(compute=compute, **options),
    )


def _asked(variants: list[Variant], image: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, str], Any]:
    """The inputs of the step that measures speed, and the request for the measurement, which is not made."""
    requests: list[object] = []
    asked: dict[str, str] = {}

    def measure(request: object, **_: object) -> None:
        requests.append(request)
        raise StopIteration

    def step(*_: object, inputs: dict[str, str], make: Any, stage: str) -> None:
        asked.update(inputs)
        make(Path())

    monkeypatch.setattr(proof, "run_benchmark", measure)
    source = SimpleNamespace(sha256="", reference=lambda: variants[0])
    images = SimpleNamespace(evaluation=[EvaluationImage(1, image)])
    request = SimpleNamespace(session=SessionOptions())
    context: Any = SimpleNamespace(images=images, source=source, step=step, progress=None, request=request)
    with pytest.raises(StopIteration):
        proof.measure_speed(context, variants)
    return asked, requests[0]


def test_times_of_an_interrupted_run_are_those_of_the_same_settings_and_runtime(
    graph: Artifact, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tiny_bundle / "golden" / "000.png"

    def inputs(**options: Any) -> dict[str, str]:
        return _asked([_variant(graph, **options)], image, monkeypatch)[0]

    before = inputs()
    assert before == inputs()
    assert before != inputs(threads=1)
    backend = get_backend("onnxruntime")
    newer = replace(backend.probe(), version="99.0")
    monkeypatch.setattr(type(backend), "probe", lambda _: newer)
    assert before != inputs()


def test_what_a_backend_runs_by_default_is_measured_alone(
    graph: Artifact, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    int8 = replace(graph, path="int8.onnx", precision=Precision.INT8)
    variants = [
        _variant(graph, backend="openvino"),
        _variant(int8, backend="openvino"),
        _variant(int8, backend="openvino", compute=ComputeType.BF16),
        _variant(graph),
    ]
    _, request = _asked(variants, tiny_bundle / "golden" / "000.png", monkeypatch)
    assert request.candidates[1:] == tuple(variants)
    assert request.alone == (variants[1], variants[3])


def test_what_was_built_stands_for_a_graph_only_where_every_engine_of_it_is_rounded_alike(graph: Artifact) -> None:
    portable, own = (
        replace(graph, sha256=letter * 64, precision=Precision.INT8, placement=placement)
        for letter, placement in (("b", "portable"), ("c", "openvino"))
    )

    def built(source: Artifact, **options: Any) -> Variant:
        engine = replace(source, kind=ArtifactKind.OPENVINO_IR, sha256="d" * 64, parent=source.sha256)
        return _variant(engine, backend="openvino", **options)

    for source, variant, stands in (
        (graph, built(graph), True),
        (graph, built(graph, compute=ComputeType.BF16), False),
        (graph, built(replace(graph, sha256="e" * 64)), False),
        (replace(graph, precision=Precision.FP16), built(replace(graph, precision=Precision.FP16)), False),
        (own, built(own), True),
        (own, built(own, compute=ComputeType.BF16), False),
        (own, replace(built(own), backend="onnxruntime"), False),
        (portable, built(portable), False),
    ):
        assert (proof._rounded_alike(source, [variant]) is variant) == stands, (source, variant)


def test_what_ran_is_taken_for_the_same_files_settings_and_images_only(graph: Artifact, tmp_path: Path) -> None:
    for name in ("a.onnx", "copy.onnx", "b.onnx"):
        (tmp_path / name).write_bytes(name[:1].replace("c", "a").encode())

    def spec(name: str = "a.onnx", **options: Any) -> Variant:
        return replace(_variant(graph, **options), model=tmp_path / name)

    image, runs = EvaluationImage(1, tmp_path / "a.png"), DetectionRuns()
    nothing: dict[str, Any] = {"names": (), "description": {}, "detections": {}, "seconds": StageSeconds()}
    kept = DetectionRun(model="a.onnx", backend="onnxruntime", precision="fp32", **nothing)
    runs.collect(spec(), [image], run=lambda: kept)
    same = runs.get(spec("copy.onnx"), [image])
    assert same is not None
    assert same.model == "copy.onnx"
    for other in (spec("b.onnx"), spec(backend="openvino"), spec(compute=ComputeType.BF16), spec(threads=1)):
        assert runs.get(other, [image]) is None, other
    for images in ([], [image, image], [replace(image, image_id=2)], [replace(image, path=tmp_path / "b.png")]):
        assert runs.get(spec(), images) is None, images
    (tmp_path / "a.onnx").write_bytes(b"changed meanwhile")
    assert runs.get(spec(), [image]) is None
