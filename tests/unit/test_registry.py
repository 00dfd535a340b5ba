"""A module in a plug-in package registers itself; entry points of other distributions do so, too."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import pytest

from fcos_deploy.checkpoints.ecosystems import all_ecosystems, get_ecosystem
from fcos_deploy.checkpoints.rules import Ecosystem
from fcos_deploy.core import registry
from fcos_deploy.core.backend import Backend, BackendProbe, Session, SessionOptions
from fcos_deploy.core.enums import ArtifactKind
from fcos_deploy.core.errors import ConfigError
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
_CACHED = (registry.all_backends, registry.all_exporters, all_ecosystems, all_packagers)


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

        monkeypatch.setattr(registry.importlib.metadata, "entry_points", entry_points)
        monkeypatch.setattr(importlib.metadata.EntryPoint, "load", lambda self: globals()[self.attr])

    return visible


def test_our_own_modules_are_found_by_name() -> None:
    found = registry.all_backends()
    assert {"pytorch", "onnxruntime", "openvino"} <= set(found)
    assert list(found) == sorted(found)
    assert all(name == backend.name for name, backend in found.items())
    assert registry.get_backend("onnxruntime") is found["onnxruntime"]


def test_every_public_module_of_the_plug_in_folders_registers_something() -> None:
    import exporters
    import runtimes

    def public(package: object) -> int:
        (folder,) = package.__path__  # type: ignore[attr-defined]  # a package
        return len([p for p in Path(folder).glob("*.py") if not p.name.startswith("_")])

    assert 0 < len(registry.all_backends()) <= public(runtimes)
    assert 0 < len(registry.all_exporters()) <= public(exporters)


def test_backends_are_found_by_what_they_open() -> None:
    names = [backend.name for backend in registry.backends_for(ArtifactKind.ONNX)]
    assert "onnxruntime" in names
    assert names == sorted(names)
    assert all(ArtifactKind.OPENVINO_IR in b.accepts for b in registry.backends_for(ArtifactKind.OPENVINO_IR))


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no backend 'tensorflow'") as caught:
        registry.get_backend("tensorflow")
    assert "onnxruntime" in caught.value.hint
    with pytest.raises(ConfigError, match="no exporter 'tflite'") as caught:
        registry.get_exporter("tflite")
    assert "openvino" in caught.value.hint


def test_entry_points_of_third_parties_are_found(install) -> None:
    install("PLUGIN")
    assert registry.get_backend("third-party") is PLUGIN
    install("PACKAGER", group="serving")
    assert all_packagers()["third-party"] is PACKAGER
    install("ECOSYSTEM", group="ecosystems")
    assert get_ecosystem("third-party") is ECOSYSTEM


def test_two_plug_ins_of_one_name_are_an_error(install) -> None:
    install("PLUGIN", "PLUGIN")
    with pytest.raises(ConfigError, match="Two plug-ins are named 'third-party'"):
        registry.all_backends()


def test_entry_point_of_another_kind_is_an_error(install) -> None:
    install("NOT_A_PLUGIN")
    with pytest.raises(ConfigError, match="is not a Backend"):
        registry.all_backends()
