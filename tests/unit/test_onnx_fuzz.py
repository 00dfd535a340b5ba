"""ONNX files with changed bytes: what reads them without a runtime gives an answer or the project's errors.

The runtimes' own parsers are native code: they get such files in a process of their own, which must not die.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fcos_deploy.bundle.store import check_external_data
from fcos_deploy.core.artifact import find_contract
from fcos_deploy.core.errors import BackendLoadError, FcosDeployError
from fcos_deploy.core.onnx_file import onnx_interface
from fcos_deploy.detector import Detector

pytest.importorskip("onnx")

OPENER = """
import sys
from pathlib import Path
import numpy as np
from fcos_deploy import Detector, SessionOptions
from fcos_deploy.core.errors import FcosDeployError

for path in sorted(Path(sys.argv[2]).glob("*.onnx")):
    try:
        with Detector.open(path, backend=sys.argv[1], options=SessionOptions(threads=1)) as detector:
            detector.detect(np.zeros((64, 64, 3), np.uint8))
        print("ran")
    except FcosDeployError:
        print("refused")
"""


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_readers_without_a_runtime(data: st.DataObject, mini_onnx: Path, tmp_path: Path) -> None:
    content = bytearray(mini_onnx.read_bytes())
    # Half of the changes near the ends, where the structure is; weights fill the middle.
    ends = st.one_of(st.integers(0, 400), st.integers(len(content) - 4000, len(content) - 1))
    places = st.one_of(ends, st.integers(0, len(content) - 1))
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=6)):
        content[place] = value
    path = tmp_path / "m.onnx"
    path.write_bytes(bytes(content[: data.draw(st.sampled_from([len(content), data.draw(places)]))]))
    for read in (find_contract, onnx_interface, lambda p: check_external_data(p.parent, p.name, allowed=frozenset())):
        with contextlib.suppress(FcosDeployError):
            read(path)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_runtimes_refuse_or_run_and_their_process_lives(backend: str, tiny_onnx: Path, tmp_path: Path) -> None:
    pytest.importorskip(backend)
    rng = np.random.default_rng(7)
    original = tiny_onnx.read_bytes()
    count = 24 * int(os.environ.get("FCOS_DEPLOY_FUZZ", "1"))
    for number in range(count):
        content = bytearray(original)
        for place in rng.integers(0, len(content), int(rng.integers(1, 40))):
            content[place] = rng.integers(0, 256)
        keep = len(content) if number % 3 else int(rng.integers(1, len(content)))
        (tmp_path / f"{number:06d}.onnx").write_bytes(content[:keep])
    done = subprocess.run(
        [sys.executable, "-c", OPENER, backend, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split().count("refused") > 0
    assert len(done.stdout.split()) == count


def test_bytes_that_are_no_text_in_a_runtimes_message(tiny_onnx: Path, tmp_path: Path) -> None:
    """Found by the test above: the runtimes quote the operator's name, which is not UTF-8."""
    content = tiny_onnx.read_bytes()
    place = content.index(b"\x22\x04Conv")  # NodeProto.op_type
    (tmp_path / "m.onnx").write_bytes(content[:place] + b"\x22\x04Co\xadv" + content[place + 6 :])
    for backend in ("onnxruntime", "openvino"):
        pytest.importorskip(backend)
        with pytest.raises(BackendLoadError, match=r"Co.v|utf-8"):
            Detector.open(tmp_path / "m.onnx", backend=backend)
