"""mmdetection's configuration text, read as data."""

from __future__ import annotations

import pytest

from fcos_deploy.checkpoints.ecosystems.mmdetection import UNKNOWN, parse_config


def test_configuration_text_is_never_evaluated() -> None:
    config = parse_config(
        "import os\na = os.system('false')\nb = dict(c=[1, -2.5, (3,)], d=a, e={'f': None}, **a)\ng = b"
    )
    assert config["a"] is UNKNOWN
    assert config["g"] == {"c": [1, -2.5, [3]], "d": UNKNOWN, "e": {"f": None}}


@pytest.mark.parametrize("text", ["def (", "a = " + "(" * 5000, "\0", "x" * 3_000_000, "a = " + "-" * 100_000 + "1"])
def test_configuration_text_that_is_no_python_is_ignored(text: str) -> None:
    assert parse_config(text) == {}
