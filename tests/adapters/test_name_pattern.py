from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.adapters.name_pattern import NamePattern, PatternSyntaxError, StepBudget
from node.errors import AdapterInvalidError

ATOMS = st.sampled_from(["a", "b", ".", r"\.", r"\d", r"\w", "[ab]", "[^a]", "[a-c1]", "q_proj", "^", "$", r"\b", "-"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map("".join),
        st.tuples(inner, inner).map("|".join),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{,2}", "{2,}", "*?"])).map(
            lambda p: f"(?:{p[0]}){p[1]}"
        ),
        inner.map(lambda source: f"({source})"),
    ),
    max_leaves=8,
)
NAMES = st.text(alphabet="abc1._q-", max_size=10)


@settings(max_examples=300, deadline=None)
@given(source=PATTERNS, name=NAMES)
def test_pattern_any_source_matches_what_re_matches(source, name):
    pattern = NamePattern.compile(source)

    assert pattern.matches_all(name, StepBudget()) == (re.fullmatch(source, name) is not None)
    assert pattern.matches_start(name, StepBudget()) == (re.match(source, name) is not None)


@pytest.mark.parametrize(
    "source", ["(?=a)", "(?i)a", r"(a)\1", "(?P<n>a)", "a++", "(", ")", "a{3,2}", "*a", "[b-a]", "a{2000}", "[a"]
)
def test_compile_syntax_not_understood_says_so(source):
    with pytest.raises(PatternSyntaxError):
        NamePattern.compile(source)


@pytest.mark.parametrize(
    "source", ["(((a{1000}){1000}){1000})", "(((){1000}){1000}){1000}" * 3 + "a{1000}" * 30, "(" * 100 + ")" * 100]
)
def test_compile_explosive_repeats_are_bounded(source):
    with pytest.raises(PatternSyntaxError):
        NamePattern.compile(source)


def test_matches_catastrophic_pattern_takes_few_steps():
    pattern = NamePattern.compile("(a+)+$")

    assert not pattern.matches_all("a" * 200 + "b", StepBudget(10_000))


def test_matches_beyond_the_budget_is_refused():
    pattern = NamePattern.compile("(.*.*.*)*x")

    with pytest.raises(AdapterInvalidError) as caught:
        pattern.matches_all("a" * 500, StepBudget(100))

    assert caught.value.error_code == "adapter_config_invalid"
