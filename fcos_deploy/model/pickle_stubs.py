"""What names in a pickle stand for when it is read as data: inert holders in the place of classes and functions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fcos_deploy.core.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["DATA_GLOBALS", "Inert", "PickledArray", "StatefulStub", "UnsafeGlobalError", "checked_key"]


class UnsafeGlobalError(CheckpointError):
    """A pickle names a class or function that is not known to be data."""


class Inert:
    """In place of an object whose class is not imported; its arguments and state are kept as data."""

    state: object = None

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments


class PickledArray:
    """In place of ``numpy.ndarray``: made into one by ``take``, when it is wanted."""

    def __init__(self, *_: object) -> None:
        self.state: object = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return self._facts()[0]

    @property
    def dtype(self) -> str:
        """NumPy's name of it."""
        return self._facts()[1]

    def check(self) -> None:
        """Raise CheckpointError when the state is not that of an array of plain numbers."""
        self._facts()

    def take(self) -> NDArray[Any]:
        """A copy as an array of plain numbers; the pickled bytes are let go, so that memory holds them only once.

        Raises:
            CheckpointError: when the state is not that of such an array.
        """
        array = self._view()
        self.state = None
        return array.copy()

    def tolist(self) -> Any:  # Any: nested lists
        """The numbers."""
        return self._view().tolist()

    def _facts(self) -> tuple[tuple[int, ...], str]:
        try:
            state: Any = self.state  # Any: what it is not is caught below
            _, shape, dtype, _, content = state
            found, size = dtype.name, _length(content)
            axes = tuple(shape)
            if not all(type(n) is int and n >= 0 for n in axes) or math.prod(axes) * dtype.itemsize != size:
                raise ValueError(f"{size} bytes are not of shape {axes}")
        except (AttributeError, TypeError, ValueError, UnicodeError) as error:
            raise CheckpointError(f"A NumPy array in the file is damaged: {error}.") from error
        return axes, found

    def _view(self) -> NDArray[Any]:
        import numpy as np

        shape, _ = self._facts()
        try:
            state: Any = self.state  # Any: what it is not was found by ``_facts``
            return np.frombuffer(_raw(state[4]), state[2].resolve()).reshape(shape, order="F" if state[3] else "C")
        except (TypeError, ValueError, UnicodeError) as error:
            raise CheckpointError(f"A NumPy array in the file is damaged: {error}.") from error


class _Dtype:
    """In place of ``numpy.dtype``."""

    def __init__(self, text: object = "", *_: object) -> None:
        self.text = text
        self.state: object = None

    @property
    def _code(self) -> str:
        code = str(self.text).lstrip("<>|=")
        if code not in _NUMBERS:
            raise ValueError(f"dtype '{code[:16]}' is not a number")
        return code

    @property
    def name(self) -> str:
        """NumPy's name of it."""
        return _NUMBERS[self._code]

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return int(self._code[1:])

    def resolve(self) -> np.dtype[Any]:
        import numpy as np

        big = isinstance(self.state, tuple) and self.state[1:2] in ((">",), (b">",))
        return np.dtype((">" if big else "<") + self._code)


# NumPy's codes of numbers, kind and bytes, and its names.
_NUMBERS = {
    "b1": "bool",
    **{f"f{size}": f"float{8 * size}" for size in (2, 4, 8)},
    **{f"{kind[0]}{size}": f"{kind}{8 * size}" for kind in ("int", "uint") for size in (1, 2, 4, 8)},
}


class _Encoded:
    """The call ``_codecs.encode(text, 'latin1')``, with which Python 3 writes bytes in old protocols; made lazily."""

    def __init__(self, text: object = "", *_: object) -> None:
        self.text = text


def _raw(content: object) -> bytes:
    text = _text(content)
    return text if isinstance(text, bytes) else text.encode("latin1")


def _length(content: object) -> int:
    return len(_text(content))


def _text(content: object) -> bytes | str:
    text = content.text if isinstance(content, _Encoded) else content
    if isinstance(text, (bytes, str)):
        return text
    raise TypeError(f"a {type(text).__name__} is not bytes")


# The functions below never copy what they are given: a pickle may call them with the same large object many times.


def _from_buffer(content: object = b"", dtype: object = None, shape: object = (), order: object = "C") -> PickledArray:
    array = PickledArray()
    array.state = (1, shape, dtype, order == "F", content)
    return array


def _scalar(dtype: object = None, content: object = b"") -> Any:  # Any: int, float or bool
    if len(_raw(content)) > 16:
        raise UnsafeGlobalError("A NumPy scalar of more than 16 bytes is not a number.")
    return _from_buffer(content, dtype).take().item()


def _array(*_: object) -> PickledArray:
    return PickledArray()


def _dict(items: object = None, *_: object) -> dict[Any, Any]:
    if isinstance(items, dict):
        return items
    result: dict[Any, Any] = {}
    if isinstance(items, list):  # Python 2 writes an OrderedDict as a list of pairs.
        for key, value in items:
            result[checked_key(key)] = value
        items.clear()
    return result


def _list(items: object = None, *_: object) -> list[Any]:
    return items if isinstance(items, list) else []


def _reconstruct(kind: object = None, *_: object) -> object:
    return {} if kind is _dict else Inert()


def _table() -> dict[tuple[str, str], Any]:
    table: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): _dict,
        ("collections", "Counter"): _dict,
        ("collections", "defaultdict"): Inert,
        ("collections", "deque"): _list,
        ("_codecs", "encode"): _Encoded,
        ("numpy", "ndarray"): PickledArray,
        ("numpy", "dtype"): _Dtype,
    }
    for module in ("numpy.core", "numpy._core"):
        table[f"{module}.multiarray", "_reconstruct"] = _array
        table[f"{module}.multiarray", "scalar"] = _scalar
        table[f"{module}.numeric", "_frombuffer"] = _from_buffer
    for module in ("copyreg", "copy_reg"):
        table[module, "_reconstructor"] = _reconstruct
    for module in ("builtins", "__builtin__"):
        for name in _BUILTINS:
            table[module, name] = Inert
    table.update(dict.fromkeys(_INERT, Inert))
    table.update(dict.fromkeys(_DICTS, _dict))
    return table


# Types that pickles name, for example as the default of a defaultdict. mmengine's HistoryBuffer names its methods with
# getattr, which here looks nothing up.
_BUILTINS = (
    *("object", "list", "dict", "tuple", "set", "frozenset", "int", "float", "bool", "str", "unicode", "long"),
    *("complex", "slice", "bytes", "bytearray", "type", "range", "getattr"),
)
_INERT = (
    ("argparse", "Namespace"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("datetime", "datetime"),
    ("datetime", "timedelta"),
    ("types", "SimpleNamespace"),
    ("mmengine.logging.history_buffer", "HistoryBuffer"),
)
_DICTS = (
    ("mmengine.config.config", "ConfigDict"),
    ("mmengine.config.config", "Config"),
    ("mmcv.utils.config", "ConfigDict"),
    ("mmcv.utils.config", "Config"),
    ("addict.addict", "Dict"),
    ("pytorch_lightning.utilities.parsing", "AttributeDict"),
    ("lightning.fabric.utilities.data", "AttributeDict"),
    ("lightning.pytorch.utilities.parsing", "AttributeDict"),
    ("yacs.config", "CfgNode"),
    ("fvcore.common.config", "CfgNode"),
    ("detectron2.config.config", "CfgNode"),
)


def checked_key(key: object) -> str | int | float | bytes | None:
    """``key``, if it is of a type whose hash takes no time.

    Raises:
        UnsafeGlobalError: otherwise.
    """
    # Only these: hashing a deeply nested tuple overflows the C stack.
    if key is None or isinstance(key, (str, int, float, bytes)):
        return key
    raise UnsafeGlobalError(f"The pickle uses a {type(key).__name__} as a key.")


StatefulStub = (Inert, PickledArray, _Dtype)
DATA_GLOBALS = _table()
