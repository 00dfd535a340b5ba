"""What every backend promises, tried with a real detector on every backend that is found."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fcos_deploy.core.backend import Backend, Session, SessionOptions, Tensors, all_backends, backends_for, get_backend
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.enums import ArtifactKind, Precision
from fcos_deploy.core.errors import (
    BackendError,
    BackendLoadError,
    CheckpointError,
    ConfigError,
    DeviceError,
    TensorMismatchError,
)

# Engines are tested where there is a GPU, in the tests of their own backends.
_ARTIFACTS = {
    ArtifactKind.CHECKPOINT: "tiny_checkpoint",
    ArtifactKind.ONNX: "tiny_onnx",
    ArtifactKind.OPENVINO_IR: "tiny_ir",
}
_CASES = [(b.name, kind) for b in all_backends().values() for kind in sorted(b.accepts & _ARTIFACTS.keys())]
_REQUIRED = frozenset(os.environ.get("FCOS_DEPLOY_REQUIRE", "").split(",")) - {"", "native", "old-openvino"}
_LOCATIONS = 16 * 20 + 8 * 10 + 4 * 5 + 2 * 3 + 1 * 2  # of 128x160


def test_required_backends_are_there() -> None:
    assert {name for name in _REQUIRED if not get_backend(name).probe().available} == set()


@pytest.fixture(scope="module", params=_CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request: pytest.FixtureRequest) -> tuple[Backend, Path]:
    name, kind = request.param
    backend = get_backend(name)
    probe = backend.probe()
    if not probe.available:
        assert name not in _REQUIRED, f"{name} is required: {probe.problem}"
        pytest.skip(probe.problem)
    return backend, request.getfixturevalue(_ARTIFACTS[kind])


@pytest.fixture(scope="module")
def session(case: tuple[Backend, Path]) -> Iterator[Session]:
    backend, path = case
    with backend.open(path, SessionOptions(threads=1)) as opened:
        yield opened


@pytest.fixture(scope="module")
def feeds() -> list[Tensors]:
    generator = np.random.default_rng(0)
    return [{"images": generator.integers(0, 256, (1, 3, 128, 160), np.uint8)} for _ in range(4)]


def _assert_same(left: Tensors, right: Tensors) -> None:
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_specs_are_those_of_the_contract(session: Session) -> None:
    (images,) = session.inputs
    assert (images.name, images.dtype, images.shape[1:]) == ("images", "uint8", (3, 128, 160))
    assert {spec.name: (spec.dtype, spec.shape[1:]) for spec in session.outputs} == {
        "cls_logits": ("float32", (_LOCATIONS, 3)),
        "distances": ("float32", (_LOCATIONS, 4)),
        "centerness": ("float32", (_LOCATIONS, 1)),
    }


def test_the_artifact_brings_its_contract(session: Session) -> None:
    assert isinstance(session.contract, ModelContract)
    assert session.contract.class_names == ("red", "white", "platelet")
    assert session.contract.precision is Precision.FP32


def test_the_description_says_what_runs(session: Session, case: tuple[Backend, Path]) -> None:
    described = session.description
    assert described["backend"] == case[0].name
    assert described["version"] == case[0].probe().version
    assert described["compute"] == "f32"
    assert described["device"].lower() == "cpu"
    assert described["threads"] == "1"


def test_outputs_are_as_specified_and_not_constant(session: Session, feeds: list[Tensors]) -> None:
    first, second = session.run(feeds[0]), session.run(feeds[1])
    for spec in session.outputs:
        spec.check(first[spec.name])
        assert np.isfinite(first[spec.name]).all()
        assert not np.array_equal(first[spec.name], second[spec.name])


def test_the_same_input_gives_the_same_output(session: Session, feeds: list[Tensors]) -> None:
    _assert_same(session.run(feeds[0]), session.run(feeds[0]))


def test_outputs_belong_to_the_caller(session: Session, feeds: list[Tensors]) -> None:
    first = session.run(feeds[0])
    kept = {name: array.copy() for name, array in first.items()}
    session.run(feeds[1])
    session.borrow(feeds[2])
    _assert_same(first, kept)


def test_borrowed_outputs_are_the_same(session: Session, feeds: list[Tensors]) -> None:
    for feed in feeds:
        expected = session.run(feed)
        _assert_same(session.borrow(feed), expected)


def test_bound_arrays_are_read_anew_each_time(session: Session, feeds: list[Tensors]) -> None:
    expected = [session.run(feed) for feed in feeds[:2]]
    buffer = {"images": feeds[0]["images"].copy()}
    infer = session.bound(buffer)
    for turn in (0, 1, 1, 0):
        buffer["images"][:] = feeds[turn]["images"]
        _assert_same(infer(), expected[turn])
        session.borrow(feeds[2])
    with pytest.raises(TensorMismatchError):
        session.bound({"images": buffer["images"][..., :-1]})


def test_a_buffer_that_changes_between_calls_is_read_anew(session: Session, feeds: list[Tensors]) -> None:
    buffer = {"images": feeds[0]["images"].copy()}
    first = session.run(buffer)
    buffer["images"][:] = feeds[1]["images"]
    _assert_same(session.run(buffer), session.run(feeds[1]))
    buffer["images"][:] = feeds[0]["images"]
    _assert_same(session.run(buffer), first)


def test_views_and_read_only_arrays_are_taken(session: Session, feeds: list[Tensors]) -> None:
    expected = session.run(feeds[0])
    flipped = np.ascontiguousarray(feeds[0]["images"][..., ::-1])
    _assert_same(session.run({"images": flipped[..., ::-1]}), expected)
    frozen = feeds[0]["images"].copy()
    frozen.flags.writeable = False
    _assert_same(session.run({"images": frozen}), expected)
    for found in session.run_many([{"images": flipped[..., ::-1]}, {"images": frozen}] * 4):
        _assert_same(found, expected)


def test_many_requests_come_back_in_order(session: Session, feeds: list[Tensors]) -> None:
    asked = [feeds[index % len(feeds)] for index in (0, 3, 1, 2, 2, 0, 1)]
    for found, feed in zip(session.run_many(asked), asked, strict=True):
        _assert_same(found, session.run(feed))
    assert session.run_many([]) == []


def test_many_threads_get_what_one_gets(session: Session, feeds: list[Tensors]) -> None:
    if not session.thread_safe:
        pytest.skip("the session says that it is not for several threads at a time")
    expected = [session.run(feed) for feed in feeds]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda index: session.run(feeds[index % len(feeds)]), range(48)))
    for index, one in enumerate(found):
        _assert_same(one, expected[index % len(feeds)])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"images": np.zeros((1, 3, 128, 160), np.float32)}, "must be uint8"),
        ({"images": np.zeros((1, 128, 160, 3), np.uint8)}, "got uint8\\[1, 128, 160, 3\\]"),
        ({"images": np.zeros((3, 128, 160), np.uint8)}, "got uint8\\[3, 128, 160\\]"),
        ({"pictures": np.zeros((1, 3, 128, 160), np.uint8)}, "must be \\['images'\\], got \\['pictures'\\]"),
        ({}, "got \\[\\]"),
    ],
)
def test_a_wrong_feed_is_refused(session: Session, wrong: Tensors, message: str) -> None:
    for call in (session.run, session.borrow, lambda feed: session.run_many([feed])):
        with pytest.raises(TensorMismatchError, match=message):
            call(wrong)


def test_a_closed_session_says_so(case: tuple[Backend, Path], feeds: list[Tensors]) -> None:
    backend, path = case
    opened = backend.open(path, SessionOptions(threads=1))
    opened.run(feeds[0])
    opened.close()
    opened.close()
    assert opened.closed
    for call in (opened.run, opened.borrow, lambda feed: opened.run_many([feed])):
        with pytest.raises(BackendError, match="closed"):
            call(feeds[0])


@pytest.mark.parametrize("device", ["gpu.7", "cuda:31", "npu-of-nobody", "auto", "cpu:x"])
def test_a_device_that_is_not_there_is_an_error(case: tuple[Backend, Path], device: str) -> None:
    with pytest.raises(DeviceError, match=f"no device '{device}'") as caught:
        case[0].open(case[1], SessionOptions(device=device))
    assert "cpu" in caught.value.hint.lower()


def test_a_missing_file_is_named(case: tuple[Backend, Path]) -> None:
    missing = case[1].with_name(f"missing{case[1].suffix}")
    with pytest.raises((BackendLoadError, CheckpointError), match="missing"):
        case[0].open(missing, SessionOptions())


@pytest.mark.parametrize("share", [0.0, 0.003, 0.5, 0.99])
def test_a_truncated_file_is_one_clear_error(case: tuple[Backend, Path], share: float, tmp_path: Path) -> None:
    backend, path = case
    cut = tmp_path / path.name
    content = path.read_bytes()
    cut.write_bytes(content[: int(len(content) * share)])
    for companion in (path.with_suffix(".bin"), path.with_suffix(".json")):
        if companion.is_file():
            cut.with_name(companion.name).write_bytes(companion.read_bytes())
    with pytest.raises((BackendLoadError, CheckpointError)) as caught:
        backend.open(cut, SessionOptions())
    assert str(cut) in caught.value.message
    assert "\n" not in caught.value.message


def test_a_text_file_is_one_clear_error(case: tuple[Backend, Path], tmp_path: Path) -> None:
    text = tmp_path / f"model{case[1].suffix}"
    text.write_text("This is not a model.\n")
    text.with_suffix(".bin").write_bytes(b"")
    with pytest.raises((BackendLoadError, CheckpointError)) as caught:
        case[0].open(text, SessionOptions())
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("backend", all_backends().values(), ids=lambda backend: backend.name)
def test_a_foreign_placement_is_refused(backend: Backend, bundle_contract: ModelContract) -> None:
    from dataclasses import replace

    foreign = replace(bundle_contract, precision=Precision.INT8, placement="of-some-other-runtime")
    with pytest.raises(BackendLoadError, match="quantized for 'of-some-other-runtime'"):
        backend.check_placement(foreign)
    for placement in backend.placements:
        backend.check_placement(replace(foreign, placement=placement))


@pytest.mark.parametrize("backend", all_backends().values(), ids=lambda backend: backend.name)
def test_a_probe_never_raises_and_says_what_to_do(backend: Backend) -> None:
    probe = backend.probe()
    assert probe.version if probe.available else probe.problem
    assert probe.devices if probe.available else probe.remedy


def test_unknown_backends_name_those_that_exist() -> None:
    with pytest.raises(ConfigError) as caught:
        get_backend("tensorflow")
    assert "onnxruntime" in caught.value.hint
    assert {b.name for b in backends_for(ArtifactKind.ONNX)} >= {"onnxruntime", "openvino"}
