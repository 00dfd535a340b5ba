"""The weights in what a training script saved: every state dict of a network, in whichever container and wrapper."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fcos_deploy.checkpoints.pickle_reader import PickledArray
from fcos_deploy.checkpoints.reader import StoredTensor, TensorFacts
from fcos_deploy.core.checkpoint_options import OPTION
from fcos_deploy.core.errors import CheckpointError, ConfigError
from fcos_deploy.core.text import brief

__all__ = ["StoredWeights", "find_weights"]

_PLAIN = frozenset(
    ("", "state_dict", "model", "model_state_dict", "model_state", "net", "network", "module", "weights", "params")
)
_AVERAGED = re.compile(r"(?:^|[._])(?:ema|swa|averaged|shadow)(?:[._]|$)")
# Components of names that wrappers add, wherever they stand: DataParallel and FSDP, torch.compile, activation
# checkpoints, Lightning's strategies.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|_forward_module)\."
)
_BACKBONE = re.compile(r"(?:^|\.)backbone\.")  # how the tensors of every ecosystem's backbone begin
# What is stored with a network and belongs to its training: counters of thop, buffers of losses and metrics.
_OF_TRAINING = re.compile(
    r"n_averaged|(?:.*\.)?total_(?:ops|params)|(?:criterion|loss(?:es|_\w+)?|metrics?|\w+_metrics?)\..+"
)
# Bounds of a state dict. The largest FCOS has 1,400 tensors with names of 80 characters; weights that are shared
# between modules are stored once and named twice.
_MAX_TENSORS = 20_000
_MAX_NAME = 512
_MAX_SHARED = 8
_DEEPEST = 3  # containers within containers
_SAME_NETWORK = 0.9  # share of names that two sets of weights of one network have in common

_Tensors = dict[str, "StoredTensor | PickledArray"]


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """Tensors by the names that they have in the file, without wrappers' prefixes.

    ``metadata`` is all that the file holds beside them; ``container`` is the key they were under, or ''; ``source``
    says who chose it. ``left_out``: tensors beside them that are not the network's.
    """

    tensors: Mapping[str, TensorFacts]
    metadata: dict[str, Any]  # Any: whatever a training script stored
    container: str
    has_both: bool  # averaged and plain weights
    source: str = ""
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _WeightSet:
    """One state dict: ``name`` is its container's, with the prefix where that tells it from another."""

    name: str
    tensors: _Tensors
    left_out: tuple[str, ...] = ()

    @property
    def is_averaged(self) -> bool:
        return _AVERAGED.search(self.name.lower()) is not None


def find_weights(content: object, *, prefer: str = "") -> StoredWeights:
    """The state dict in the contents of a file.

    ``prefer`` is 'ema', 'model', the name of a container, or '' for the averaged weights where there are any, which is
    what torchvision's reference scripts evaluate.

    Raises:
        CheckpointError: when there is none, or a tensor reaches beyond the file.
        ConfigError: when ``prefer`` asks for weights that the file does not hold, or has to say which.
    """
    if not isinstance(content, dict):
        raise CheckpointError(
            f"The file holds a {type(content).__name__}, expected a dict of tensors.",
            hint="save the weights: torch.save(model.state_dict(), path)",
        )
    state_dicts = list(_state_dicts(content, seen=set()))
    if any(len(tensors) > _MAX_TENSORS or max(map(len, tensors)) > _MAX_NAME for _, tensors in state_dicts):
        raise CheckpointError("The file has more tensors, or longer names, than an FCOS can have.")
    sets = _of_one_network([item for path, tensors in state_dicts for item in _split(path, tensors)])
    if not sets:
        keys = ", ".join(map(brief, list(content)[:6]))
        raise CheckpointError(f"The file holds no tensors, only {keys or 'nothing'}.")
    swapped = _is_of_mmengine(content)
    chosen, source = _choose(sets, prefer=prefer, swapped=swapped)
    for name, value in chosen.tensors.items():
        try:
            value.check()
        except CheckpointError as error:
            raise CheckpointError(f"Tensor '{name}': {error.message}", hint=error.hint) from error
    metadata: dict[str, Any] = {
        name: chosen.tensors[name] for name in ("pixel_mean", "pixel_std") if name in chosen.tensors
    }
    containers = {item.name.partition(".")[0] for item in sets}
    metadata |= {
        key: value
        for key, value in content.items()
        if key not in containers and not isinstance(value, (StoredTensor, PickledArray))
    }
    both = any(item.is_averaged for item in sets) and not all(item.is_averaged for item in sets)
    return StoredWeights(chosen.tensors, metadata, chosen.name, both, source, chosen.left_out)


def _refuse_multiples(tensors: Iterable[StoredTensor | PickledArray]) -> None:
    """Raise CheckpointError when many tensors repeat few stored bytes: loaded they would take terabytes."""
    stored: dict[object, int] = {}
    claimed, file_size = 0, 0
    for tensor in tensors:
        stored[tensor.stored_at] = tensor.stored_bytes
        claimed += tensor.nbytes
        # Entries of a zip file may overlap.
        file_size = max(file_size, tensor.storage.archive.size if isinstance(tensor, StoredTensor) else sys.maxsize)
    if claimed > _MAX_SHARED * min(file_size, sum(stored.values())):
        raise CheckpointError(f"The tensors together have more than {_MAX_SHARED} times the numbers that are stored.")


def _state_dicts(
    content: Mapping[Any, Any], path: str = "", depth: int = 0, *, seen: set[int]
) -> Iterator[tuple[str, _Tensors]]:
    """Every mapping of names to tensors in ``content``, with the keys that lead to it; each once, as ``seen`` tells."""
    if id(content) in seen:
        return
    seen.add(id(content))
    tensors = {n: v for n, v in content.items() if isinstance(n, str) and isinstance(v, (StoredTensor, PickledArray))}
    if tensors:
        yield path, tensors
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Mapping) and depth < _DEEPEST:
            yield from _state_dicts(value, f"{path}.{key}".removeprefix("."), depth + 1, seen=seen)


def _split(path: str, stored: _Tensors) -> list[_WeightSet]:
    """The networks in one mapping: one for each prefix under which there is a backbone.

    Raises:
        CheckpointError: two names differ only by a wrapper, or FSDP has flattened the parameters.
    """
    flat = next((name for name in stored if "_flat_param" in name), None)
    if flat is not None:
        raise CheckpointError(
            f"'{flat}' holds parameters that FSDP has flattened.", hint="save a full state dict (FULL_STATE_DICT)"
        )
    tensors: _Tensors = {}
    for name, value in stored.items():
        plain = _WRAPPERS.sub("", name)
        if plain in tensors:
            raise CheckpointError(f"Tensor '{plain}' is stored twice, by the names of two wrappers.")
        tensors[plain] = value
    prefixes = Counter(name[: m.end() - len("backbone.")] for name in tensors if (m := _BACKBONE.search(name)))
    if not prefixes:
        return [_WeightSet(path, {n: v for n, v in tensors.items() if n != "n_averaged"})]
    sets = []
    # Longer prefixes first, so that the shortest, which may be empty, gets what is left.
    for prefix in sorted(prefixes, key=len, reverse=True):
        own = [name for name in tensors if name.startswith(prefix)]
        of_network = {name.removeprefix(prefix): tensors.pop(name) for name in own}
        left_out = tuple(name for name in of_network if _OF_TRAINING.fullmatch(name))
        kept = {name: value for name, value in of_network.items() if name not in left_out}
        name = ".".join(filter(None, (path, prefix.rstrip(".") if len(prefixes) > 1 else "")))
        sets.append(_WeightSet(name, kept, left_out))
    beside = tuple(sorted(tensors))  # under none of the prefixes
    return [_WeightSet(item.name, item.tensors, (*item.left_out, *beside)) for item in reversed(sets)]


def _of_one_network(sets: list[_WeightSet]) -> list[_WeightSet]:
    """The largest set, and those of the same network: optimizers' states are not."""
    backbones = [item for item in sets if any(_BACKBONE.match(name) for name in item.tensors)]
    candidates = backbones or sets
    if not candidates:
        return []
    largest = max(candidates, key=lambda item: len(item.tensors))
    needed = _SAME_NETWORK * len(largest.tensors)
    return [item for item in candidates if len(item.tensors.keys() & largest.tensors.keys()) >= needed]


def _is_of_mmengine(content: Mapping[Any, Any]) -> bool:
    """Whether mmengine wrote the file: its EMA hook swaps, so that ``state_dict`` holds the averaged weights."""
    meta = content.get("meta")
    return "message_hub" in content or (isinstance(meta, Mapping) and "mmengine_version" in meta)


def _choose(sets: list[_WeightSet], *, prefer: str, swapped: bool) -> tuple[_WeightSet, str]:
    """The set that is asked for, or the one that the file's own convention evaluates, and who decided it."""
    averaged = [item for item in sets if item.is_averaged]
    plain = [item for item in sets if item.name.rpartition(".")[2] in _PLAIN and not item.is_averaged]
    names = ", ".join(f"'{item.name}'" if item.name else "the file's own" for item in sets)
    if swapped and len(averaged) == len(plain) == 1:
        averaged, plain = plain, averaged
    named = [item for item in sets if prefer and item.name == prefer]
    if prefer == "ema" and not (named or averaged):
        raise ConfigError("The file holds no averaged (EMA) weights.", hint="leave --weights out")
    if prefer and not named:
        named = {"ema": averaged, "model": plain or (sets if len(sets) == 1 else [])}.get(prefer, [])
    if len(named) == 1:
        return named[0], OPTION
    if prefer and not named:
        raise ConfigError(f"The file holds no weights '{prefer}', only {names}.", hint="--weights NAME, one of these")
    if not prefer and len(sets) == 1:
        return sets[0], "the only weights in the file"
    if not prefer and len(sets) == 2 and len(averaged) == len(plain) == 1:
        rule = (
            "mmengine's: 'state_dict' has the averaged weights" if swapped else "averaged weights are what is evaluated"
        )
        return averaged[0], f"rule: {rule}; '{plain[0].name}' has the others"
    raise ConfigError(
        f"The file holds {len(sets)} sets of weights: {names}. Which of them was evaluated, it does not say.",
        hint="choose one with --weights NAME",
    )
