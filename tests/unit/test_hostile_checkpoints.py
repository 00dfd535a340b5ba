"""Small files that ask a reader for hours or gigabytes: each is read or refused within seconds and a bounded memory.

The commands run in a process whose memory and processor time are limited, so that a reader without bounds fails.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fcos_deploy.core.errors import brief

MEMORY = 2 << 30  # bytes of address space, of which an idle process with its libraries takes a quarter
SECONDS = 20
PROGRAM = "from fcos_deploy.cli.app import main; main()"


def _limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))


def _inspect(path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, "inspect", str(path)],
        preexec_fn=_limited,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def _safetensors(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def _zip(path: Path, pickled: bytes, *, storage: bytes = b"") -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", pickled)
        archive.writestr("m/data/0", storage)


def _persistent(count: int) -> bytes:
    """The opcodes that leave storage '0' of ``count`` floats on the stack."""
    size = struct.pack("<q", count)
    return b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu\x8a\x08" + size + b"tQ"


def _tensor(name: str, shape: bytes, strides: bytes) -> bytes:
    """The opcodes of one item of a state dict, over the storage in memo 0."""
    key = struct.pack("<I", len(name)) + name.encode()
    return b"X" + key + b"ctorch._utils\n_rebuild_tensor_v2\n(h\0K\0" + shape + strides + b"\x89}tR"


def _dag(path: Path) -> None:
    """A configuration of forty lists, each holding the one before twice."""
    lists = b"".join(b"l" + str(i).encode() + b" = [l%d, l%d]\n" % (i - 1, i - 1) for i in range(1, 40))
    text = (b"l0 = [1, 2]\n" + lists + b"test_pipeline = l39\nmodel = dict(bbox_head=dict(strides=l39))\n").decode()
    names = ("backbone.layer1.0.conv1.weight", "bbox_head.conv_centerness.weight", "neck.x")
    model = {name: np.ones((1, 1, 1, 1), np.float32) for name in names}
    path.write_bytes(pickle.dumps({"state_dict": model, "meta": {"cfg": text}}))


def _shared_lists(path: Path) -> None:
    """A shape and a type of nested shared lists, whose text has a billion characters."""
    nested: list[object] = [1, 2]
    for _ in range(30):
        nested = [nested, nested]
    path.write_bytes(pickle.dumps({"model": {"w": _Call(np.dtype, (nested,))}, "k": nested}))


class _Call:
    def __init__(self, function: object, arguments: tuple[object, ...]) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> object:
        return self.call


def _nested_shape(path: Path) -> None:
    lists = b"]" + b"".join(b"q%c(h%ch%ce" % (i, i, i) if i == 1 else b"" for i in (1,))
    dag = lists + b"".join(b"]q%c(h%ch%ce" % (i, i - 1, i - 1) for i in range(2, 40))
    pickled = b"\x80\x02" + dag + b"0" + _persistent(4) + b"q\0}(" + _tensor("w", b"h\x26", b"h\x26") + b"u."
    _zip(path, pickled, storage=bytes(16))


def _megabyte_integers(path: Path) -> None:
    number = b"\x8b" + struct.pack("<i", 4_000_000) + b"\x7f" * 4_000_000
    path.write_bytes(b"\x80\x02}X\x05\0\0\0model}X\x01\0\0\0w" + number + b"ss.")


def _hexadecimal_integer(path: Path) -> None:
    path.write_bytes(b"\x80\x02}X\x05\0\0\0modelI0x" + b"f" * 30_000_000 + b"\ns.")


def _many_digits(path: Path) -> None:
    header = b'{"w": {"dtype": "F32", "shape": [' + b"9" * 50_000 + b'], "data_offsets": [0, 4]}}'
    path.write_bytes(_safetensors(header, bytes(4)))


def _million_axes(path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1] * 1_000_000, "data_offsets": [0, 4]}})
    path.write_bytes(_safetensors(header.encode(), bytes(4)))


def _million_axes_shared(path: Path) -> None:
    """One shape of a million axes that 3,000 tensors share; each would copy it."""
    shape = b"(" + b"K\x01" * 500_000 + b"tq\x01"
    tensors = b"".join(_tensor(f"w{i}", b"h\x01", b"h\x01") for i in range(3000))
    _zip(path, b"\x80\x02" + shape + b"0" + _persistent(4) + b"q\x000}(" + tensors + b"u.", storage=bytes(16))


def _shared_arguments(path: Path) -> None:
    arguments = b"(" + b"K\x01" * 500_000 + b"tq\x01"
    calls = b"cargparse\nNamespace\nq\x02" + b"h\x02h\x01R" * 50_000
    path.write_bytes(b"\x80\x02" + arguments + calls + b".")


def _aliased_storages(path: Path) -> None:
    """10,000 vectors of batch norm over the same 16 million zeros."""
    count = 1 << 24
    shape = b"J" + struct.pack("<i", count) + b"\x85"
    tensors = b"".join(_tensor(f"backbone.layer1.{i}.bn1.running_mean", shape, b"K\x01\x85") for i in range(10_000))
    pickled = b"\x80\x02" + _persistent(count) + b"q\x000}X\x05\0\0\0model}(" + tensors + b"us."
    _zip(path, pickled, storage=bytes(4 * count))


def _deep_header(path: Path) -> None:
    path.write_bytes(_safetensors(b'{"__metadata__": {"fcos_deploy": "' + b"[" * 8_000_000 + b'"}}'))


def _wide_header(path: Path) -> None:
    path.write_bytes(_safetensors(b'{"w": [' + b"{}," * 20_000_000 + b"{}]}"))


def _long_prefix(path: Path) -> None:
    path.write_bytes(pickle.dumps({"module." * 1_000_000: np.ones(1, np.float32)}))


def _directory(path: Path) -> None:
    """A zip file with half a million empty entries."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}.")
        archive.start_dir = archive.fp.tell()
        entry = zipfile.ZipInfo("m/data/0")
        entry.header_offset = entry.CRC = 0
        archive.filelist += [entry] * 500_000
        archive._didModify = True


def _byte_order(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}.")
        archive.writestr("m/byteorder", b"little")
        archive.getinfo("m/byteorder").file_size = 1 << 40


HOSTILE: tuple[Callable[[Path], None], ...] = (
    *(_dag, _shared_lists, _nested_shape, _megabyte_integers, _hexadecimal_integer, _many_digits, _million_axes),
    *(_million_axes_shared, _shared_arguments, _aliased_storages, _deep_header, _wide_header, _long_prefix),
    *(_directory, _byte_order),
)


@pytest.mark.parametrize("write", HOSTILE, ids=lambda write: write.__name__.strip("_"))
def test_a_hostile_checkpoint_is_refused_in_seconds(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    write(path)
    done = _inspect(path)
    assert done.returncode in (1, 2), (done.returncode, done.stderr[-2000:])
    assert "Traceback" not in done.stderr
    assert len(done.stderr) < 2000
    assert "more memory than there is" not in done.stderr


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a" * 200, "'" + "a" * 80 + "...'"),
        (7, "7"),
        (1 << 100_000, "an integer of 100001 bits"),
        ([[1]], "a list"),
        (None, "None"),
        (True, "True"),
    ],
    ids=["text", "number", "huge number", "list", "none", "flag"],
)
def test_values_of_files_are_shown_in_a_line(value: object, text: str) -> None:
    assert brief(value) == text
