"""Reads a pickle as data: no class is imported, no function of the file is called.

A pickle is a program that names classes and functions and calls them. Here every name is looked up in a fixed table,
where inert holders stand in the place of what was pickled; a name that is not in it ends the reading. Memory is bounded
by the size of the file.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.errors import CheckpointError, brief

__all__ = ["MAX_AXES", "Inert", "PickledArray", "UnsafeGlobalError", "read_pickle"]

# Bounds of what is read; real training checkpoints stay far below them.
_MAX_OPERATIONS = 1_000_000  # they need tens of thousands; each costs up to 250 bytes of memory
_MAX_LINE = 4096  # bytes of a name or number in the text opcodes, which only old protocols use for more
_MAX_NAME = 256  # characters of a module or class
_MAX_ARGUMENTS = 64  # of a call
_MAX_INTEGER_BYTES = 64  # NumPy's random states have 16; arithmetic and text of longer ones take quadratic time
MAX_AXES = 64  # torch's own limit


class UnsafeGlobalError(CheckpointError):
    """A pickle names a class or function that is not known to be data."""


class Inert:
    """In place of an object whose class is not imported; its arguments and state are kept as data."""

    state: object = None

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments


class PickledArray:
    """In place of ``numpy.ndarray``: made into one by ``take``, when its numbers are needed."""

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

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        shape, name = self._facts()
        return math.prod(shape) * np.dtype(name).itemsize

    @property
    def stored_at(self) -> object:
        """What identifies the pickled bytes, which several arrays may share."""
        state: Any = self.state  # Any: checked by ``_facts``
        return id(_text(state[4]))

    def check(self) -> None:
        """Raise CheckpointError when the state is not that of an array of plain numbers."""
        self._facts()

    def take(self) -> NDArray[Any]:
        """A copy as an array of plain numbers; the pickled bytes are let go, so that memory holds them only once.

        Raises:
            CheckpointError: when the state is not that of such an array.
        """
        array: NDArray[Any] = self._view().copy()
        self.state = None
        return array

    def tolist(self) -> Any:  # Any: nested lists
        """The numbers."""
        return self._view().tolist()

    def _facts(self) -> tuple[tuple[int, ...], str]:
        try:
            state: Any = self.state  # Any: what it is not is caught below
            _, shape, dtype, _, content = state
            if not isinstance(shape, (tuple, list)) or len(shape) > MAX_AXES:
                raise ValueError(f"{brief(shape)} of more than {MAX_AXES} axes, or no shape")
            axes, size = tuple(shape), len(_text(content))
            if not all(type(n) is int and n >= 0 for n in axes) or math.prod(axes) * dtype.itemsize != size:
                raise ValueError(f"{size} bytes are not of shape {axes}")
            return axes, dtype.name
        except (AttributeError, TypeError, ValueError, UnicodeError) as error:
            raise CheckpointError(f"A NumPy array in the file is damaged: {_reason(error)}.") from error

    def _view(self) -> NDArray[Any]:
        shape, _ = self._facts()
        state: Any = self.state  # Any: checked by ``_facts``
        try:
            text = _text(state[4])
            content = text if isinstance(text, bytes) else text.encode("latin1")
            return np.frombuffer(content, state[2].resolve()).reshape(shape, order="F" if state[3] else "C")
        except (TypeError, ValueError, UnicodeError) as error:
            raise CheckpointError(f"A NumPy array in the file is damaged: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    """What the error says, unless that would be the text of an object in the file."""
    return error.args[0][:200] if error.args and isinstance(error.args[0], str) else type(error).__name__


class _Source(Protocol):
    def read(self, size: int = ..., /) -> bytes: ...
    def readline(self) -> bytes: ...


def read_pickle(
    source: _Source | bytes,
    *,
    known: Mapping[tuple[str, str], Any] | None = None,  # Any: stub classes and functions
    storage: Callable[[object], object] | None = None,
) -> Any:  # Any: whatever was pickled
    """Read one pickle as data; NumPy arrays come as ``PickledArray``.

    ``known``: more names; ``storage``: what a reference to data outside of the pickle (a storage of torch) becomes.

    Raises:
        UnsafeGlobalError: it names something that is not known to be data.
        CheckpointError: it is damaged.
    """
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        return _Unpickler(stream, known or {}, storage).load()
    except CheckpointError:
        raise
    except Exception as error:  # A damaged pickle can fail in any way; none of them is a bug here.
        raise CheckpointError(f"The pickle is damaged: {type(error).__name__}: {_reason(error)}.") from error


# ---- what stands in the place of NumPy's and Python's own classes and functions ----
# None of these copies what it is given: a pickle may call them with the same large object many times.


class _Dtype:
    """In place of ``numpy.dtype``."""

    def __init__(self, text: object = "", *_: object) -> None:
        self.text = text
        self.state: object = None

    @property
    def _code(self) -> str:
        code = self.text.lstrip("<>|=") if isinstance(self.text, str) and len(self.text) < _MAX_NAME else ""
        if code not in _NUMBERS:
            raise ValueError(f"dtype {brief(self.text)} is not a number")
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
        big_endian = isinstance(self.state, tuple) and self.state[1:2] in ((">",), (b">",))
        return np.dtype((">" if big_endian else "<") + self._code)


# NumPy's codes of numbers, kind and bytes, and its names.
_NUMBERS = {
    "b1": "bool",
    **{f"f{size}": f"float{8 * size}" for size in (2, 4, 8)},
    **{f"{kind[0]}{size}": f"{kind}{8 * size}" for kind in ("int", "uint") for size in (1, 2, 4, 8)},
}


class _Encoded:
    """In place of ``_codecs.encode(text, "latin1")``, as which Python 3 writes bytes in old protocols."""

    def __init__(self, text: object = "", *_: object) -> None:
        self.text = text


def _text(content: object) -> bytes | str:
    text = content.text if isinstance(content, _Encoded) else content
    if isinstance(text, (bytes, str)):
        return text
    raise TypeError(f"a {type(text).__name__} is not bytes")


def _from_buffer(content: object = b"", dtype: object = None, shape: object = (), order: object = "C") -> PickledArray:
    array = PickledArray()
    array.state = (1, shape, dtype, order == "F", content)
    return array


def _scalar(dtype: object = None, content: object = b"") -> Any:  # Any: int, float or bool
    if len(_text(content)) > 16:
        raise UnsafeGlobalError("A NumPy scalar of more than 16 bytes is not a number.")
    return _from_buffer(content, dtype).take().item()


def _dict(items: object = None, *_: object) -> dict[Any, Any]:
    if isinstance(items, dict):
        return items
    result: dict[Any, Any] = {}
    if isinstance(items, list):  # Python 2 writes an OrderedDict as a list of pairs.
        for key, value in items:
            result[_checked_key(key)] = value
        items.clear()
    return result


def _list(items: object = None, *_: object) -> list[Any]:
    return items if isinstance(items, list) else []


def _reconstruct(kind: object = None, *_: object) -> object:
    return {} if kind is _dict else Inert()


def _checked_key(key: object) -> str | int | float | bytes | None:
    # Only these: hashing a deeply nested tuple overflows the C stack.
    if key is None or isinstance(key, (str, int, float, bytes)):
        return key
    raise UnsafeGlobalError(f"The pickle uses a {type(key).__name__} as a key.")


# Types that pickles name, for example as the default of a defaultdict. mmengine's HistoryBuffer names its methods with
# getattr, which here looks nothing up.
_BUILTINS = (
    *("object", "list", "dict", "tuple", "set", "frozenset", "int", "float", "bool", "str", "unicode", "long"),
    *("complex", "slice", "bytes", "bytearray", "type", "range", "getattr"),
)
_KNOWN_GLOBALS: dict[tuple[str, str], Any] = {
    **{("collections", name): _dict for name in ("OrderedDict", "Counter", "defaultdict")},
    ("collections", "deque"): _list,
    ("_codecs", "encode"): _Encoded,
    **{(module, "_reconstructor"): _reconstruct for module in ("copyreg", "copy_reg")},
    **{("datetime", name): Inert for name in ("datetime", "timedelta")},
    **{("pathlib", name): Inert for name in ("PosixPath", "WindowsPath")},
    ("pathlib._local", "PosixPath"): Inert,
    ("argparse", "Namespace"): Inert,
    ("types", "SimpleNamespace"): Inert,
    **{(module, name): Inert for module in ("builtins", "__builtin__") for name in _BUILTINS},
    ("numpy", "ndarray"): PickledArray,
    ("numpy", "dtype"): _Dtype,
    **{(f"{core}.multiarray", "_reconstruct"): PickledArray for core in ("numpy.core", "numpy._core")},
    **{(f"{core}.multiarray", "scalar"): _scalar for core in ("numpy.core", "numpy._core")},
    **{(f"{core}.numeric", "_frombuffer"): _from_buffer for core in ("numpy.core", "numpy._core")},
    ("mmengine.logging.history_buffer", "HistoryBuffer"): Inert,
    # Configurations of training libraries, all of them subclasses of dict.
    **{("mmengine.config.config", name): _dict for name in ("Config", "ConfigDict")},
    **{("mmcv.utils.config", name): _dict for name in ("Config", "ConfigDict")},
    ("addict.addict", "Dict"): _dict,
    ("pytorch_lightning.utilities.parsing", "AttributeDict"): _dict,
    ("lightning.fabric.utilities.data", "AttributeDict"): _dict,
    ("lightning.pytorch.utilities.parsing", "AttributeDict"): _dict,
    **{(f"{module}.config", "CfgNode"): _dict for module in ("yacs", "fvcore.common", "detectron2.config")},
}


class _Unpickler(pickle._Unpickler):
    """Handlers of the opcodes that make objects; the others are those of the standard library.

    The pure-Python base is used because its memory is bounded by the file: the C one allocates what an index claims.
    Each handler is entered into ``dispatch`` below it, as in the standard library.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    for _code in (pickle.INST, pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER):
        del dispatch[_code[0]]  # no checkpoint needs them

    def __init__(
        self, source: _Source, known: Mapping[tuple[str, str], Any], storage: Callable[[object], object] | None
    ) -> None:
        super().__init__(source, encoding="latin1")
        self._known, self._storage = {**_KNOWN_GLOBALS, **known}, storage
        self._callable = frozenset(map(id, self._known.values()))

    def load(self) -> Any:  # Any: whatever was pickled
        """Read one pickle: the loop of the standard library, with a bound."""
        self._unframer = pickle._Unframer(self._file_read, self._file_readline)  # type: ignore[attr-defined]
        self.read = self._unframer.read
        self.readinto = self._unframer.readinto
        self.metastack: list[Any] = []
        self.stack: list[Any] = []
        self.append = self.stack.append
        self.proto = 0
        try:
            for _ in range(_MAX_OPERATIONS):
                key = self.read(1)
                if not key:
                    raise EOFError
                self.dispatch[key[0]](self)
        except pickle._Stop as stop:  # type: ignore[attr-defined]
            return stop.value
        raise UnsafeGlobalError(f"The pickle has more than {_MAX_OPERATIONS} operations.")

    def readline(self) -> bytes:
        """A line of the text opcodes, for the handlers of the standard library too."""
        line: bytes = self._unframer.readline()
        if len(line) > _MAX_LINE:
            raise UnsafeGlobalError(f"The pickle has a line of {len(line)} bytes.")
        return line

    def find_class(self, module: str, name: str, /) -> Any:  # Any: a stub class or function
        """The stub for a name.

        Raises:
            UnsafeGlobalError: when it is not in the table.
        """
        if max(len(module), len(name)) > _MAX_NAME:
            raise UnsafeGlobalError("The file refers to a class whose name is too long for one.")
        if (module, name) in self._known:
            return self._known[module, name]
        if _KNOWN_GLOBALS.get((module, name.partition(".")[0])) is Inert:
            return Inert  # A method of a class that is not imported.
        module = module.replace("__builtin__", "builtins")  # Python 2's name, which old protocols write
        raise UnsafeGlobalError(
            f"The file refers to '{module}.{name}', which is not data; it was not imported and nothing was run.",
            hint="save only the weights: torch.save(model.state_dict(), path)",
        )

    def persistent_load(self, pid: Any) -> Any:  # Any: torch's storage tuples
        """A storage of a torch file."""
        if self._storage is None:
            raise UnsafeGlobalError("The pickle refers to data outside of itself.")
        return self._storage(pid)

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        if id(function) not in self._callable:
            raise UnsafeGlobalError("The pickle calls something that is not in the table of known names.")
        # Arguments are copied, and a pickle may hand the same ones to many calls.
        if not isinstance(arguments, tuple) or len(arguments) > _MAX_ARGUMENTS:
            raise UnsafeGlobalError(f"The pickle calls something with {brief(arguments)} of arguments.")
        self.stack[-1] = function(*arguments)

    dispatch[pickle.REDUCE[0]] = dispatch[pickle.NEWOBJ[0]] = load_reduce

    def load_newobj_ex(self) -> None:
        if self.stack.pop():
            raise UnsafeGlobalError("The pickle makes an object with keyword arguments.")
        self.load_reduce()

    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex

    def load_build(self) -> None:
        state = self.stack.pop()
        instance = self.stack[-1]
        if isinstance(instance, (Inert, PickledArray, _Dtype)):
            instance.state = state
        elif not isinstance(instance, dict):  # An OrderedDict's own state (torch's _metadata) is of no use.
            raise UnsafeGlobalError(f"The pickle sets the state of a {type(instance).__name__}.")

    dispatch[pickle.BUILD[0]] = load_build

    def _store(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            what = "an object that is not a dict" if isinstance(target, Inert) else f"a {type(target).__name__}"
            raise UnsafeGlobalError(
                f"The file stores items in {what}, as pickled objects of a program's own classes do.",
                hint="save only the weights: torch.save(model.state_dict(), path)",
            )
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_checked_key(key)] = value

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._store([key, value])

    dispatch[pickle.SETITEM[0]] = load_setitem

    def _items(self) -> list[Any]:
        items: list[Any] = self.pop_mark()  # type: ignore[attr-defined]  # the standard library's, not in its stubs
        return items

    def load_setitems(self) -> None:
        self._store(self._items())

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_dict(self) -> None:
        items = self._items()
        self.append({})
        self._store(items)

    dispatch[pickle.DICT[0]] = load_dict

    # A set's members are kept in a list: nothing here needs hashing.
    dispatch[pickle.EMPTY_SET[0]] = dispatch[pickle.EMPTY_LIST[0]]

    def load_additems(self) -> None:
        items = self._items()
        if not isinstance(self.stack[-1], list):
            raise UnsafeGlobalError("The pickle adds members to something that is not a set.")
        self.stack[-1].extend(items)

    dispatch[pickle.ADDITEMS[0]] = load_additems

    dispatch[pickle.FROZENSET[0]] = dispatch[pickle.LIST[0]]

    def _integer(self, size: int) -> None:
        if not 0 <= size <= _MAX_INTEGER_BYTES:
            raise UnsafeGlobalError(f"The pickle has an integer of {size} bytes.")
        self.append(pickle.decode_long(self.read(size)))

    def load_long1(self) -> None:
        self._integer(self.read(1)[0])

    dispatch[pickle.LONG1[0]] = load_long1

    def load_long4(self) -> None:
        self._integer(int.from_bytes(self.read(4), "little", signed=True))

    dispatch[pickle.LONG4[0]] = load_long4

    def _number_line(self) -> bytes:
        line = self.readline()
        if len(line) > 4 * _MAX_INTEGER_BYTES:
            raise UnsafeGlobalError(f"The pickle has an integer of {len(line)} digits.")
        return line[:-1]

    def load_int(self) -> None:
        line = self._number_line()
        self.append({b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line, 0))

    dispatch[pickle.INT[0]] = load_int

    def load_long(self) -> None:
        self.append(int(self._number_line().rstrip(b"L"), 0))

    dispatch[pickle.LONG[0]] = load_long

    def load_bytearray8(self) -> None:
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
