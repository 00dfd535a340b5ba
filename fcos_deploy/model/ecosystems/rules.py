"""What an ecosystem decides about a checkpoint, and on whose word."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fcos_deploy.core.contract import Decision
from fcos_deploy.core.enums import CenterMode
from fcos_deploy.core.network import BoxActivation, FcosConfig
from fcos_deploy.core.preprocess_spec import ChannelOrder, InputDtype, ResizeFilter, ResizeOrder, SizeRule
from fcos_deploy.model.ecosystems.renaming import Rename
from fcos_deploy.model.stored_tensor import TensorFacts, flat_values

__all__ = ["Ecosystem", "Evidence", "Rules"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Everything that neither shapes nor arithmetic can tell. ``sources`` says of each field who decided it.

    Pixels are normalised as ``(pixel / pixel_scale - mean) / std`` in ``channel_order``. ``label_offset`` is the label
    of class channel 0. ``class_names`` is indexed by label.
    """

    variant: str = ""
    class_names: tuple[str, ...] = ()
    label_offset: int = 0
    stride_in_1x1: bool = False
    box_activation: BoxActivation = BoxActivation.RELU
    centerness_on_reg: bool = True
    norm_eps: float = 1e-5
    profile: str
    centers: CenterMode
    score_threshold: float
    iou_threshold: float
    pre_nms_top_k: int = 1000
    max_detections: int = 100
    channel_order: ChannelOrder
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pixel_scale: float = 1.0
    resize_filter: ResizeFilter
    resize_order: ResizeOrder = ResizeOrder.RESIZE_FIRST
    size_rule: SizeRule
    input_size: tuple[int, int] | None = None
    shortest: int | None = 800
    longest: int | None = 1333
    input_dtype: InputDtype | None = None
    sources: Mapping[str, str] = field(default_factory=dict)

    def decide(self, source: str, **values: Any) -> Rules:  # Any: the fields have different types
        """The same with ``values`` decided by ``source``; a ``None`` leaves the field as it is."""
        given = {name: value for name, value in values.items() if value is not None}
        sources = {**self.sources, **dict.fromkeys(given, source)}
        return dataclasses.replace(self, **given, sources=sources)

    def decisions(self, *, default_source: str) -> tuple[Decision, ...]:
        """One ``Decision`` a field, in the order above; class names are counted, not listed."""
        found = []
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name == "sources" or value is None or value == "":
                continue
            text = f"{len(value)} names" if item.name == "class_names" else _text(value)
            found.append(Decision(item.name, text, self.sources.get(item.name, default_source)))
        return tuple(found)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a checkpoint shows of itself.

    ``tensors`` have canonical names, ``source_names`` are those in the file; ``network`` is what shapes tell;
    ``metadata`` is what the file holds beside tensors; ``variant`` is what the user said, or ''.
    """

    file_name: str
    tensors: Mapping[str, TensorFacts]
    source_names: frozenset[str]
    network: FcosConfig
    metadata: Mapping[str, Any]  # Any: whatever a training script stored
    variant: str = ""

    def merged_batch_norm(self) -> bool:
        """Whether the body's statistics are 0 and 1, as converted Caffe (MSRA) bodies have them (spec 8.5)."""
        return self._all_near(".running_mean", 0.0, within=0.0) and self._all_near(".running_var", 1.0, within=2e-5)

    def _all_near(self, ending: str, value: float, *, within: float) -> bool:
        """Whether all numbers of the body's tensors with this ending are near ``value``."""
        vectors = (t for n, t in self.tensors.items() if n.startswith("backbone.body.") and n.endswith(ending))
        found = (numbers for numbers in map(flat_values, vectors) if numbers)
        return all(value - within <= min(numbers) and max(numbers) <= value + within for numbers in found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ecosystem:
    """One place where people train FCOS: how its keys look, what they become, and what it leaves unsaid.

    ``signature``: parts of names that all must occur in the names of a checkpoint of this ecosystem.
    ``variants``: the words that ``Evidence.variant`` may be.
    """

    name: str
    signature: tuple[str, ...]
    renames: tuple[Rename, ...]
    rules: Callable[[Evidence], Rules]
    variants: tuple[str, ...] = ()

    def matches(self, names: frozenset[str]) -> bool:
        """Whether every part of the signature occurs in some name."""
        return all(any(part in name for name in names) for part in self.signature)
