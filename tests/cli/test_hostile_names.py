"""What others named is printed as text: no markup, no control characters, no command that a file chose."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fcos_deploy.bundle import open_bundle
from fcos_deploy.cli import output
from fcos_deploy.cli.app import build_app
from fcos_deploy.core.errors import printable
from fcos_deploy.report.render import _markdown
from fcos_deploy.serving.package import _served_name

NAMES = ("[/bold]", "photo [copy].jpg", "[red]x", ":smile:", "\x1b[2Jgone", "a\rb", "a\u202ejpg.exe", "a\nerror: b")


@pytest.mark.parametrize("name", NAMES)
def test_tables_notes_and_errors_show_names_as_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    shown = printable(name)
    for show in (
        lambda: output.table(name, ("name",), [[name]]),
        lambda: output.note(name.replace("\n", "")),
        lambda: output.show_error(name.replace("\n", ""), hint=name.replace("\n", "")),
    ):
        show()
        assert shown.replace("\\n", "") in stream.getvalue().replace("\\n", ""), stream.getvalue()
        assert not set("\x1b\r\u202e") & set(stream.getvalue())
        stream.seek(0)
        stream.truncate()


def test_the_names_of_files_that_are_missing_are_text_too() -> None:
    for name in ("[/bold].jpg", "\x1b[2J.jpg"):
        done = CliRunner().invoke(build_app(), ["inspect", name])
        assert done.exit_code == 1
        assert printable(name) in done.stderr
        assert "\x1b[2J" not in done.stderr


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a|b", r"a\|b"),
        ("[x](http://evil)", r"\[x\](http://evil)"),
        ("<img src=x>", r"\<img src=x\>"),
        ("`a`", r"\`a\`"),
        ("a\nb", "a\\\\nb"),
    ],
)
def test_the_report_in_markdown_shows_names_as_text(name: str, text: str) -> None:
    assert _markdown(name) == text


@pytest.mark.parametrize("name", ["..", ".", "../../x", "...", "/etc", "-rf", "", "é", "a" * 300])
def test_a_served_model_has_a_name_that_stays_in_its_folder(name: str) -> None:
    served = _served_name(name)
    assert served
    assert served[0].isalnum()
    assert "/" not in served
    assert len(served) <= 128


@pytest.mark.parametrize("server", ["triton", "ovms"])
def test_a_bundle_named_dotdot_is_packaged_inside_the_output(
    server: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from fcos_deploy.serving import package_bundle

    with open_bundle(tiny_bundle) as bundle:
        monkeypatch.setattr(bundle, "manifest", replace(bundle.manifest, name=".."))
        package_bundle(bundle, server=server, output=tmp_path / "in" / "models")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["models"]


COMMANDS: tuple[tuple[str, ...], ...] = (
    ("package", "{bundle}"),
    ("package", "{bundle}", "--for", "triton"),
    ("export", "{checkpoint}"),
    ("simplify", "{onnx}"),
    ("build", "{onnx}", "--backend", "openvino"),
    ("deploy", "{checkpoint}", "--images", "{images}"),
    ("demo",),
)


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: "-".join(words[:1] + words[3:4]))
@pytest.mark.parametrize("place", [".", "..", "/"])
def test_an_output_without_a_name_is_a_sentence(
    place: str,
    words: tuple[str, ...],
    tiny_bundle: Path,
    tiny_checkpoint: Path,
    tiny_onnx: Path,
    smooth_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = {"bundle": tiny_bundle, "checkpoint": tiny_checkpoint, "onnx": tiny_onnx, "images": smooth_images}
    done = CliRunner().invoke(build_app(), [*(word.format(**paths) for word in words), "-o", place])
    assert done.exit_code in (1, 2), done.output
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert list(tmp_path.iterdir()) == []
