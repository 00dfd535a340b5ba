"""What got slower since the baseline that the repository holds.

    python benchmarks/baseline.py            # measure and print
    python benchmarks/baseline.py --check    # compare with baseline.json; exit code 4 when something got slower
    python benchmarks/baseline.py --save     # replace baseline.json

Every figure is a ratio to something that is not ours and was measured in the same turns: sorting in NumPy for the
host path, PyTorch eager for the network on a runtime, a loop in Python for exporting, imports of Python's own for
starting. Ratios carry over from one day to the next, and roughly from one machine to another of the same kind; times
do not. The fastest of the turns counts, of ours as of the reference.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import cv2
import host_path
import numpy as np
from contestants import Subject, demo_subject

from exporters.torch_onnx import export_onnx
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.decode import PROFILES, DecodeSpec
from fcos_deploy.core.detections import postprocess
from fcos_deploy.core.files import write_text
from fcos_deploy.core.image import list_images, read_image
from fcos_deploy.core.machine import read_machine
from fcos_deploy.core.preprocess import Letterbox, preprocess
from fcos_deploy.detector import Detector

BASELINE = Path(__file__).with_name("baseline.json")
Action = Callable[[], object]


@dataclass(frozen=True)
class Figure:
    """``ours`` is measured against ``reference``, both ``turns`` times."""

    ours: Action
    reference: Action
    turns: int

    def ratio(self) -> float:
        """Fastest of ours over fastest of the reference."""
        for action in (self.ours, self.reference):
            action()
        times = [(_seconds(self.ours), _seconds(self.reference)) for _ in range(self.turns)]
        ours, reference = (min(column) for column in zip(*times, strict=True))
        return ours / reference


def _seconds(action: Action) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def sort_in_numpy() -> Action:
    """A millisecond or two of one core."""
    values = np.random.default_rng(0).random(100_000, np.float32)
    return lambda: np.sort(values, kind="stable")


def loop_in_python() -> None:
    """A few seconds of the interpreter, as long as an export: a fast moment then is in both or in neither."""
    counts: dict[int, int] = {}
    for i in range(20_000_000):
        counts[i % 1000] = counts.get(i % 1000, 0) + i


def host_figures() -> dict[str, Figure]:
    """Preprocessing and post-processing at 640x640 with 80 classes."""
    spec = DecodeSpec(profile=PROFILES["torchvision"], score_threshold=0.2, iou_threshold=0.6)
    contract = ModelContract(
        class_names=tuple(map(str, range(host_path.CLASSES))),
        preprocess=host_path.PreprocessSpec(mean=host_path.MEAN, std=host_path.STD, height=640, width=640),
        decode=spec,
    )
    image = np.random.default_rng(0).integers(0, 256, (720, 1280, 3), dtype=np.uint8)
    out, box = np.empty((3, 640, 640), np.uint8), Letterbox(720, 1280, 360, 640)
    figures = {
        "preprocess 1280x720": Figure(lambda: preprocess(image, contract.preprocess, out=out), sort_in_numpy(), 60)
    }
    heads = {"scene": host_path.scene_head(20), "crowded": host_path.scene_head(150)}
    for name, head in {**heads, "adversarial": host_path.adversarial_head()}.items():
        raw = {n: getattr(head, n)[None] for n in ("cls_logits", "distances", "centerness")}

        def decode_and_suppress(raw: dict[str, np.ndarray] = raw) -> object:
            return postprocess(raw, contract, index=0, input_size=(640, 640), letterbox=box)

        figures[f"decode and NMS, {name}"] = Figure(decode_and_suppress, sort_in_numpy(), 60)
    return figures


def network_figures(subject: Subject, model: Path, opened: ExitStack) -> dict[str, Figure]:
    """From pixels to detections on a runtime, against PyTorch eager."""
    image = read_image(list_images(subject.images)[0])
    options = subject.options()
    eager = opened.enter_context(Detector.of_network(subject.loaded.model, subject.contract, options=options))
    figures = {}
    for backend in ("onnxruntime", "openvino"):
        ours = opened.enter_context(Detector.open(model, backend=backend, options=options))

        def detect(ours: Detector = ours) -> object:
            return ours.detect(image)

        figures[f"demo detector, {backend}"] = Figure(detect, lambda: eager.detect(image), 12)
    return figures


def start_figures() -> dict[str, Figure]:
    """Starting Python with us, and with a good part of its own library: an empty one is too short to divide by."""

    def start(code: str, *arguments: str) -> Action:
        command = [sys.executable, "-c", code, *arguments]
        return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    app = "from fcos_deploy.cli.app import main; main()"
    library = start("import asyncio, email.message, http.server, logging.config, multiprocessing.pool, unittest.mock")
    return {
        "import fcos_deploy": Figure(start("import fcos_deploy"), library, 12),
        "fcos-deploy --help": Figure(start(app, "--help"), library, 12),
    }


def measure() -> dict[str, float]:
    """All ratios, each the better of two measurements."""
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        subject, model = demo_subject(1), Path(folder) / "demo.onnx"
        figures = {"export and simplify": Figure(lambda: export_onnx(subject.loaded, model), loop_in_python, 4)}
        figures["export and simplify"].ours()  # the others need the model
        figures |= host_figures() | network_figures(subject, model, opened) | start_figures()
        return {name: min(figure.ratio(), figure.ratio()) for name, figure in figures.items()}


def slower(found: dict[str, float], baseline: dict[str, float], *, tolerance: float) -> list[str]:
    """A line for each figure that rose by more than ``tolerance``."""
    return [
        f"{name}: {found[name]:.3f} instead of {before:.3f}, {found[name] / before - 1:+.0%}"
        for name, before in baseline.items()
        if name in found and found[name] > before * (1 + tolerance)
    ]


def main() -> None:
    """Measure; save or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--tolerance", type=float, default=0.25, help="0.25: a quarter slower")
    options = parser.parse_args()
    found = measure()
    print("\n".join(f"{name}: {ratio:.3f}" for name, ratio in found.items()))
    if options.save:
        record = {
            "processor": read_machine().processor,
            "python": platform.python_version(),
            "ratios": {name: round(ratio, 3) for name, ratio in found.items()},
        }
        write_text(BASELINE, json.dumps(record, indent=2) + "\n")
    if options.check:
        lines = slower(found, json.loads(BASELINE.read_text())["ratios"], tolerance=options.tolerance)
        print("\n".join(["slower than the baseline:", *lines] if lines else ["nothing got slower"]))
        sys.exit(4 if lines else 0)


if __name__ == "__main__":
    main()
