"""Finds out what a checkpoint is from names, shapes and metadata: no network is built, and torch is not needed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fcos_deploy.core.checkpoint_options import AUTO, CheckpointOptions
from fcos_deploy.core.contract import Decision, ModelContract
from fcos_deploy.core.errors import CheckpointError, ConfigError
from fcos_deploy.core.network import FcosConfig
from fcos_deploy.model.decide import decode_spec, final_rules, preprocess_spec
from fcos_deploy.model.ecosystems import detect_ecosystem, ecosystem
from fcos_deploy.model.ecosystems.renaming import canonical, refuse_unsupported
from fcos_deploy.model.ecosystems.rules import Ecosystem, Evidence
from fcos_deploy.model.safe_load import open_checkpoint
from fcos_deploy.model.state_dict import StoredWeights, find_weights
from fcos_deploy.model.stored_tensor import TensorFacts
from fcos_deploy.model.structure import infer_network

__all__ = ["CheckpointDescription", "describe_checkpoint", "describe_weights"]

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
        return ecosystem(options.ecosystem)
    if "ecosystem" in stated:
        return ecosystem(stated["ecosystem"])
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
