"""Missing libraries become instructions; broken ones stay what they are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fcos_deploy.core.errors import ConfigError, MissingDependencyError
from fcos_deploy.core.libraries import lazy_import, library_versions, parse_version, require


def test_installed_library_is_returned() -> None:
    assert require("json.decoder") is sys.modules["json.decoder"]


def test_missing_library_is_an_instruction() -> None:
    with pytest.raises(MissingDependencyError, match="'no_such_library', which is not installed") as caught:
        require("no_such_library.part", extra="openvino")
    assert caught.value.hint == "pip install 'fcos-deploy[openvino]'"
    assert caught.value.exit_code == 3


def test_library_that_belongs_to_every_installation() -> None:
    with pytest.raises(MissingDependencyError) as caught:
        require("no_such_library")
    assert caught.value.hint == "pip install fcos-deploy"


def test_missing_part_of_an_installed_library_is_named() -> None:
    with pytest.raises(MissingDependencyError, match=r"'json\.no_such_part', which is not installed"):
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
