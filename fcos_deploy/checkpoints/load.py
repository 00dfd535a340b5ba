"""Describes a checkpoint (network, contract, and the source of every decision), and loads it.

``inspect`` prints the description, which needs neither torch nor the weights; ``load_checkpoint`` builds the network
that it asks for over the memory-mapped weights.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fcos_deploy.checkpoints.ecosystems import detect_ecosystem, get_ecosystem
from fcos_deploy.checkpoints.pickle_reader import PickledArray
from fcos_deploy.checkpoints.reader import (
    ITEM_SIZES,
    StoredTensor,
    StoredWeights,
    TensorFacts,
    count_of,
    find_weights,
    open_checkpoint,
)
from fcos_deploy.checkpoints.rules import (
    CLS_HEAD,
    REG_HEAD,
    SHARED_TOWER,
    Evidence,
    Rename,
    decode_spec,
    final_rules,
    level_strides,
    network_config,
    preprocess_spec,
)
from fcos_deploy.core.checkpoint_options import AUTO, OPTION, CheckpointOptions, option_infos
from fcos_deploy.core.contract import Decision, ModelContract
from fcos_deploy.core.decode import ALL_CANDIDATES
from fcos_deploy.core.errors import CheckpointError, ConfigError, FcosDeployError
from fcos_deploy.core.files import sha256_file
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.core.network import (
    BackboneType,
    BlockType,
    DeformableLayer,
    ExtraSource,
    FcosConfig,
    OsaStage,
    TowerNorm,
)

if TYPE_CHECKING:
    from torch import Tensor

    from fcos_deploy.model.fcos import Fcos

__all__ = [
    "CheckpointDescription",
    "CheckpointOptions",
    "LoadedCheckpoint",
    "StoredWeights",
    "decided_options",
    "describe_checkpoint",
    "describe_weights",
    "find_weights",
    "load_checkpoint",
    "to_tensors",
]

torch = lazy_import("torch", extra="export")
fcos = lazy_import("fcos_deploy.model.fcos", extra="export")  # imports torch

_METADATA_KEY = "fcos_deploy"  # of a safetensors file


@dataclass(frozen=True, slots=True)
class CheckpointDescription:
    """A checkpoint before its network is built: ``tensors`` have canonical names and are still in the file."""

    config: FcosConfig
    contract: ModelContract
    tensors: Mapping[str, TensorFacts]
    reader: str = "memory"


def describe_checkpoint(path: Path, *, options: CheckpointOptions | None = None) -> CheckpointDescription:
    """Find out what a checkpoint is, without reading its weights or building the network.

    Raises:
        CheckpointError, ConfigError: as ``load_checkpoint``, except for weights that are not finite.
    """
    options = options or CheckpointOptions()
    file = open_checkpoint(path)
    weights = find_weights(file.content, prefer=options.weights)
    description = describe_weights(weights, file_name=path.name, stated=_stated(file.metadata), options=options)
    return dataclasses.replace(description, reader=file.reader)


def describe_weights(
    weights: StoredWeights, *, file_name: str, stated: Mapping[str, Any], options: CheckpointOptions
) -> CheckpointDescription:
    """The same for weights that are in memory; ``stated`` holds what the file says under the names of ``Rules``."""
    if options.ecosystem != AUTO:
        ecosystem, source = get_ecosystem(options.ecosystem), OPTION
        if missing := ecosystem.missing(weights.tensors):
            raise CheckpointError(
                f"This is not a checkpoint of {ecosystem.name}: no tensor's name has '{missing}' in it.",
                hint="leave --ecosystem out to have the ecosystem recognised",
            )
    elif "ecosystem" in stated:
        ecosystem, source = get_ecosystem(stated["ecosystem"]), "the file's metadata"
    else:
        ecosystem, source = detect_ecosystem(weights.tensors), "the tensors' names"
    if options.variant and options.variant not in ecosystem.variants:
        known = f"one of {', '.join(ecosystem.variants)}" if ecosystem.variants else "left out: it has none"
        raise ConfigError(f"--variant of {ecosystem.name} must be {known}, got '{options.variant}'.")
    tensors = canonical(weights.tensors, ecosystem.renames)
    network = _infer_network(tensors, deform_groups=options.deform_groups)
    evidence = Evidence(
        file_name=file_name,
        tensors=tensors,
        source_names=frozenset(weights.tensors),
        network=network,
        metadata=weights.metadata,
        options=options,
    )
    names = _stored_class_names(weights.metadata)
    stated = {"class_names": names, **stated} if names else stated
    rules = final_rules(ecosystem, evidence, stated=stated, options=options)
    config = network_config(rules, network)
    decisions = [Decision("ecosystem", ecosystem.name, source)]
    if weights.container:
        decisions.append(Decision("weights", weights.container, weights.source))
    if weights.left_out:
        more = f", and {len(weights.left_out) - 4} more" if len(weights.left_out) > 4 else ""
        shown = ", ".join(weights.left_out[:4]) + more
        decisions.append(Decision("left_out", shown, "rule: these tensors are the training's, not the network's"))
    contract = ModelContract(
        class_names=rules.class_names,
        preprocess=preprocess_spec(rules),
        decode=decode_spec(rules, config),
        ecosystem=ecosystem.name,
        decisions=tuple(
            # An option that a file states names that file.
            dataclasses.replace(decision, source=f"option in '{options.origins[decision.name]}'")
            if decision.source == OPTION and decision.name in options.origins
            else decision
            for decision in (*decisions, *rules.decisions(default_source=f"rule of {ecosystem.name}"))
        ),
    )
    return CheckpointDescription(config, contract, tensors)


def decided_options(description: CheckpointDescription) -> CheckpointOptions:
    """All decisions as options: the file, read again with them, has the same configuration and contract."""
    contract, decode = description.contract, description.contract.decode
    decided = {decision.name: decision.value for decision in contract.decisions}
    values: dict[str, Any] = {}
    for part in (decode.profile, decode, contract.preprocess, description.config):
        values.update({item.name: getattr(part, item.name) for item in dataclasses.fields(part)})
    values.update(dict.fromkeys(_OF_SOME_NETWORKS - decided.keys()))
    variants = get_ecosystem(contract.ecosystem).variants
    values |= {
        "ecosystem": contract.ecosystem,
        "variant": decided["variant"] if decided.get("variant") in variants else "",
        "weights": decided.get("weights", ""),
        "class_names": contract.class_names,
        "deform_groups": int(decided["deform_groups"]) if "deform_groups" in decided else None,
        "ignore_config": tuple(filter(None, decided.get("ignore_config", "").split(", "))),
        "input_size": contract.preprocess.canvas,
        "pre_nms_top_k": 0 if decode.pre_nms_top_k == ALL_CANDIDATES else decode.pre_nms_top_k,
        "profile": decode.profile.name,
    }
    return CheckpointOptions(**{name: values[name] for name in option_infos()})


# Options about parts that not every network has.
_OF_SOME_NETWORKS = {"fpn_norm_eps", "norm_groups", "tower_norm_eps", "stage_strides", "stage_dilations"} | {
    *("pooled_levels", "extra_source", "extra_relu"),
}


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """A network in evaluation mode and the contract around it (tail ``raw``, precision fp32)."""

    model: Fcos
    contract: ModelContract


def load_checkpoint(path: Path, *, options: CheckpointOptions | None = None) -> LoadedCheckpoint:
    """Load a checkpoint of any ecosystem; nothing in it is executed.

    float32 weights stay in the memory-mapped file: replace it by renaming, do not overwrite it while it is in use.

    Raises:
        CheckpointError: unreadable, unsafe, damaged, of another architecture, or with weights that are not finite.
        ConfigError: an option does not fit, or the file leaves open what an option must say.
    """
    description = describe_checkpoint(path, options=options)
    tensors = to_tensors(description.tensors)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor)  # Propagates NaN, and needs no memory of the tensor's size.
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise CheckpointError(
                    f"Tensor '{name}' holds NaN or infinite values.", hint="did the training diverge?"
                )
    contract = dataclasses.replace(description.contract, source_sha256=sha256_file(path))
    return LoadedCheckpoint(fcos.build_network(description.config, tensors), contract)


def to_tensors(stored: Mapping[str, TensorFacts]) -> dict[str, Tensor]:
    """The tensors themselves; those of a file that is mapped share its pages.

    Raises:
        CheckpointError: naming a tensor that reaches beyond the file, or is damaged.
    """
    maps: dict[Path, Tensor] = {}
    tensors = {}
    for name, value in stored.items():
        try:
            tensors[name] = _to_tensor(value, maps)
        except CheckpointError as error:
            raise CheckpointError(f"Tensor '{name}': {error.message}", hint=error.hint) from error
    return tensors


def _to_tensor(value: TensorFacts, maps: dict[Path, Tensor]) -> Tensor:
    """``maps``: the mapped files so far, as uint8 tensors."""
    numbers: Tensor
    if isinstance(value, torch.Tensor):
        numbers = value
    elif isinstance(value, PickledArray):
        array = value.take()
        numbers = torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)))
    elif isinstance(value, StoredTensor):
        value.check()
        path, size = value.storage.archive.path, value.elements * ITEM_SIZES[value.dtype]
        if size and value.start % ITEM_SIZES[value.dtype]:  # Files of torch before 1.6 do not align their numbers.
            return torch.from_numpy(value.read()).view(getattr(torch, value.dtype))  # type: ignore[no-any-return]  # torch is imported lazily
        if path not in maps:
            maps[path] = torch.from_file(str(path), shared=False, size=value.storage.archive.size, dtype=torch.uint8)
        content = maps[path][value.start : value.start + size] if size else torch.empty(0, dtype=torch.uint8)
        numbers = content.view(getattr(torch, value.dtype))
        numbers = numbers.as_strided(value.shape, value.strides, numbers.storage_offset() + value.offset)
    else:
        raise CheckpointError(f"A {type(value).__name__} is not a tensor.")
    return numbers


def _stated(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a safetensors file says of itself under ``fcos_deploy``, by the names of ``CheckpointOptions``."""
    if _METADATA_KEY not in metadata:
        return {}
    try:
        stated = dict(json.loads(metadata[_METADATA_KEY]))
        if not all(isinstance(value, (str, int, float)) for value in stated.values()):
            raise TypeError("a value is neither text nor a number")
        fields: dict[str, Any] = {"ecosystem": str(stated["ecosystem"])} if "ecosystem" in stated else {}
        if "classes" in stated:
            fields["class_names"] = tuple(json.loads(stated["classes"]))
            if not all(isinstance(name, str) for name in fields["class_names"]):
                raise TypeError("a class name is not text")
        if "input_size" in stated:
            height, _, width = str(stated["input_size"]).partition("x")
            fields["input_size"] = (int(height), int(width))
        if "score_threshold" in stated:
            fields["score_threshold"] = float(stated["score_threshold"])
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"The file's '{_METADATA_KEY}' metadata is damaged: {error}.") from error
    return fields


_NAME_KEYS = ("classes", "class_names", "CLASSES", "names")
_NAME_CONTAINERS = ("args", "hyper_parameters", "hparams", "config", "cfg")


def _stored_class_names(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Class names that a training script stored beside the weights, or with its arguments; () where it did not."""
    meta = metadata.get("meta")  # mmdetection's: CLASSES until version 2, then dataset_meta; text is a single name
    of_mmdetection = [meta.get("dataset_meta"), meta] if isinstance(meta, Mapping) else []
    places = [metadata, *(getattr(metadata.get(key), "state", metadata.get(key)) for key in _NAME_CONTAINERS)]
    for index, place in enumerate((*of_mmdetection, *places)):
        if not isinstance(place, Mapping):
            continue
        for key in _NAME_KEYS:
            names = place.get(key)
            names = (names,) if isinstance(names, str) and index < len(of_mmdetection) else names
            if isinstance(names, Mapping) and set(names) == set(range(len(names))):
                names = [names[index] for index in range(len(names))]
            if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
                return tuple(names)
    return ()


# ---- names: those of torchvision's network ----

_DROPPED = re.compile(r".*\.num_batches_tracked|pixel_mean|pixel_std|ema_.*|n_averaged")
_HELD = re.compile(r"(.+)\.conv\.(weight|bias)")
# ``conv2.conv_offset.weight`` (mmcv) and ``conv2_offset.weight`` (detectron2) are ``conv2.offset.weight``.
_OFFSET = re.compile(r"(?:\.conv|(?<=\.conv\d))_offset\.(weight|bias)$")
_SCALE = re.compile(re.escape(REG_HEAD) + r"\.scales\.(\d+)")
_PYRAMID_BLOCK = re.compile(r"backbone\.fpn\.(inner|layer)_blocks\.(\d+)\.0\.(.+)")
_TOWERS = "|".join(map(re.escape, (CLS_HEAD, REG_HEAD, SHARED_TOWER)))
_TOWER_LAYER = re.compile(rf"({_TOWERS})\.conv\.(\d+)\.(.+)")


def canonical(tensors: Mapping[str, TensorFacts], renames: tuple[Rename, ...]) -> dict[str, TensorFacts]:
    """The tensors that inference needs, under canonical names; each level's scale is a tensor of its own.

    Raises:
        CheckpointError: when two names become one, or the levels' scales do not fit each other.
    """
    renamed: dict[str, TensorFacts] = {}
    sources: dict[str, str] = {}
    names = {}
    for name in tensors:
        if not _DROPPED.fullmatch(name):
            target = next((new for rename in renames if (new := rename.apply(name)) is not None), name)
            names[name] = _OFFSET.sub(r".offset.\1", target)
    # detectron2's and tianzhi's DFConv2d holds the convolution and its offsets side by side.
    wrapped = {m[1] for name in names.values() if (m := re.fullmatch(r"(.+)\.offset\.weight", name))}
    for name, renamed_name in names.items():
        tensor, held = tensors[name], _HELD.fullmatch(renamed_name)
        target = f"{held[1]}.{held[2]}" if held and held[1] in wrapped else renamed_name
        if target in sources:
            raise CheckpointError(f"Tensors '{sources[target]}' and '{name}' are both '{target}'.")
        sources[target], renamed[target] = name, tensor
    renamed = _with_numbered_towers(_with_numbered_levels(renamed))
    scales = {int(m.group(1)): t for n, t in renamed.items() if (m := _SCALE.fullmatch(n))}
    if sorted(scales) != list(range(len(scales))) or any(count_of(t) != 1 for t in scales.values()):
        raise CheckpointError(f"Expected one scale for each level, got levels {sorted(scales)}.")
    return renamed


def _with_numbered_levels(tensors: Mapping[str, TensorFacts]) -> dict[str, TensorFacts]:
    """The pyramid's blocks counted from 0 on; output convolutions beyond the lateral ones are P6 and P7.

    detectron2 and tianzhi number them after the backbone's stages, and mmdetection goes on counting.
    """
    blocks = {name: match for name in tensors if (match := _PYRAMID_BLOCK.fullmatch(name))}
    laterals = sorted({int(match[2]) for match in blocks.values() if match[1] == "inner"})
    first = laterals[0] if laterals else 0
    numbered = {}
    for name, tensor in tensors.items():
        match = blocks.get(name)
        target = name
        if match is not None:
            index = int(match[2]) - first
            beyond = match[1] == "layer" and index >= len(laterals)
            place = f"extra_blocks.p{6 + index - len(laterals)}" if beyond else f"{match[1]}_blocks.{index}.0"
            target = f"backbone.fpn.{place}.{match[3]}"
        if target in numbered:
            raise CheckpointError(f"Two tensors are '{target}': the pyramid's levels are numbered in two ways.")
        numbered[target] = tensor
    return numbered


def _with_numbered_towers(tensors: Mapping[str, TensorFacts]) -> dict[str, TensorFacts]:
    """The towers' layers counted with a norm behind each convolution, which libraries leave out where there is none."""
    layers: dict[str, dict[int, bool]] = {}  # of each tower: whether a layer is a convolution
    for name, tensor in tensors.items():
        match = _TOWER_LAYER.fullmatch(name)
        if match is not None:
            known = layers.setdefault(match[1], {})
            known[int(match[2])] = known.get(int(match[2]), False) or (match[3] == "weight" and len(tensor.shape) == 4)
    numbers: dict[tuple[str, int], int] = {}
    for tower, kinds in layers.items():
        convolutions = 0
        for index in sorted(kinds):
            convolutions += kinds[index]
            numbers[tower, index] = 3 * (convolutions - 1) + (not kinds[index])
    numbered = {}
    for name, tensor in tensors.items():
        match = _TOWER_LAYER.fullmatch(name)
        numbered[f"{match[1]}.conv.{numbers[match[1], int(match[2])]}.{match[3]}" if match else name] = tensor
    return numbered


# ---- the network that the shapes show ----

_STEMS = {
    BackboneType.RESNET: "backbone.body.conv1.weight",
    BackboneType.DLA34: "backbone.body.base_layer.0.weight",
    BackboneType.MOBILENET_V2: "backbone.body.features.0.0.weight",
    BackboneType.VOVNET: "backbone.body.stem.0.0.weight",
}


# Parts of the canonical names of all backbones and heads. A pyramid's are known in full; its norm is mmdetection's,
# merged into its convolution when the network is built.
_PART = (
    r"conv\d*|bn\d*|layer\d|downsample|base_layer|level\d|tree\d|root|project|features|stem|stages|layers|concat|ese|fc"
    r"|classification_head|regression_head|shared_tower|cls_logits|bbox_reg|bbox_ctrness|scales|offset|\d+"
)
_CANONICAL = re.compile(
    r"(?:backbone\.fpn\.(?:(?:inner|layer)_blocks\.[0-4]\.0|extra_blocks\.p[67])(?:\.norm)?"
    rf"|(?:backbone\.body|head)(?:\.(?:{_PART}))+)(?:\.(?:weight|bias|running_mean|running_var))?"
)


def refuse_unknown(names: Iterable[str]) -> None:
    """Stop at tensors that the network has no place for, such as those of a head or an adapter of one's own.

    Raises:
        CheckpointError: naming the first four.
    """
    unknown = sorted(name for name in names if not _CANONICAL.fullmatch(name))
    if unknown:
        shown = ", ".join(f"'{name}'" for name in unknown[:4]) + (", ..." if len(unknown) > 4 else "")
        raise CheckpointError(
            f"The checkpoint has {len(unknown)} unknown tensors: {shown}.",
            hint="is it another architecture, or are there more levels than P6 and P7? Where they are the training's "
            "alone, save the file without them; for a network of your own see docs/your-own-fcos.md",
        )


def _infer_network(tensors: Mapping[str, TensorFacts], *, deform_groups: int | None) -> FcosConfig:
    """The configuration that fits the tensors; what shapes do not tell has its default.

    Raises:
        CheckpointError: a tensor that every FCOS has is missing, or the shapes fit no FCOS.
        ConfigError: the shapes of a deformable convolution have two readings.
    """
    backbone = next((kind for kind, mark in _STEMS.items() if mark in tensors), None)
    if backbone is None:
        shown = [f"'{name}'" for name in sorted(tensors) if name.startswith("backbone.")][:3]
        starts = [f"'{start}'" for start, _ in Counter(name.partition(".")[0] for name in tensors).most_common(4)]
        raise CheckpointError(
            f"The backbone is none of {', '.join(_STEMS)}; the file has "
            + (f"{', '.join(shown)}." if shown else f"no backbone: its tensors begin with {', '.join(starts)}."),
            hint="for a network of your own see docs/your-own-fcos.md",
        )
    _shape(tensors, f"{REG_HEAD}.bbox_ctrness.weight", 4)  # Absent in RetinaNet, whose other names are the same.
    convs = {
        head: sum(
            len(t.shape) == 4 for n, t in tensors.items() if re.fullmatch(rf"{re.escape(head)}\.conv\.\d+\.weight", n)
        )
        for head in (CLS_HEAD, SHARED_TOWER, REG_HEAD)
    }
    norm = next((f"{head}.conv.1" for head, count in convs.items() if count), "")
    if f"{norm}.0.running_mean" in tensors:
        tower_norm = TowerNorm.BATCH_PER_LEVEL
    elif f"{norm}.running_mean" in tensors:
        tower_norm = TowerNorm.BATCH
    else:
        tower_norm = TowerNorm.GROUP if f"{norm}.weight" in tensors else TowerNorm.NONE
    refuse_unknown(tensors)
    _refuse_other_shapes(tensors, backbone)
    laterals = sum(f"backbone.fpn.inner_blocks.{index}.0.weight" in tensors for index in range(5))
    channels, c5_channels = _shape(tensors, f"backbone.fpn.inner_blocks.{laterals - 1}.0.weight", 4)[:2]
    first_tower = next((f"{head}.conv.0.weight" for head in (SHARED_TOWER, CLS_HEAD, REG_HEAD) if convs[head]), "")
    p6 = tensors.get("backbone.fpn.extra_blocks.p6.weight")
    from_c5 = p6 is not None and c5_channels != channels and tuple(p6.shape)[1:2] == (c5_channels,)
    extra = sum(f"backbone.fpn.extra_blocks.p{level}.weight" in tensors for level in (6, 7))
    # A level of its own scale that no convolution makes is pooled. The scales are one tensor, or one a level.
    name = f"{REG_HEAD}.scales"
    scales = _shape(tensors, name, 1)[0] if name in tensors else sum(n.startswith(f"{name}.") for n in tensors)
    pooled = max(scales - laterals - extra, 0)
    deformable = _infer_deformable(tensors, groups=deform_groups)
    try:
        return FcosConfig(
            num_classes=_shape(tensors, f"{CLS_HEAD}.cls_logits.weight", 4)[0],
            image_channels=_shape(tensors, _STEMS[backbone], 4)[1],
            backbone=backbone,
            fpn_channels=channels,
            tower_channels=_shape(tensors, first_tower, 4)[0] if first_tower else 0,
            extra_source=ExtraSource.INPUT if from_c5 else ExtraSource.OUTPUT,
            norm_groups=1,  # decided later: shapes do not tell
            strides=level_strides((1, 2, 2, 2), laterals + extra + pooled, laterals=laterals),
            laterals=laterals,
            pooled_levels=pooled,
            cls_convs=convs[CLS_HEAD],
            reg_convs=convs[REG_HEAD],
            shared_convs=convs[SHARED_TOWER],
            tower_norm=tower_norm,
            has_scales=scales > 0,
            deformable=deformable,
            **_INFERRED.get(backbone, lambda _: {})(tensors),
        )
    except FcosDeployError as error:
        raise CheckpointError(f"The shapes fit no FCOS: {error.message}", hint=error.hint) from error


def _refuse_other_shapes(tensors: Mapping[str, TensorFacts], backbone: BackboneType) -> None:
    """Stop at variants that people train and this network is not.

    Raises:
        CheckpointError: naming the part.
    """
    own = "see docs/your-own-fcos.md"
    colours = _shape(tensors, _STEMS[backbone], 4)[1]
    if colours not in {1, 3}:
        raise CheckpointError(
            f"The stem '{_STEMS[backbone]}' takes images of {colours} channels, expected 3, or 1 for gray images.",
            hint=f"image files and cameras give no others; {own}",
        )
    laterals = [index for index in range(5) if f"backbone.fpn.inner_blocks.{index}.0.weight" in tensors]
    if laterals not in ([0, 1, 2], [0, 1, 2, 3]):
        raise CheckpointError(
            f"The pyramid has lateral convolutions {laterals}, expected 0 to 2 (over C3 to C5) or 0 to 3 (C2 to C5).",
            hint=f"is it another number of levels? S{own[1:]}",
        )


def _infer_resnet(tensors: Mapping[str, TensorFacts]) -> dict[str, Any]:  # Any: keyword arguments of FcosConfig
    blocks = []
    for layer in (1, 2, 3, 4):
        pattern = rf"backbone\.body\.layer{layer}\.(\d+)\.conv1\.weight"
        numbers = {int(m.group(1)) for name in tensors if (m := re.fullmatch(pattern, name))}
        if numbers != set(range(len(numbers))) or not numbers:
            raise CheckpointError(
                f"Expected blocks 0, 1, 2, ... in 'backbone.body.layer{layer}', got {sorted(numbers)[:8]}."
            )
        blocks.append(len(numbers))
    network = {"blocks": tuple(blocks), "stem_channels": _shape(tensors, "backbone.body.conv1.weight", 4)[0]}
    if "backbone.body.layer1.0.conv3.weight" not in tensors:
        return {**network, "block": BlockType.BASIC}
    width, inputs = _shape(tensors, "backbone.body.layer1.0.conv2.weight", 4)[:2]
    groups = max(1, width // inputs)  # its weight is (width, width / groups, 3, 3)
    return {**network, "block": BlockType.BOTTLENECK, "groups": groups, "width_per_group": width // groups}


def _infer_deformable(tensors: Mapping[str, TensorFacts], *, groups: int | None) -> tuple[DeformableLayer, ...]:
    """The deformable convolutions, by their offsets: two channels a tap and group, and a third with a mask (DCNv2).

    Raises:
        CheckpointError: a number of channels that neither version has.
        ConfigError: one that both have, and ``groups`` does not decide.
    """
    layers = []
    for name in tensors:
        match = re.fullmatch(r"(.+)\.offset\.weight", name)
        if match is None:
            continue
        kernel = _shape(tensors, f"{match[1]}.weight", 4)[2:]
        channels, in_channels = _shape(tensors, name, 4)[:2]
        readings = []
        for modulated, parts in ((True, 3), (False, 2)):
            count, rest = divmod(channels, parts * kernel[0] * kernel[1])
            if count and not rest and in_channels % count == 0:
                readings.append(DeformableLayer(match[1], count, modulated))
        if not readings:
            raise CheckpointError(
                f"The deformable convolution '{match[1]}' has {channels} channels of offsets, "
                f"which fit no number of groups of its {in_channels} input channels."
            )
        chosen = [layer for layer in readings if len(readings) == 1 or layer.groups == groups]
        if len(chosen) != 1:
            both = " or ".join(f"{'with' if r.modulated else 'without'} a mask and {r.groups} groups" for r in readings)
            raise ConfigError(
                f"The {channels} channels of offsets of '{match[1]}' have two readings: {both}.",
                hint=f"--deform-groups {readings[0].groups} or {readings[1].groups}",
            )
        layers += chosen
    return tuple(sorted(layers, key=lambda layer: layer.name))


def _infer_vovnet(tensors: Mapping[str, TensorFacts]) -> dict[str, Any]:  # Any: keyword arguments of FcosConfig
    stem = tuple(_shape(tensors, f"backbone.body.stem.{index}.0.weight", 4)[0] for index in range(3))
    stages = []
    for index in range(4):
        first = f"backbone.body.stages.{index}"
        blocks = {m[1] for n in tensors if (m := re.match(rf"{re.escape(first)}\.(\d+)\.", n))}
        layers = {m[1] for n in tensors if (m := re.match(rf"{re.escape(first)}\.0\.layers\.(\d+)\.", n))}
        channels = _shape(tensors, f"{first}.0.layers.0.0.weight", 4)[0]
        out_channels = _shape(tensors, f"{first}.0.concat.0.weight", 4)[0]
        stages.append(OsaStage(len(blocks), len(layers), channels, out_channels))
    return {"stem_widths": stem, "osa_stages": tuple(stages)}


_INFERRED = {BackboneType.RESNET: _infer_resnet, BackboneType.VOVNET: _infer_vovnet}


def _shape(tensors: Mapping[str, TensorFacts], name: str, axes: int) -> tuple[int, ...]:
    """Shape of a tensor that must be there with this number of axes, none of them empty."""
    if name not in tensors:
        retinanet = name.endswith("bbox_ctrness.weight")
        raise CheckpointError(
            f"The checkpoint has no '{name}' under any known name.",
            hint="a RetinaNet has no centerness and is not an FCOS" if retinanet else "",
        )
    shape = tuple(tensors[name].shape)
    if len(shape) != axes or 0 in shape:
        raise CheckpointError(f"'{name}' must have {axes} axes that are not empty, got shape {list(shape)}.")
    return shape
