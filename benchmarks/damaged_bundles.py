"""Damages bundles as bad memory, attackers and power cuts do, and looks whether it is noticed.

    python benchmarks/damaged_bundles.py --flips 100 --kills 400

Bit flips: in every file of a signed bundle, one bit in each of up to ``--flips`` equal regions. The bundle must be
refused with an error of ours; what nobody trusts (the log, and ``model.sig``, which is for others) must stop nothing.

Kill points with torn pages: a process that makes, signs, logs and packs a bundle is killed at one of its file
operations. Of every file that it had not yet forced to the disk a power cut may have left anything: it is zeroed, cut
to a page, cut to nothing, or its last page is zeroed. Then what lies under the bundle's name must be whole, the old one
or the new one, and a second run must complete. A finding is printed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from fcos_deploy.accuracy.golden import make_golden
from fcos_deploy.bundle import (
    ArtifactDraft,
    BundleWriter,
    Manifest,
    Provenance,
    RunDefaults,
    StepOutput,
    open_bundle,
    pack,
)
from fcos_deploy.bundle.manifest import GoldenImage
from fcos_deploy.bundle.signature import generate_ec_key, generate_key
from fcos_deploy.bundle.store import append_log, read_log, sign
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.decode import PROFILES, DecodeSpec
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import ArtifactKind, Precision
from fcos_deploy.core.errors import FcosDeployError
from fcos_deploy.core.preprocess import PreprocessSpec
from fcos_deploy.core.serialize import from_json, to_json

PAGE = 4096
UNTRUSTED = {"verification.jsonl", "model.sig"}  # a damaged one stops no prediction
WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree", "ctypes.dlsym"}
TEARS: dict[str, Callable[[bytes], bytes]] = {
    "zeroed": lambda content: bytes(len(content)),
    "cut to a page": lambda content: content[: len(content) // 2 // PAGE * PAGE],
    "empty": lambda _: b"",
    "last page zeroed": lambda content: content[: len(content) // PAGE * PAGE] + bytes(len(content) % PAGE),
    "kept": lambda content: content,
}
CONTRACT = ModelContract(
    class_names=("a", "b"),
    preprocess=PreprocessSpec(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), height=64, width=64),
    decode=DecodeSpec(profile=PROFILES["torchvision"], score_threshold=0.1, iou_threshold=0.5),
)


def write_bundle(target: Path, *, version: str) -> None:
    """A graph, an artifact with a companion, and two golden images."""

    def export(folder: Path) -> StepOutput:
        helper = onnx.helper
        weight = onnx.numpy_helper.from_array(np.linspace(-1, 1, 2700, dtype=np.float32).reshape(100, 3, 3, 3), "w")
        graph = helper.make_graph(
            [helper.make_node("Conv", ["x", "w"], ["y"])],
            version,
            [helper.make_tensor_value_info("x", 1, [1, 3, 64, 64])],
            [helper.make_tensor_value_info("y", 1, [1, 100, 62, 62])],
            [weight],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
        onnx.save(model, folder / "model.fp32.onnx")
        draft = ArtifactDraft(path="model.fp32.onnx", kind=ArtifactKind.ONNX, precision=Precision.FP32, parent="0" * 64)
        return StepOutput(artifacts=(draft,))

    def build(folder: Path) -> StepOutput:
        (folder / "model.engine").write_bytes(version.encode() * 4000)
        (folder / "model.json").write_text(version)
        draft = ArtifactDraft(
            path="model.engine",
            kind=ArtifactKind.TENSORRT_ENGINE,
            precision=Precision.INT8,
            parent="0" * 64,
            companions=("model.json",),
        )
        return StepOutput(artifacts=(draft,))

    def golden(folder: Path) -> StepOutput:
        images = list(np.random.default_rng(0).integers(0, 256, (2, 60, 50, 3), np.uint8))
        found = Detections(np.float32([[1, 2, 30, 40]]), np.float32([0.5]), np.int64([0]))
        return StepOutput(values=to_json(make_golden(images, [found] * len(images), folder=folder, contract=CONTRACT)))

    with BundleWriter(target) as writer:
        inputs = {"version": version}
        for name, make in (("export", export), ("build", build)):
            writer.step(name, inputs=inputs, make=make)
        records = writer.step("golden", inputs=inputs, make=golden).values
        writer.finish(
            Manifest(
                name=version,
                contract=CONTRACT,
                provenance=Provenance(checkpoint="c.pth", checkpoint_sha256="0" * 64),
                defaults=RunDefaults(backend="onnxruntime", precision=Precision.FP32),
                golden=tuple(from_json(GoldenImage, value) for value in records),
            )
        )


def make(folder: Path, *, version: str) -> None:
    """Everything that a release does: make, sign in both formats, log twice, pack."""
    write_bundle(folder / "cells", version=version)
    sign(folder / "cells", private_key=folder / "key.pem", openssf_key=folder / "ec.pem")
    for index in range(2):
        append_log(folder / "cells" / "verification.jsonl", {"record": index, "version": version})
    pack(folder / "cells", folder / "cells.tar")


# ---- bit flips ----


def flip_bits(folder: Path, regions: int) -> Counter[str]:
    """One bit in each region of every file; outcomes by what happened."""
    bundle, keys = folder / "cells", (folder / "key.pub.pem",)
    rng = np.random.default_rng(0)
    outcomes: Counter[str] = Counter()
    for path in sorted(path for path in bundle.rglob("*") if path.is_file()):
        content = path.read_bytes()
        edges = np.linspace(0, len(content), min(regions, len(content)) + 1).astype(int)
        for first, last in itertools.pairwise(edges):
            place, bit = int(rng.integers(first, last)), int(rng.integers(8))
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            where = f"{path.relative_to(bundle)} byte {place} bit {bit}"
            outcomes[flipped(bundle, path, keys, where)] += 1
        path.write_bytes(content)
    with open_bundle(bundle, public_keys=keys):
        pass
    return outcomes


def flipped(bundle: Path, path: Path, keys: tuple[Path, ...], where: str) -> str:
    """What comes of a flipped bit: refused, or not trusted anyway; or a finding."""
    try:
        with open_bundle(bundle, public_keys=keys):
            pass
    except FcosDeployError:
        return "refused" if path.name not in UNTRUSTED else f"FINDING {where}: stops the bundle"
    except BaseException as error:  # noqa: BLE001  (everything else is a finding)
        return f"FINDING {where}: {type(error).__name__} {error}"[:200]
    if path.name == "verification.jsonl":
        try:
            kept = len(read_log(path))
        except FcosDeployError:
            return "log refused"
        return "log read without its last line" if kept < 2 else f"FINDING {where}: log believed"
    return "for others" if path.name in UNTRUSTED else f"FINDING {where}: opened"


# ---- kill points ----


def killed(folder: Path, *, version: str, at: int) -> tuple[bool, dict[int, int]]:
    """Run ``make`` in a child that is killed at file operation ``at``: whether it was, and what was on the disk.

    The latter maps the inode of each file that was forced to the disk to its time of change at that moment.
    """
    record = folder.parent / "synced"
    before = [path.stat() for path in folder.rglob("*") if path.is_file()]
    record.write_text("".join(f"{facts.st_ino} {facts.st_mtime_ns}\n" for facts in before))
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, _: object) -> None:
            nonlocal count
            if event in WATCHED:
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        real, log = os.fsync, os.open(record, os.O_WRONLY | os.O_APPEND)

        def fsync(number: int) -> None:
            real(number)
            facts = os.fstat(number)
            os.write(log, f"{facts.st_ino} {facts.st_mtime_ns}\n".encode())

        os.fsync = fsync
        sys.addaudithook(hook)
        try:
            make(folder, version=version)
        except BaseException as error:  # noqa: BLE001  (told to the parent)
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a run that nobody killed failed")
    synced = dict(tuple(map(int, line.split())) for line in record.read_text().splitlines())
    return os.WIFSIGNALED(status), synced


def tear(folder: Path, synced: dict[int, int], damage: str) -> int:
    """Damage every file that was not forced to the disk since it was changed; how many there were."""
    torn = 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()):
        facts = path.stat()
        if facts.st_size and synced.get(facts.st_ino, 0) < facts.st_mtime_ns:
            path.write_bytes(TEARS[damage](path.read_bytes()))
            torn += 1
    return torn


def kill(root: Path, count: int) -> Counter[str]:
    """Kill at ``count`` operations, spread over a whole run, with each damage in turn."""
    start = root / "start"
    outcomes: Counter[str] = Counter()
    folder = root / "run" / "work"
    shutil.copytree(start, folder)
    last = 1
    while killed(folder, version="new", at=last)[0]:  # how many operations there are
        last *= 2
        shutil.rmtree(folder)
        shutil.copytree(start, folder)
    low = last // 2
    while last - low > 1:
        shutil.rmtree(folder)
        shutil.copytree(start, folder)
        middle = (low + last) // 2
        low, last = (middle, last) if killed(folder, version="new", at=middle)[0] else (low, middle)
    outcomes[f"(a run has {low} operations)"] += 1
    points = np.unique(np.linspace(1, low, count).astype(int)) if count < low else np.arange(1, low + 1)
    names = list(TEARS)
    for number in range(max(count, len(points))):
        at, damage = int(points[number % len(points)]), names[(number // len(points) + number) % len(names)]
        shutil.rmtree(folder)
        shutil.copytree(start, folder)
        _, synced = killed(folder, version="new", at=at)
        torn = tear(folder, synced, damage)
        outcomes["files torn"] += torn
        outcomes[after_power_cut(folder, f"operation {at}, {damage}")] += 1
    return outcomes


def after_power_cut(folder: Path, where: str) -> str:
    """Look at what is there, and run once more."""
    keys = (folder / "key.pub.pem",)
    try:
        with open_bundle(folder / "cells") as opened:
            found = opened.manifest.name
        if (folder / "cells.tar").exists():
            with open_bundle(folder / "cells.tar"):
                pass
        make(folder, version="new")
        with open_bundle(folder / "cells", public_keys=keys) as opened:
            if opened.manifest.name != "new" or len(read_log(folder / "cells" / "verification.jsonl")) < 2:
                return f"FINDING {where}: the second run is not complete"
        with open_bundle(folder / "cells.tar", public_keys=keys) as opened:
            if opened.manifest.name != "new":
                return f"FINDING {where}: the archive is the old one"
        leftovers = [path.name for path in folder.iterdir() if path.name.startswith(".")]
        if any(name.endswith((".old", ".work")) for name in leftovers):
            return f"FINDING {where}: {leftovers} stay"
    except BaseException as error:  # noqa: BLE001  (whatever it is)
        return f"FINDING {where}: {type(error).__name__} {error}"[:250]
    return f"the {found} bundle, and a second run that completed"


def main() -> int:
    """Print the outcomes as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=100, help="regions of each file")
    parser.add_argument("--kills", type=int, default=400)
    options = parser.parse_args()
    results: dict[str, dict[str, int | float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        os.environ["FCOS_DEPLOY_STATE"] = str(root / "state")
        start = root / "start"
        start.mkdir()
        generate_key(start / "key.pem", public=start / "key.pub.pem")
        generate_ec_key(start / "ec.pem", public=start / "ec.pub.pem")
        make(start, version="old")
        for name, run in {
            "bit flips": lambda: flip_bits(Path(shutil.copytree(start, root / "flips")), options.flips),
            "kill points": lambda: kill(root, options.kills),
        }.items():
            began = time.monotonic()
            outcomes = run()
            results[name] = {**outcomes, "seconds": round(time.monotonic() - began, 1)}
    print(json.dumps(results, indent=1))
    return int(any("FINDING" in name for outcomes in results.values() for name in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
