"""The sentence at the top of a report, whose bound the largest drop must keep."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from fcos_deploy.pipeline.report import report_verdict


def measured(*drops: float) -> Any:
    candidates = [SimpleNamespace(drop=SimpleNamespace(value=d), scores=SimpleNamespace(images=40)) for d in drops]
    return cast("Any", SimpleNamespace(verdicts=[], candidates=candidates))


@pytest.mark.parametrize(
    ("drops", "sentence"),
    [
        ((0.0052, 0.0028), "All 2 variants are within 0.006 AP of the reference on 40 images."),
        ((0.0108,), "The variant is within 0.011 AP of the reference on 40 images."),
        ((-0.002, 0.0004), "All 2 variants are as accurate as the reference on 40 images."),
    ],
)
def test_the_bound_is_never_less_than_the_largest_drop(drops: tuple[float, ...], sentence: str) -> None:
    assert report_verdict(measured(*drops)).headline == sentence
