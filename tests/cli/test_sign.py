"""``sign`` and ``verify-signature``, and every command's policy: ``--require-signature`` opens only a signed bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import typer
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

from fcos_deploy import Detector, SessionOptions
from fcos_deploy.bundle.signature import generate_key
from fcos_deploy.bundle.store import open_bundle, sign
from fcos_deploy.bundle.versions import InstalledVersions
from fcos_deploy.cli.app import build_app
from fcos_deploy.core.errors import SignatureError

pytest.importorskip("cryptography")
pytest.importorskip("onnxruntime")


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(build_app(), [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def home(
    tiny_bundle: Path,
    tiny_onnx: Path,
    tiny_checkpoint: Path,
    smooth_images: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """``signed`` by ``key``, ``unsigned``, ``other`` (signed by another key), their checkpoint, and pictures."""
    folder = tmp_path_factory.mktemp("policy")
    for name in ("key", "stranger"):
        generate_key(folder / f"{name}.pem", public=folder / f"{name}.pub.pem")
    for name in ("signed", "unsigned", "other"):
        shutil.copytree(tiny_bundle, folder / name)
    sign(folder / "signed", private_key=folder / "key.pem", version=3)
    sign(folder / "other", private_key=folder / "stranger.pem")
    shutil.copytree(smooth_images, folder / "images")
    shutil.copyfile(tiny_onnx, folder / "model.onnx")
    shutil.copyfile(tiny_checkpoint, folder / "model.safetensors")
    return folder


def _command(name: str, model: Path, home: Path) -> list[object]:
    """A short use of each command; ``evaluate`` and ``compare`` take ``model`` twice."""
    images, twice = home / "images", [model, "--reference", model]
    against = [model, "--reference", home / "model.safetensors", "--images", images]
    return {
        "predict": ["predict", model, images / "b" / "00.png"],
        "evaluate": ["evaluate", *twice, "--images", images, "--limit", 2, "--resamples", 0],
        "benchmark": ["benchmark", model, "--rounds", 1, "--seconds", 0.1, "--warmup", 0, "--no-cold-start"],
        "soak": ["soak", model, "--inferences", 20, "--concurrency", 2, "--max-memory-growth", 1],
        "parity": ["parity", *against, "--limit", 1],
        "report": [
            "report",
            *twice,
            "--images",
            images,
            "--limit",
            2,
            "--rounds",
            1,
            "-o",
            home / f"{model.name}.html",
        ],
        "compare": ["compare", model, model, "--images", images, "--no-speed", "--limit", 2],
        "setup": ["setup", model, "--backend", "onnxruntime"],
        "install": ["install", model, home / "installed" / model.name],
        "rollback": ["rollback", _installed_twice(model, home)],
        "tune": ["tune", model, "--images", images, "--threads", 1, "-o", home / f"tuned-{model.name}"],
        "verify": ["verify", model, "--log", home / "log"],
        "inspect": ["inspect", model],
        "build": ["build", model, "--backend", "onnxruntime", "-o", home / f"{model.name}.onnx"],
        "package": ["package", model, "-o", home / f"{model.name}.tar"],
    }[name]


def _installed_twice(model: Path, home: Path) -> Path:
    """A link with ``model`` as its earlier version: what is checked is the version that is gone back to."""
    link = home / "rolled-back" / model.name
    if not link.is_symlink():
        newer = Path(shutil.copytree(model, home / f"newer-{model.name}"))
        (newer / "SIGNATURE").unlink(missing_ok=True)
        for bundle in (model, newer):
            with InstalledVersions(link) as versions, open_bundle(bundle) as opened:
                versions.switch(versions.publish(versions.stage(opened)))
    return link


def _with_the_policy() -> list[str]:
    """Every command of the application that has the option: a new one without a use above is a failure."""
    application = typer.main.get_group(build_app())
    takes = {name: [one for p in command.params for one in p.opts] for name, command in application.commands.items()}
    return sorted(name for name, options in takes.items() if "--require-signature" in options)


@pytest.mark.parametrize("name", _with_the_policy())
def test_only_what_a_trusted_key_signed_is_opened(name: str, home: Path) -> None:
    policy = ("--require-signature", "--public-key", home / "key.pub.pem")
    for model, words in {
        "unsigned": ("is not signed", "fcos-deploy sign"),
        "other": ("was signed by key", "use the public key"),
    }.items():
        refused = _run(*_command(name, home / model, home), *policy)
        assert refused.exit_code == 1, refused.output
        assert all(word in refused.stderr for word in words), refused.stderr
    keyless = _run(*_command(name, home / "signed", home), "--require-signature")
    assert keyless.exit_code == 2
    assert "--public-key" in keyless.stderr
    asked = {"--expect-name": ("tiny", "plates", "is 'tiny', not 'plates'"), "--min-version": (3, 4, "4 or later")}
    for option, (_, wrong, words) in asked.items():
        refused = _run(*_command(name, home / "signed", home), *policy, option, wrong)
        assert refused.exit_code == 1
        assert words in refused.stderr
    fitting = [word for option, (right, *_) in asked.items() for word in (option, right)]
    allowed = _run(*_command(name, home / "signed", home), *policy, *fitting)
    assert allowed.exit_code == 0, allowed.output


def test_only_commands_whose_answer_names_the_engine_fall_back() -> None:
    """What evaluate and benchmark tell are the figures of the one engine that was asked for."""
    application = typer.main.get_group(build_app())
    takes = {name for name, c in application.commands.items() for p in c.params if "--allow-fallback" in p.opts}
    assert takes == {"predict", "verify"}


def test_every_command_that_runs_a_model_has_the_policy() -> None:
    runs = {"benchmark", "build", "compare", "evaluate", "inspect", "package", "parity", "predict", "report", "soak"}
    assert set(_with_the_policy()) >= {*runs, "verify"}


@pytest.mark.parametrize("name", ["evaluate", "report"])
def test_what_the_reference_is_must_be_signed_too_unless_it_is_a_checkpoint(name: str, home: Path) -> None:
    policy = ("--require-signature", "--public-key", home / "key.pub.pem")
    output = ("-o", home / "r.html") if name == "report" else ()
    images = ("--images", home / "images", "--limit", 1, *output)
    # What it is, its content says: neither a folder nor a graph becomes a checkpoint by its name.
    for bundle in ("unsigned", "other"):
        if not (home / f"{bundle}.pth").exists():
            shutil.copytree(home / bundle, home / f"{bundle}.pth")
    shutil.copyfile(home / "model.onnx", home / "graph.pth")
    for reference, words in {
        "unsigned": "is not signed",
        "unsigned.pth": "is not signed",
        "other": "was signed by key",
        "other.pth": "was signed by key",
        "model.onnx": "is not a bundle",
        "graph.pth": "is not a bundle",
    }.items():
        refused = _run(name, home / "signed", "--reference", home / reference, *images, *policy)
        assert refused.exit_code == 1, refused.output
        assert words in refused.stderr
        assert f"'{home / reference}'" in refused.stderr
    if name == "evaluate":
        shutil.copyfile(home / "model.safetensors", home / "model.onnx.bak")
        for checkpoint in ("model.safetensors", "model.onnx.bak"):
            read = _run(name, home / "signed", "--reference", home / checkpoint, *images, *policy)
            assert read.exit_code == 0, read.output


def test_a_bare_file_has_no_signature(home: Path) -> None:
    key = ("--public-key", home / "key.pub.pem")
    refused = _run("predict", home / "model.onnx", home / "images", *key)
    assert refused.exit_code == 1
    assert "is not a bundle" in refused.stderr
    nameless = _run("predict", home / "model.onnx", home / "images", "--expect-name", "tiny")
    assert nameless.exit_code == 1
    assert "neither a signature nor a name" in nameless.stderr
    for command in (["inspect"], ["build", "--backend", "onnxruntime", "-o", home / "x.onnx"]):
        refused = _run(*command, home / "model.onnx", *key)
        assert refused.exit_code == 1
        assert "is a file, not a bundle" in refused.stderr


def test_the_key_may_be_given_as_text(home: Path, blobs: list[NDArray[np.uint8]]) -> None:
    text = (home / "key.pub.pem").read_text()
    assert _run("verify-signature", home / "signed", "--public-key", text).exit_code == 0
    with Detector.open(home / "signed", options=SessionOptions(public_keys=(text,), threads=1)) as detector:
        assert len(detector.detect(blobs[0])) > 0
    with pytest.raises(SignatureError):
        Detector.open(home / "other", options=SessionOptions(public_keys=(text,)))
    broken = _run("verify-signature", home / "signed", "--public-key", text.replace("A", "?"))
    assert broken.exit_code == 2
    assert "is not a public key" in broken.stderr


def test_a_new_key_signs_and_verifies(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "cells"))
    key, public = tmp_path / "k.pem", tmp_path / "k.pub.pem"
    assert _run("verify", bundle, "--require-signature").exit_code == 2
    assert _run("sign", "--generate-key", "--key", key).exit_code == 0
    assert _run("verify", bundle, "--require-signature", "--public-key", public).exit_code == 1
    assert _run("sign", bundle, "--key", key).exit_code == 0
    assert _run("verify-signature", bundle, "--public-key", public).exit_code == 0
    done = _run("verify", bundle, "--require-signature", "--public-key", public, "--json")
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["signed_by"]) == 64
