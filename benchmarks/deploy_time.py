"""What a deployment takes, stage by stage, beside the least that it could take.

    python benchmarks/deploy_time.py -o WORK [--calibration-count 40] [--backend onnxruntime]
    python benchmarks/deploy_time.py --resnet50 -o WORK --shortest 256 --longest 512 --calibration-count 8 --sample 8
    python benchmarks/deploy_time.py CHECKPOINT -o WORK [--calibration DIR --images DIR --annotations FILE] \
        [--shortest 256 --longest 512 | --input-size 160x224] [--checkpoint-options FILE] [--min-match-rate 0]

A checkpoint without images of its own is deployed on the demo's, where one of random weights agrees with nothing:
``--min-match-rate 0``. Without a checkpoint it is the demo detector; with ``--resnet50`` a ResNet-50 of 91 classes,
with ``--mobilenet-v2`` a MobileNetV2 of 3, of random weights on the demo's images, of which nothing has to agree. The
floor is the export, one calibration pass, one evaluation of every artifact at its measured latency, and the timed
rounds. The portable INT8 graph, from which other devices build, is an artifact too: it is timed on ONNX Runtime
afterwards. Everything is of one run, so that other load on the machine lengthens both. On a machine that runs other
things ``--processor-time``, on one core (``taskset -c 1 python ...``), counts what this process and those that it
starts compute in place of the seconds that pass. Beside the seconds is the most memory that each stage took, and last
that of a process that only detects with the float graph on ONNX Runtime (on Linux; elsewhere the most of the whole
process so far). A last table has what the progress lines said after a tenth of their steps about the time that
remained. Compiled models are kept in WORK, so that a second run finds those of the first, as a second deployment on a
machine does.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

import fcos_deploy.pipeline.deploy as deploying
from fcos_deploy.benchmark.measure import TimingOptions, measure_cold_start, peak_memory_mib, time_in_turns
from fcos_deploy.bundle import open_bundle
from fcos_deploy.cli import output
from fcos_deploy.cli.options import checkpoint_options_of
from fcos_deploy.core.enums import ArtifactKind, Precision
from fcos_deploy.core.image import list_images
from fcos_deploy.core.progress import StageClock
from fcos_deploy.core.serialize import to_json
from fcos_deploy.core.trust import CACHE_VARIABLE
from fcos_deploy.detector import Detector, DetectorSpec
from fcos_deploy.pipeline.deploy import DEMO_DATA, Deployment, demo_request, deploy
from fcos_deploy.pipeline.steps import DeployRequest


def main() -> None:
    """Deploy once and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the bundle")
    for name in ("--calibration", "--images", "--annotations", "--checkpoint-options"):
        parser.add_argument(name, type=Path)
    for name in ("--shortest", "--longest", "--calibration-count", "--sample"):
        parser.add_argument(name, type=int)
    parser.add_argument("--input-size", help="height x width, such as 160x224")
    for name in ("--resnet50", "--mobilenet-v2"):
        parser.add_argument(name, action="store_true", help="in place of a checkpoint")
    parser.add_argument("--backend", action="append", default=[], help="default: every one of this machine")
    parser.add_argument("--max-map-drop", type=float, default=0.02, help="with annotations")
    parser.add_argument("--min-match-rate", type=float, default=0.97, help="without annotations")
    parser.add_argument("--processor-time", action="store_true", help="in place of the clock's, of one core")
    asked = parser.parse_args()
    if asked.processor_time:
        time.perf_counter = processor_seconds
    asked.output.mkdir(parents=True, exist_ok=True)
    if asked.resnet50 or asked.mobilenet_v2:
        name = "resnet50" if asked.resnet50 else "mobilenet-v2"
        asked.checkpoint, asked.min_match_rate = random_weights(asked.output / f"{name}.safetensors", name), 0.0
    if asked.checkpoint is None:
        request = demo_request(asked.output / "bundle")
    else:
        request = DeployRequest(
            checkpoint=asked.checkpoint,
            output=asked.output / "bundle",
            calibration_images=asked.calibration or DEMO_DATA / "calibration",
            images=asked.images or DEMO_DATA / "evaluation",
            annotations=asked.annotations,
            options=checkpoint_options_of(
                {name: getattr(asked, name) for name in ("shortest", "longest", "input_size")},
                file=asked.checkpoint_options,
            ),
            max_map_drop=asked.max_map_drop if asked.annotations else None,
            min_match_rate=None if asked.annotations else asked.min_match_rate,
        )
    request = replace(
        request,
        calibration_count=asked.calibration_count,
        sample=asked.sample,
        backends=tuple(asked.backend),
    )
    os.environ[CACHE_VARIABLE] = str(asked.output / "compiled")
    clock, bars = MemoryClock(), Bars()
    deploying.StageClock = lambda: clock  # type: ignore[assignment,misc]  # deploy makes its own
    output.Progress = lambda *_, **__: bars  # type: ignore[assignment,misc]  # and so does progress_bar
    with output.progress_bar() as report:

        def progress(label: str, done: int, total: int) -> None:
            report(label, done, total)
            bars.look(label)

        deployment = deploy(request, progress=progress)
    print(markdown(deployment, clock.peaks))
    print("\n".join(["", "| progress line | steps | said after a tenth | took |", "|---|---:|---:|---:|", *bars.rows]))
    (asked.output / "stages.json").write_text(json.dumps(to_json(deployment.stages), indent=1))


class MemoryClock(StageClock):
    """``peaks``: the largest resident memory of this process within each stage, in MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.peaks: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """As ``StageClock.stage``."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets VmHWM back (proc(5))
        with super().stage(name):
            yield
        self.peaks[name] = max(self.peaks.get(name, 0.0), peak_memory_mib())


class Bars(Progress):
    """The progress lines by this benchmark's clock, shown to nobody; ``rows``: the ends of those with many steps."""

    def __init__(self) -> None:
        # The period of ``progress_bar``: rates are those of the whole stage.
        super().__init__(
            console=Console(file=io.StringIO()),
            auto_refresh=False,
            get_time=time.perf_counter,
            speed_estimate_period=1e9,
        )
        self.rows: list[str] = []
        self._said: dict[str, tuple[float, float]] = {}

    def look(self, label: str) -> None:
        """At a line that has just been reported to."""
        task: Any = next(task for task in self.tasks if task.description == label)
        now, steps = time.perf_counter(), task.total or 0
        if task.completed == 0:
            self._said.pop(label, None)
        if steps >= 10 and label not in self._said and task.completed >= 0.1 * steps and task.speed:
            self._said[label] = now, task.remaining / task.speed
        if task.finished and label in self._said:
            at, said = self._said.pop(label)
            self.rows.append(f"| {label} | {steps:.0f} | {said:.1f} | {now - at:.1f} |")


def processor_seconds() -> float:
    """What this process and its finished children have computed."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def random_weights(path: Path, name: str) -> Path:
    """A state dict as torchvision's ``fcos_resnet50_fpn`` has it, or of our FCOS on MobileNetV2, 3 classes, 320x416.

    It is biased so that some hundred candidates pass.
    """
    import torch
    from safetensors.torch import save_file

    from fcos_deploy.core.network import BackboneType, FcosConfig, resnet_config
    from fcos_deploy.model.fcos import Fcos

    torch.manual_seed(0)
    config, metadata = resnet_config(50, num_classes=91), {"ecosystem": "torchvision"}
    if name == "mobilenet-v2":
        config = FcosConfig(num_classes=3, backbone=BackboneType.MOBILENET_V2, fpn_channels=96)
        metadata |= {"classes": json.dumps(["RBC", "WBC", "Platelets"]), "input_size": "320x416"}
    model = Fcos(config)
    with torch.no_grad():
        model.head.classification_head.cls_logits.weight.normal_(std=0.03)
        model.head.classification_head.cls_logits.bias.fill_(-5.0)
        model.head.regression_head.bbox_reg.bias.fill_(2.0)
    weights = {key: tensor for key, tensor in model.state_dict().items() if tensor.is_floating_point()}
    save_file(weights, path, metadata={"fcos_deploy": json.dumps(metadata)})
    return path


def markdown(deployment: Deployment, peaks: dict[str, float]) -> str:
    """The stages, then the floor and what it is made of."""
    lines = ["| stage | seconds | share | inferences | MiB |", "|---|---:|---:|---:|---:|"]
    for stage in deployment.stages:
        share = stage.seconds / deployment.seconds
        lines.append(
            f"| {stage.name} | {stage.seconds:.1f} | {share:.0%} | {stage.inferences} | {peaks[stage.name]:.0f} |"
        )
    lines += [f"| all | {deployment.seconds:.1f} | | | {max(peaks.values()):.0f} |"]
    lines += [f"| the network alone | | | | {network_mib(deployment):.0f} |"]
    floor = floor_seconds(deployment)
    lines += ["", "| of the floor | seconds |", "|---|---:|"]
    lines += [f"| {name} | {seconds:.1f} |" for name, seconds in floor.items()]
    total = sum(floor.values())
    lines += [f"| all | {total:.1f} |", "", f"{deployment.seconds / total:.2f} times the floor"]
    return "\n".join(lines)


def network_mib(deployment: Deployment) -> float:
    """The largest resident memory of a process that opens the float graph on ONNX Runtime and detects a few times."""
    with open_bundle(deployment.bundle) as bundle:
        graph = next(
            artifact
            for artifact in bundle.manifest.artifacts
            if (artifact.kind, artifact.precision) == (ArtifactKind.ONNX, Precision.FP32)
        )
        spec = DetectorSpec(model=bundle.path(graph.path), backend="onnxruntime")
        return measure_cold_start(spec, deployment.evaluations.dataset.images[0].path).peak_memory_mib


def floor_seconds(deployment: Deployment) -> dict[str, float]:
    """The parts of the floor; rows are the reference and the variants, in the order of the benchmark's results."""
    stages = {stage.name: stage.seconds for stage in deployment.stages}
    images, results = deployment.rows[0].scores.images, deployment.benchmark.results
    return {
        "export": stages["export"],
        "calibration pass": stages["calibrate"],
        "one evaluation of each artifact": images * sum(result.latency.p50 for result in results) / 1e3,
        "one evaluation of the portable INT8 graph": images * portable_seconds(deployment),
        "timed rounds": sum(sum(result.samples_ms) for result in results) / 1e3,
    }


def portable_seconds(deployment: Deployment) -> float:
    """Median latency of the INT8 graphs from which nothing was built here, on ONNX Runtime; 0 without one."""
    with open_bundle(deployment.bundle) as bundle:
        artifacts = bundle.manifest.artifacts
        counted = {a.parent for a in artifacts} | {a.sha256 for a in artifacts if a.placement != "portable"}
        timed = {figure.artifact for figure in bundle.manifest.benchmark}
        graphs = [a for a in artifacts if a.sha256 not in counted and a.path not in timed]
        medians = []
        for graph in graphs:
            with Detector.open(bundle.path(graph.path), backend="onnxruntime") as detector:
                image = detector.read(next(iter(list_images(DEMO_DATA / "evaluation"))))
                timing = time_in_turns([detector], image, options=TimingOptions(rounds=2, warmup=0))
            medians.append(timing[0].latency().p50 / 1e3)
        return sum(medians)


if __name__ == "__main__":
    main()
