"""How a Python process of ours is started: never with the working directory among the places it imports from."""

from __future__ import annotations

import sys

__all__ = ["module_command"]

# Python 3.10 has no ``-P``. ``-c`` puts '' (the working directory) first, and this takes it away before it imports.
_WITHOUT_CURRENT_FOLDER = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; module = sys.argv.pop(1); "
    "import runpy; runpy.run_module(module, run_name='__main__', alter_sys=True)"
)


def module_command(module: str, *, version: tuple[int, int] = sys.version_info[:2]) -> list[str]:
    """The command that runs ``module`` with this interpreter, as ``python -m`` would.

    ``python -m`` alone imports from the working directory first, so that a ``numpy.py`` in a folder of downloaded
    models would be run. ``PYTHONPATH`` is honoured.
    """
    if version >= (3, 11):
        return [sys.executable, "-P", "-m", module]
    return [sys.executable, "-c", _WITHOUT_CURRENT_FOLDER, module]
