"""Corpus B, 49: API keys that are missing, wrong or too many. One text and one status, whatever was wrong."""

from __future__ import annotations

import concurrent.futures

import pytest

pytestmark = pytest.mark.e2e

BODY = {"model": "good", "prompt": "hi", "max_tokens": 2}


def headers(stage, kind):
    key = stage.keys["acme"]
    return {
        "missing": {},
        "empty": {"authorization": "Bearer "},
        "short": {"authorization": f"Bearer {key[:-1]}"},
        "long": {"authorization": f"Bearer {key}x"},
        "unicode": {"authorization": f"Bearer {key[:-1]}\u00e9"},
        "4 kB": {"authorization": "Bearer " + "k" * 4096},
        "another scheme": {"authorization": f"Basic {key}"},
        "in another header": {"x-api-key": "nothing"},
    }[kind]


KINDS = ["missing", "empty", "short", "long", "unicode", "4 kB", "another scheme", "in another header"]


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_key_is_401(stage, kind):
    sent = headers(stage, kind)
    answer = stage.refused(lambda: stage.post("/v1/completions", BODY, tenant=None, **sent), 401, "invalid_api_key")
    text = stage.post("/v1/completions", BODY, tenant=None).message
    assert answer.message == text


def test_two_keys_are_401_even_if_one_is_right(stage):
    import http.client

    def send():
        connection = http.client.HTTPConnection(*stage.address, timeout=30)
        connection.putrequest("GET", "/v1/models")
        connection.putheader("authorization", "Bearer wrong")
        connection.putheader("authorization", f"Bearer {stage.keys['acme']}")
        connection.endheaders()
        answer = connection.getresponse()
        status = answer.status
        connection.close()
        return status

    with stage.watched():
        assert send() == 401


def test_many_wrong_keys_are_429_and_the_right_one_still_opens(stage):
    def guess(index):
        return stage.send("GET", "/v1/models", tenant=None, authorization=f"Bearer olk_{'a' * 12}_{index:043d}").status

    with concurrent.futures.ThreadPoolExecutor(8) as pool, stage.watched():
        statuses = list(pool.map(guess, range(300)))
    assert set(statuses) == {401, 429}
    assert statuses.count(429) > 150
    assert stage.send("GET", "/v1/models").status == 200


def test_wrong_keys_again_cost_nothing(stage):
    def again():
        with stage.watched():
            assert stage.post("/v1/completions", BODY, tenant=None).status in (401, 429)

    stage.rounds[:] = [again] * 20
    stage.check_steady()
