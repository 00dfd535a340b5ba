"""Package for a program in C++: the model, its contract, headers that do the rest, and a program that verifies."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.verify import golden_standard
from fcos_deploy.bundle.golden import GoldenDetections, read_golden_image
from fcos_deploy.bundle.store import Bundle
from fcos_deploy.core.contract import contract_to_text
from fcos_deploy.core.enums import ArtifactKind, ComputeType
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.serialize import to_json
from fcos_deploy.serving.package import Packager, ServedModel

__all__ = ["PACKAGER"]

_FORMAT = "fcos-deploy golden, version 1"
_ADAPTER = "{}_session.hpp"


class _Cpp(Packager):
    name = "cpp"
    readers: ClassVar[Mapping[ArtifactKind, str]] = {}

    def write(self, model: ServedModel, folder: Path) -> None:
        if model.bundle is None:
            raise ConfigError("The golden images are those of a bundle.")
        sources = importlib.resources.files("fcos_deploy.serving").joinpath("cpp_sources")
        files = {item.name: item for item in sources.iterdir() if item.is_file()}
        if _ADAPTER.format(model.backend) not in files:
            runtimes = sorted(
                name.removesuffix(_ADAPTER.format("")) for name in files if name.endswith(_ADAPTER.format(""))
            )
            raise ConfigError(
                f"There is no C++ adapter for the backend '{model.backend}'.",
                hint=f"choose one of {', '.join(runtimes)} with --backend",
            )
        model.copy_to(folder)
        for name, source in files.items():
            (folder / name).write_bytes(source.read_bytes())
        (folder / "labels.txt").write_text(model.label_text, encoding="utf-8")
        (folder / "contract.json").write_text(contract_to_text(model.contract) + "\n", encoding="utf-8")
        content = json.dumps(_golden(model, model.bundle, folder), indent=1) + "\n"
        (folder / "golden.json").write_text(content, encoding="utf-8")


PACKAGER = _Cpp()


def _golden(model: ServedModel, bundle: Bundle, folder: Path) -> dict[str, object]:
    """What ``verify`` in C++ judges by; writes the golden images, which it can read without a library, as PPM."""
    manifest, artifact = bundle.manifest, model.artifact
    standard = golden_standard(manifest, artifact, backend=model.backend, compute=ComputeType.F32)
    images: list[dict[str, object]] = []
    (folder / "golden").mkdir()
    for index, golden in enumerate(manifest.golden):
        pixels = f"golden/{index:03d}.ppm"
        _write_ppm(folder / pixels, read_golden_image(bundle.read(golden.path), golden))
        certified = None if standard.certified is None else standard.certified[index]
        images.append(
            {
                "path": golden.path,
                "pixels": pixels,
                "height": golden.height,
                "width": golden.width,
                "scale": standard.scales[index],
                "fingerprint": to_json(golden.fingerprint),
                "expected": to_json(golden.detections),
                "certified": None if certified is None else to_json(GoldenDetections.from_detections(certified)),
            }
        )
    gate = standard.gate
    return {
        "format": _FORMAT,
        "bundle": manifest.name,
        "manifest_sha256": bundle.manifest_sha256,
        "artifact": artifact.path,
        "artifact_sha256": artifact.sha256,
        "model": f"model{model.path.suffix}",
        "backend": model.backend,
        "precision": str(artifact.precision),
        "gate": {
            "min_match_rate": gate.min_match_rate,
            "min_iou": gate.min_iou,
            "max_score_delta": gate.max_score_delta,
        },
        "has_certified": standard.certified is not None,
        "same_artifact": standard.same_artifact,
        "score_threshold": manifest.contract.decode.score_threshold,
        "max_detections": manifest.contract.decode.max_detections,
        "class_names": manifest.contract.class_names,
        "images": images,
    }


def _write_ppm(path: Path, image: NDArray[np.uint8]) -> None:
    """``image``: (h, w, 3) uint8 RGB."""
    height, width = image.shape[:2]
    path.write_bytes(b"P6\n%d %d\n255\n" % (width, height) + np.ascontiguousarray(image).tobytes())
