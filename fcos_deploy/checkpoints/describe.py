"""Finds the weights in what a training script saved (spec 8)."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fcos_deploy.checkpoints.ecosystems import detect_ecosystem, get_ecosystem
from fcos_deploy.checkpoints.pickle_reader import PickledArray
from fcos_deploy.checkpoints.reader import StoredTensor, TensorFacts, open_checkpoint
from fcos_deploy.checkpoints.rules import (
    Ecosystem,
    Evidence,
    canonical,
    decode_spec,
    final_rules,
    preprocess_spec,
    refuse_unsupported,
)
from fcos_deploy.core.checkpoint_options import AUTO, CheckpointOptions
from fcos_deploy.core.contract import Decision, ModelContract
from fcos_deploy.core.errors import CheckpointError, ConfigError, FcosDeployError
from fcos_deploy.core.network import BackboneType, BlockType, FcosConfig, TowerNorm

__all__ = [
    "CheckpointDescription",
    "StoredWeights",
    "decided_options",
    "describe_checkpoint",
    "describe_weights",
    "find_weights",
    "infer_network",
]

_Stored = StoredTensor | PickledArray
_CONTAINERS = ("state_dict", "model", "model_state_dict", "net", "network")
_EMA_CONTAINERS = ("model_ema", "ema_model", "ema")
_PREFIXES = ("module.", "model.", "_orig_mod.", "detector.")
_NOT_WEIGHTS = frozenset({"n_averaged"})


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """Tensors by the names that they have in the file, without wrappers' prefixes.

    ``metadata`` is all that the file holds beside them; ``container`` is the key they were under, or ''.
    """

    tensors: Mapping[str, TensorFacts]
    metadata: dict[str, Any]  # Any: whatever a training script stored
    container: str
    has_both: bool  # averaged and plain weights


def find_weights(content: object, *, prefer: str = "") -> StoredWeights:
    """The state dict in the contents of a file.

    ``prefer`` is 'ema', 'model', or '' for the averaged weights where there are any, which is what torchvision's
    reference scripts evaluate.

    Raises:
        CheckpointError: when there is none.
        ConfigError: when ``prefer`` asks for weights that the file does not hold.
    """
    if not isinstance(content, dict):
        raise CheckpointError(
            f"The file holds a {type(content).__name__}, expected a dict of tensors.",
            hint="save the weights: torch.save(model.state_dict(), path)",
        )
    container, stored, has_both = _choose(content, prefer)
    tensors = _checked(_without_prefixes(stored))
    stored_pixels: dict[str, Any] = {n: tensors[n] for n in ("pixel_mean", "pixel_std") if n in tensors}
    metadata: dict[str, Any] = (
        {k: v for k, v in content.items() if k not in (*_CONTAINERS, *_EMA_CONTAINERS)} if container else {}
    )
    return StoredWeights(tensors, {**metadata, **stored_pixels}, container, has_both)


def _choose(content: Mapping[Any, Any], prefer: str) -> tuple[str, dict[str, _Stored], bool]:
    plain, averaged = (_first(content, keys) for keys in (_CONTAINERS, _EMA_CONTAINERS))
    if prefer == "ema" and averaged is None:
        raise ConfigError("The file holds no averaged (EMA) weights.", hint="leave --weights out")
    chosen = plain if averaged is None or (prefer == "model" and plain) else averaged
    if chosen is None:
        bare = _state_dict(content)
        if not bare:
            raise CheckpointError(f"The file holds no tensors, only {_keys(content)}.")
        return "", bare, False
    return *chosen, plain is not None and averaged is not None


def _first(content: Mapping[Any, Any], keys: tuple[str, ...]) -> tuple[str, dict[str, _Stored]] | None:
    for key in keys:
        inner = content.get(key)
        found = _state_dict(inner) if isinstance(inner, Mapping) else {}
        if found:
            return key, found
    return None


def _state_dict(mapping: Mapping[Any, Any]) -> dict[str, _Stored]:
    return {n: v for n, v in mapping.items() if isinstance(n, str) and isinstance(v, _Stored)}


def _keys(content: Mapping[Any, Any]) -> str:
    return ", ".join(repr(k)[:40] for k in list(content)[:6]) or "nothing"


def _without_prefixes(stored: dict[str, _Stored]) -> dict[str, _Stored]:
    """Drop what DataParallel, Lightning, ``torch.compile`` and EMA wrappers put before every name."""
    names = {n: v for n, v in stored.items() if n not in _NOT_WEIGHTS}
    while prefix := next((p for p in _PREFIXES if names and all(n.startswith(p) for n in names)), ""):
        names = {n.removeprefix(prefix): v for n, v in names.items()}
    return names


def _checked(names: dict[str, _Stored]) -> dict[str, _Stored]:
    for name, value in names.items():
        try:
            value.check()
        except CheckpointError as error:
            raise CheckpointError(f"Tensor '{name}': {error.message}", hint=error.hint) from error
    return names


_STRIDES = (8, 16, 32, 64, 128)
_BACKBONE = "backbone.body."
_CLS, _REG, _SHARED = "head.classification_head", "head.regression_head", "head.shared_tower"
_BACKBONE_MARKS = {
    BackboneType.RESNET: _BACKBONE + "layer1.0.conv1.weight",
    BackboneType.DLA34: _BACKBONE + "base_layer.0.weight",
    BackboneType.MOBILENET_V2: _BACKBONE + "features.0.0.weight",
}


def infer_network(tensors: Mapping[str, TensorFacts]) -> FcosConfig:
    """The configuration that fits the tensors; what shapes do not tell has its default.

    Raises:
        CheckpointError: a tensor that every FCOS has is missing, or the shapes fit no FCOS.
    """
    shapes = _Shapes(tensors)
    backbone = shapes.backbone()
    levels = 5 if "backbone.fpn.extra_blocks.p6.weight" in tensors else 3
    shapes.of(f"{_REG}.bbox_ctrness.weight", 4)  # Absent in RetinaNet, whose other names are the same.
    try:
        return FcosConfig(
            num_classes=shapes.of(f"{_CLS}.cls_logits.weight", 4)[0],
            backbone=backbone,
            fpn_channels=shapes.of("backbone.fpn.inner_blocks.0.0.weight", 4)[0],
            strides=_STRIDES[:levels],
            cls_convs=shapes.tower_convs(_CLS),
            reg_convs=shapes.tower_convs(_REG),
            shared_convs=shapes.tower_convs(_SHARED),
            tower_norm=shapes.tower_norm(),
            has_scales=any(name in tensors for name in (f"{_REG}.scales", f"{_REG}.scales.0")),
            **(shapes.resnet() if backbone is BackboneType.RESNET else {}),
        )
    except FcosDeployError as error:
        raise CheckpointError(f"The shapes fit no FCOS: {error.message}", hint=error.hint) from error


class _Shapes:
    """Questions about names and shapes."""

    def __init__(self, tensors: Mapping[str, TensorFacts]) -> None:
        self._tensors = tensors

    def of(self, name: str, ndim: int) -> tuple[int, ...]:
        """Shape of a tensor that must be there with ``ndim`` axes, none of them empty."""
        if name not in self._tensors:
            raise CheckpointError(f"The checkpoint has no '{name}' under any name that we know.", hint=_hint(name))
        shape = tuple(self._tensors[name].shape)
        if len(shape) != ndim or 0 in shape:
            raise CheckpointError(f"'{name}' must have {ndim} axes that are not empty, got shape {list(shape)}.")
        return shape

    def backbone(self) -> BackboneType:
        for backbone, mark in _BACKBONE_MARKS.items():
            if mark in self._tensors:
                return backbone
        shown = sorted(name for name in self._tensors if name.startswith("backbone."))[:3]
        raise CheckpointError(
            f"The backbone is none of {', '.join(_BACKBONE_MARKS)}; the file has {shown or 'no backbone tensor'}.",
            hint="for a network of your own see docs/your-own-fcos.md",
        )

    def resnet(self) -> dict[str, Any]:  # Any: keyword arguments of FcosConfig
        blocks = tuple(self._count(rf"backbone\.body\.layer{i}\.(\d+)\.conv1\.weight") for i in (1, 2, 3, 4))
        stem = self.of(_BACKBONE + "conv1.weight", 4)[0]
        if _BACKBONE + "layer1.0.conv3.weight" not in self._tensors:
            return {"block": BlockType.BASIC, "blocks": blocks, "stem_channels": stem}
        width, inputs = self.of(_BACKBONE + "layer1.0.conv2.weight", 4)[:2]
        groups = max(1, width // inputs)
        return {
            "block": BlockType.BOTTLENECK,
            "blocks": blocks,
            "stem_channels": stem,
            "groups": groups,
            "width_per_group": width // groups,
        }

    def tower_convs(self, head: str) -> int:
        pattern = re.compile(re.escape(head) + r"\.conv\.(\d+)\.weight")
        return sum(1 for n, t in self._tensors.items() if pattern.fullmatch(n) and len(t.shape) == 4)

    def tower_norm(self) -> TowerNorm:
        towers = [head for head in (_CLS, _SHARED, _REG) if self.tower_convs(head)]
        names = [f"{head}.conv.1" for head in towers[:1]]
        if any(f"{name}.0.running_mean" in self._tensors for name in names):
            return TowerNorm.BATCH_PER_LEVEL
        return TowerNorm.GROUP if any(f"{name}.weight" in self._tensors for name in names) else TowerNorm.NONE

    def _count(self, pattern: str) -> int:
        found = {int(m.group(1)) for name in self._tensors if (m := re.fullmatch(pattern, name))}
        if found != set(range(len(found))) or not found:
            raise CheckpointError(f"Expected blocks 0, 1, 2, ... under '{pattern}', got {sorted(found)[:8]}.")
        return len(found)


def _hint(name: str) -> str:
    return "a RetinaNet has no centerness and is not an FCOS" if name.endswith("bbox_ctrness.weight") else ""


_METADATA_KEY = "fcos_deploy"


@dataclass(frozen=True, slots=True)
class CheckpointDescription:
    """A checkpoint before its network is built: ``tensors`` have canonical names and are still in the file."""

    config: FcosConfig
    contract: ModelContract
    tensors: Mapping[str, TensorFacts]
    reader: str = "memory"

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """What tensors do not tell, and who decided it."""
        return self.contract.decisions


def describe_checkpoint(path: Path, *, options: CheckpointOptions | None = None) -> CheckpointDescription:
    """Find out what a checkpoint is, without reading its weights or building the network.

    Raises:
        CheckpointError, ConfigError: as ``load_checkpoint``, except for weights that are not finite.
    """
    options = options or CheckpointOptions()
    file = open_checkpoint(path)
    weights = find_weights(file.content, prefer=options.weights)
    described = describe_weights(weights, file_name=path.name, stated=_stated(file.metadata), options=options)
    return dataclasses.replace(described, reader=file.reader)


def describe_weights(
    weights: StoredWeights, *, file_name: str, stated: Mapping[str, Any], options: CheckpointOptions
) -> CheckpointDescription:
    """The same for weights that are in memory; ``stated`` holds what the file says under the names of ``Rules``."""
    refuse_unsupported(weights.tensors)
    chosen = _ecosystem(options, stated, weights)
    tensors = canonical(weights.tensors, chosen.renames)
    evidence = Evidence(
        file_name=file_name,
        tensors=tensors,
        source_names=frozenset(weights.tensors),
        network=infer_network(tensors),
        metadata=weights.metadata,
        variant=_variant(options, chosen),
    )
    rules = final_rules(chosen.rules(evidence), stated=stated, options=options, network=evidence.network)
    config = dataclasses.replace(
        evidence.network,
        stride_in_1x1=rules.stride_in_1x1,
        box_activation=rules.box_activation,
        centerness_on_reg=rules.centerness_on_reg,
        norm_eps=rules.norm_eps,
    )
    decisions = (*_origin(chosen, options, stated, weights), *rules.decisions(default_source=f"rule of {chosen.name}"))
    contract = ModelContract(
        class_names=rules.class_names,
        preprocess=preprocess_spec(rules),
        decode=decode_spec(rules, config),
        ecosystem=chosen.name,
        decisions=decisions,
    )
    return CheckpointDescription(config, contract, tensors)


def _stated(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a safetensors file says of itself under our key, as fields of ``Rules`` and ``CheckpointOptions``."""
    if _METADATA_KEY not in metadata:
        return {}
    try:
        stated = dict(json.loads(metadata[_METADATA_KEY]))
        fields: dict[str, Any] = {"ecosystem": str(stated["ecosystem"])} if "ecosystem" in stated else {}
        if "classes" in stated:
            fields["class_names"] = tuple(str(name) for name in json.loads(stated["classes"]))
        if "input_size" in stated:
            height, _, width = str(stated["input_size"]).partition("x")
            fields["input_size"] = (int(height), int(width))
        if "score_threshold" in stated:
            fields["score_threshold"] = float(stated["score_threshold"])
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"The file's '{_METADATA_KEY}' metadata is damaged: {error}.") from error
    return fields


def _ecosystem(options: CheckpointOptions, stated: Mapping[str, Any], weights: StoredWeights) -> Ecosystem:
    if options.ecosystem != AUTO:
        return get_ecosystem(options.ecosystem)
    if "ecosystem" in stated:
        return get_ecosystem(stated["ecosystem"])
    return detect_ecosystem(weights.tensors)


def _variant(options: CheckpointOptions, chosen: Ecosystem) -> str:
    if options.variant and options.variant not in chosen.variants:
        known = f"one of {', '.join(chosen.variants)}" if chosen.variants else "left out: it has none"
        raise ConfigError(f"The variant for {chosen.name} must be {known}, got '{options.variant}'.")
    return options.variant


def _origin(
    chosen: Ecosystem, options: CheckpointOptions, stated: Mapping[str, Any], weights: StoredWeights
) -> tuple[Decision, ...]:
    source = "the file's metadata" if "ecosystem" in stated else "the tensors' names"
    decisions = [Decision("ecosystem", chosen.name, source if options.ecosystem == AUTO else "option")]
    if weights.container:
        rule = "rule: averaged weights are what is evaluated" if weights.has_both else "the only weights in the file"
        decisions.append(Decision("weights", weights.container, "option" if options.weights else rule))
    return tuple(decisions)


def decided_options(described: CheckpointDescription) -> CheckpointOptions:
    """All decisions as options: the file, read again with them, has the same configuration and contract."""
    contract, config = described.contract, described.config
    preprocess, decode = contract.preprocess, contract.decode
    decided = {decision.name: decision.value for decision in contract.decisions}
    variant, container = decided.get("variant", ""), decided.get("weights", "")
    return CheckpointOptions(
        ecosystem=contract.ecosystem,
        variant=variant if variant in get_ecosystem(contract.ecosystem).variants else "",
        weights=("ema" if container in _EMA_CONTAINERS else "model") if container else "",
        class_names=contract.class_names,
        stride_in_1x1=config.stride_in_1x1,
        box_activation=config.box_activation,
        centerness_on_reg=config.centerness_on_reg,
        norm_eps=config.norm_eps,
        input_size=preprocess.canvas,
        shortest=preprocess.shortest,
        longest=preprocess.longest,
        input_dtype=preprocess.input_dtype,
        channel_order=preprocess.channel_order,
        mean=preprocess.mean,
        std=preprocess.std,
        resize_filter=preprocess.resize_filter,
        score_threshold=decode.score_threshold,
        iou_threshold=decode.iou_threshold,
        max_detections=decode.max_detections,
        pre_nms_top_k=decode.pre_nms_top_k,
        centers=decode.profile.centers,
        profile=decode.profile.name,
    )
