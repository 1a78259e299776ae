import pytest
from hypothesis import given
from hypothesis import strategies as st

from attribution.errors import SplitError
from attribution.money import PPM, split
from attribution.shares import adapter_shares, parse_weight

weight_maps = st.dictionaries(st.text(max_size=8), st.integers(0, 10**30), min_size=1, max_size=40).filter(
    lambda weights: any(weights.values())
)


@given(st.integers(0, 2**96), weight_maps, st.binary(max_size=32))
def test_split_sums_exactly_and_stays_within_one_wei(total, weights, tie):
    shares = split(total, weights, tie)

    assert sum(shares.values()) == total
    assert list(shares) == list(weights)
    weight_sum = sum(weights.values())
    for key, weight in weights.items():
        assert shares[key] >= 0
        assert abs(shares[key] * weight_sum - total * weight) < weight_sum
        assert weight > 0 or shares[key] == 0


@given(st.integers(0, 2**96), weight_maps, st.binary(max_size=32), st.randoms())
def test_split_order_of_the_weights_changes_nothing(total, weights, tie, random):
    pairs = list(weights.items())
    random.shuffle(pairs)

    assert split(total, dict(pairs), tie) == split(total, weights, tie)


@given(st.integers(0, 10**6), st.integers(1, 20))
def test_split_a_larger_weight_never_gets_less(total, count):
    shares = split(total, {str(i): i for i in range(1, count + 1)}, b"")

    assert list(shares.values()) == sorted(shares.values())


def test_split_golden_vectors_match(vectors):
    for case in vectors("split.json")["cases"]:
        weights = {share["id"]: int(share["weight"]) for share in case["shares"]}
        expected = {share["id"]: int(share["amount"]) for share in case["shares"]}
        assert split(int(case["total"]), weights, bytes.fromhex(case["tie"][2:])) == expected


def test_split_equal_remainders_fall_to_someone_else_under_another_tie():
    lucky = {next(key for key, share in split(1, dict.fromkeys("abc", 1), bytes([n])).items() if share) for n in range(64)}

    assert lucky == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("total", "weights", "words"),
    [
        (1, {}, "none of the 0 weights"),
        (5, {"a": 0, "b": 0}, "none of the 2 weights"),
        (0, {"a": 0}, "none of the 1 weights"),
        (1, {"a": 2, "b": -1}, "-1 is negative"),
        (-1, {"a": 1}, "total is -1"),
    ],
)
def test_split_without_an_answer_is_refused(total, weights, words):
    with pytest.raises(SplitError, match=words):
        split(total, weights, b"")


@given(
    st.dictionaries(
        st.text("0123456789abcdef", min_size=4, max_size=4),
        st.decimals(min_value=-999, max_value=999, places=6).map(lambda value: format(value, "f")),
        min_size=1,
        max_size=8,
    ).filter(lambda weights: any(float(text) for text in weights.values()))
)
def test_adapter_shares_sum_to_a_million_by_magnitude(weights):
    weights = {key: "0" if float(text) == 0 else text for key, text in weights.items()}
    shares = adapter_shares(weights, b"tie")

    assert sum(shares.values()) == PPM
    assert shares == adapter_shares({key: text.lstrip("-") for key, text in weights.items()}, b"tie")


def test_adapter_shares_of_one_and_of_a_subtraction():
    assert adapter_shares({"a": "0.3"}, b"") == {"a": PPM}
    assert adapter_shares({"a": "1.5", "b": "-0.5"}, b"") == {"a": 750_000, "b": 250_000}


@pytest.mark.parametrize("text", ["", "1e3", "+1", ".5", "01", "1.", "0x1", "NaN", "١", "1" * 10, "0." + "1" * 19, " 1", "1\n"])
def test_parse_weight_anything_but_a_plain_decimal_is_refused(text):
    with pytest.raises(SplitError, match="plain decimal"):
        parse_weight(text)


def test_parse_weight_is_exact():
    assert parse_weight("-0.1") == -(10**17)
    assert parse_weight("999999999.000000000000000001") == 999999999 * 10**18 + 1
