"""Whatever is in a file, loading ends in a network or in an error that a user can read; nothing in it is run."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import pickletools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors

from fcos_deploy.checkpoints.load import CheckpointOptions, load_checkpoint
from fcos_deploy.checkpoints.pickle_reader import read_pickle
from fcos_deploy.core.errors import CheckpointError, FcosDeployError
from fcos_deploy.core.network import resnet_config
from fcos_deploy.model.fcos import Fcos

OPTIONS = CheckpointOptions(input_size=(64, 64))
FUZZ = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)

torch.manual_seed(0)
WEIGHTS = Fcos(resnet_config(18, num_classes=2, stem_channels=4, fpn_channels=32)).state_dict()
NAMES = sorted(WEIGHTS)


def _torch_bytes(content: Any, *, zipped: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


FILES = {
    "zip": _torch_bytes({"model": WEIGHTS, "epoch": 3}),
    "legacy": _torch_bytes({"model": WEIGHTS, "epoch": 3}, zipped=False),
    "pickle": pickle.dumps({"model": {n: t.numpy() for n, t in WEIGHTS.items()}}),
    "safetensors": save_safetensors({n: t.contiguous() for n, t in WEIGHTS.items()}, metadata={"format": "pt"}),
}


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that hostile pickles make when they are run."""
    monkeypatch.setenv("FCOS_DEPLOY_FUZZ_MARKER", str(tmp_path / "marker"))
    return tmp_path / "marker"


def _load(content: bytes, path: Path) -> None:
    """Load; only errors for users may come out."""
    path.unlink(missing_ok=True)  # A new file: the old one may still be mapped.
    path.write_bytes(content)
    with contextlib.suppress(FcosDeployError):
        load_checkpoint(path, options=OPTIONS)


@pytest.mark.parametrize("form", sorted(FILES))
def test_the_files_that_are_damaged_below_are_good(form: str, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(FILES[form])
    assert load_checkpoint(tmp_path / "m", options=OPTIONS).model.config.num_classes == 2


@FUZZ
@given(form=st.sampled_from(sorted(FILES)), part=st.floats(0, 0.9999))
def test_truncated(form: str, part: float, tmp_path: Path) -> None:
    content = FILES[form][: int(part * len(FILES[form]))]
    path = tmp_path / "m"
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        load_checkpoint(path, options=OPTIONS)


@FUZZ
@given(
    form=st.sampled_from(sorted(FILES)),
    flips=st.lists(st.tuples(st.floats(0, 0.9999), st.integers(0, 255)), min_size=1, max_size=20),
    near_start=st.booleans(),
)
def test_changed_bytes(form: str, flips: list[tuple[float, int]], near_start: bool, tmp_path: Path) -> None:
    content = bytearray(FILES[form])
    reach = 20_000 if near_start else len(content)
    for place, value in flips:
        content[int(place * reach)] = value
    _load(bytes(content), tmp_path / "m")


@pytest.mark.slow
@FUZZ
@given(order=st.permutations(NAMES), dropped=st.integers(0, 5), swapped=st.integers(0, 5))
def test_shuffled_missing_and_swapped_tensors(order: list[str], dropped: int, swapped: int, tmp_path: Path) -> None:
    names = order[dropped:]
    weights = {name: WEIGHTS[name] for name in names}
    for first, second in zip(names[:swapped], names[-swapped:] if swapped else [], strict=True):
        weights[first] = WEIGHTS[second]
    _load(_torch_bytes(weights), tmp_path / "m")


def test_the_order_of_tensors_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(_torch_bytes({name: WEIGHTS[name] for name in reversed(NAMES)}))
    load_checkpoint(tmp_path / "m", options=OPTIONS)


@pytest.mark.slow
@FUZZ
@given(
    name=st.sampled_from(NAMES),
    shape=st.lists(st.integers(0, 7), max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64]),
    value=st.sampled_from([0.0, 1.0, float("nan"), float("inf")]),
)
def test_wrong_shapes_dtypes_and_values(
    name: str, shape: list[int], dtype: torch.dtype, value: float, tmp_path: Path
) -> None:
    fill = value if dtype.is_floating_point or dtype.is_complex else 1
    _load(_torch_bytes({**WEIGHTS, name: torch.full(shape, fill, dtype=dtype)}), tmp_path / "m")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYS = ("model", "state_dict", "model_ema", "meta", "cfg", "config", "dataset_meta", "CLASSES", "pixel_mean")


@pytest.mark.slow
@FUZZ
@given(content=st.dictionaries(st.sampled_from(KEYS), PLAIN, max_size=4), zipped=st.booleans(), weights=st.booleans())
def test_contents_of_other_kinds(content: dict[str, Any], zipped: bool, weights: bool, tmp_path: Path) -> None:
    if weights:
        content = {**content, "model": WEIGHTS}
    _load(_torch_bytes(content, zipped=zipped), tmp_path / "m")


class _Hostile:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


TOUCH = "__import__('pathlib').Path(__import__('os').environ['FCOS_DEPLOY_FUZZ_MARKER']).touch()"
HOSTILE = [
    _Hostile(eval, TOUCH),
    _Hostile(exec, TOUCH),
    _Hostile(os.system, 'touch "$FCOS_DEPLOY_FUZZ_MARKER"'),
    _Hostile(__import__, "antigravity"),
    _Hostile(map, _Hostile(eval, TOUCH), ["1"]),
]


def test_the_hostile_objects_are_hostile(marker: Path) -> None:
    pickle.loads(pickle.dumps(HOSTILE[0]))
    assert marker.exists()


@FUZZ
@given(
    hostile=st.sampled_from(range(len(HOSTILE))),
    place=st.sampled_from(["model", "meta", "args", "optimizer", "state_dict"]),
    form=st.sampled_from(["zip", "legacy", "pickle"]),
    protocol=st.integers(0, 5),
)
def test_code_is_never_run(hostile: int, place: str, form: str, protocol: int, tmp_path: Path, marker: Path) -> None:
    content = {"model": WEIGHTS, place: {"deep": [HOSTILE[hostile]], "w": torch.ones(1)}}
    if form == "pickle":
        data = pickle.dumps({"model": {"w": 1}, place: HOSTILE[hostile]}, protocol=max(protocol, 2))
    else:
        data = _torch_bytes(content, zipped=form == "zip")
    (tmp_path / "m").unlink(missing_ok=True)
    (tmp_path / "m").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"not data|damaged|operation"):
        load_checkpoint(tmp_path / "m", options=OPTIONS)
    assert not marker.exists()


OPCODES = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]
ARGUMENTS = st.sampled_from(
    [
        b"",
        b"\x00",
        b"\x01",
        b"\xff\xff\xff\x7f",
        b"os\nsystem\n",
        b"builtins\neval\n",
        b"1\n",
        b"\x04evil",
        b"argparse\nNamespace\n",
    ]
)


@settings(max_examples=600, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(OPCODES), ARGUMENTS | st.binary(max_size=6)), max_size=40))
def test_any_sequence_of_opcodes_is_data_or_an_error(operations: list[tuple[bytes, bytes]]) -> None:
    stream = b"".join(code + argument for code, argument in operations) + b"."
    with contextlib.suppress(CheckpointError):
        read_pickle(stream)
