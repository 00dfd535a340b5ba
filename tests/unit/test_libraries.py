"""Plug-ins and optional libraries: how they are discovered, checked and imported."""

from __future__ import annotations

import gc
import importlib.metadata
import pkgutil
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fcos_deploy.checkpoints.ecosystems import all_ecosystems, get_ecosystem
from fcos_deploy.checkpoints.rules import Ecosystem
from fcos_deploy.core import libraries
from fcos_deploy.core.backend import (
    Backend,
    BackendProbe,
    PerThread,
    Session,
    SessionOptions,
    all_backends,
    backends_for,
    get_backend,
)
from fcos_deploy.core.enums import ArtifactKind, ComputeType, PerformanceHint
from fcos_deploy.core.errors import ConfigError, MissingDependencyError
from fcos_deploy.core.exporter import all_exporters, get_exporter
from fcos_deploy.core.libraries import lazy_import, library_versions, parse_version, require
from fcos_deploy.serving.package import Packager, ServedModel, all_packagers


class _ThirdParty(Backend):
    name = "third-party"
    accepts = frozenset({ArtifactKind.ONNX})
    extra = ""

    def open(self, path: Path, options: SessionOptions) -> Session:
        raise NotImplementedError

    def probe(self) -> BackendProbe:
        return BackendProbe(available=False)


class _Server(Packager):
    name = "third-party"
    accepts = frozenset({ArtifactKind.ONNX})

    def write(self, model: ServedModel, folder: Path) -> None:
        raise NotImplementedError


PLUGIN, NOT_A_PLUGIN, PACKAGER = _ThirdParty(), object(), _Server()
ECOSYSTEM = Ecosystem(name="third-party", signature=("x",), renames=(), rules=get_ecosystem("torchvision").rules)
_CACHED = (all_backends, all_exporters, all_ecosystems, all_packagers)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Discovery is cached; these tests change what there is to discover."""
    for cached in _CACHED:
        cached.cache_clear()
    yield
    for cached in _CACHED:
        cached.cache_clear()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch):
    """Make entry points visible as if a distribution had declared them."""

    def visible(*names: str, group: str = "runtimes") -> None:
        points = [
            importlib.metadata.EntryPoint(f"plugin{i}", f"{__name__}:{name}", f"fcos_deploy.{group}")
            for i, name in enumerate(names)
        ]

        def entry_points(*, group: str) -> list[importlib.metadata.EntryPoint]:
            return [p for p in points if p.group == group]

        monkeypatch.setattr(libraries.importlib.metadata, "entry_points", entry_points)
        monkeypatch.setattr(importlib.metadata.EntryPoint, "load", lambda self: globals()[self.attr])

    return visible


def test_our_own_modules_are_found_by_name() -> None:
    found = all_backends()
    assert {"pytorch", "onnxruntime", "openvino"} <= set(found)
    assert list(found) == sorted(found)
    assert all(name == backend.name for name, backend in found.items())
    assert get_backend("onnxruntime") is found["onnxruntime"]


def test_every_public_module_of_the_runtimes_registers_something() -> None:
    import runtimes

    backends = {type(backend).__module__ for backend in all_backends().values()}
    assert backends == {f"runtimes.{m.name}" for m in pkgutil.iter_modules(runtimes.__path__) if m.name[0] != "_"}
    assert all_exporters()


def test_backends_are_found_by_what_they_open() -> None:
    names = [backend.name for backend in backends_for(ArtifactKind.ONNX)]
    assert "onnxruntime" in names
    assert names == sorted(names)
    assert all(ArtifactKind.OPENVINO_IR in b.accepts for b in backends_for(ArtifactKind.OPENVINO_IR))


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no backend 'tensorflow'") as caught:
        get_backend("tensorflow")
    assert "onnxruntime" in caught.value.hint
    with pytest.raises(ConfigError, match="no exporter 'tflite'") as caught:
        get_exporter("tflite")
    assert "openvino" in caught.value.hint


def test_entry_points_of_third_parties_are_found(install) -> None:
    install("PLUGIN")
    assert get_backend("third-party") is PLUGIN
    install("PACKAGER", group="serving")
    assert all_packagers()["third-party"] is PACKAGER
    install("ECOSYSTEM", group="ecosystems")
    assert get_ecosystem("third-party") is ECOSYSTEM


def test_two_plug_ins_of_one_name_are_an_error(install) -> None:
    install("PLUGIN", "PLUGIN")
    with pytest.raises(ConfigError, match="Two plug-ins are named 'third-party'"):
        all_backends()


def test_entry_point_of_another_kind_is_an_error(install) -> None:
    install("NOT_A_PLUGIN")
    with pytest.raises(ConfigError, match="is not a Backend"):
        all_backends()


class _Value:
    pass


def test_a_thread_keeps_its_value_and_shares_it_with_nobody() -> None:
    values = PerThread(_Value)
    mine = values.get()
    assert values.get() is mine
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(values.get).result() is not mine


def test_a_value_goes_with_its_thread() -> None:
    values = PerThread(_Value)
    seen: list[weakref.ref[_Value]] = []
    thread = threading.Thread(target=lambda: seen.append(weakref.ref(values.get())))
    thread.start()
    thread.join()
    gc.collect()
    assert seen[0]() is None


def test_all_values_go_with_the_object() -> None:
    owner = [PerThread(_Value)]
    mine, barrier = weakref.ref(owner[0].get()), threading.Barrier(2)
    theirs: list[weakref.ref[_Value]] = []

    def work() -> None:
        theirs.append(weakref.ref(owner[0].get()))
        barrier.wait(30)
        barrier.wait(30)

    thread = threading.Thread(target=work)
    thread.start()
    barrier.wait(30)
    owner.clear()
    gc.collect()
    assert mine() is None
    assert theirs[0]() is None
    barrier.wait(30)
    thread.join()


def test_session_options_take_the_documented_words() -> None:
    options = SessionOptions(hint="throughput", compute="bf16")  # type: ignore[arg-type]  # text, as the page says
    assert options.hint is PerformanceHint.THROUGHPUT
    assert options.compute is ComputeType.BF16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hint": "fast"}, "'hint' must be one of 'latency', 'throughput', got 'fast'"),
        ({"compute": "fp32"}, "'compute' must be one of 'f32', 'f16', 'bf16', got 'fp32'"),
        ({"threads": "2"}, "'threads' must be a whole number of at least 1, or None, got '2'"),
        ({"threads": 0}, "got 0"),
        ({"streams": True}, "'streams' must be a whole number of at least 1, or None, got True"),
        ({"threads": 2.0}, "got 2.0"),
        ({"device": 0}, "'device' must be text"),
        ({"public_keys": "key.pem"}, "'public_keys' must be a tuple"),
        ({"contract": {}}, "'contract' must be a ModelContract or None"),
        ({"checkpoint": "coco"}, "'checkpoint' must be CheckpointOptions or None"),
        ({"allow_fallback": "no"}, "'allow_fallback' must be True or False, got 'no'"),
    ],
)
def test_a_wrong_session_option_is_named_with_what_came(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SessionOptions(**options)
    assert message in caught.value.message


def test_installed_library_is_returned() -> None:
    assert require("json.decoder") is sys.modules["json.decoder"]


def test_missing_library_is_an_instruction() -> None:
    with pytest.raises(MissingDependencyError, match="'no_such_library' is not installed") as caught:
        require("no_such_library.part", extra="openvino")
    assert caught.value.hint == "pip install 'fcos-deploy[openvino]'"
    assert caught.value.exit_code == 3


def test_library_that_belongs_to_every_installation() -> None:
    with pytest.raises(MissingDependencyError) as caught:
        require("no_such_library")
    assert caught.value.hint == "pip install fcos-deploy"


def test_missing_part_of_an_installed_library_is_named() -> None:
    with pytest.raises(MissingDependencyError, match=r"'json\.no_such_part' is not installed"):
        require("json.no_such_part")


@pytest.mark.parametrize("body", ["import no_such_thing", "raise ImportError('libcudart.so.13 not found')", "1 / 0"])
def test_broken_library_shows_its_own_error(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_library.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises((ImportError, ZeroDivisionError)) as caught:
        require("broken_library", extra="openvino")
    assert not isinstance(caught.value, MissingDependencyError)


def test_a_lazy_library_is_imported_when_it_is_used() -> None:
    assert lazy_import("json").dumps([1]) == "[1]"
    missing = lazy_import("no_such_library", extra="openvino")
    with pytest.raises(MissingDependencyError) as caught:
        _ = missing.Core
    assert "fcos-deploy[openvino]" in caught.value.hint


def test_versions_of_what_is_installed() -> None:
    versions = library_versions("numpy", "no-such-distribution", "pytest")
    assert list(versions) == ["numpy", "pytest"]
    assert versions["pytest"] == pytest.__version__


def test_version_numbers_without_suffixes() -> None:
    assert parse_version("10.13.3.9") == (10, 13, 3, 9)
    assert parse_version("2.8.0+cu126") == (2, 8, 0)
    with pytest.raises(ConfigError, match="not a version number"):
        parse_version("unknown")
