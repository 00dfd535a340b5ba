"""What names in a pickle stand for when it is read as data: inert holders in the place of classes and functions."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from fcos_deploy.core.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "DATA_GLOBALS",
    "Inert",
    "PickleHooks",
    "PickledArray",
    "RestrictedUnpickler",
    "StatefulStub",
    "UnsafeGlobalError",
    "checked_key",
    "read_pickle",
]


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


# Real training checkpoints need tens of thousands; each costs up to 250 bytes of memory, so this bounds it.
MAX_OPERATIONS = 3_000_000


class _Source(Protocol):
    def read(self, size: int = ..., /) -> bytes: ...
    def readline(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class PickleHooks:
    """More known names, and what a reference to a storage (torch) becomes."""

    globals: dict[tuple[str, str], Any]  # Any: stub classes and functions
    persistent: Callable[[object], object] | None = None


class RestrictedUnpickler(pickle._Unpickler):
    """An unpickler that knows a fixed table of harmless names and refuses every other by name.

    The pure-Python base is used because its memory is bounded by the file: the C one allocates what an index claims.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, source: _Source, *, hooks: PickleHooks | None = None) -> None:
        super().__init__(source, encoding="latin1")
        self._hooks = hooks or PickleHooks({}, None)

    def load(self) -> Any:  # Any: whatever was pickled
        """Read one pickle."""
        self._prepare()
        try:
            for _ in range(MAX_OPERATIONS):
                key = self.read(1)
                if not key:
                    raise EOFError
                self.dispatch[key[0]](self)
        except pickle._Stop as stop:  # type: ignore[attr-defined]
            return stop.value
        raise UnsafeGlobalError(f"The pickle has more than {MAX_OPERATIONS} operations.")

    def _prepare(self) -> None:
        self._unframer = pickle._Unframer(self._file_read, self._file_readline)  # type: ignore[attr-defined]
        self.read = self._unframer.read
        self.readinto = self._unframer.readinto
        self.readline = self._unframer.readline
        self.metastack: list[Any] = []
        self.stack: list[Any] = []
        self.append = self.stack.append
        self.proto = 0

    def find_class(self, module: str, name: str, /) -> Any:  # Any: a stub class or function
        """The stub for a name.

        Raises:
            UnsafeGlobalError: when it is not in the table.
        """
        for table in (self._hooks.globals, DATA_GLOBALS):
            if (module, name) in table:
                return table[module, name]
        if DATA_GLOBALS.get((module, name.partition(".")[0])) is Inert:
            return Inert  # A method of a class that is not imported.
        module = module.replace("__builtin__", "builtins")  # Python 2's name, which old protocols write
        raise UnsafeGlobalError(
            f"The file refers to '{module}.{name}', which is not data; it was not imported and nothing was run.",
            hint="save only the weights: torch.save(model.state_dict(), path)",
        )

    def persistent_load(self, pid: Any) -> Any:  # Any: torch's storage tuples
        """A storage of a torch file."""
        if self._hooks.persistent is None:
            raise UnsafeGlobalError("The pickle refers to data outside of itself.")
        return self._hooks.persistent(pid)

    def _call(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        if not any(function is known for known in (*DATA_GLOBALS.values(), *self._hooks.globals.values())):
            raise UnsafeGlobalError("The pickle calls something that is not in the table of known names.")
        self.stack[-1] = function(*arguments)

    def _new(self) -> None:
        arguments = self.stack.pop()
        self.stack.append(arguments)
        self._call()

    def _new_with_keywords(self) -> None:
        keywords = self.stack.pop()
        if keywords:
            raise UnsafeGlobalError("The pickle makes an object with keyword arguments.")
        self._new()

    def _build(self) -> None:
        state = self.stack.pop()
        instance = self.stack[-1]
        if isinstance(instance, StatefulStub):
            instance.state = state
        elif not isinstance(instance, dict):  # An OrderedDict's own state (torch's _metadata) is of no use.
            raise UnsafeGlobalError(f"The pickle sets the state of a {type(instance).__name__}.")

    def _items(self) -> list[Any]:
        items = self.stack
        self.stack = self.metastack.pop()
        self.append = self.stack.append
        return items

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._store([key, value])

    def _set_items(self) -> None:
        self._store(self._items())

    def _dict(self) -> None:
        items = self._items()
        self.append({})
        self._store(items)

    def _store(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise UnsafeGlobalError(f"The pickle stores an item in a {type(target).__name__}.")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[checked_key(key)] = value

    def _set(self) -> None:
        self.append([])  # A set's members are kept in a list: nothing here needs hashing.

    def _add_items(self) -> None:
        items = self._items()
        if not isinstance(self.stack[-1], list):
            raise UnsafeGlobalError("The pickle adds members to something that is not a set.")
        self.stack[-1].extend(items)

    def _frozen_set(self) -> None:
        self.append(self._items())

    def _bytes8(self) -> None:
        self.append(self.read(int.from_bytes(self.read(8), "little")))


_OPERATIONS: dict[bytes, Callable[[RestrictedUnpickler], None]] = {
    pickle.REDUCE: RestrictedUnpickler._call,
    pickle.NEWOBJ: RestrictedUnpickler._new,
    pickle.NEWOBJ_EX: RestrictedUnpickler._new_with_keywords,
    pickle.BUILD: RestrictedUnpickler._build,
    pickle.SETITEM: RestrictedUnpickler._set_item,
    pickle.SETITEMS: RestrictedUnpickler._set_items,
    pickle.DICT: RestrictedUnpickler._dict,
    pickle.EMPTY_SET: RestrictedUnpickler._set,
    pickle.ADDITEMS: RestrictedUnpickler._add_items,
    pickle.FROZENSET: RestrictedUnpickler._frozen_set,
    pickle.BYTEARRAY8: RestrictedUnpickler._bytes8,
}
for _code, _operation in _OPERATIONS.items():
    RestrictedUnpickler.dispatch[_code[0]] = _operation
for _code in (pickle.INST, pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER):
    del RestrictedUnpickler.dispatch[_code[0]]


def read_pickle(source: _Source | bytes, *, hooks: PickleHooks | None = None) -> Any:  # Any: whatever was pickled
    """Read one pickle as data; NumPy arrays come as ``PickledArray``.

    Raises:
        UnsafeGlobalError: it names something that is not known to be data.
        CheckpointError: it is damaged.
    """
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        return RestrictedUnpickler(stream, hooks=hooks).load()
    except CheckpointError:
        raise
    except Exception as error:  # A damaged pickle can fail in any way; none of them is a bug here.
        raise CheckpointError(f"The pickle is damaged: {type(error).__name__}: {error}.") from error
