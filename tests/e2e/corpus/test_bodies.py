"""Corpus B, 30 to 42 and 45 to 48: bodies and fields, refused before anything is counted, queued or fetched.

Field cases are those of tests/api/test_bad_requests.py, where every refused value stands beside the parameter its
answer names; the few that depend on names the tiny model has are asked here with this node's own. 31: a body of this
many keys or this depth is judged in less time than the loop's patience; here it is enough that the golden request after
it is served unchanged.
"""

from __future__ import annotations

import json

import pytest

from tests.api.test_bad_requests import CASES, IMAGE, RAW_BODIES

pytestmark = pytest.mark.e2e

CHAT = {"model": "good", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "seed": 1}
ELSEWHERE = {"model unknown", "model malformed", "prompt beyond context", "context", "too large"}
NAMES = {"alice": "good"}


def chat(**changes):
    return "/v1/chat/completions", {**CHAT, **changes}


def completion(**changes):
    return "/v1/completions", {"model": "good", "prompt": "hi", "max_tokens": 8, **changes}


@pytest.mark.parametrize("name", sorted(RAW_BODIES.keys() - ELSEWHERE))
def test_raw_body_is_refused(stage, name):
    body, status, code = RAW_BODIES[name]
    stage.refused(lambda: stage.post("/v1/chat/completions", body), status, code)


@pytest.mark.parametrize("name", sorted(CASES.keys() - ELSEWHERE))
def test_field_is_refused_by_name(stage, name):
    path, body, status, param = CASES[name]
    body = {key: NAMES.get(value, value) if isinstance(value, str) else value for key, value in body.items()}
    with stage.watched():
        answer = stage.post(path, body)
    assert (answer.status, answer.json["error"]["param"]) == (status, param)
    stage.refused(lambda: stage.post(path, body), status, answer.code)


MORE = {
    "30 text": (("/v1/completions", b'{"model": ""}'), 415, "unsupported_media_type", {"content-type": "text/plain"}),
    "30 gzip": (("/v1/completions", b'{"model": ""}'), 415, "unsupported_media_type", {"content-encoding": "gzip"}),
    "31 20 MB string": (("/v1/completions", b'{"prompt": "' + b"x" * (20 << 20) + b'"}'), 413, "body_too_large", {}),
    "31 a million keys": (
        ("/v1/completions", b"{" + b",".join(b'"%d":1' % k for k in range(300_000)) + b"}"),
        400,
        "invalid_json",
        {},
    ),
    "32 model unknown": (chat(model="nobody"), 404, "model_not_found", {}),
    "33 100 000 messages": (chat(messages=[{"role": "user", "content": "x"}] * 100_000), 400, "invalid_request", {}),
    "34 token id 2**40": (completion(prompt=[2**40]), 400, "invalid_request", {}),
    "35 prompt beyond context": (completion(prompt=[40] * 2100), 400, "context_length_exceeded", {}),
    "35 prompt and answer beyond context": (completion(prompt=[40] * 2000, max_tokens=100), 400, "context_length_exceeded", {}),
    "37 n 10**9 with best_of": (completion(n=10**9, best_of=10**9), 400, "invalid_request", {}),
    "38 temperature 1e309": (
        ("/v1/completions", b'{"model": "good", "prompt": "hi", "temperature": 1e309}'),
        400,
        "invalid_request",
        {},
    ),
    "39 logit_bias of 10**5 entries": (chat(logit_bias={str(key): 1 for key in range(100_000)}), 400, "invalid_request", {}),
    "40 log-probabilities of 60,000 prompt tokens": (
        completion(prompt=[[40] * 1000] * 60, echo=True, logprobs=1, max_tokens=0),
        400,
        "invalid_request",
        {},
    ),
    "39 logit_bias one token twice": (chat(logit_bias={"1": 1, "01": 2}), 400, "invalid_request", {}),
    "41 stop of a megabyte": (chat(stop="x" * (1 << 20)), 400, "invalid_request", {}),
    "45 template that counts": (chat(chat_template="{% for i in range(10**9) %}x{% endfor %}"), 400, "param_not_supported", {}),
    "45 dunder": (chat(chat_template_kwargs={"__class__": 1}), 400, "param_not_supported", {}),
    "47 image as data": (
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]}]),
        400,
        "modality_not_supported",
        {},
    ),
    "47 audio": (
        chat(messages=[{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}]}]),
        400,
        "modality_not_supported",
        {},
    ),
    "47 file": (
        chat(messages=[{"role": "user", "content": [{"type": "file", "file": {"file_id": "x"}}]}]),
        400,
        "modality_not_supported",
        {},
    ),
}


@pytest.mark.parametrize("name", MORE)
def test_body_is_refused_with_its_code(stage, name):
    (path, body), status, code, headers = MORE[name]
    stage.refused(lambda: stage.post(path, body, **headers), status, code)


def test_35_context_error_names_the_three_numbers(stage):
    path, body = completion(prompt=[40] * 2000, max_tokens=100)
    message = stage.post(path, body).message
    assert all(number in message for number in ("2048", "2000", "100"))


def test_47_image_url_is_refused_by_name_and_never_fetched(stage):
    asked = len(stage.web.requests)
    image = {**IMAGE, "image_url": {"url": f"http://{stage.web.host}/team/picture.png"}}
    path, body = chat(messages=[{"role": "user", "content": [image]}])
    stage.refused(lambda: stage.post(path, body), 400, "modality_not_supported")
    assert len(stage.web.requests) == asked


def test_46_another_tenants_user_and_salt_change_nothing(stage):
    """Ids of the client's own choice are keys of nothing: the same ones of two tenants never meet."""
    body = {**CHAT, "temperature": 0, "user": "somebody", "cache_salt": "salt"}
    for _ in range(2):
        for tenant in ("acme", "other"):
            with stage.watched(admitted=1):
                answer = stage.post("/v1/chat/completions", body, tenant=tenant, **{"x-request-id": "mine"})
            assert answer.status == 200
            assert answer.headers["x-request-id"] != "mine"
            receipt = answer.headers["x-openlora-receipt"]
            other = {"acme": "other", "other": "acme"}[tenant]
            assert stage.send("GET", f"/v1/receipts/{receipt}", tenant=other).status == 404


@pytest.mark.parametrize("salt", ["a\x00b", "a" * 10_000])
def test_46_cache_salt_is_no_field_of_this_node_whose_cache_is_keyed_by_tenant(stage, salt):
    path, body = completion(cache_salt=salt, max_tokens=2)
    with stage.watched(admitted=1):
        answer = stage.post(path, body)
    assert answer.headers["x-openlora-warnings"] == "ignored unknown fields: cache_salt"


def test_48_unknown_fields_are_answered_and_listed_once(stage):
    path, body = completion(zebra=1, aardvark={"deep": True}, max_tokens=2)
    with stage.watched(admitted=1):
        answer = stage.post(path, body)
    assert answer.status == 200
    assert answer.headers["x-openlora-warnings"] == "ignored unknown fields: aardvark, zebra"


def test_bodies_refused_again_cost_nothing(stage):
    stage.check_steady()


def test_every_error_is_json_and_short(stage):
    answer = stage.post("/v1/completions", json.dumps({"model": "x" * 10_000, "prompt": "y" * 100_000}).encode())
    assert answer.status in (400, 404)
    assert len(answer.raw) < 1000
