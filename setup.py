"""Compiles the host path's loops (fcos_deploy/core/c/host.c); everything else about the package is in pyproject.toml.

Without a compiler the package installs all the same, and NumPy does the work. ``FCOS_DEPLOY_NATIVE=0`` leaves the
library out, ``FCOS_DEPLOY_NATIVE=1`` makes its failure an error; ``CC`` names another compiler.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SWITCH = os.environ.get("FCOS_DEPLOY_NATIVE", "")
# Every operation rounds as NumPy's does: no fused multiply-add, no reordering. No debug data, which would hold paths.
FLAGS = "-std=c11 -O3 -ffp-contract=off -fno-math-errno -fPIC -shared -s"


class BuildLibrary(build_ext):
    """A library with a plain C interface is no module of one Python: it has no suffix of its own, and no PyInit."""

    def get_ext_filename(self, ext_name: str) -> str:
        """Path of the library below the root."""
        return str(Path(*ext_name.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Run the compiler once."""
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
        try:
            subprocess.run([*shlex.split(compiler), *FLAGS.split(), "-o", str(library), *ext.sources], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"'{compiler}' does not compile the host path: {error}") from error


class Wheel(bdist_wheel):
    """One wheel for every Python of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """Tags of interpreter, ABI and platform."""
        return ("py3", "none", super().get_tag()[2])


LIBRARY = Extension("fcos_deploy.core.c.host", ["fcos_deploy/core/c/host.c"], optional=SWITCH != "1")

setup(
    ext_modules=[] if SWITCH == "0" or os.name == "nt" else [LIBRARY],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
