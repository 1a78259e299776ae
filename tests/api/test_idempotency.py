"""`Idempotency-Key`: one run and one record for a key, the same answer for whoever sends it again."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web

from node.api.idempotency import Replays
from node.errors import RequestError

COMPLETION = {"model": "", "prompt": "hi", "max_tokens": 8, "seed": 1}
KEY = {"Idempotency-Key": "order-17"}


async def post(client, body=COMPLETION, path="/v1/completions", **headers):
    answer = await client.post(path, json=body, headers={**KEY, **headers})
    return answer.status, answer.headers, await answer.read()


async def test_same_key_and_body_later_gets_the_first_answer_without_a_second_run(bench, client):
    first = await post(client)
    second = await post(client, dict(reversed(COMPLETION.items())))
    assert (first[0], second[0]) == (200, 200)
    assert first[2] == second[2]
    assert "idempotency-replayed" not in first[1]
    assert second[1]["idempotency-replayed"] == "true"
    assert first[1]["x-openlora-receipt"] == second[1]["x-openlora-receipt"]
    assert first[1]["x-request-id"] != second[1]["x-request-id"]
    bench.one_closing()


async def test_same_key_concurrently_runs_once(bench, client):
    answers = await asyncio.gather(*(post(client) for _ in range(5)))
    assert {answer[0] for answer in answers} == {200}
    assert len({answer[2] for answer in answers}) == 1
    assert sorted("idempotency-replayed" in answer[1] for answer in answers) == [False] + [True] * 4
    bench.one_closing()


async def test_same_key_with_another_body_is_409(bench, client):
    await post(client)
    status, _, body = await post(client, {**COMPLETION, "prompt": "ho"})
    assert (status, json.loads(body)["error"]["code"]) == (409, "idempotency_key_reused")
    bench.one_closing()


async def test_keys_are_a_tenants_own_and_a_routes_own(make_bench, make_client):
    bench = make_bench(keys={"a": "key-of-tenant-a", "b": "key-of-tenant-b"})
    client = await make_client(bench)
    for tenant in ("a", "b"):
        status, headers, _ = await post(client, authorization=f"Bearer key-of-tenant-{tenant}")
        assert (status, "idempotency-replayed" in headers) == (200, False)
    chat = {"model": "", "messages": [{"role": "user", "content": "hi"}]}
    assert (await post(client, chat, "/v1/chat/completions", authorization="Bearer key-of-tenant-a"))[0] == 200
    assert len(bench.books.closed) == 3


async def test_request_that_failed_may_be_sent_again(bench, client):
    bench.engine.fail_after = 1
    assert (await post(client))[0] == 500
    bench.engine.fail_after = None
    status, headers, _ = await post(client)
    assert (status, "idempotency-replayed" in headers) == (200, False)


async def test_run_goes_on_when_its_client_hangs_up_and_the_answer_waits_for_it(bench, client):
    is_closing, may_close = asyncio.Event(), asyncio.Event()
    original = bench.books.close

    async def slow_close(closing):
        is_closing.set()
        await may_close.wait()
        return await original(closing)

    bench.books.close = slow_close
    task = asyncio.create_task(post(client))
    await is_closing.wait()
    task.cancel()
    await asyncio.wait([task])
    may_close.set()
    status, headers, _ = await post(client)
    assert (status, headers["idempotency-replayed"]) == (200, "true")
    assert bench.one_closing().status == "ok"


@pytest.mark.parametrize(("path", "body"), [("/generate", {"inputs": "hi"}), ("/", {"inputs": "hi"})])
async def test_lorax_routes_replay_too(bench, client, path, body):
    first, second = await post(client, body, path), await post(client, body, path)
    assert first[2] == second[2]
    assert second[1]["idempotency-replayed"] == "true"
    bench.one_closing()


async def test_streamed_request_with_a_key_is_refused_by_name(bench, client):
    status, _, body = await post(client, {**COMPLETION, "stream": True})
    error = json.loads(body)["error"]
    assert (status, error["code"], error["param"]) == (400, "param_not_supported", "Idempotency-Key")
    assert bench.books.opened == []


@pytest.mark.parametrize("key", ["", "x" * 256, "caf\u00e9"])
async def test_malformed_key_is_refused(bench, client, key):
    status, _, body = await post(client, **{"Idempotency-Key": key})
    assert (status, json.loads(body)["error"]["param"]) == (400, "Idempotency-Key")
    assert bench.books.opened == []


class Runs:
    """Work that counts how often it ran."""

    def __init__(self, size_bytes=10):
        self.count = 0
        self.size_bytes = size_bytes

    async def __call__(self):
        self.count += 1
        return web.Response(body=b"x" * self.size_bytes)


async def test_answer_expires(clock):
    replays, runs = Replays(60.0, 1 << 20, clock), Runs()
    await replays.answer("a", ["k"], {}, runs)
    clock.now_s += 59
    await replays.answer("a", ["k"], {}, runs)
    assert runs.count == 1
    clock.now_s += 1
    await replays.answer("a", ["k"], {"other": 1}, runs)
    assert runs.count == 2


async def test_answers_are_bounded_and_the_largest_holder_pays(clock):
    replays, small, large = Replays(60.0, 100_000, clock), Runs(), Runs(9_000)
    await replays.answer("small", ["k"], {}, small)
    for index in range(30):
        await replays.answer("large", [f"k{index}"], {}, large)
    await replays.answer("small", ["k"], {}, small)
    assert small.count == 1
    await replays.answer("large", ["k29"], {}, large)
    assert large.count == 30
    await replays.answer("large", ["k0"], {}, large)
    assert large.count == 31
    with pytest.raises(RequestError):
        await replays.answer("large", ["k29"], {"other": 1}, large)


@pytest.fixture
def clock():
    class Clock:
        now_s = 1000.0

        def __call__(self):
            return self.now_s

    return Clock()
