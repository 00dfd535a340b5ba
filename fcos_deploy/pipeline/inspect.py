"""Says what a file is: a checkpoint, an ONNX graph, an engine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fcos_deploy.bundle.manifest import Manifest
from fcos_deploy.bundle.store import open_bundle
from fcos_deploy.checkpoints.describe import CheckpointDescription, decided_options, describe_checkpoint
from fcos_deploy.checkpoints.reader import count_of
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.contract import Decision, ModelContract, read_contract, sidecar_path
from fcos_deploy.core.enums import ArtifactKind, Precision
from fcos_deploy.core.errors import BackendLoadError, CheckpointError
from fcos_deploy.core.model_files import KINDS_BY_SUFFIX
from fcos_deploy.core.network import BackboneType, BlockType, FcosConfig
from fcos_deploy.core.serialize import to_json

if TYPE_CHECKING:
    from fcos_deploy.core.tensor_spec import TensorSpec

__all__ = ["Inspection", "contract_facts", "inspect_bundle", "inspect_file"]

_PUBLISHED: dict[tuple[int, ...], tuple[int, ...]] = {
    (2, 2, 2, 2): (18,),
    (3, 4, 6, 3): (34, 50),
    (3, 4, 23, 3): (101,),
    (3, 8, 36, 3): (152,),
}


# Another file's sidecar may lie beside these: ``model.json`` of ``model.xml`` beside ``model.onnx``.
_WITHOUT_SIDECAR = frozenset(
    suffix
    for suffix, kinds in KINDS_BY_SUFFIX.items()
    if {ArtifactKind.CHECKPOINT, ArtifactKind.ONNX}.intersection(kinds)
)


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a file is. ``facts`` are lines for people, ``decisions`` what tensors do not tell and who decided it.

    ``options`` are the decisions on a checkpoint as options that make them again.
    """

    path: Path
    kind: str
    facts: tuple[tuple[str, str], ...]
    decisions: tuple[Decision, ...] = ()
    contract: ModelContract | None = None
    options: CheckpointOptions | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON value with the same contents; ``contract`` in full."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            **{name.replace(" ", "_"): value for name, value in self.facts},
            "decisions": to_json(self.decisions),
            "contract": to_json(self.contract),
        }


def inspect_file(path: Path, *, options: CheckpointOptions | None = None) -> Inspection:
    """Look into a checkpoint, an ONNX file, or an engine or IR with its sidecar; no network is built.

    Raises:
        CheckpointError: the file is none of these.
        BackendLoadError: an ONNX file or engine that is damaged.
        ConfigError: a checkpoint that leaves open what an option must say.
    """
    if not path.is_file():
        raise CheckpointError(f"'{path}' is not a file.", hint="give a checkpoint, an ONNX file, an engine or a bundle")
    if path.suffix == ".onnx":
        return _inspect_onnx(path)
    if path.suffix == ".xml" or (path.suffix not in _WITHOUT_SIDECAR and sidecar_path(path).is_file()):
        return _inspect_engine(path)
    described = describe_checkpoint(path, options=options)
    facts = (*_network_facts(described), *contract_facts(described.contract))
    options = decided_options(described)
    return Inspection(path, "checkpoint", facts, described.decisions, described.contract, options)


def contract_facts(contract: ModelContract) -> tuple[tuple[str, str], ...]:
    """Input and post-processing in words."""
    pre, decode = contract.preprocess, contract.decode
    if pre.canvas is None:
        size = f"shortest {pre.shortest}, longest {pre.longest}, by the rule of {pre.size_rule}"
    else:
        size = f"{pre.height}x{pre.width}, keeping the ratio"
    suppression = (
        f"score > {decode.score_threshold:g}, IoU {decode.iou_threshold:g}, {decode.pre_nms_top_k} a level, "
        f"at most {decode.max_detections}"
    )
    names = contract.class_names
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    return (
        ("class names", f"{len(names)}: {shown}"),
        ("input", f"{pre.input_dtype} {pre.channel_order}, {size}, resized as {pre.resize_filter} does"),
        ("post-processing", f"{decode.profile.name}: {suppression}"),
    )


def _network_facts(described: CheckpointDescription) -> tuple[tuple[str, str], ...]:
    config = described.config
    weights = described.tensors.values()
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in weights})
    towers = f"{config.cls_convs} + {config.reg_convs} convolutions"
    return (
        ("ecosystem", described.contract.ecosystem),
        ("backbone", _backbone(config)),
        ("levels", f"{config.num_levels}, strides {', '.join(map(str, config.strides))}"),
        ("classes", f"{config.num_classes} channels"),
        ("pyramid", f"{config.fpn_channels} channels"),
        ("towers", towers + (f" after {config.shared_convs} shared" if config.shared_convs else "")),
        ("norms", f"backbone: batch norm, eps {config.norm_eps:g}; towers: {config.tower_norm}"),
        ("scales", "one a level" if config.has_scales else "none"),
        ("weights", f"{sum(map(count_of, weights)):,} numbers, {', '.join(dtypes)}"),
        ("read by", described.reader),
    )


def _backbone(config: FcosConfig) -> str:
    if config.backbone is not BackboneType.RESNET:
        return str(config.backbone)
    depths = [d for d in _PUBLISHED.get(config.blocks, ()) if (d < 50) == (config.block is BlockType.BASIC)]
    name = f"ResNe{'t' if config.groups == 1 else 'Xt'}-{depths[0] if depths else '-'.join(map(str, config.blocks))}"
    grouped = f" {config.groups}x{config.width_per_group}d" if config.groups > 1 else ""
    width = "" if config.stem_channels == 64 else f", width {config.stem_channels}/64"
    return name + grouped + width


def _inspect_onnx(path: Path) -> Inspection:
    from fcos_deploy.core.onnx_file import onnx_interface  # with NumPy, which a checkpoint does without

    graph = onnx_interface(path)
    facts = [
        ("opset", str(graph.opset)),
        ("producer", graph.producer or "unknown"),
        ("nodes", str(graph.nodes)),
        ("inputs", _tensors(graph.inputs)),
        ("outputs", _tensors(graph.outputs)),
    ]
    try:
        contract = read_contract(path)
    except BackendLoadError as error:
        return Inspection(path, "onnx", (*facts, ("contract", f"none: {error.message}")))
    return Inspection(path, "onnx", (*facts, *_artifact_facts(contract)), contract.decisions, contract)


def _inspect_engine(path: Path) -> Inspection:
    contract = read_contract(path)
    record = json.loads(sidecar_path(path).read_text(encoding="utf-8")).get("record") or {}
    facts = (*_artifact_facts(contract), *((str(name), str(value)) for name, value in sorted(record.items())))
    kind = "openvino-ir" if path.suffix == ".xml" else "engine"
    return Inspection(path, kind, facts, contract.decisions, contract)


def _artifact_facts(contract: ModelContract) -> tuple[tuple[str, str], ...]:
    placement = (("placement", contract.placement),) if contract.placement else ()
    return (
        ("ecosystem", contract.ecosystem or "unknown"),
        ("tail", contract.tail),
        ("precision", contract.precision),
        *placement,
        *contract_facts(contract),
    )


def _tensors(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{spec.name} {spec}" for spec in specs)


def inspect_bundle(path: Path, *, public_keys: tuple[Path | str, ...] = ()) -> Inspection:
    """Open a bundle, which checks every file of it and, with keys, its signature, and say what is in it.

    Raises:
        BundleError: when it is incomplete or was changed.
        SignatureError: when none of the keys signed it.
    """
    with open_bundle(path, public_keys=public_keys) as bundle:
        manifest = bundle.manifest
        artifacts = tuple(
            (artifact.path, f"{artifact.kind}, {artifact.precision}, {artifact.size:,} bytes, by {artifact.step.name}")
            for artifact in manifest.artifacts
        )
        facts = (
            ("name", manifest.name),
            ("checkpoint", f"{manifest.provenance.checkpoint} {manifest.provenance.checkpoint_sha256[:12]}"),
            ("ecosystem", manifest.contract.ecosystem or "unknown"),
            ("default", f"{manifest.defaults.backend}, {manifest.defaults.precision}"),
            ("signed by", bundle.signed_by or "not asked"),
            *contract_facts(manifest.contract),
            *artifacts,
            *_thresholds(manifest),
        )
        return Inspection(path, "bundle", facts, manifest.contract.decisions, manifest.contract)


def _thresholds(manifest: Manifest) -> tuple[tuple[str, str], ...]:
    """Which score threshold each INT8 variant needs for the float model's operating point."""
    return tuple(
        (
            f"threshold, {figure.backend} {figure.precision}",
            f"{figure.score_drift.threshold:.4g} where the float model has {figure.score_drift.float_threshold:.4g}",
        )
        for figure in manifest.accuracy
        if figure.precision is Precision.INT8 and figure.score_drift is not None
    )
