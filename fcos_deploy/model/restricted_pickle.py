"""Reads pickles as data: no class is imported, no function of the file's choice is called."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from fcos_deploy.core.errors import CheckpointError
from fcos_deploy.model.pickle_stubs import DATA_GLOBALS, Inert, StatefulStub, UnsafeGlobalError, checked_key

__all__ = ["PickleHooks", "RestrictedUnpickler", "read_pickle"]

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
