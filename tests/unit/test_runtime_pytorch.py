"""PyTorch as a runtime: every tail, every input, other compute types."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fcos_deploy import ComputeType, Detector, SessionOptions, Tail
from fcos_deploy.core.backend import Session
from fcos_deploy.core.errors import DeviceError

torch = pytest.importorskip("torch")

from fcos_deploy.checkpoints.load import LoadedCheckpoint, load_checkpoint  # noqa: E402  (needs torch)
from runtimes.pytorch import open_model  # noqa: E402

_ONE_THREAD = SessionOptions(threads=1)


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedCheckpoint:
    return load_checkpoint(tiny_checkpoint)


def _feeds(session: Session, batch: int) -> dict[str, NDArray[Any]]:
    feeds: dict[str, NDArray[Any]] = {
        "images": np.random.default_rng(0).integers(0, 256, (batch, 3, 128, 160), np.uint8)
    }
    if len(session.inputs) > 1:
        feeds["image_sizes"] = np.tile(np.float32([120, 160, 240, 320]), (batch, 1))
    return feeds


@pytest.mark.parametrize("tail", Tail)
@pytest.mark.parametrize("batch", [1, 2])
def test_every_tail_gives_what_its_specs_say(loaded: LoadedCheckpoint, tail: Tail, batch: int) -> None:
    contract = replace(loaded.contract, tail=tail)
    with open_model(loaded.model, contract=contract, options=_ONE_THREAD) as session:
        outputs = session.run(_feeds(session, batch))
        assert tuple(outputs) == contract.outputs
        for spec in session.outputs:
            spec.check(outputs[spec.name])
            assert outputs[spec.name].shape[0] == batch


def test_all_tails_detect_the_same(loaded: LoadedCheckpoint, blobs: list[NDArray[np.uint8]]) -> None:
    found = [
        Detector.of_network(loaded.model, replace(loaded.contract, tail=tail), options=_ONE_THREAD).detect(blobs[1])
        for tail in Tail
    ]
    assert len(found[0]) > 0
    for other in found[1:]:
        np.testing.assert_array_equal(other.labels, found[0].labels)
        np.testing.assert_allclose(other.scores, found[0].scores, atol=1e-6)
        np.testing.assert_allclose(other.boxes, found[0].boxes, atol=1e-3)


def test_bf16_is_coarser_and_still_close(loaded: LoadedCheckpoint) -> None:
    with (
        open_model(loaded.model, contract=loaded.contract, options=_ONE_THREAD) as full,
        open_model(
            loaded.model, contract=loaded.contract, options=SessionOptions(threads=1, compute=ComputeType.BF16)
        ) as half,
    ):
        assert half.description["compute"] == "bf16"
        expected, found = full.run(_feeds(full, 1)), half.run(_feeds(half, 1))
    difference = np.abs(found["cls_logits"] - expected["cls_logits"]).max()
    assert 0 < difference < 0.5
    assert found["cls_logits"].dtype == np.float32


def test_gradients_are_not_recorded(loaded: LoadedCheckpoint) -> None:
    with open_model(loaded.model, contract=loaded.contract, options=_ONE_THREAD) as session:
        session.run(_feeds(session, 1))
    assert all(parameter.grad is None for parameter in loaded.model.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps", "meta"])
def test_no_gpu_is_an_error_and_not_the_cpu(loaded: LoadedCheckpoint, device: str) -> None:
    with pytest.raises(DeviceError, match=f"no device '{device}'") as caught:
        open_model(loaded.model, contract=loaded.contract, options=SessionOptions(device=device))
    assert caught.value.hint == "devices: cpu"
