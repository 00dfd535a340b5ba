"""Fixtures that every test may use: the golden references and small real models."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Outputs of the original libraries on deterministic weights."""
    return TESTS / "golden" / "data"


@pytest.fixture(scope="session")
def state_dict_keys_dir() -> Path:
    """Names and shapes of the tensors of real checkpoints."""
    return TESTS / "data" / "state_dict_keys"
