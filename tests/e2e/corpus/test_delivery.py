"""Corpus B, 52 and 53: clients that hang up at any token, and requests sent twice."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import random

import pytest

pytestmark = pytest.mark.e2e

STREAM = {"model": "good", "prompt": "hello world", "max_tokens": 1900, "temperature": 1, "ignore_eos": True, "stream": True}
BODY = {"model": "good", "prompt": "hello", "max_tokens": 3, "temperature": 1}


def hang_up_after(stage, event_count):
    """Read so many events of a stream and hang up; returns the receipt's id."""
    connection = http.client.HTTPConnection(*stage.address, timeout=30)
    sent = {"content-type": "application/json", "authorization": f"Bearer {stage.keys['acme']}"}
    connection.request("POST", "/v1/completions", json.dumps(STREAM), sent)
    answer = connection.getresponse()
    for _ in range(event_count):
        while not answer.readline().startswith(b"data:"):
            pass
    receipt = answer.headers["x-openlora-receipt"]
    answer.close()
    connection.close()
    return receipt


@pytest.mark.parametrize("seed", range(6))
def test_52_hang_up_at_any_token_ends_the_sequence_and_bills_what_was_delivered(stage, seed):
    event_count = random.Random(seed).randint(1, 40)

    def once():
        with stage.watched(admitted=1):
            receipt = hang_up_after(stage, event_count)
        record = stage.send("GET", f"/v1/receipts/{receipt}").json["record"]
        assert record["status"] == "cancelled"
        assert event_count <= record["tokens"]["output"] < 1900
        price = record["price"]
        counts = record["tokens"]
        assert int(record["fee_wei"]) == counts["prompt"] * int(price["input_token_wei"]) + counts["output"] * int(
            price["output_token_wei"]
        )

    once()
    stage.rounds.append(once)


def test_52_blocks_and_places_come_back(stage):
    """Eighty at one token each: more than the engine runs together, so each needs the place of one before."""
    with stage.watched(admitted=80):
        for _ in range(80):
            hang_up_after(stage, 1)


def test_53_same_key_and_body_twice_is_one_execution_and_a_replay(stage):
    def once(key):
        with stage.watched(admitted=1):
            first, second = (stage.post("/v1/completions", BODY, **{"idempotency-key": key}) for _ in range(2))
        assert (first.status, first.raw) == (200, second.raw)
        assert "idempotency-replayed" not in first.headers
        assert second.headers["idempotency-replayed"] == "true"

    once("twice")


def test_53_same_key_concurrently_is_one_execution(stage):
    slow = {**BODY, "max_tokens": 200, "ignore_eos": True}
    with concurrent.futures.ThreadPoolExecutor(8) as pool, stage.watched(admitted=1):
        sent = [pool.submit(stage.post, "/v1/completions", slow, **{"idempotency-key": "at once"}) for _ in range(8)]
        answers = [future.result(60) for future in sent]
    assert {answer.status for answer in answers} == {200}
    assert len({answer.raw for answer in answers}) == 1
    assert sum("idempotency-replayed" in answer.headers for answer in answers) == 7


def test_53_same_key_with_another_body_is_409(stage):
    key = {"idempotency-key": "another"}
    with stage.watched(admitted=1):
        assert stage.post("/v1/completions", BODY, **key).status == 200
    stage.refused(lambda: stage.post("/v1/completions", {**BODY, "prompt": "other"}, **key), 409, "idempotency_key_reused")


def test_53_same_key_of_another_tenant_is_another_key(stage):
    with stage.watched(admitted=2):
        answers = [
            stage.post("/v1/completions", BODY, tenant=tenant, **{"idempotency-key": "shared"}) for tenant in ("acme", "other")
        ]
    assert all("idempotency-replayed" not in answer.headers for answer in answers)


def test_53_client_that_hung_up_finds_its_answer(stage):
    key = {"idempotency-key": "hung up"}
    slow = {**BODY, "max_tokens": 1500, "n": 4, "ignore_eos": True}
    with stage.watched(admitted=1):
        connection = http.client.HTTPConnection(*stage.address, timeout=30)
        sent = {"content-type": "application/json", "authorization": f"Bearer {stage.keys['acme']}", **key}
        connection.request("POST", "/v1/completions", json.dumps(slow), sent)
        stage.wait_until(lambda: stage.open_count == 1, "the admission")
        connection.close()
        answer = stage.post("/v1/completions", slow, timeout_s=60.0, **key)
    assert (answer.status, answer.headers["idempotency-replayed"]) == (200, "true")
    assert answer.json["openlora"]["receipt"]["record"]["status"] == "ok"


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb"])
def test_53_malformed_key_is_400(stage, key):
    stage.refused(lambda: stage.post("/v1/completions", BODY, **{"idempotency-key": key}), 400, "invalid_request")


def test_53_streamed_request_with_a_key_is_refused_by_name(stage):
    stage.refused(lambda: stage.post("/v1/completions", STREAM, **{"idempotency-key": "stream"}), 400, "param_not_supported")


def test_deliveries_again_cost_nothing(stage):
    stage.check_steady()
