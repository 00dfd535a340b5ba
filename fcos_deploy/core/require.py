"""The one way in which optional libraries are imported."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from fcos_deploy.core.errors import MissingDependencyError

__all__ = ["require"]


def require(module: str, *, extra: str = "") -> ModuleType:
    """Import ``module``; a missing library becomes an instruction, a broken one shows its own error.

    ``extra`` is the pip extra that brings the library; empty for one that every installation has.

    Raises:
        MissingDependencyError: when the library is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise  # The library is there, something it needs is not: its own message is the better one.
        package = f"'fcos-deploy[{extra}]'" if extra else "fcos-deploy"
        raise MissingDependencyError(
            f"This step needs '{error.name}', which is not installed.", hint=f"pip install {package}"
        ) from error
