"""A bundle travels as one .tar, and a hostile .tar does no harm."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fcos_deploy.bundle import open_bundle, pack, select_artifact
from fcos_deploy.bundle.archive import unpack
from fcos_deploy.core.errors import BundleError, ConfigError, FcosDeployError

MakeBundle = Callable[[Path], Path]


def test_pack_and_open_is_the_same_bundle(make_bundle: MakeBundle, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "cells")
    pack(bundle, tmp_path / "cells.tar")
    with open_bundle(tmp_path / "cells.tar") as opened:
        assert opened.manifest == open_bundle(bundle).manifest
        assert opened.path("model.int8.engine").read_bytes() == (bundle / "model.int8.engine").read_bytes()
        assert opened.log_path is None
    assert not opened.root.exists()


def test_packing_twice_gives_the_same_bytes(make_bundle: MakeBundle, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "cells")
    pack(bundle, tmp_path / "a.tar")
    pack(bundle, tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_an_artifact_of_an_archive_can_be_run(make_bundle: MakeBundle, tmp_path: Path) -> None:
    pack(make_bundle(tmp_path / "cells"), tmp_path / "cells.tar")
    with open_bundle(tmp_path / "cells.tar") as bundle:
        selection = select_artifact(bundle)
        assert bundle.path(selection.artifact.path).is_file()
    assert selection.backend == "tensorrt"


def test_only_tar_is_written(make_bundle: MakeBundle, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\*\.tar"):
        pack(make_bundle(tmp_path / "cells"), tmp_path / "cells.zip")


def _tar(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def _member(name: str, *, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, size
    return member


@pytest.mark.parametrize(
    "members",
    [
        [_member("../evil", size=3)],
        [_member("/tmp/evil", size=3)],
        [_member("a/../../evil", size=3)],
        [_member("link", kind=tarfile.SYMTYPE, link="/etc"), _member("link/evil", size=3)],
        [_member("link", kind=tarfile.LNKTYPE, link="/etc/passwd")],
        [_member("pipe", kind=tarfile.FIFOTYPE)],
        [_member("device", kind=tarfile.CHRTYPE)],
        [_member("twice", size=1), _member("twice", size=1)],
        [_member("file", size=1), _member("file/below", size=1)],
        [_member("x" * 2000, size=1)],
    ],
    ids=lambda members: members[0].name[:12] if isinstance(members, list) else None,
)
def test_a_hostile_member_is_refused_and_nothing_lands_outside(members: list[tarfile.TarInfo], tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    target.mkdir(parents=True)
    with pytest.raises(BundleError):
        unpack(_tar(tmp_path / "evil.tar", *members), target)
    assert not list(tmp_path.rglob("evil"))
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["target"]


def test_a_member_that_claims_more_than_the_archive_has_is_refused(tmp_path: Path) -> None:
    header = _member("bomb", size=1 << 39).tobuf()
    (tmp_path / "bomb.tar").write_bytes(header + b"\0" * 10240)
    (tmp_path / "target").mkdir()
    with pytest.raises(BundleError):
        unpack(tmp_path / "bomb.tar", tmp_path / "target")
    assert sum(p.stat().st_size for p in (tmp_path / "target").rglob("*") if p.is_file()) == 0


def test_a_sparse_member_is_refused(tmp_path: Path) -> None:
    """GNU sparse 1.0: 512 bytes of map say that the file has 1 TiB."""
    member = _member("sparse", size=512)
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 40)}
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member, io.BytesIO(b"1\n0\n0\n".ljust(512, b"\0")))
    (tmp_path / "target").mkdir()
    with pytest.raises(BundleError):
        unpack(tmp_path / "s.tar", tmp_path / "target")
    assert not list((tmp_path / "target").iterdir())


def test_a_compressed_archive_is_not_opened(make_bundle: MakeBundle, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "cells.tar", "w:gz") as archive:
        archive.add(make_bundle(tmp_path / "cells"), "")
    with pytest.raises(BundleError, match="not a bundle's archive"):
        open_bundle(tmp_path / "cells.tar")


def test_flipped_bits_in_an_archive_are_refused_or_harmless(make_bundle: MakeBundle, tmp_path: Path) -> None:
    """Padding and times are no part of the bundle; whatever opens must be the very same bundle."""
    pack(make_bundle(tmp_path / "cells"), tmp_path / "cells.tar")
    content = (tmp_path / "cells.tar").read_bytes()
    manifest = open_bundle(tmp_path / "cells").manifest
    rng = np.random.default_rng(8)
    refused = 0
    for place in rng.integers(0, len(content) * 8, 150):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << (place % 8)
        (tmp_path / "damaged.tar").write_bytes(damaged)
        try:
            with open_bundle(tmp_path / "damaged.tar") as opened:
                assert opened.manifest == manifest
        except FcosDeployError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("how", ["folder", "dot"])
def test_what_plain_tar_packs_opens(make_bundle: MakeBundle, tmp_path: Path, how: str) -> None:
    """With the folder's name before every member or a dot, with layers of a device and the log."""
    bundle = make_bundle(tmp_path / "cells")
    (bundle / "device" / "layer").mkdir(parents=True)
    (bundle / "device" / "layer" / "model.engine").write_bytes(b"of one device")
    words = ["cells"] if how == "folder" else ["-C", "cells", "."]
    subprocess.run(["tar", "cf", "plain.tar", *words], cwd=tmp_path, check=True)
    with open_bundle(tmp_path / "plain.tar") as opened:
        assert opened.manifest.name == "cells"
        assert not (opened.root / "device").exists()
    (tmp_path / "other").mkdir()
    shutil.move(bundle, tmp_path / "other" / "cells")
    subprocess.run(["tar", "cf", "deep.tar", "other"], cwd=tmp_path, check=True)
    with pytest.raises(BundleError, match=r"no 'manifest\.json'"), open_bundle(tmp_path / "deep.tar"):
        pass
