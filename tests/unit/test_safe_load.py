"""Files that are not checkpoints, and files that want more than to be read."""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fcos_deploy.checkpoints.load import find_weights, to_tensors
from fcos_deploy.checkpoints.pickle_reader import PickledArray, UnsafeGlobalError, read_pickle
from fcos_deploy.checkpoints.reader import ITEM_SIZES, open_checkpoint
from fcos_deploy.core.errors import CheckpointError


class _Runs:
    """Pickles to a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def _save(content: Any, path: Path, form: str) -> None:
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch {marker}",), r"(posix|nt)\.system"),
        (eval, ("open('{marker}', 'w')",), r"builtins\.eval"),
        (exec, ("open('{marker}', 'w')",), r"builtins\.exec"),
        (getattr, (os, "name"), r"builtins\.getattr|posix"),
        (torch.load, ("{marker}",), r"torch\.serialization\.load"),
        (open, ("{marker}", "w"), r"_?io\.open"),
    ],
)
def test_a_pickle_that_wants_to_run_code_is_refused_by_name(
    form: str, function: Any, arguments: Any, name: str, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    values = [a.format(marker=marker) if isinstance(a, str) else a for a in arguments]
    if function is getattr:
        values = [_Runs(os.getcwd), "x"]
        name = r"(posix|nt)\.getcwd|builtins\.getattr"
    _save({"model": {"a": np.ones(1)}, "extra": _Runs(function, *values)}, tmp_path / "m.pth", form)
    with pytest.raises(UnsafeGlobalError, match=name) as caught:
        open_checkpoint(tmp_path / "m.pth")
    assert "nothing was run" in caught.value.message
    assert not marker.exists()


def test_a_whole_pickled_module_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "m.pth")
    with pytest.raises(UnsafeGlobalError, match=r"torch\.nn\.modules\.linear\.Linear") as caught:
        open_checkpoint(tmp_path / "m.pth")
    assert "state_dict()" in caught.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"epoch 1 loss 0.3\n" * 9, "a text file beginning 'epoch 1 loss"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "a PNG image"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "HDF5"),
        (b"\x08\x09\x12\x07pytorch", "perhaps an ONNX file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (bytes(range(200, 256)), "of an unknown format"),
        (b"PK\x03\x04" + bytes(100), "damaged zip file"),
        (b"\x80\x02}q\x00X", "damaged"),
        (b"\x80\x04.", "damaged"),
    ],
)
def test_files_that_are_not_checkpoints(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "m.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path / "m.pth")
    assert "m.pth" in caught.value.message


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Cannot read"):
        open_checkpoint(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="Cannot read"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("part", [0.2, 0.5, 0.9, 0.999])
def test_truncated_files(form: str, part: float, tmp_path: Path) -> None:
    weights = {f"w{i}": torch.randn(50, 50) for i in range(4)}
    _save({n: t.numpy() for n, t in weights.items()} if form == "pickle" else weights, tmp_path / "m.pth", form)
    whole = (tmp_path / "m.pth").read_bytes()
    (tmp_path / "m.pth").write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(CheckpointError):
        find_weights(open_checkpoint(tmp_path / "m.pth").content)


def test_truncated_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(100)}, tmp_path / "m.safetensors")
    whole = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match="damaged safetensors"):
        open_checkpoint(tmp_path / "m.safetensors")


def test_zip_files_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"not one of torch\.save: it holds 'readme\.txt'"):
        open_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", "")
        archive.writestr("m/constants.pkl", "")
    with pytest.raises(CheckpointError, match="TorchScript"):
        open_checkpoint(path)
    with zipfile.ZipFile(path, "w", compression=zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", bytes(10_000_000))
    with pytest.raises(CheckpointError, match="compressed"):
        open_checkpoint(path)


def _zip_of(pickled: bytes, path: Path, **storages: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", pickled)
        for name, data in storages.items():
            archive.writestr(f"m/data/{name}", data)


def _tensor_pickle(shape: tuple[int, ...], strides: tuple[int, ...], *, offset: int = 0, count: int = 4) -> bytes:
    """What torch.save writes for one float32 tensor over storage '0', after a global that torch itself refuses."""
    from io import BytesIO

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", count) if item == "STORAGE" else None

    stream = BytesIO()
    arguments = ("STORAGE", offset, shape, strides, False, {})
    tensor = _Runs(torch._utils._rebuild_tensor_v2, *arguments)
    Pickler(stream, protocol=2).dump({"w": tensor, "when": __import__("datetime").timedelta(1)})
    return stream.getvalue()


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "count"),
    [
        ((5,), (1,), 0, 4),
        ((4,), (1,), 1, 4),
        ((1 << 40,), (0,), 0, 4),
        ((1 << 20, 1 << 20), (1, 1), 0, 4),
        ((-1,), (1,), 0, 4),
        ((4,), (-1,), 0, 4),
        ((2, 2), (1,), 0, 4),
        ((4,), (1,), 0, 1 << 50),
        ((4,), (1,), 0, -4),
    ],
)
def test_tensors_that_claim_more_than_is_stored(
    shape: tuple[int, ...], strides: tuple[int, ...], offset: int, count: int, tmp_path: Path
) -> None:
    pickled = _tensor_pickle(shape, strides, offset=offset, count=count)
    _zip_of(pickled, tmp_path / "m.pth", **{"0": struct.pack("<4f", 1, 2, 3, 4)})
    with pytest.raises(CheckpointError):
        find_weights(open_checkpoint(tmp_path / "m.pth").content)


@pytest.mark.parametrize("count", [8, 9])
def test_tensors_that_share_a_storage_more_often_than_modules_share_weights_are_refused(
    count: int, tmp_path: Path
) -> None:
    shared = torch.zeros(1000)
    torch.save({f"backbone.layer{index}.weight": shared for index in range(count)}, tmp_path / "model.pth")
    content = open_checkpoint(tmp_path / "model.pth").content
    with (
        contextlib.nullcontext()
        if count == 8
        else pytest.raises(CheckpointError, match="more than 8 times the numbers")
    ):
        find_weights(content)


def test_strided_and_offset_tensors_are_read_from_the_mapped_file(tmp_path: Path) -> None:
    _zip_of(_tensor_pickle((2, 2), (1, 2)), tmp_path / "m.pth", **{"0": struct.pack("<4f", 1, 2, 3, 4)})
    opened = open_checkpoint(tmp_path / "m.pth")
    assert opened.reader == "torch"
    assert find_weights(opened.content).tensors["w"].tolist() == [[1, 3], [2, 4]]


@pytest.mark.parametrize("dtype", sorted(ITEM_SIZES))
@pytest.mark.parametrize("zipped", [True, False])
def test_numbers_are_read_without_torch_as_torch_reads_them(dtype: str, zipped: bool, tmp_path: Path) -> None:
    whole = torch.arange(24).view(4, 6).to(getattr(torch, dtype))
    views = {"whole": whole, "part": whole[1:3, ::2].t(), "one": whole[2, 3], "none": whole[:, :0]}
    torch.save(views, tmp_path / "m.pth", _use_new_zipfile_serialization=zipped)
    stored = find_weights(open_checkpoint(tmp_path / "m.pth").content).tensors
    tensors = to_tensors(stored)
    for name, tensor in views.items():
        assert stored[name].tolist() == tensor.tolist()
        assert torch.equal(tensors[name], tensor)
        assert (stored[name].shape, stored[name].dtype) == (tuple(tensor.shape), dtype)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "damaged"),
        ("[]", "is not a checkpoint"),
        ('{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "does not lie in bytes 0 to 4"),
        ('{"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}', "does not lie in bytes"),
        ('{"w": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}', "impossible"),
        ('{"w": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}', "impossible"),
        ('{"w": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', "impossible"),
        ('{"w": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}', "F8_E4M3., which is not read"),
        ('{"w": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}', "damaged"),
        ('{"w": 1}', "damaged"),
        ('{"__metadata__": {}, "__metadata__": {}}', "occurs twice"),
        ('{"__metadata__": [1]}', "damaged"),
        ('{"w": ' + "[" * 100_000, "damaged"),
    ],
)
def test_safetensors_headers_that_do_not_fit_the_file(header: str, message: str, tmp_path: Path) -> None:
    content = header.encode()
    (tmp_path / "m.safetensors").write_bytes(len(content).to_bytes(8, "little") + content + bytes(8))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "uint8", ">f4", "bool"])
def test_numpy_arrays_of_every_protocol(protocol: int, dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    for stored in (array, np.asfortranarray(array)):
        pickled = read_pickle(pickle.dumps(stored, protocol=protocol))
        assert isinstance(pickled, PickledArray)
        np.testing.assert_array_equal(pickled.take(), stored)
    assert read_pickle(pickle.dumps(np.float32(2.5), protocol=protocol)) == 2.5


def test_arrays_of_objects_are_refused() -> None:
    pickled = read_pickle(pickle.dumps(np.array([{}, []], dtype=object)))
    with pytest.raises(CheckpointError, match="damaged"):
        pickled.take()


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02}r\xff\xff\xff\x7f.",  # a memo index that makes the C unpickler allocate gigabytes
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a byte array of 8 EiB
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # bytes of 8 EiB
        b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b"}(h\x00.",
        b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"Ns.",  # a key that overflows the stack when hashed
        b"\x80\x02c__builtin__\nlist\n(lp0\ng0\n\x85R.",
        b"\x80\x02(S'touch /tmp/x'\ni__builtin__\neval\n.",  # INST
        b"\x80\x02(c__builtin__\neval\nS'1'\no.",  # OBJ
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x02cargparse\nNamespace\n}X\x01\x00\x00\x00aK\x01sb.",  # BUILD on a class, not on an instance
        b"\x80\x02U\x04evilU\x04evil\x93.",
        b"\x80\x02K\x01K\x02\x93.",  # STACK_GLOBAL of numbers
        b"\x80\x02K\x01)R.",  # a call of a number
        b"}" * 3_100_000 + b".",
    ],
)
def test_hostile_pickles_end_in_an_error(pickled: bytes) -> None:
    before = dict(vars(__import__("argparse").Namespace))
    with contextlib.suppress(CheckpointError):
        read_pickle(pickled)
    assert dict(vars(__import__("argparse").Namespace)) == before


def test_memory_for_hostile_pickles_is_bounded() -> None:
    import tracemalloc

    bombs = [
        b"\x80\x02}r\xff\xff\xff\x7f.",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x02c_codecs\nencode\nq\x00(X\x40\x42\x0f\x00"
        + b"x" * 1_000_000
        + b"tq\x01"
        + b"h\x00h\x01R" * 10_000
        + b".",
    ]
    for bomb in bombs:
        tracemalloc.start()
        with contextlib.suppress(CheckpointError):
            read_pickle(bomb)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 * len(bomb) + 8_000_000


def test_mmengine_history_buffers_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their state holds NumPy arrays and, named with getattr, their own methods."""
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def mean(self) -> float:
            return 0.0

    for item, name in ((HistoryBuffer, "HistoryBuffer"), (HistoryBuffer.mean, "HistoryBuffer.mean")):
        item.__module__, item.__qualname__ = module.__name__, name
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]  # made here
    buffer = module.HistoryBuffer()
    buffer.log, buffer.methods = np.arange(3.0), {"mean": module.HistoryBuffer.mean}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "mmengine", types.ModuleType("mmengine"))
        patch.setitem(sys.modules, "mmengine.logging", types.ModuleType("mmengine.logging"))
        patch.setitem(sys.modules, "mmengine.logging.history_buffer", module)
        content = {"state_dict": {"w": torch.ones(2)}, "message_hub": {"loss": buffer}}
        torch.save(content, tmp_path / "m2.pth")
        torch.save(content, tmp_path / "m4.pth", pickle_protocol=4)
    for name in ("m2.pth", "m4.pth"):
        weights = find_weights(open_checkpoint(tmp_path / name).content)
        assert weights.tensors["w"].tolist() == [1, 1]
        assert weights.container == "state_dict"


def test_keys_that_would_overflow_the_stack_when_hashed(tmp_path: Path) -> None:
    """``torch.load(weights_only=True)`` of torch 2.13 ends the process on this file."""
    _zip_of(b"\x80\x02})" + b"\x85" * 900_000 + b"K\x01s.", tmp_path / "m.pth")
    with pytest.raises(UnsafeGlobalError, match="uses a tuple as a key"):
        open_checkpoint(tmp_path / "m.pth")


def test_configurations_of_training_libraries_are_read_as_dicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """yacs' CfgNode and mmcv's ConfigDict are subclasses of dict; neither library is needed."""
    module = types.ModuleType("yacs.config")
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    module.CfgNode = node  # type: ignore[attr-defined]  # made here
    stored = node(a=1)
    stored.extra = 2
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        torch.save({"model": {"w": torch.ones(2)}, "cfg": stored}, tmp_path / "m.pth")
    content = open_checkpoint(tmp_path / "m.pth").content
    assert isinstance(content, dict)
    assert content["cfg"] == {"a": 1}


def test_a_defaultdict_is_read_and_items_of_other_objects_are_told(tmp_path: Path) -> None:
    history: collections.defaultdict[str, list[int]] = collections.defaultdict(list, loss=[1, 2])
    torch.save({"model": {"a": torch.zeros(1)}, "history": history}, tmp_path / "m.pth")
    assert open_checkpoint(tmp_path / "m.pth").content["history"] == {"loss": [1, 2]}
    stores_items = b"\x80\x02cargparse\nNamespace\n)R(X\x01\x00\x00\x00aK\x01u."
    with pytest.raises(UnsafeGlobalError, match="stores items in an object that is not a dict") as caught:
        read_pickle(stores_items)
    assert "state_dict" in caught.value.hint
