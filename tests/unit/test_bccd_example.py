"""The training example refuses what could not be deployed, before it trains."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("rich")

SCRIPT = Path(__file__).parents[2] / "examples" / "bccd" / "train.py"


@pytest.mark.parametrize("size", [("160", "208"), ("0", "32"), ("-32", "64")])
def test_a_size_that_cannot_be_deployed_is_not_trained(
    size: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "m.safetensors"
    arguments = ["train.py", "--data", str(tmp_path), "-o", str(output), "--size", *size]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stopped.value.code == 2
    assert "argument --size: must be a multiple of 32" in capsys.readouterr().err
    assert not output.exists()
