"""Corpus B, 43 and 44: schemas, patterns and grammars that cannot be held, refused by the process that judges them.

The cases are those of tests/api/test_structured.py. Different from the corpus for a reason: patterns are matched in
linear time, so a catastrophic one is an ordinary one and is served; a schema of another shape is schema_invalid
whatever its depth.
"""

from __future__ import annotations

import pytest

from tests.api.test_structured import BAD, chat, completion, json_format

pytestmark = pytest.mark.e2e
MORE = {
    "43 depth 5,000": (chat(guided_json='{"items":' * 5000 + "true" + "}" * 5000), 400, None),
    "43 catastrophic pattern in a key": (
        chat(response_format=json_format({"type": "object", "patternProperties": {"(a+)+b(": {}}})),
        400,
        None,
    ),
    "44 pattern of a megabyte": (completion(guided_regex="a" * (1 << 20)), 400, "schema_too_complex"),
}


@pytest.mark.parametrize("name", BAD)
def test_form_that_cannot_be_held_is_refused(stage, name):
    (path, body), code = BAD[name]
    stage.refused(lambda: stage.post(path, {**body, "model": "good"}), 400, code)


@pytest.mark.parametrize("name", MORE)
def test_form_beyond_the_limits_is_refused_within_a_second_of_compiling(stage, name):
    (path, body), status, code = MORE[name]
    with stage.watched():
        answer = stage.post(path, {**body, "model": "good"})
    assert answer.status == status
    assert answer.code in ((code,) if code else ("schema_invalid", "schema_too_complex"))


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|aa)*c", "([ab]*)*c", "((a{1,999}){1,999}){1,999}"])
def test_43_nested_quantifiers_are_harmless(stage, pattern):
    path, body = completion(guided_regex=pattern)
    with stage.watched(admitted=1):
        assert stage.post(path, {**body, "model": "good"}).status == 200


def test_43_remote_reference_is_never_fetched(stage):
    asked = len(stage.web.requests)
    path, body = chat(response_format=json_format({"$ref": f"http://{stage.web.host}/team/schema.json"}))
    stage.refused(lambda: stage.post(path, {**body, "model": "good"}), 400, "schema_invalid")
    assert len(stage.web.requests) == asked


def test_forms_refused_again_cost_nothing(stage):
    stage.check_steady()


def test_44_many_distinct_patterns_leave_caches_bounded(stage):
    """Verdicts and compiled grammars are kept in caches of fixed length: the second three hundred cost what the first did."""

    def ask(first):
        for index in range(first, first + 300):
            path, body = completion(guided_regex=f"[a-c]{{2}}{index}", max_tokens=1)
            assert stage.post(path, {**body, "model": "good"}).status == 200

    ask(0)
    before = stage.footprint()
    ask(1000)
    after = stage.footprint()
    assert after.is_within(before), (before, after)
    assert stage.ask_golden() == stage.golden
