"""Says what a file is: a checkpoint, an ONNX graph, an engine or IR, a bundle, annotations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fcos_deploy.accuracy.dataset import (
    annotated_frame,
    check_annotations,
    check_geometry,
    summarize_annotations,
)
from fcos_deploy.bundle.device_layer import describe_layers
from fcos_deploy.bundle.store import open_trusted
from fcos_deploy.checkpoints.load import CheckpointDescription, decided_options, describe_checkpoint
from fcos_deploy.checkpoints.reader import count_of
from fcos_deploy.core.annotations import find_named_images, read_coco
from fcos_deploy.core.artifact import KINDS_BY_SUFFIX, is_checkpoint, kinds_of, read_contract, sidecar_path
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.contract import Decision, ModelContract
from fcos_deploy.core.decode import ALL_CANDIDATES
from fcos_deploy.core.enums import ArtifactKind, Orientation, Precision
from fcos_deploy.core.errors import BackendLoadError, CheckpointError, brief
from fcos_deploy.core.files import MAX_TEXT_BYTES, read_file
from fcos_deploy.core.gate import Finding, Severity
from fcos_deploy.core.image import list_images
from fcos_deploy.core.network import BackboneType, BlockType, FcosConfig, TowerNorm
from fcos_deploy.core.preprocess import SizeRule
from fcos_deploy.core.serialize import parse_json, to_json
from fcos_deploy.core.trust import Trust
from fcos_deploy.targets.profiles import DLA, NPU, fallback_note, operators_of

__all__ = ["Inspection", "inspect_annotations", "inspect_bundle", "inspect_file", "is_annotations"]

# Depth of the ResNets that were published with these numbers of blocks in their four stages, by the kind of block.
_DEPTHS: dict[tuple[BlockType, tuple[int, ...]], int] = {
    (BlockType.BASIC, (2, 2, 2, 2)): 18,
    (BlockType.BASIC, (3, 4, 6, 3)): 34,
    (BlockType.BOTTLENECK, (3, 4, 6, 3)): 50,
    (BlockType.BOTTLENECK, (3, 4, 23, 3)): 101,
    (BlockType.BOTTLENECK, (3, 8, 36, 3)): 152,
}

_Facts = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a file is. ``facts`` are lines for people, ``decisions`` what tensors do not tell and who decided it.

    ``options`` are the decisions on a checkpoint as options that make them again. ``classes`` (name, objects, images,
    median box) and ``findings`` are those of annotations.
    """

    path: Path
    kind: str
    facts: _Facts
    decisions: tuple[Decision, ...] = ()
    contract: ModelContract | None = None
    options: CheckpointOptions | None = None
    classes: tuple[tuple[str, int, int, str], ...] = ()
    findings: tuple[Finding, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON value with the same contents; ``contract`` in full."""
        if self.findings is not None:
            keys = ("name", "objects", "images", "median_box")
            return {
                "path": str(self.path),
                "kind": self.kind,
                **{name.replace(", ", "_").replace(" ", "_"): value for name, value in self.facts},
                "by_class": [dict(zip(keys, row, strict=True)) for row in self.classes],
                "findings": to_json(self.findings),
            }
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
    # What has neither a known suffix nor a checkpoint's content is named by the checkpoint reader.
    kinds = kinds_of(path) if path.suffix.lower() in KINDS_BY_SUFFIX else (ArtifactKind.CHECKPOINT,)
    if ArtifactKind.ONNX in kinds:
        return _inspect_onnx(path)
    if ArtifactKind.CHECKPOINT not in kinds:
        contract = read_contract(path)
        record = parse_json(read_file(sidecar_path(path), limit=MAX_TEXT_BYTES)).get("record")
        record = record if isinstance(record, dict) else {}
        texts = {str(name): value if isinstance(value, str) else brief(value) for name, value in record.items()}
        facts = (*_artifact_facts(contract), *sorted(texts.items()))
        kind = str(kinds[0]) if len(kinds) == 1 else "engine"
        return Inspection(path, kind, facts, contract.decisions, contract)
    checkpoint = describe_checkpoint(path, options=options)
    fallbacks = _fallback_facts(operators_of(checkpoint.config))
    facts = (*_network_facts(checkpoint), *fallbacks, *_contract_facts(checkpoint.contract))
    decided = decided_options(checkpoint)
    return Inspection(path, "checkpoint", facts, checkpoint.contract.decisions, checkpoint.contract, decided)


_JSON_HEADS = (b"{", b"[", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


def is_annotations(path: Path) -> bool:
    """Whether a file looks like JSON, by its suffix or its content; no model does."""
    if not path.is_file():
        return False
    if path.suffix.lower() == ".json":
        return True
    if path.suffix.lower() in KINDS_BY_SUFFIX or is_checkpoint(path):
        return False
    with path.open("rb") as stream:
        return stream.read(64).lstrip().startswith(_JSON_HEADS)


def inspect_annotations(path: Path, *, images: Path | None = None) -> Inspection:
    """Look into COCO annotations; with ``images`` also at the size of every image, and which are not annotated.

    Raises:
        ConfigError: the file is not one of COCO annotations, or has entries that cannot be used.
        ImageError: ``images`` is not a folder of images, or one of them is none.
    """
    coco = read_coco(path)
    summary = summarize_annotations(coco)
    facts, findings = list(summary.facts), []
    paths: dict[str, Path] = {}
    sizes: dict[int, tuple[int, int]] = {}
    if images is not None:
        files = list_images(images)
        located = find_named_images((image.name for image in coco.images), images, annotations=path)
        paths = located.paths
        sizes = {
            image.image_id: annotated_frame(paths[image.name], image.size)[0]
            for image in coco.images
            if image.name in paths
        }
        annotated = {located_path.resolve() for located_path in paths.values()}
        facts += [
            ("images found", f"{len(sizes)} of {len(coco.images)}"),
            ("found by the end of the name", str(len(located.by_tail))),
            ("files without annotations", str(sum(file.resolve() not in annotated for file in files))),
        ]
        missing = [image.name for image in coco.images if image.name not in paths]
        if missing:
            message = f"{len(missing)} of {len(coco.images)} images are not in '{images}': the first is '{missing[0]}'"
            if missing[0] in located.ambiguous:
                message += ", which may be several files, or a file several names"
            findings.append(Finding(kind="missing", severity=Severity.REFUSED, message=message))
    findings += [*check_annotations(coco, paths), *check_geometry(coco, sizes)]
    empty = [name for name, objects, *_ in summary.classes if not objects]
    if empty:
        message = f"no object of {', '.join(repr(name) for name in empty[:8])}{', ...' if len(empty) > 8 else ''}"
        findings.append(Finding(kind="classes-absent", severity=Severity.INCONCLUSIVE, message=message))
    return Inspection(path, "COCO annotations", tuple(facts), classes=summary.classes, findings=tuple(findings))


def inspect_bundle(path: Path, *, trust: Trust | None = None) -> Inspection:
    """Open a bundle, which checks every file of it and what ``trust`` asks for, and say what is in it.

    Raises:
        BundleError: it is incomplete or was changed.
        SignatureError: none of the keys signed it, or it is another bundle.
    """
    with open_trusted(path, trust or Trust()) as bundle:
        manifest = bundle.manifest
        facts = [
            ("name", manifest.name),
            ("checkpoint", f"{manifest.provenance.checkpoint} {manifest.provenance.checkpoint_sha256[:12]}"),
            ("ecosystem", manifest.contract.ecosystem or "unknown"),
            ("default", str(manifest.defaults)),
            ("signed by", bundle.signed_by or "not asked"),
            *_contract_facts(manifest.contract),
        ]
        for artifact in manifest.artifacts:
            text = f"{artifact.kind}, {artifact.precision}, {artifact.size:,} bytes, by {artifact.step.name}"
            facts.append((artifact.path, text))
        facts += describe_layers(bundle)
        for figure in manifest.accuracy:
            drift = figure.score_drift
            if figure.precision is Precision.INT8 and drift is not None:
                text = f"{drift.threshold:.4g} where the float model has {drift.float_threshold:.4g}"
                compute = figure.details.get("compute", "")  # One artifact may be judged in several types.
                facts.append((f"threshold, {figure.backend} {figure.precision} {compute}".rstrip(), text))
        return Inspection(path, "bundle", tuple(facts), manifest.contract.decisions, manifest.contract)


def _inspect_onnx(path: Path) -> Inspection:
    from fcos_deploy.core.onnx_file import onnx_interface  # with NumPy, which a checkpoint does without

    graph = onnx_interface(path)
    facts = (
        ("opset", str(graph.opset)),
        ("producer", graph.producer or "unknown"),
        ("nodes", str(graph.nodes)),
        ("inputs", ", ".join(f"{spec.name} {spec}" for spec in graph.inputs)),
        ("outputs", ", ".join(f"{spec.name} {spec}" for spec in graph.outputs)),
        *_fallback_facts(graph.operators),
    )
    try:
        contract = read_contract(path)
    except BackendLoadError as error:
        return Inspection(path, "onnx", (*facts, ("contract", f"none: {error.message}")))
    return Inspection(path, "onnx", (*facts, *_artifact_facts(contract)), contract.decisions, contract)


def _artifact_facts(contract: ModelContract) -> _Facts:
    placement = (("placement", contract.placement),) if contract.placement else ()
    return (
        ("ecosystem", contract.ecosystem or "unknown"),
        ("tail", contract.tail),
        ("precision", contract.precision),
        *placement,
        *_contract_facts(contract),
    )


def _fallback_facts(operators: frozenset[str]) -> _Facts:
    notes = ((f"on {accelerator.name}", fallback_note(accelerator, operators)) for accelerator in (DLA, NPU))
    return tuple((name, note) for name, note in notes if note)


def _contract_facts(contract: ModelContract) -> _Facts:
    """Input and post-processing in words."""
    pre, decode, names = contract.preprocess, contract.decode, contract.class_names
    if pre.canvas is None:
        size = f"shortest {pre.shortest}, longest {pre.longest}, by the rule of {pre.size_rule}"
    else:
        part = f" with the image in {pre.content[0]}x{pre.content[1]}" if pre.content else ""
        how = "stretched" if pre.size_rule is SizeRule.STRETCH else "keeping the ratio"
        size = f"{pre.height}x{pre.width}{part}, {how}"
    top_k = "all" if decode.pre_nms_top_k == ALL_CANDIDATES else decode.pre_nms_top_k
    upright = "turned as their EXIF says" if pre.orientation is Orientation.EXIF else "as stored, EXIF ignored"
    suppression = (
        f"score > {decode.score_threshold:g}, IoU {decode.iou_threshold:g}"
        f"{' across classes' if decode.class_agnostic else ''}, {top_k} a level, at most {decode.max_detections}"
    )
    return (
        ("class names", f"{len(names)}: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"),
        ("input", f"{pre.input_dtype} {pre.channel_order}, {size}, resized as {pre.resize_filter} does"),
        ("image files", upright),
        ("post-processing", f"{decode.profile.name}: {suppression}"),
    )


def _deformable_facts(config: FcosConfig) -> str:
    """Such as ``13 + 2 convolutions of backbone and head, with masks (DCNv2)``."""
    if not config.deformable:
        return "none"
    in_head = sum(layer.name.startswith("head.") for layer in config.deformable)
    masks = {True: "with masks (DCNv2)", False: "without masks (DCNv1)"}
    kinds = " and ".join(masks[kind] for kind in sorted({layer.modulated for layer in config.deformable}, reverse=True))
    groups = max(layer.groups for layer in config.deformable)
    of_groups = f", up to {groups} offset groups" if groups > 1 else ""
    return f"{len(config.deformable) - in_head} + {in_head} convolutions of backbone and head, {kinds}{of_groups}"


def _network_facts(checkpoint: CheckpointDescription) -> _Facts:
    config, weights = checkpoint.config, checkpoint.tensors.values()
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights})
    groups = f" of {config.norm_groups} groups" if config.tower_norm is TowerNorm.GROUP else ""
    shared = f" after {config.shared_convs} shared" if config.shared_convs else ""
    return (
        ("ecosystem", checkpoint.contract.ecosystem),
        ("backbone", _backbone_name(config)),
        ("levels", f"{config.num_levels}, strides {', '.join(map(str, config.strides))}"),
        ("classes", f"{config.num_classes} channels"),
        ("pyramid", f"{config.fpn_channels} channels"),
        ("towers", f"{config.cls_convs} + {config.reg_convs} convolutions{shared}"),
        ("deformable", _deformable_facts(config)),
        ("norms", f"backbone: batch norm, eps {config.norm_eps:g}; towers: {config.tower_norm}{groups}"),
        ("scales", "one a level" if config.has_scales else "none"),
        ("weights", f"{sum(map(count_of, weights)):,} numbers, {', '.join(dtypes)}"),
        ("read by", checkpoint.reader),
    )


def _backbone_name(config: FcosConfig) -> str:
    """Such as ``ResNet-50``, ``ResNeXt-101 32x8d`` or ``ResNet-18, width 8/64``; blocks by stage if not published."""
    if config.backbone is BackboneType.VOVNET:
        return f"VoVNet-{3 + sum(stage.blocks * (stage.layers + 1) for stage in config.osa_stages)}"
    if config.backbone is not BackboneType.RESNET:
        return str(config.backbone)
    family = "ResNet" if config.groups == 1 else "ResNeXt"
    depth = _DEPTHS.get((config.block, config.blocks), "-".join(map(str, config.blocks)))
    grouped = f" {config.groups}x{config.width_per_group}d" if config.groups > 1 else ""
    width = "" if config.stem_channels == 64 else f", width {config.stem_channels}/64"
    return f"{family}-{depth}{grouped}{width}"
