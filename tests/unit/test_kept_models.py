"""Compiled models that are kept: only this user's own, for the same facts."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.trust import (
    CACHE_VARIABLE,
    STATE_VARIABLE,
    KeptModel,
    authenticate,
    own_folder,
    state_folder,
)

FACTS = {"model": "a", "version": "1"}


def test_what_was_kept_is_found_for_the_same_facts_only(tmp_path: Path) -> None:
    KeptModel("openvino", facts=FACTS, folder=tmp_path).store(b"compiled")
    assert KeptModel("openvino", facts=FACTS, folder=tmp_path).load() == b"compiled"
    assert KeptModel("openvino", facts={**FACTS, "version": "2"}, folder=tmp_path).load() is None
    assert KeptModel("tensorrt-rtx", facts=FACTS, folder=tmp_path).load() is None
    (kept,) = tmp_path.iterdir()
    other = KeptModel("openvino", facts={**FACTS, "model": "b"}, folder=tmp_path)
    other.store(b"of b")
    (other_path,) = set(tmp_path.iterdir()) - {kept}
    other_path.write_bytes(kept.read_bytes())
    assert other.load() is None
    assert not other_path.exists()


def test_the_most_recent_of_a_backend_remain(tmp_path: Path) -> None:
    for number in range(20):
        KeptModel("openvino", facts={"model": str(number)}, folder=tmp_path).store(b"%d" % number)
    assert len(list(tmp_path.iterdir())) == 16


@pytest.mark.parametrize("kind", ["link", "writable"])
def test_folders_that_others_can_put_there_are_refused_when_named_and_not_used_otherwise(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    if kind == "link":
        (tmp_path / "planted").mkdir()
        folder.symlink_to(tmp_path / "planted")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with pytest.raises(ConfigError, match="nothing in it can be trusted"):
        KeptModel("openvino", facts=FACTS, folder=folder)
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    assert not KeptModel("openvino", facts=FACTS).enabled


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "planted").mkdir(mode=0o700)
    os.chown(tmp_path / "planted", 4321, 4321)
    with pytest.raises(ConfigError, match="belongs to user 4321"):
        own_folder(tmp_path / "planted")


def test_without_a_place_for_the_secret_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STATE_VARIABLE, "/dev/null")
    assert not KeptModel("openvino", facts=FACTS).enabled
    with pytest.raises(ConfigError, match="/dev/null"):
        KeptModel("openvino", facts=FACTS, folder=tmp_path / "cache")


def test_the_cache_is_off_or_below_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "")
    assert not KeptModel("openvino", facts=FACTS).enabled
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    KeptModel("openvino", facts=FACTS).store(b"x")
    assert len(list((tmp_path / "fcos-deploy" / "openvino").iterdir())) == 1


def test_the_secret_is_made_once_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    with ThreadPoolExecutor(8) as pool:
        macs = set(pool.map(lambda _: authenticate("test", b"x"), range(32)))
    assert len(macs) == 1
    assert authenticate("other", b"x") not in macs
    secret = state_folder() / "secret"
    assert (secret.stat().st_mode & 0o777, secret.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert [path.name for path in secret.parent.iterdir()] == ["secret"]
    secret.write_bytes(secret.read_bytes()[:7])  # as after a power cut
    assert authenticate("test", b"x") not in macs
    secret.chmod(0o644)
    with pytest.raises(ConfigError, match="is no secret"):
        authenticate("test", b"x")
