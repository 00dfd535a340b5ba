"""Contracts survive JSON, and nothing else does."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcos_deploy.core.contract import Decision, ModelContract
from fcos_deploy.core.decode import PROFILES, DecodeSpec, PostprocessProfile
from fcos_deploy.core.enums import Precision, Tail
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.preprocess import ChannelOrder, InputDtype, PreprocessSpec, ResizeFilter, SizeRule
from fcos_deploy.core.serialize import from_json, parse_toml, to_json

positive = st.floats(1e-3, 1e3)
triples = st.tuples(positive, positive, positive)
text = st.text(max_size=12)

canvases = st.sampled_from(ChannelOrder).flatmap(
    lambda order: st.builds(
        PreprocessSpec,
        mean=st.tuples(positive) if order is ChannelOrder.GRAY else triples,
        std=st.tuples(positive) if order is ChannelOrder.GRAY else triples,
        height=st.integers(1, 50).map(lambda n: 32 * n),
        width=st.integers(1, 50).map(lambda n: 32 * n),
        channel_order=st.just(order),
        resize_filter=st.sampled_from(ResizeFilter),
    )
)
edges = st.builds(
    PreprocessSpec,
    mean=triples,
    std=triples,
    shortest=st.integers(1, 2000),
    longest=st.integers(1, 4000),
    size_rule=st.sampled_from([rule for rule in SizeRule if rule not in {SizeRule.LETTERBOX, SizeRule.STRETCH}]),
    input_dtype=st.sampled_from(InputDtype),
)
decodes = st.builds(
    DecodeSpec,
    profile=st.sampled_from(list(PROFILES.values())),
    score_threshold=st.floats(0, 0.999),
    iou_threshold=st.floats(0.01, 1),
    pre_nms_top_k=st.integers(1, 5000),
    label_map=st.lists(st.integers(0, 1000)).map(tuple),
)
contracts = st.builds(
    ModelContract,
    class_names=st.lists(text, min_size=1, max_size=5).map(tuple),
    preprocess=canvases | edges,
    decode=decodes,
    tail=st.sampled_from(Tail),
    precision=st.sampled_from(Precision),
    decisions=st.lists(st.builds(Decision, name=text, value=text, source=text), max_size=3).map(tuple),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=150, deadline=None)
@given(contract=contracts)
def test_contracts_come_back_equal(contract: ModelContract) -> None:
    through_text = json.loads(json.dumps(to_json(contract)))
    assert from_json(ModelContract, through_text) == contract


def example() -> ModelContract:
    return ModelContract(
        class_names=("a", "b"),
        preprocess=PreprocessSpec(mean=(1.0, 2.0, 3.0), std=(1.0, 1.0, 1.0), height=64, width=64),
        decode=DecodeSpec(profile=PROFILES["torchvision"], score_threshold=0.2, iou_threshold=0.6),
        decisions=(Decision("stride_in_1x1", "True", "the file"),),
    )


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, item in items for p in _paths(item, (*path, key)))]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_is_a_config_error_or_another_valid_contract(data: st.DataObject) -> None:
    """One value of the JSON is replaced by anything: never another exception, never another type inside."""
    value = json.loads(json.dumps(to_json(example())))
    path = data.draw(st.sampled_from(_paths(value)))
    damage = data.draw(json_values)
    if not path:
        value = damage
    else:
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = damage
    try:
        contract = from_json(ModelContract, value)
    except ConfigError:
        return
    assert from_json(ModelContract, json.loads(json.dumps(to_json(contract)))).class_names == contract.class_names
    assert isinstance(contract.decode.profile, PostprocessProfile)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tail": "head"}, r"contract\.tail must be one of raw, candidates, nms, got 'head'"),
        ({"class_names": "ab"}, r"contract\.class_names must be an array, got 'ab'"),
        ({"class_names": ["a", 1]}, r"contract\.class_names\[1\] must be str, got 1"),
        ({"decode": None}, r"contract\.decode must be an object"),
        ({"schema_version": True}, r"contract\.schema_version must be int, got True"),
        ({"schema_version": 2}, "schema version 2"),
        ({"future": 1}, r"contract has unknown keys 'future'"),
    ],
)
def test_message_names_the_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_json(ModelContract, {**to_json(example()), **change}, where="contract")


def test_missing_keys_are_named() -> None:
    value = to_json(example())
    del value["decode"], value["class_names"]
    with pytest.raises(ConfigError, match=r"ModelContract lacks \['class_names', 'decode'\]"):
        from_json(ModelContract, value)


def test_integers_stand_for_floats_but_not_beyond_their_range() -> None:
    value = to_json(example())
    value["preprocess"]["mean"] = [1, 2, 3]
    assert from_json(ModelContract, value) == example()
    value["preprocess"]["mean"] = [1, 2, 10**400]
    with pytest.raises(ConfigError, match=r"mean\[2\] must be float"):
        from_json(ModelContract, value)


def test_keys_with_defaults_may_be_missing() -> None:
    value = to_json(replace(example(), decisions=()))
    del value["decisions"], value["precision"]
    assert from_json(ModelContract, value) == replace(example(), decisions=())


@dataclass(frozen=True)
class _Nested:
    numbers: tuple[int, ...]
    pair: tuple[str, float] | None = None
    table: dict[str, tuple[int, ...]] = field(default_factory=dict)


def test_tuples_dicts_and_optionals() -> None:
    nested = _Nested((1, 2), ("a", 0.5), {"x": (3,), "y": ()})
    assert from_json(_Nested, to_json(nested)) == nested
    with pytest.raises(ConfigError, match=r"_Nested\.pair must be an array of 2"):
        from_json(_Nested, {"numbers": [], "pair": ["a"]})
    with pytest.raises(ConfigError, match=r"_Nested\.table\.x\[0\] must be int"):
        from_json(_Nested, {"numbers": [], "table": {"x": [0.5]}})


@pytest.mark.parametrize(
    "text",
    [
        ".".join(["a"] * 20_000) + " = 1",  # read in time that grows with the square
        "[" + ".".join(["a"] * 20_000) + "]",
        "a = {" + ".".join(["a"] * 20_000) + " = 1}",
        "a = " + "[" * 20_000 + "]" * 20_000,
        "a = " + "9" * 100_000,
        "a = 1\n" * 100_000,
    ],
)
def test_toml_that_takes_for_ever_is_refused_at_once(text: str) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"\w"):
        parse_toml(text)
    assert time.monotonic() - started < 2


def test_toml_as_people_write_it_is_read() -> None:
    text = 'classes = ["a.b", "c"]\nmean = [0.1, 0.2, 0.3]\n[a.b.c]\nd.e = 1.5 # ' + "." * 60
    assert parse_toml(text)["a"]["b"]["c"]["d"]["e"] == 1.5
