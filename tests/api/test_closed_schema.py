"""Objects that list their properties hold those alone, unless their schema says otherwise."""

from __future__ import annotations

import copy

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.api import grammar_text
from node.api.closed_schema import closed

A = {"type": "object", "properties": {"a": {"type": "integer"}}}
SHUT = {**A, "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (A, SHUT),
        ({"type": "array", "items": A}, {"type": "array", "items": SHUT}),
        ({"anyOf": [A, {"type": "null"}]}, {"anyOf": [SHUT, {"type": "null"}]}),
        ({"$defs": {"P": A}, "$ref": "#/$defs/P"}, {"$defs": {"P": SHUT}, "$ref": "#/$defs/P"}),
        ({"$defs": {"P": A}, "allOf": [{"$ref": "#/$defs/P"}]}, {"$defs": {"P": SHUT}, "allOf": [{"$ref": "#/$defs/P"}]}),
        (
            {"type": "object", "properties": {"properties": A}},
            {"type": "object", "properties": {"properties": SHUT}, "additionalProperties": False},
        ),
        ({"properties": {}}, {"properties": {}, "additionalProperties": False}),
    ],
)
def test_object_that_lists_its_properties_is_closed(schema, expected):
    before = copy.deepcopy(schema)
    assert closed(schema) == expected
    assert schema == before


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {**A, "additionalProperties": True},
        {**A, "additionalProperties": {"type": "string"}},
        {**A, "patternProperties": {"^x": {}}},
        {**A, "required": ["b"]},
        {**A, "minProperties": 2},
        {**A, "anyOf": [{"required": ["a"]}, {"properties": {"b": {}}}]},
        {"allOf": [A, {"type": "object", "properties": {"b": {}}}]},
        {"if": A, "then": A},
        {"enum": [A]},
        {"const": {"properties": {"a": 1}}},
    ],
)
def test_schema_that_says_otherwise_or_combines_is_left_as_it_is(schema):
    assert closed(schema) == schema


NAMES = st.sampled_from("abc")
SCHEMAS = st.recursive(
    st.sampled_from([{"type": "integer"}, {"type": "string"}, {}]),
    lambda inner: (
        st.builds(
            lambda properties, required: {"type": "object", "properties": properties, "required": required},
            st.dictionaries(NAMES, inner, max_size=3),
            st.lists(NAMES, unique=True, max_size=2),
        )
        | st.builds(lambda item: {"type": "array", "items": item}, inner)
        | st.builds(lambda first, second: {"anyOf": [first, second]}, inner, inner)
    ),
    max_leaves=5,
)
VALUES = st.recursive(
    st.integers() | st.text("xy", max_size=2),
    lambda inner: st.dictionaries(NAMES, inner, max_size=3) | st.lists(inner, max_size=2),
    max_leaves=6,
)


@given(SCHEMAS, VALUES)
def test_what_follows_the_closed_schema_follows_the_schema(schema, value):
    if jsonschema.Draft202012Validator(closed(schema)).is_valid(value):
        assert jsonschema.Draft202012Validator(schema).is_valid(value)


def test_grammar_of_a_schema_is_of_the_closed_one():
    assert '"additionalProperties": false' in grammar_text.of_schema(A)
    assert '"additionalProperties": true' in grammar_text.of_schema({**A, "additionalProperties": True})
