"""Tracing: as it is where every operator has a translation, which is every FCOS; decomposed where one has not."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from exporters.step_check import onnx_runner  # noqa: E402
from exporters.torch_onnx import Axes, ExportOptions, export_onnx, trace  # noqa: E402
from fcos_deploy.checkpoints.load import load_checkpoint  # noqa: E402
from fcos_deploy.core.enums import NmsForm, Tail  # noqa: E402


class Small(torch.nn.Module):
    input_names = ("images",)
    output_names = ("result",)

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.forward = function


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Programs that were traced a second time."""
    found: list[object] = []
    original = torch.export.ExportedProgram.run_decompositions

    def run(program: Any, *args: Any, **options: Any) -> Any:
        found.append(program)
        return original(program, *args, **options)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", run)
    return found


@pytest.mark.parametrize(
    ("tail", "form", "opset"),
    [
        (Tail.RAW, NmsForm.ONNX, 17),
        pytest.param(Tail.CANDIDATES, NmsForm.ONNX, 21, marks=pytest.mark.slow),
        (Tail.NMS, NmsForm.ONNX, 17),
        pytest.param(Tail.NMS, NmsForm.STATIC, 17, marks=pytest.mark.slow),
    ],
)
def test_an_fcos_is_traced_once(
    tiny_checkpoint: Path, tmp_path: Path, decomposed: list[object], tail: Tail, form: NmsForm, opset: int
) -> None:
    options = ExportOptions(tail=tail, nms_form=form, opset=opset, simplify=False)
    export_onnx(load_checkpoint(tiny_checkpoint), tmp_path / "traced.onnx", options=options)
    assert decomposed == []


@pytest.mark.parametrize(
    "function",
    [lambda x: ((x > 1) | (x < -1)).to(torch.float32), lambda x: (x * 2).relu_() + 1],
    ids=["an operator without translation", "a change in place"],
)
def test_what_has_no_translation_is_decomposed(decomposed: list[object], function: Callable[[Any], Any]) -> None:
    images = torch.linspace(-3, 3, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    model = trace(Small(function).eval(), (images,), opset=17, dynamic_batch=False, size=Axes.FIXED)
    assert len(decomposed) == 1
    np.testing.assert_array_equal(onnx_runner(model)({"images": images.numpy()})["result"], function(images).numpy())


def test_the_collector_pauses_for_an_export_and_goes_on_after_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert gc.isenabled()
    seen: list[bool] = []

    def progress(_label: str, _done: int, _total: int) -> None:
        seen.append(gc.isenabled())

    options = ExportOptions(simplify=False)
    export_onnx(load_checkpoint(tiny_checkpoint), tmp_path / "paused.onnx", options=options, progress=progress)
    assert set(seen) == {False}
    assert gc.isenabled()
