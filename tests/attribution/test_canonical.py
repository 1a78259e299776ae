import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attribution import canonical
from attribution.errors import CanonicalError

plain_text = st.text(st.characters(exclude_categories=["Cs"]))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-canonical.MAX_INTEGER, canonical.MAX_INTEGER) | plain_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(plain_text, inner, max_size=4),
    max_leaves=20,
)


@given(json_values)
def test_dumps_read_again_gives_the_same_value_and_bytes(value):
    data = canonical.dumps(value)

    assert canonical.loads(data) == value
    assert canonical.dumps(canonical.loads(data)) == data


@given(st.dictionaries(plain_text, st.integers(0, 9), min_size=2), st.randoms())
def test_dumps_of_shuffled_keys_is_the_same(value, random):
    pairs = list(value.items())
    random.shuffle(pairs)

    assert canonical.dumps(dict(pairs)) == canonical.dumps(value)


def test_dumps_golden_vectors_match(vectors):
    for case in vectors("canonical.json")["cases"]:
        data = canonical.dumps(case["value"])
        assert data.hex() == case["utf8_hex"]
        assert hashlib.sha256(data).hexdigest() == case["sha256"] == canonical.digest(case["value"])


def test_dumps_keys_beyond_the_basic_plane_sort_by_utf16_units():
    # U+1F600 is D83D DE00 in UTF-16 and so comes before U+FB33, unlike in code point order.
    assert canonical.dumps({"\ufb33": 1, "\U0001f600": 2}) == '{"\U0001f600":2,"\ufb33":1}'.encode()


@pytest.mark.parametrize("value", [1.0, 0.1, float("nan"), {"a": [1.5]}, {1: 2}, {"a": b"x"}, {"a": {1, 2}}])
def test_dumps_other_types_are_type_errors(value):
    with pytest.raises(TypeError):
        canonical.dumps(value)


@pytest.mark.parametrize("value", [2**53, -(2**53), "\ud800", {"a": ["\udc00"]}])
def test_dumps_values_without_a_canonical_form_are_refused(value):
    with pytest.raises(CanonicalError):
        canonical.dumps(value)


def test_dumps_too_deep_is_refused():
    value = []
    for _ in range(canonical.MAX_DEPTH + 1):
        value = [value]

    with pytest.raises(CanonicalError, match="nests"):
        canonical.dumps(value)


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":1,"a":2}',
        b'{"x":{"a":1,"a":1}}',
        b"1.0",
        b"1e3",
        b"NaN",
        b"-Infinity",
        b"9007199254740992",
        b"1" * 5000,
        b"{",
        b'"\xff"',
        b"[" * 100_000,
        b"",
    ],
)
def test_loads_outside_the_subset_is_refused(data):
    with pytest.raises(CanonicalError):
        canonical.loads(data)


def test_loads_beyond_the_limit_names_both_sizes():
    with pytest.raises(CanonicalError, match="12 bytes; the limit is 10"):
        canonical.loads(json.dumps("a" * 10).encode(), max_bytes=10)
