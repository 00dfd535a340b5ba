"""From a checkpoint file of any ecosystem to the network and its contract."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fcos_deploy.core.atomic import sha256_file
from fcos_deploy.core.contract import Decision, ModelContract
from fcos_deploy.core.decode_spec import PROFILES, DecodeSpec
from fcos_deploy.core.errors import CheckpointError, ConfigError
from fcos_deploy.core.network import FcosConfig
from fcos_deploy.core.preprocess_spec import InputDtype, PreprocessSpec, ResizeFilter, ResizeOrder, SizeRule
from fcos_deploy.model.checkpoint_options import AUTO, CheckpointOptions
from fcos_deploy.model.ecosystems import detect_ecosystem, ecosystem
from fcos_deploy.model.ecosystems.renaming import canonical_names, canonical_tensors, refuse_unsupported
from fcos_deploy.model.ecosystems.rules import Ecosystem, Evidence, Rules
from fcos_deploy.model.fcos import Fcos
from fcos_deploy.model.safe_load import open_checkpoint
from fcos_deploy.model.state_dict import StoredWeights, find_weights, require_finite
from fcos_deploy.model.structure import infer_network

__all__ = ["CheckpointDescription", "CheckpointOptions", "LoadedCheckpoint", "describe_checkpoint", "load_checkpoint"]

_METADATA_KEY = "fcos_deploy"


@dataclass(frozen=True, slots=True)
class CheckpointDescription:
    """A checkpoint before its network is built: ``tensors`` have canonical names and are still in the file."""

    config: FcosConfig
    contract: ModelContract
    tensors: Mapping[str, Tensor]
    reader: str

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """What tensors do not tell, and who decided it."""
        return self.contract.decisions


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """A network in evaluation mode and the contract around it (tail ``raw``, precision fp32)."""

    model: Fcos
    contract: ModelContract
    config: FcosConfig

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """What tensors do not tell, and who decided it."""
        return self.contract.decisions


def load_checkpoint(path: Path, *, options: CheckpointOptions | None = None) -> LoadedCheckpoint:
    """Load a checkpoint of any ecosystem; nothing in it is executed.

    float32 weights stay in the memory-mapped file: replace it by renaming, do not overwrite it while it is in use.

    Raises:
        CheckpointError: unreadable, unsafe, damaged, of another architecture, or with weights that are not finite.
        ConfigError: an option does not fit, or the file leaves open what an option must say.
    """
    described = describe_checkpoint(path, options=options)
    require_finite(described.tensors)
    contract = dataclasses.replace(described.contract, source_sha256=sha256_file(path))
    return LoadedCheckpoint(build_network(described.config, described.tensors), contract, described.config)


def describe_checkpoint(path: Path, *, options: CheckpointOptions | None = None) -> CheckpointDescription:
    """Find out what a checkpoint is, without reading its weights or building the network.

    Raises:
        CheckpointError, ConfigError: as ``load_checkpoint``, except for weights that are not finite.
    """
    options = options or CheckpointOptions()
    file = open_checkpoint(path)
    weights = find_weights(file.content, prefer=options.weights)
    stated = _stated(file.metadata)
    refuse_unsupported(weights.tensors)
    chosen = _ecosystem(options, stated, weights)
    tensors = canonical_tensors(weights.tensors, canonical_names(weights.tensors, chosen.renames))
    evidence = Evidence(
        file_name=path.name,
        tensors=tensors,
        source_names=frozenset(weights.tensors),
        network=infer_network(tensors),
        metadata=weights.metadata,
        variant=_variant(options, chosen),
    )
    rules = _overridden(chosen.rules(evidence), stated=stated, options=options, network=evidence.network)
    config = dataclasses.replace(
        evidence.network,
        stride_in_1x1=rules.stride_in_1x1,
        box_activation=rules.box_activation,
        centerness_on_reg=rules.centerness_on_reg,
        norm_eps=rules.norm_eps,
    )
    decisions = (*_origin(chosen, options, weights), *rules.decisions(default_source=f"rule of {chosen.name}"))
    contract = ModelContract(
        class_names=rules.class_names,
        preprocess=_preprocess(rules, options.input_dtype),
        decode=_decode(rules, config),
        ecosystem=chosen.name,
        decisions=decisions,
    )
    return CheckpointDescription(config, contract, tensors, file.reader)


def build_network(config: FcosConfig, tensors: Mapping[str, Tensor]) -> Fcos:
    """The network in evaluation mode, float32, over exactly these tensors (canonical names).

    Raises:
        CheckpointError: naming tensors that are missing, left over, or of another shape.
    """
    with torch.device("meta"):
        model = Fcos(config)
    wanted = model.state_dict()
    counters = {name: torch.zeros((), dtype=torch.int64) for name in wanted if name.endswith(".num_batches_tracked")}
    _require_same_names(wanted, {**tensors, **counters})
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"Tensor '{name}' must have shape {list(wanted[name].shape)}, got {list(tensor.shape)}."
            )
    weights = {name: tensor.to(torch.float32).contiguous() for name, tensor in tensors.items()}
    model.load_state_dict({**weights, **counters}, strict=True, assign=True)
    return model.eval().requires_grad_(requires_grad=False)


def _require_same_names(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    for what, names in (("lacks", set(wanted) - set(found)), ("has unknown", set(found) - set(wanted))):
        if names:
            shown = ", ".join(f"'{n}'" for n in sorted(names)[:4]) + (", ..." if len(names) > 4 else "")
            raise CheckpointError(
                f"The checkpoint {what} {len(names)} tensors: {shown}.",
                hint="it is of another architecture, or not complete; for a network of your own see docs/your-own-fcos.md",
            )


def _stated(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a safetensors file says of itself under our key, as fields of ``Rules`` and ``CheckpointOptions``."""
    if _METADATA_KEY not in metadata:
        return {}
    try:
        stated = json.loads(metadata[_METADATA_KEY])
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
        return ecosystem(options.ecosystem)
    if "ecosystem" in stated:
        return ecosystem(stated["ecosystem"])
    return detect_ecosystem(weights.tensors)


def _variant(options: CheckpointOptions, chosen: Ecosystem) -> str:
    if options.variant and options.variant not in chosen.variants:
        known = f"one of {', '.join(chosen.variants)}" if chosen.variants else "left out: it has none"
        raise ConfigError(f"The variant for {chosen.name} must be {known}, got '{options.variant}'.")
    return options.variant


def _origin(chosen: Ecosystem, options: CheckpointOptions, weights: StoredWeights) -> tuple[Decision, ...]:
    source = "the tensors' names" if options.ecosystem == AUTO else "option"
    decisions = [Decision("ecosystem", chosen.name, source)]
    if weights.container:
        rule = "rule: averaged weights are what is evaluated" if weights.has_both else "the only weights in the file"
        decisions.append(Decision("weights", weights.container, "option" if options.weights else rule))
    return tuple(decisions)


def _overridden(rules: Rules, *, stated: Mapping[str, Any], options: CheckpointOptions, network: FcosConfig) -> Rules:
    names = {item.name for item in dataclasses.fields(Rules)} - {"variant"}
    given = {item.name: getattr(options, item.name) for item in dataclasses.fields(options) if item.name in names}
    for source, values in (("the file's metadata", stated), ("option", given)):
        values = {name: value for name, value in values.items() if name in names and value not in (None, ())}
        if "profile" in values and "centers" not in values and values["profile"] in PROFILES:
            rules = rules.decide(f"{source}: profile", centers=PROFILES[values["profile"]].centers)
        rules = rules.decide(source, **values)
        if "input_size" in values:
            rules = dataclasses.replace(rules, shortest=None, longest=None)
        if "shortest" in values:
            rules = dataclasses.replace(rules, input_size=None)
    return _with_names(rules, network)


def _with_names(rules: Rules, network: FcosConfig) -> Rules:
    """Class names by label: a list without the background gets one, a missing list gets numbers."""
    count = network.num_classes + rules.label_offset
    names = rules.class_names
    if not names:
        numbered = tuple(f"class_{i}" for i in range(count))
        return rules.decide("nobody: give the names with --classes", class_names=numbered)
    # torchvision counts the background as channel 0; tianzhi's labels begin at 1.
    background = rules.label_offset == 1 or rules.profile == "torchvision"
    if len(names) == count - 1 and background:
        return dataclasses.replace(rules, class_names=("background", *names))
    if len(names) != count:
        raise ConfigError(
            f"The network has {network.num_classes} class channels, but {len(names)} class names were given.",
            hint="one name a line, in the order of the training labels",
        )
    return rules


def _preprocess(rules: Rules, dtype: InputDtype | None) -> PreprocessSpec:
    """The ecosystem's own arithmetic for float32; for uint8 pixels are resized before they are normalised."""
    canvas = rules.input_size
    dtype = dtype or (InputDtype.FLOAT32 if canvas is None else InputDtype.UINT8)
    order, resize = rules.resize_order, rules.resize_filter
    if dtype is InputDtype.UINT8:
        order = ResizeOrder.RESIZE_FIRST
        resize = ResizeFilter.CV2 if resize is ResizeFilter.TORCH else resize
    return PreprocessSpec(
        mean=rules.mean,
        std=rules.std,
        pixel_scale=rules.pixel_scale,
        channel_order=rules.channel_order,
        height=canvas[0] if canvas else None,
        width=canvas[1] if canvas else None,
        shortest=rules.shortest,
        longest=rules.longest,
        size_rule=SizeRule.LETTERBOX if canvas else rules.size_rule,
        resize_filter=resize,
        resize_order=order,
        input_dtype=dtype,
    )


def _decode(rules: Rules, config: FcosConfig) -> DecodeSpec:
    if rules.profile not in PROFILES:
        raise ConfigError(f"There is no profile '{rules.profile}'.", hint=f"profiles: {', '.join(PROFILES)}")
    offset = rules.label_offset
    return DecodeSpec(
        profile=dataclasses.replace(PROFILES[rules.profile], centers=rules.centers),
        score_threshold=rules.score_threshold,
        iou_threshold=rules.iou_threshold,
        strides=config.strides,
        pre_nms_top_k=rules.pre_nms_top_k,
        max_detections=rules.max_detections,
        label_map=tuple(range(offset, offset + config.num_classes)) if offset else (),
    )
