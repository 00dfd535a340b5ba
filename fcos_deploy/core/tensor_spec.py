"""Name, dtype and shape of a tensor that enters or leaves a session."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.errors import ConfigError, TensorMismatchError

__all__ = ["TensorSpec"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """``dtype`` is NumPy's name; ``None`` in ``shape`` is a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("A tensor needs a name.")
        try:
            np.dtype(self.dtype)
        except TypeError as error:
            raise ConfigError(f"Tensor '{self.name}' has the unknown dtype '{self.dtype}'.") from error

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join('?' if n is None else str(n) for n in self.shape)}]"

    def check(self, array: NDArray[Any]) -> None:
        """Raise TensorMismatchError unless ``array`` has this dtype and shape."""
        fits = len(array.shape) == len(self.shape) and all(
            n is None or n == m for n, m in zip(self.shape, array.shape, strict=True)
        )
        if array.dtype != np.dtype(self.dtype) or not fits:
            got = f"{array.dtype}[{', '.join(map(str, array.shape))}]"
            raise TensorMismatchError(f"Tensor '{self.name}' must be {self}, got {got}.")
