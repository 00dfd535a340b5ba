"""A feed for a graph whose converted form is to be compared with it."""

from __future__ import annotations

from collections.abc import Mapping

from exporters.step_check import Feeds, provoking_feed
from fcos_deploy.core.contract import ModelContract

__all__ = ["feed_of"]


def feed_of(contract: ModelContract, shapes: Mapping[str, tuple[int | None, ...]]) -> Feeds:
    """A feed that provokes differences; ``shapes`` are those of the graph's inputs, None is a dynamic axis.

    Dynamic axes become a batch of 1, and the canvas or, without one, twice the coarsest stride.
    """
    side = 2 * max(contract.decode.strides)
    height, width = contract.preprocess.canvas or (side, side)
    n, _, h, w = shapes["images"]
    return provoking_feed(
        (n or 1, 3, h or height, w or width),
        dtype=str(contract.preprocess.input_dtype),
        image_sizes="image_sizes" in shapes,
    )
