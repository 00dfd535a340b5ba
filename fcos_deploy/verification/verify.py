"""Whether this machine gives the certified detections. Needs NumPy, the bundle and one runtime (design, section 7)."""

from __future__ import annotations

import datetime
import importlib.metadata
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fcos_deploy.bundle.golden import (
    read_golden_image,
)
from fcos_deploy.bundle.machine import MachineFacts, read_machine
from fcos_deploy.bundle.preflight import StepDown, choose
from fcos_deploy.bundle.records import Gate
from fcos_deploy.bundle.store import Bundle, Selection
from fcos_deploy.core.contract_io import read_contract
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import BundleError
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.detector import Detector
from fcos_deploy.verification.compare import compare_golden
from fcos_deploy.verification.preprocessing import check_preprocessing
from fcos_deploy.verification.records import GoldenResult, VerificationRecord, VerifyOptions
from runtimes.kserve import RemoteModel, write_remote_model

__all__ = ["verify_bundle"]


def verify_bundle(
    bundle: Bundle,
    *,
    options: VerifyOptions | None = None,
    signed_by: str = "",
    progress: ProgressFn = no_progress,
) -> VerificationRecord:
    """Preflight, then preprocessing, then the golden images through the runtime.

    The record says whether it held; ``require_verified`` turns a failure into an error.

    Raises:
        DeviceError: this machine cannot run the artifact.
        BundleError: the bundle has no golden images, or no gate for the precision.
    """
    options = options or VerifyOptions()
    started = time.perf_counter()
    golden = bundle.manifest.golden
    if not golden:
        raise BundleError(f"The bundle '{bundle.source}' has no golden images to verify with.")
    machine = read_machine()
    selection, stepped = _select(bundle, options, machine)
    gate = bundle.manifest.gate(selection.artifact.precision)
    session: Mapping[str, str] = {}
    results: tuple[GoldenResult, ...] = ()
    preprocessing = check_preprocessing(bundle)
    if preprocessing.passed:
        results, session = _replay(bundle, selection, gate=gate, options=options, progress=progress)
    matched = _matched_fraction(results)
    return VerificationRecord(
        bundle=bundle.manifest.name,
        manifest_sha256=bundle.manifest_sha256,
        artifact=selection.artifact.path,
        artifact_sha256=selection.artifact.sha256,
        backend="kserve" if options.server else selection.backend,
        precision=selection.artifact.precision,
        passed=preprocessing.passed and matched >= gate.min_matched,
        matched=round(matched, 6),
        gate=gate,
        preprocessing=preprocessing,
        images=results,
        time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - started, 3),
        session=dict(session),
        machine=_machine_text(machine),
        versions=_versions(),
        stepped_down=stepped,
        signed_by=signed_by,
    )


def _select(bundle: Bundle, options: VerifyOptions, machine: MachineFacts) -> tuple[Selection, tuple[StepDown, ...]]:
    """A server has its own machine, which preflight cannot see."""
    if options.server:
        return bundle.select(backend=options.backend, precision=options.precision), ()
    return choose(
        bundle,
        backend=options.backend,
        precision=options.precision,
        allow_fallback=options.allow_fallback,
        machine=machine,
    )


@contextmanager
def _opened(bundle: Bundle, selection: Selection, options: VerifyOptions) -> Iterator[Detector]:
    path = bundle.path(selection.artifact.path)
    if not options.server:
        with Detector.open(path, backend=selection.backend, options=options.session) as detector:
            yield detector
        return
    with tempfile.TemporaryDirectory(prefix="fcos-deploy-") as folder:
        remote = Path(folder, "server.kserve")
        write_remote_model(remote, RemoteModel(url=options.server, contract=read_contract(path)))
        with Detector.open(remote, options=options.session) as detector:
            yield detector


def _replay(
    bundle: Bundle, selection: Selection, *, gate: Gate, options: VerifyOptions, progress: ProgressFn
) -> tuple[tuple[GoldenResult, ...], Mapping[str, str]]:
    golden_images = bundle.manifest.golden
    decode = bundle.manifest.contract.decode
    results = []
    with _opened(bundle, selection, options) as detector:
        for index, golden in enumerate(golden_images):
            found = detector.detect(read_golden_image(bundle.path(golden.path), golden))
            wanted = golden.detections.to_detections()
            floor = decode.score_threshold + gate.max_score_difference
            floor = max(floor, *(_cut_floor(d, decode.max_detections, gate) for d in (wanted, found)))
            results.append(compare_golden(wanted, found, gate=gate, floor=floor, path=golden.path))
            progress("verify", index + 1, len(golden_images))
        return tuple(results), dict(detector.session.description)


def _cut_floor(detections: Detections, limit: int, gate: Gate) -> float:
    """Where the list is full, the last ones may be others: they are not held to anything."""
    return float(detections.scores.min()) + gate.max_score_difference if len(detections) >= limit else 0.0


def _matched_fraction(results: tuple[GoldenResult, ...]) -> float:
    due = sum(r.expected + r.found for r in results)
    return 1.0 - sum(r.missed + r.invented for r in results) / due if due else 0.0


def _machine_text(machine: MachineFacts) -> dict[str, str]:
    texts = {
        "system": machine.system,
        "machine": machine.machine,
        "processor": machine.processor,
        "gpus": ", ".join(f"{name} ({capability})" for name, capability in machine.gpus),
        "driver": machine.driver,
        "cuda_driver": machine.cuda_driver,
    }
    return {name: text for name, text in texts.items() if text}


def _versions() -> dict[str, str]:
    names = ("fcos-deploy", "numpy", "opencv-python-headless", "pillow")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # A system package without metadata, as on a Jetson.
    return found
