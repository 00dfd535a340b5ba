"""What ``import fcos_deploy`` offers: every name is there, and importing it costs nothing."""

from __future__ import annotations

import subprocess
import sys

import fcos_deploy


def test_every_public_name_is_there_and_is_its_homes() -> None:
    for name in fcos_deploy.__all__:
        assert getattr(getattr(fcos_deploy, name), "__name__", name) == name  # a table of profiles has none


def test_importing_it_loads_neither_numpy_nor_a_framework() -> None:
    code = "import sys, fcos_deploy; assert not {'numpy', 'torch', 'onnx', 'cv2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
