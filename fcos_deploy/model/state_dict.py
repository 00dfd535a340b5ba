"""Finds the weights in what a training script saved (spec 8)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fcos_deploy.core.errors import CheckpointError, ConfigError
from fcos_deploy.model.pickle_stubs import PickledArray
from fcos_deploy.model.stored_tensor import StoredTensor, TensorFacts

__all__ = ["StoredWeights", "find_weights"]

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
