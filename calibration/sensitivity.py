"""Which layers hurt: each is quantized alone, and its effect on detections measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.calibration_file import Calibration
from calibration.effects import DetectionEffect, EffectMeter
from calibration.engines import open_engine
from calibration.feeds import Feeder
from calibration.graph import ConvGraph
from calibration.placement import Placement
from calibration.qdq import quantized_model
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.enums import Tail
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.progress import ProgressFn, no_progress

__all__ = ["LayerSensitivity", "measure_sensitivity"]

Remember = Callable[["LayerSensitivity"], None]


@dataclass(frozen=True, slots=True)
class LayerSensitivity:
    """The effect of quantizing this layer and nothing else."""

    layer: str
    effect: DetectionEffect


def measure_sensitivity(
    graph: ConvGraph,
    calibration: Calibration,
    *,
    contract: ModelContract,
    policy: Placement,
    pictures: Sequence[NDArray[np.uint8]],
    known: Mapping[str, LayerSensitivity] | None = None,
    remember: Remember | None = None,
    progress: ProgressFn = no_progress,
) -> tuple[LayerSensitivity, ...]:
    """All layers that ``policy`` would quantize, the most harmful first.

    ``known`` holds measurements of an interrupted run, ``remember`` is called with every new one.

    Raises:
        ConfigError: the graph does not end in raw outputs.
    """
    if contract.tail is not Tail.RAW:
        raise ConfigError(f"Sensitivity needs the raw tail, the graph has '{contract.tail}'.", hint="export --tail raw")
    known = known or {}
    feeder = Feeder(graph.model, contract)
    feeds = [feeder(picture) for picture in pictures]
    reference = open_engine("onnxruntime", graph.model)
    wanted = [reference(feed) for feed in feeds]
    layers = quantizable_layers(graph, policy)
    found = []
    for index, layer in enumerate(layers):
        progress("measuring layers", index, len(layers))
        if layer not in known:
            others = set(graph.layers) - {layer}
            model = quantized_model(graph, calibration, policy=policy, keep_float=others)
            known = {**known, layer: LayerSensitivity(layer, _effect(model, feeds, wanted))}
            if remember is not None:
                remember(known[layer])
        found.append(known[layer])
    progress("measuring layers", len(layers), len(layers))
    return tuple(sorted(found, key=lambda item: (-item.effect.total, item.layer)))


def quantizable_layers(graph: ConvGraph, policy: Placement) -> tuple[str, ...]:
    """Layers with a convolution that the placement does not keep float itself."""
    convs = (c for c in graph.convs if not (policy.keep_predictions and c.is_prediction))
    return tuple(dict.fromkeys(conv.layer for conv in convs))


def _effect(
    model: Any, feeds: Sequence[Mapping[str, NDArray[Any]]], wanted: Sequence[Mapping[str, NDArray[Any]]]
) -> DetectionEffect:
    run = open_engine("onnxruntime", model)
    meter = EffectMeter()
    for feed, reference in zip(feeds, wanted, strict=True):
        meter.add(reference, run(feed))
    return meter.effect
