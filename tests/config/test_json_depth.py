"""Nesting, judged before parsing."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.json_depth import nests_deeper_than

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=20,
)


def _depth(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0


@given(VALUES)
def test_nests_deeper_than_agrees_with_the_parsed_value(value: object) -> None:
    text, depth = json.dumps(value).encode(), _depth(value)
    assert not nests_deeper_than(text, depth)
    assert depth == 0 or nests_deeper_than(text, depth - 1)


@pytest.mark.parametrize("text", [b"[" * 200_000, b'{"a":' * 200_000, b'"' + b"[" * 100 + b'" [[['])
def test_nests_deeper_than_reads_what_no_parser_should(text: bytes) -> None:
    assert nests_deeper_than(text, 2)


def test_nests_deeper_than_ignores_brackets_inside_strings() -> None:
    assert not nests_deeper_than(rb'{"a": "[[[[\"[[[["}', 1)
