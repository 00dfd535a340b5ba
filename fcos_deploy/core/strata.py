"""Choosing some of many images so that what they show is spread as in all of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TypeVar

import numpy as np

__all__ = ["object_stratum", "stratified"]

Key = TypeVar("Key", str, int)


def object_stratum(classes: Iterable[int], *, longest_side: float) -> str:
    """An image's combination of classes, and the octave of its largest object's longer side: one pyramid level each."""
    return f"{'+'.join(map(str, sorted(set(classes))))}@{int(math.log2(max(longest_side, 1.0)))}"


def stratified(strata: Mapping[Key, str], *, count: int, seed: int) -> list[Key]:
    """``count`` keys in proportion to their strata, and at least one of every stratum while there is room.

    The k-th of n members of a stratum ranks at (k + 0.5) / n, its first at 0. The ``count`` lowest ranks of all strata
    then are the first of each, and after that the same share of each; a larger count only adds keys.
    """
    members: dict[str, list[Key]] = defaultdict(list)
    for key in sorted(strata):
        members[strata[key]].append(key)
    ranked = []
    for index, (stratum, keys) in enumerate(sorted(members.items())):
        order = np.random.default_rng([seed, index]).permutation(len(keys))
        for place, member in enumerate(order):
            share = 0.0 if place == 0 else (place + 0.5) / len(keys)
            ranked.append((share, -len(keys), stratum, keys[member]))
    return [key for *_, key in sorted(ranked)[:count]]
