"""What docs/security.md promises of the surroundings of a run: other users, the working directory, the network."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import typer

import fcos_deploy
from calibration.dataset import SampleOptions, open_images
from fcos_deploy.accuracy.dataset import load_coco
from fcos_deploy.accuracy.predictions import PredictionStore
from fcos_deploy.benchmark.measure import module_command
from fcos_deploy.bundle import BundleWriter, StepOutput, open_bundle
from fcos_deploy.cli.app import build_app
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import (
    BackendLoadError,
    BundleError,
    CalibrationError,
    ConfigError,
    DeviceError,
    ImageError,
)
from fcos_deploy.core.preprocess import PreprocessSpec
from fcos_deploy.detector.prediction import read_frames
from runtimes.kserve import BACKEND, RemoteModel, write_remote_model

pytestmark = pytest.mark.slow

PROGRAM = "import sys; sys.path.remove(''); from fcos_deploy.cli.app import main; main()"
HOSTILE = "open({marker!r}, 'w'); raise SystemExit('the working directory was imported from')\n"


def _start(*words: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def _run(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    process = _start(*words, **options)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


# ---- the working directory, the network and the disk ----


@pytest.fixture(scope="module")
def hostile_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of downloaded models, with modules by the names that Python and this product import."""
    folder = tmp_path_factory.mktemp("surroundings") / "downloads"
    marker = str(folder.parent / "marker")
    (folder / "fcos_deploy").mkdir(parents=True)
    for name in ("numpy", "json", "runpy", "linecache", "site", "cv2", "fcos_deploy/__init__", "runtimes", "torch"):
        (folder / f"{name}.py").write_text(HOSTILE.format(marker=marker))
    return folder


# All commands in one process, as the console script would run each, and three seconds more: telemetry comes late.
EVERY_COMMAND = """
import sys
sys.path.remove('')
import json, os, time
def watch(event, arguments):
    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.sendto', 'os.system', 'os.exec', 'os.posix_spawn'):
        watched.append(f'{event} {arguments}')
watched = []
sys.addaudithook(watch)
from pathlib import Path
from typer.testing import CliRunner
from fcos_deploy.cli.app import build_app
import fcos_deploy.pipeline.deploy as pipeline
task = json.load(sys.stdin)
inputs = {name: Path(value) for name, value in task['demo'].items()}
# The demo is a deployment of a detector that takes minutes; here of a tiny one.
pipeline.demo_request = lambda output: pipeline.DeployRequest(
    output=output, backends=('onnxruntime',), precisions=(pipeline.Precision.FP32,), **inputs)
done = []
for words in task['commands']:
    started = time.monotonic()
    result = CliRunner().invoke(build_app(), words)
    done.append([words[0], result.exit_code, result.output[-2000:], time.monotonic() - started])
time.sleep(3)
json.dump({'done': done, 'watched': watched}, open(os.environ['ANSWER'], 'w'))
"""


@dataclass(frozen=True)
class Surroundings:
    """What every command did: (command, exit code, output), audited events, system calls, and the folder of it all."""

    root: Path
    done: list[tuple[str, int, str, float]]
    watched: list[str]
    calls: list[str]


def _uses(out: Path, *, bundle: Path, ir: Path, onnx: Path, checkpoint: Path, images: Path) -> list[list[object]]:
    """A short use of each command, in an order in which what one makes is there for the next."""
    image = next(images.rglob("*.png"))
    against = ["--reference", checkpoint, "--images", images, "--limit", 2]
    short = ["--rounds", 1, "--seconds", 0.1, "--warmup", 0]
    deploy = [checkpoint, "-o", out / "deployed", "--calibration-images", images]
    key, keys = out / "key.pem", ["--public-key", out / "key.pub.pem"]
    return [
        ["doctor"],
        ["inspect", checkpoint],
        ["export", checkpoint, "-o", out / "m.onnx"],
        ["simplify", out / "m.onnx", "-o", out / "s.onnx"],
        ["calibrate", onnx, "--images", images, "--count", 8, "--engine", "openvino", "-o", out / "c.json"],
        ["quantize", onnx, "--calibration", out / "c.json", "-o", out / "q.onnx"],
        ["quantize", onnx, "--quantizer", "nncf", "--for", "openvino", "--images", images, "-o", out / "n.xml"],
        ["build", onnx, "--backend", "openvino", "-o", out / "m.xml"],
        ["deploy", *deploy, "--target", "jetson-orin-nano", "--dry-run"],
        ["init", *deploy, "--config", out / "project.toml"],
        ["demo", "-o", out / "demo"],
        ["setup", bundle, "--backend", "openvino"],
        ["sign", bundle, "--generate-key", "--key", key, "--openssf-key", out / "ec.pem"],
        ["verify-signature", bundle, *keys],
        ["verify", bundle, *keys],
        ["verify", ir],
        ["package", bundle, "--for", "triton", "--backend", "onnxruntime", "-o", out / "triton"],
        ["package", bundle, "-o", out / "bundle.tar"],
        ["install", bundle, out / "live"],
        ["install", ir, out / "live"],
        ["rollback", out / "live"],
        ["tune", onnx, "--images", images, "--backend", "openvino", "--threads", 1, "-o", out / "tuned"],
        ["evaluate", onnx, *against, "--resamples", 0],
        ["parity", onnx, *against],
        ["compare", onnx, checkpoint, "--images", images, "--limit", 2, "--no-speed"],
        ["report", onnx, *against, "--rounds", 1, "-o", out / "report.html"],
        ["predict", ir, image, "--draw", out / "drawn"],
        ["benchmark", onnx, *short, "-o", out / "speed.json"],
        ["soak", onnx, "--inferences", 20, "--concurrency", 2, "--max-memory-growth", 1],
    ]


@pytest.fixture(scope="module")
def surroundings(
    hostile_folder: Path,
    tiny_bundle: Path,
    tiny_ir_bundle: Path,
    tiny_onnx: Path,
    tiny_checkpoint: Path,
    smooth_images: Path,
) -> Surroundings:
    """Every command, run from the hostile folder with a home and a temporary folder of its own."""
    root = hostile_folder.parent
    for name in ("home", "tmp", "out"):
        (root / name).mkdir()
    (root / "tmp" / ".ses").symlink_to(root / "victim")  # where ONNX Runtime's telemetry would follow a link
    bundles = [Path(shutil.copytree(source, root / source.parent.name)) for source in (tiny_bundle, tiny_ir_bundle)]
    uses = _uses(
        root / "out",
        bundle=bundles[0],
        ir=bundles[1],
        onnx=tiny_onnx,
        checkpoint=tiny_checkpoint,
        images=smooth_images,
    )
    demo = {"checkpoint": tiny_checkpoint, "calibration_images": smooth_images}
    task = {"commands": [[str(word) for word in words] for words in uses], "demo": demo}
    kept = {key: value for key, value in os.environ.items() if key not in ("CI", "ORT_DISABLE_TELEMETRY")}
    environment = {
        **kept,
        "HOME": str(root / "home"),
        "TMPDIR": str(root / "tmp"),
        "ANSWER": str(root / "answer"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    for name in ("FCOS_DEPLOY_CACHE", "FCOS_DEPLOY_STATE"):
        environment.pop(name, None)
    strace = shutil.which("strace")  # with it, native code is watched too
    calls = "trace=connect,sendto,sendmsg,openat,creat,mkdir,rename,symlink"
    watched = [strace, "-f", "-qq", "-y", "--seccomp-bpf", "-e", calls, "-o", str(root / "trace")] if strace else []
    done = subprocess.run(
        [*watched, sys.executable, "-c", EVERY_COMMAND],
        input=json.dumps(task, default=str),
        env=environment,
        cwd=hostile_folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads((root / "answer").read_text())
    lines = (root / "trace").read_text(errors="replace").splitlines() if strace else []
    return Surroundings(root, [tuple(entry) for entry in answer["done"]], answer["watched"], lines)


def test_every_command_was_run(surroundings: Surroundings) -> None:
    """A new command without a use above is a failure."""
    application = typer.main.get_group(build_app())
    assert {name for name, *_ in surroundings.done} == set(application.commands)
    failed = [(name, output) for name, code, output, _ in surroundings.done if code != 0]
    assert failed == []


def test_no_command_imports_from_the_working_directory(surroundings: Surroundings) -> None:
    assert not (surroundings.root / "marker").exists()


def test_no_command_connects(surroundings: Surroundings) -> None:
    assert surroundings.watched == []
    assert [line for line in surroundings.calls if "AF_INET" in line] == []


def test_commands_write_to_declared_places_only(surroundings: Surroundings) -> None:
    root = surroundings.root
    assert [path.name for path in (root / "tmp").iterdir()] == [".ses"]
    assert not (root / "victim").exists()
    written = {path.relative_to(root / "home").parts[:2] for path in (root / "home").rglob("*") if path.is_file()}
    written.discard((".cache", "matplotlib"))  # its list of fonts, which the charts of a report need
    assert written == {(".cache", "fcos-deploy"), (".local", "state")}
    declared = (*(f"{root / name}" for name in ("home", "tmp", "out", "tiny-bundle", "tiny-ir-bundle", "answer")),)
    elsewhere = set()
    for line in surroundings.calls:
        opened = re.search(r'openat\(.*?, "([^"]*)", [A-Z_|]*(?:O_WRONLY|O_RDWR|O_CREAT)[^)]*\) = \d', line)
        if opened and not opened[1].startswith((*declared, "/dev/", "/proc/")):
            elsewhere.add(opened[1])
    assert elsewhere == set()


def test_the_installed_script_does_not_either(hostile_folder: Path, tiny_onnx: Path) -> None:
    """With the process for the cold start. ``python -m fcos_deploy``, which Python would look up here, is not there."""
    script = Path(sysconfig.get_path("scripts")) / "fcos-deploy"
    assert not (Path(fcos_deploy.__file__).parent / "__main__.py").exists()
    if not script.is_file():
        pytest.skip("the package is not installed")
    short = ("--rounds", "1", "--seconds", "0.1", "--warmup", "0")
    done = subprocess.run(
        [script, "benchmark", tiny_onnx, *short], cwd=hostile_folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not (hostile_folder.parent / "marker").exists()


@pytest.mark.parametrize("version", [(3, 10), (3, 11)])
def test_a_module_is_run_without_the_working_directory(version: tuple[int, int], hostile_folder: Path) -> None:
    command = module_command("fcos_deploy.benchmark.measure", version=version)
    done = subprocess.run(command, cwd=hostile_folder, input="{}", capture_output=True, text=True, check=False)
    assert "KeyError: 'spec'" in done.stderr, "the module ran"
    assert not (hostile_folder.parent / "marker").exists()


def test_a_user_without_a_home_is_served(tiny_bundle: Path, tmp_path: Path) -> None:
    program = (
        "import os, pwd, sys; sys.path.remove('')\n"
        "def unknown(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = unknown\n"
        "from fcos_deploy.cli.app import main; main()"
    )
    names = ("HOME", "FCOS_DEPLOY_CACHE", "FCOS_DEPLOY_STATE", "XDG_CACHE_HOME", "XDG_STATE_HOME", "USER", "LOGNAME")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    for backend in ("onnxruntime", "openvino"):
        command = [sys.executable, "-c", program, "verify", str(tiny_bundle), "--backend", backend, "--log"]
        log = str(tmp_path / f"{backend}.jsonl")
        done = subprocess.run([*command, log], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


# ---- other users of the machine ----


def _one_step(target: Path, made: list[str], content: str = "int8") -> None:
    with BundleWriter(target) as writer:

        def make(folder: Path) -> StepOutput:
            made.append(content)
            (folder / "model").write_text(content)
            return StepOutput()

        writer.step("quantize", inputs={"x": "1"}, make=make)


def test_a_planted_working_folder_is_never_resumed_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setenv("FCOS_DEPLOY_STATE", str(tmp_path / "attacker"))
    _one_step(tmp_path / "b", made, "planted")
    monkeypatch.setenv("FCOS_DEPLOY_STATE", str(tmp_path / "victim"))
    _one_step(tmp_path / "b", made)
    assert made == ["planted", "int8"]
    assert (tmp_path / ".b.work" / "files" / "model").read_text() == "int8"
    _one_step(tmp_path / "b", made)
    assert len(made) == 2  # one's own is resumed from
    (tmp_path / ".b.work").rename(tmp_path / ".c.work")
    _one_step(tmp_path / "c", made)
    assert len(made) == 3  # and not that of another bundle


@pytest.mark.parametrize("kind", ["link", "loose", "strange", "files"])
def test_a_working_folder_that_somebody_prepared_is_refused(kind: str, tmp_path: Path) -> None:
    work, victim = tmp_path / ".b.work", tmp_path / "victim"
    victim.mkdir()
    (victim / "diary").write_text("x")
    if kind == "link":
        work.symlink_to(victim)
    else:
        work.mkdir(mode=0o700)
    if kind == "loose":
        work.chmod(0o777)
    elif kind == "strange":
        (work / "diary").write_text("x")
    elif kind == "files":
        (work / "files").symlink_to(victim)
    with pytest.raises((ConfigError, BundleError)):
        BundleWriter(tmp_path / "b")
    assert (victim / "diary").read_text() == "x"


# ---- power ----


@pytest.mark.parametrize("damage", ["zeros", "cut", "zeros inside"])
def test_predictions_with_a_zeroed_page_run_again_from_there(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    found = Detections(np.float32([[1, 2, 3, 4]]), np.float32([0.5]), np.int64([0]))
    with PredictionStore(path) as store:
        for number in range(6):
            store.add(number, found)
    lines = path.read_bytes().splitlines(keepends=True)
    sound = {"zeros": 5, "cut": 5, "zeros inside": 2}[damage]
    tail = {"zeros": bytes(40) + b"\n", "cut": lines[5][:9], "zeros inside": bytes(80) + b"".join(lines[4:])}[damage]
    path.write_bytes(b"".join(lines[:sound]) + tail)
    with PredictionStore(path) as store:
        assert sorted(store.detections) == list(range(sound))
        store.add(9, found)
    with PredictionStore(path) as store:
        assert sorted(store.detections) == [*range(sound), 9]


# ---- data sets, videos and archives ----


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "a/../../secret.png"])
def test_lists_and_annotations_stay_below_their_folder(name: str, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    cv2.imwrite(str(tmp_path / "secret.png"), np.zeros((8, 8, 3), np.uint8))
    coco = {"images": [{"id": 1, "file_name": name}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (images / "coco.json").write_text(json.dumps(coco))
    (images / "list.txt").write_text(f"{name}\n")
    with pytest.raises(ConfigError, match="are not in"):
        load_coco(images / "coco.json", images=images)
    for source, refusal in (("coco.json", "are not in"), ("list.txt", "not below")):
        with pytest.raises(CalibrationError, match=refusal):
            open_images(images / source)
    assert list(open_images(images / "list.txt", allow_outside=True).paths) == [name]
    assert SampleOptions(allow_outside=True).allow_outside


def test_a_video_that_ends_early_is_an_error(tmp_path: Path) -> None:
    whole = tmp_path / "whole.avi"
    writer = cv2.VideoWriter(str(whole), cv2.VideoWriter_fourcc(*"MJPG"), 25.0, (64, 48))
    noise = np.random.default_rng(0).integers(0, 255, (40, 48, 64, 3), np.uint8)
    for frame in noise:
        writer.write(frame)
    writer.release()
    assert len(list(read_frames(whole))) == 40
    (tmp_path / "cut.avi").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ImageError, match=r"damaged|Cannot read"):
        list(read_frames(tmp_path / "cut.avi"))


@pytest.mark.parametrize("kind", ["padding", "pax"])
def test_an_archive_is_bounded_by_its_manifest_before_it_is_unpacked(
    kind: str, make_bundle: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, tar = make_bundle(tmp_path / "cells"), tmp_path / "cells.tar"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(bundle.rglob("*")):
            archive.add(path, arcname=str(path.relative_to(bundle)), recursive=False)
        member = tarfile.TarInfo("zeros")
        if kind == "pax":
            member.pax_headers = {"comment": "x" * 10_000_000}
        archive.addfile(member)
    if kind == "padding":
        content = tar.read_bytes()
        place = content.rindex(b"zeros")
        header = tarfile.TarInfo("zeros")
        header.size = 5 << 30
        tar.write_bytes(content[:place] + header.tobuf(tarfile.GNU_FORMAT))
        os.truncate(tar, 6 << 30)  # a sparse file of which nothing is on the disk
    started = time.monotonic()
    with pytest.raises(BundleError):
        open_bundle(tar)
    assert time.monotonic() - started < 10


def test_an_archive_of_a_bundle_still_opens(make_bundle: Callable[[Path], Path], tmp_path: Path) -> None:
    from fcos_deploy.bundle import pack

    pack(make_bundle(tmp_path / "cells"), tmp_path / "cells.tar")
    with open_bundle(tmp_path / "cells.tar") as opened:
        assert opened.manifest.name == "cells"


@pytest.mark.parametrize(
    "values",
    [{"size_divisor": 0}, {"mean": (1e30, 0, 0)}, {"std": (float("nan"), 1, 1)}, {"height": 1 << 40, "width": 1 << 40}],
)
def test_a_preprocessing_without_bounds_is_refused(values: dict[str, object]) -> None:
    sound = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "height": 64, "width": 64}
    with pytest.raises(ConfigError):
        PreprocessSpec(**{**sound, **values})  # type: ignore[arg-type]  # what a file may hold


BOMB = """
import resource, sys
sys.path.remove('')
from importlib import import_module
from pathlib import Path
import numpy as np
from fcos_deploy.core.errors import FcosDeployError
open_model = import_module(f'runtimes.{sys.argv[1]}').open_model
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
try:
    with open_model(Path(sys.argv[2]), threads=1) as session:
        session.run({'x': np.zeros(4, np.float32)})
except FcosDeployError as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_graph_that_unfolds_to_gigabytes_meets_a_memory_limit_in_an_error(backend: str, tmp_path: Path) -> None:
    """Nothing in the file tells its size: 2 ** 31 is worked out by 30 multiplications."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip(backend)
    helper, two = onnx.helper, np.array([2], np.int64)
    nodes = [helper.make_node("Mul", [f"s{i}", "k"], [f"s{i + 1}"]) for i in range(30)]
    nodes += [helper.make_node("ConstantOfShape", ["s30"], ["big"])]
    nodes += [helper.make_node("ReduceSum", ["big"], ["t"], keepdims=0), helper.make_node("Add", ["x", "t"], ["y"])]
    sides = [[helper.make_tensor_value_info(name, 1, [4])] for name in ("x", "y")]
    weights = [onnx.numpy_helper.from_array(two, name) for name in ("s0", "k")]
    graph = helper.make_graph(nodes, "bomb", *sides, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), tmp_path / "b.onnx")
    command = [sys.executable, "-c", BOMB, backend, str(tmp_path / "b.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("BackendError", "BackendLoadError")


# ---- servers ----


@pytest.fixture
def slow_server() -> Iterator[int]:
    """Answers a byte of its header every tenth of a second, for ever."""
    listener = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            while not stop.wait(0.1):
                try:
                    connection.send(b"H")
                except OSError:
                    return

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    stop.set()
    thread.join()
    listener.close()


def test_a_server_that_trickles_meets_a_deadline(
    slow_server: int, bundle_contract: ModelContract, tmp_path: Path
) -> None:
    path = tmp_path / "m.kserve"
    url = f"http://127.0.0.1:{slow_server}/v2/models/m"
    write_remote_model(path, RemoteModel(url=url, contract=bundle_contract, timeout_s=1.0))
    started = time.monotonic()
    with pytest.raises((DeviceError, BackendLoadError)):
        BACKEND.open(path, SessionOptions())
    assert time.monotonic() - started < 5


def test_a_token_is_never_sent_without_encryption(
    bundle_contract: ModelContract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.kserve"
    write_remote_model(path, RemoteModel(url="http://127.0.0.1:9/v2/models/m", contract=bundle_contract))
    monkeypatch.setenv("FCOS_DEPLOY_SERVER_TOKEN", "secret")
    with pytest.raises(ConfigError, match="encrypted connection"):
        BACKEND.open(path, SessionOptions())


# ---- signals ----


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_one_signal_ends_a_soak_run_and_removes_what_was_unpacked(
    number: int, code: int, tiny_bundle: Path, tmp_path: Path
) -> None:
    from fcos_deploy.bundle import pack

    tar, temporary = tmp_path / "b.tar", tmp_path / "tmp"
    pack(tiny_bundle, tar)
    temporary.mkdir()
    process = _start(
        *("soak", tar, "-v", "--inferences", 10_000_000),
        env={**os.environ, "TMPDIR": str(temporary)},
        # A run in the background ignores SIGINT, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stderr is not None
        while "warm up" not in (line := process.stderr.readline()):
            assert line, "the run ended by itself"
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code, errors
    assert list(temporary.iterdir()) == []


def test_a_closed_stdout_and_a_full_one_are_no_traceback(tiny_onnx: Path) -> None:
    closed = _run("inspect", tiny_onnx, "--json", preexec_fn=lambda: os.close(1))
    assert "Traceback" not in closed.stderr
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-c", PROGRAM, "inspect", str(tiny_onnx), "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr
