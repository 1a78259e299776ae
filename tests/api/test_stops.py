"""Stop strings: chunking never matters, and no part of one is ever shown."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from node.api.stops import StopMatcher

TEXT = st.text(alphabet="abc", max_size=40)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=3).map(tuple)


def run(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    shown = "".join(matcher.feed(piece) for piece in pieces)
    return shown + matcher.finish(), matcher.is_matched


@given(STOPS, TEXT, st.lists(st.integers(0, 40)))
def test_result_does_not_depend_on_the_pieces(stops, text, cuts):
    marks = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[start:stop] for start, stop in pairwise(marks)]
    assert run(stops, pieces) == run(stops, list(text)) == run(stops, [text])


@given(STOPS, TEXT)
def test_shown_text_is_the_text_before_the_first_completed_stop(stops, text):
    shown, is_matched = run(stops, list(text))
    assert text.startswith(shown)
    assert is_matched == any(stop in text for stop in stops)
    assert not any(stop in shown for stop in stops)
    if not is_matched:
        assert shown == text
    else:
        assert any(text[len(shown) :].startswith(stop) for stop in stops)


def test_possible_beginning_is_held_back_until_it_is_refuted():
    matcher = StopMatcher(("abcd",))
    assert matcher.feed("xab") == "x"
    assert matcher.feed("c") == ""
    assert matcher.feed("x") == "abcx"


def test_nothing_is_shown_after_a_match():
    matcher = StopMatcher(("b",))
    assert matcher.feed("ab") == "a"
    assert matcher.feed("more") == ""
    assert matcher.finish() == ""
