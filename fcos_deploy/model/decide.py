"""The last word on what tensors do not tell: the ecosystem's rules, what the file says, what the user says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.decode_spec import PROFILES, DecodeSpec
from fcos_deploy.core.errors import ConfigError, InputSizeError
from fcos_deploy.core.network import FcosConfig
from fcos_deploy.core.preprocess_spec import InputDtype, PreprocessSpec, ResizeFilter, ResizeOrder, SizeRule
from fcos_deploy.model.ecosystems.rules import Rules

__all__ = ["decode_spec", "final_rules", "preprocess_spec"]

_OPTION = "option"  # the source of what the user says


def final_rules(rules: Rules, *, stated: Mapping[str, Any], options: CheckpointOptions, network: FcosConfig) -> Rules:
    """Override the ecosystem's rules by what the file states, and both by the user's options.

    Raises:
        ConfigError: when class names do not fit the network, or a profile does not exist.
    """
    names = {item.name for item in dataclasses.fields(Rules)} - {"variant"}
    given = {item.name: getattr(options, item.name) for item in dataclasses.fields(options) if item.name in names}
    for source, every in (("the file's metadata", stated), (_OPTION, given)):
        values = {name: value for name, value in every.items() if name in names and value not in (None, ())}
        if "profile" in values and "centers" not in values and values["profile"] in PROFILES:
            rules = rules.decide(f"{source}: profile", centers=PROFILES[values["profile"]].centers)
        rules = rules.decide(source, **values)
        if "input_size" in values:
            rules = dataclasses.replace(rules, shortest=None, longest=None)
        if "shortest" in values:
            rules = dataclasses.replace(rules, input_size=None)
    return _with_input(_with_names(rules, network))


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


def _with_input(rules: Rules) -> Rules:
    """float32 keeps the ecosystem's own arithmetic; pixels that stay uint8 are resized before they are normalised."""
    if rules.input_size is None and rules.shortest is None:
        raise ConfigError(
            "The configuration in the file resizes without keeping the ratio (keep_ratio=False), which we do not.",
            hint="give --input-size HxW, or --shortest and --longest; both keep the ratio, so compare the accuracy",
        )
    default = InputDtype.FLOAT32 if rules.input_size is None else InputDtype.UINT8
    dtype = rules.input_dtype or default
    if rules.input_dtype is None:
        rules = rules.decide("rule: uint8 for a fixed input size, float32 otherwise", input_dtype=dtype)
    if rules.input_size is not None:
        rules = rules.decide("rule: a fixed input size is filled keeping the ratio", size_rule=SizeRule.LETTERBOX)
    if dtype is InputDtype.UINT8 and rules.resize_filter is ResizeFilter.TORCH:
        rules = rules.decide("rule: for uint8 input the same arithmetic, rounded", resize_filter=ResizeFilter.CV2)
    if rules.resize_filter is not ResizeFilter.TORCH and rules.resize_order is not ResizeOrder.RESIZE_FIRST:
        rules = rules.decide("rule: this resize filter works on uint8", resize_order=ResizeOrder.RESIZE_FIRST)
    return rules


def preprocess_spec(rules: Rules) -> PreprocessSpec:
    """The preprocessing part of the contract.

    Raises:
        ConfigError: a size that is no multiple of the network's strides, and who says so where it is not the user.
    """
    canvas, source = rules.input_size, rules.sources.get("input_size", _OPTION)
    try:
        return _preprocess_spec(rules, canvas)
    except InputSizeError as error:
        if source == _OPTION:
            raise
        raise InputSizeError(
            f"{error.message} The size comes from {source}.", hint=f"{error.hint}; --input-size HxW overrides it"
        ) from error


def _preprocess_spec(rules: Rules, canvas: tuple[int, int] | None) -> PreprocessSpec:
    return PreprocessSpec(
        mean=rules.mean,
        std=rules.std,
        pixel_scale=rules.pixel_scale,
        channel_order=rules.channel_order,
        height=canvas[0] if canvas else None,
        width=canvas[1] if canvas else None,
        shortest=rules.shortest,
        longest=rules.longest,
        size_rule=rules.size_rule,
        resize_filter=rules.resize_filter,
        resize_order=rules.resize_order,
        input_dtype=rules.input_dtype or InputDtype.UINT8,
    )


def decode_spec(rules: Rules, config: FcosConfig) -> DecodeSpec:
    """The post-processing part of the contract."""
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
