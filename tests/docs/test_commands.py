"""Every command that pages, plans and hints print is executed as printed.

A page's commands run in its order, in a folder with the files that they name; a word such as MODEL or DIR stands for
one of them. What needs a device, a server or a library that is not here has to end as ``REFUSED`` says.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from fcos_deploy.cli.app import build_app
from fcos_deploy.pipeline.deploy import DEMO_DATA
from fcos_deploy.targets.plan import plan
from fcos_deploy.targets.profiles import load_profile, profile_names

pytest.importorskip("torch")
pytest.importorskip("openvino")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
APP = build_app()
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
PAGES += sorted((ROOT / "examples" / "ci").glob("*.yml"))
# Images of val/, by their numbers in BCCD. Fewer than ten give no interval; a dozen do not decide small limits.
IMAGES = (0, 14, 28, 30, 37, 55, 72, 89, 104, 111, 125, 140)

COMPLETION = "fcos-deploy --install-completion"  # writes into the user's shell
# What stands for a name: by what the command has, and in all others.
NAMES = (
    (r"^fcos-deploy doctor ", {"NAME": "intel-core"}),
    (r"^fcos-deploy deploy ", {"NAME": "jetson-orin-nano", "BUNDLE": "planned"}),
    (r"^fcos-deploy soak ", {"N": "20", "T": "2"}),
    (r"", {"NAME": "openvino", "URL": "http://host:8000/v2/models/cells"}),
)
FILES = {
    **{"MODEL": "model.onnx", "CHECKPOINT": "model.pth", "BUNDLE": "cells", "A": "cells-1.0", "B": "cells-1.1"},
    **{"DIR": "val", "FILE": "val.json", "TRAIN_DIR": "train", "TRAIN.json": "train.json"},
    **{"VAL_DIR": "val", "VAL.json": "val.json", "COMMAND": "deploy"},
}
_NOT_ENOUGH = (4, "give more annotated images with --images and --annotations")
_NO_TENSORRT = (3, "pip install 'fcos-deploy[tensorrt]'")
# What does not end with 0 here: its exit code, and what it says.
REFUSED: tuple[tuple[str, tuple[int, str]], ...] = (
    (r" deploy model\.pth .*--max-map-drop", _NOT_ENOUGH),
    (r" evaluate model\.int8\..*--max-(map|recall)-drop", _NOT_ENOUGH),
    (r" quantize .* --annotations ", _NOT_ENOUGH),
    (r" rollback models/cells", (1, "has no earlier version to go back to")),
    (r" report BUNDLE$", (4, "the images could not decide a limit")),
    # Two equal bundles; that nothing varies between images is not in their records.
    (r" compare cells-1\.0 cells-1\.1 --max-map-drop", (4, "measure it with --images and --annotations")),
    (r" init model\.pth$", (2, "give them here, or run it on a terminal, which asks")),
    (r" (setup|build) \S+ --backend tensorrt( -o \S+)?$", _NO_TENSORRT),
    (r" verify \S+ --backend tensorrt$", (2, "build it here: fcos-deploy setup cells --backend tensorrt")),
    (r" verify \S+ --server ", (1, "The server at host:8000 does not answer")),
    (r" doctor --target jetson-", (1, "This machine is not a 'jetson-orin-nano'")),
    # Needs an nms tail: flow/test_deploy.py makes such a bundle and packages it.
    (r" --for (deepstream|dlstreamer)$", (2, "make the bundle with 'fcos-deploy deploy --tail nms'")),
)
# What needs a camera, or runs until it is stopped: flow/test_cameras.py runs it with a server and with folders.
ELSEWHERE = (" rtsp://", " /dev/video0 ", " --follow")
# What is refused here, and the words before the command that its hint or warning prints.
HINTED = (
    ("fcos-deploy quantize model.onnx --for openvino -o hinted.onnx", "hint: "),
    (
        "fcos-deploy quantize model.onnx --quantizer nncf --images val --min-match-rate 0.9 -o x.xml",
        "then ",
    ),
    ("fcos-deploy sign --device cells", "make one: "),
    ("fcos-deploy report cells --records unsigned.json --public-key release.pub.pem", "on the device: "),
)
# Read from pages, and executed once for all of them.
MADE = (
    ("README.md", " deploy model.pth -o bundle "),
    ("docs/int8.md", " export "),
    ("docs/int8.md", " calibrate model.onnx "),
    ("docs/int8.md", " -o model.int8.onnx$"),
)


def page_commands(page: Path) -> Iterator[str]:
    """What a page prints with at least one argument: lines of code, and spans of code in the text.

    Of a tutorial, which test_tutorials.py follows, only the blocks that it does not run. A changelog tells what was,
    and test_first_hour.py has the sessions of first-hour.md.
    """
    if page.name in ("CHANGELOG.md", "first-hour.md"):
        return
    fenced, skipped = False, False
    for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            skipped = line.startswith("<!-- not run here: ")
        if page.parent.name == "tutorials" and not (fenced and skipped):
            continue
        code = fenced or line.startswith("    ") or page.suffix == ".yml"
        for text in [re.sub(r"^ *(\$ |(- )?(run: )?)", "", line).strip()] if code else re.findall(r"`([^`]+)`", line):
            if re.match(r"fcos-deploy (?:--[a-z]|(?!bundle )[a-z-]+ +\S)", text):
                yield " ".join(text.partition(" #")[0].partition(" > ")[0].split())


def words_of(command: str) -> list[str]:
    """The command's arguments, with names of files for words in capitals."""
    names = next(names for pattern, names in NAMES if re.search(pattern, command))
    return [{**FILES, **names}.get(word, word) for word in shlex.split(command)[1:]]


def problem(command: str) -> str:
    """Execute it; '' or what is wrong with how it ended."""
    done = CliRunner().invoke(APP, words_of(command))
    code, said = next((outcome for pattern, outcome in REFUSED if re.search(pattern, command)), (0, ""))
    text = " ".join((done.stdout + done.stderr).split())
    if done.exit_code == code and said in text:
        return ""
    crash = "" if done.exception is None or isinstance(done.exception, SystemExit) else f" {done.exception!r}"
    return f"{command}\n  exit code {done.exit_code}, not {code} with {said!r}: {text[-500:]}{crash}"


def problems(commands: Iterable[str]) -> list[str]:
    return [text for command in commands for text in [problem(command)] if text]


@pytest.fixture(scope="module")
def made(make_once: Callable[[str, Callable[[Path], object]], Path], short_measurements: None) -> Path:
    """The files that pages name, and what README's first command makes of them; read-only by agreement."""
    return make_once("pages", _make_files)


def _make_files(folder: Path) -> None:
    import cv2
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    checkpoint = DEMO_DATA / "fcos_bccd.safetensors"
    with safe_open(checkpoint, "pt") as file:
        metadata = {**json.loads(file.metadata()["fcos_deploy"]), "input_size": "192x256"}  # less than half as long
    for name in ("model.pth", "detector.pth", "resnet50.safetensors"):
        save_file(load_file(checkpoint), folder / name, metadata={"fcos_deploy": json.dumps(metadata)})
    names = [f"BloodImage_{number:05d}.jpg" for number in IMAGES]
    annotations = json.loads((DEMO_DATA / "evaluation.json").read_text())
    kept = {image["id"]: image for image in annotations["images"] if image["file_name"] in names}
    annotated = [a for a in annotations["annotations"] if a["image_id"] in kept]
    val = {**annotations, "images": list(kept.values()), "annotations": annotated}
    train = sorted((DEMO_DATA / "calibration").iterdir())[:12]
    of_train = [{**image, "file_name": path.name} for image, path in zip(kept.values(), train, strict=True)]
    (folder / "val.json").write_text(json.dumps(val))
    (folder / "train.json").write_text(json.dumps({**val, "images": of_train}))
    for name, paths in (("val", [DEMO_DATA / "evaluation" / name for name in names]), ("train", train)):
        (folder / name).mkdir()
        for path in paths:
            shutil.copy(path, folder / name)
    (folder / "photos").mkdir()
    for name in ("street.jpg", "image.jpg", "photos/a.jpg"):
        shutil.copy(folder / "val" / names[0], folder / name)
    video = cv2.VideoWriter(str(folder / "clip.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 5, (640, 480))
    for name in names[:3]:
        video.write(cv2.resize(cv2.imread(str(folder / "val" / name)), (640, 480)))
    video.release()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert problems(made_before()) == []


def made_before() -> list[str]:
    return [next(c for c in page_commands(ROOT / page) if re.search(pattern, c)) for page, pattern in MADE]


def make_for_bundle_page(folder: Path) -> None:
    """A layer of this device, another device's record, and what ``run_trtexec.py`` wrote on a third."""
    module = module_of(ROOT / "tests" / "flow" / "test_trtexec_package.py")
    before = (
        "fcos-deploy build cells --backend openvino",
        "fcos-deploy verify cells --export box-2.json",
        "fcos-deploy package cells --for trtexec --target jetson-xavier -o device",
    )
    assert problems(before) == []
    assert module.run_on_device(folder / "device", folder / "trtexec").returncode == 0
    shutil.copy(folder / "device" / "trtexec-record.json", folder)


def make_for_example_page(folder: Path) -> None:
    shutil.copy("model.pth", "fcos_bccd.safetensors")
    (folder / "examples").symlink_to(ROOT / "examples")


def make_for_own_page(folder: Path) -> None:
    from exporters.torch_onnx import export_onnx

    shutil.rmtree(folder / "photos")
    module = module_of(ROOT / "tests" / "unit" / "test_wrap.py")
    module.write_page_files(folder)
    export_onnx(module.run_detector(folder), folder / "mine.onnx")


# What else a page takes for granted.
PREPARE: dict[str, Callable[[Path], object]] = {
    "docs/bundle.md": make_for_bundle_page,
    "examples/bccd/README.md": make_for_example_page,
    "docs/your-own-fcos.md": make_for_own_page,
}


def module_of(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def workspace(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy to work in, with the bundle under the names that pages give it."""
    folder = Path(shutil.copytree(made, tmp_path / "work"))
    for name in ("cells", "cells-1.0", "cells-1.1"):
        shutil.copytree(folder / "bundle", folder / name)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FCOS_DEPLOY_STATE", str(tmp_path / "state"))
    yield folder
    shutil.rmtree(folder)


def test_what_is_made_first_is_what_the_pages_print(made: Path) -> None:
    assert (made / "bundle" / "manifest.json").is_file()
    assert (made / "model.int8.onnx").is_file()


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(page_commands(page))], ids=lambda page: str(page.relative_to(ROOT))
)
def test_what_a_page_prints_works(page: Path, workspace: Path) -> None:
    name = str(page.relative_to(ROOT))
    PREPARE.get(name, lambda _: None)(workspace)
    done = made_before()
    commands = [c for c in page_commands(page) if c not in done and c != COMPLETION]
    assert problems(c for c in commands if not any(words in c for words in ELSEWHERE)) == []


def test_completion_is_installed(tmp_path: Path) -> None:
    """In a shell, which it recognises by the parent of its process."""
    assert COMPLETION in page_commands(ROOT / "README.md")
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", f"{COMPLETION}; exit $?"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "fcos-deploy" in (tmp_path / ".bashrc").read_text()


def test_what_the_plan_of_every_profile_prints_works(workspace: Path) -> None:
    printed: dict[str, None] = {}
    for name in profile_names():
        made = plan(load_profile(name))
        printed |= dict.fromkeys([*made.commands, *(note.split(": ")[-1] for note in made.notes)])
    commands = [text for text in printed if text.startswith("fcos-deploy ")]
    assert any(" setup BUNDLE --backend tensorrt" in text for text in commands)
    assert any(" --for trtexec --target jetson-xavier" in text for text in commands)
    assert problems(text.replace(" DIR", " on-device") for text in commands) == []


def test_a_hint_is_followed_literally(workspace: Path) -> None:
    before = (
        "fcos-deploy sign --generate-key --key release.pem",
        "fcos-deploy verify cells --export unsigned.json",
        "fcos-deploy build model.int8.onnx --backend openvino -o x.xml",
    )
    assert problems(before) == []
    for refused, words in HINTED:
        done = CliRunner().invoke(APP, words_of(refused))
        text = " ".join(done.stderr.split())
        assert done.exit_code != 0, refused
        found = re.search(rf"{words}'?(fcos-deploy [^';]+)", text)
        assert found is not None, text
        assert problem(found[1].rstrip(" .")) == "", refused


def test_a_layer_that_fits_no_longer_is_renewed_as_the_warning_says(
    workspace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert problem("fcos-deploy build cells --backend openvino --precision fp32") == ""
    (layer,) = (workspace / "cells" / "device").glob("openvino-*")
    with next(layer.glob("*.bin")).open("r+b") as stream:
        stream.write(b"changed")
    assert problem("fcos-deploy verify cells --backend openvino --precision fp32") == ""
    found = re.search(r"(fcos-deploy build [^\n;']+)", caplog.text)
    assert found is not None, caplog.text
    assert problem(found[1]) == ""


def test_ci_examples_are_yaml_whose_jobs_have_what_they_need() -> None:
    yaml = pytest.importorskip("yaml")
    examples = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "examples" / "ci").glob("*.yml")}
    jobs = examples["gitlab-ci"]
    assert all(jobs[name]["rules"] == job["rules"] for job in jobs.values() for name in job.get("needs", ()))
    (setup,) = (step["with"] for step in examples["github-actions"]["jobs"]["bundle"]["steps"] if "cache" in str(step))
    assert "cache-dependency-path" in setup  # setup-python fails where a repository has no requirements.txt
