"""What a tenant meets at the public door: scopes, rates, places, budgets, and adapters that are not there."""

from __future__ import annotations

import asyncio

import pytest

from node.api.application import build_application
from node.api.scopes import OPEN_PATHS, scopes_of
from node.tenancy.api_key import Scope
from node.tenancy.private_adapters import PrivateAdapter
from node.tenancy.tenant import TenantLimits, TenantTerms

CHAT = {"model": "alice", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}


@pytest.fixture
async def world(make_bench, make_client):
    """A bench, its client, and a function that makes a key: headers to send."""
    bench = make_bench(keys={"filed": "some-key-in-a-file"})

    async def key(tenant, *scopes, weight=1, **limits):
        terms = TenantTerms(tenant, weight, TenantLimits(**limits))
        _, secret = await bench.store.create_key(terms, scopes or [Scope.INFERENCE])
        return {"Authorization": f"Bearer {secret}"}

    return bench, await make_client(bench), key


def test_every_route_is_open_or_has_a_scope_of_its_own(bench):
    routes = build_application(bench.services).router.routes()
    closed = [
        (route.method, route.resource.canonical)
        for route in routes
        if route.resource.canonical not in OPEN_PATHS and scopes_of(route.method, route.resource.canonical) == {Scope.ADMIN}
    ]
    assert closed == []


async def test_key_opens_what_its_scopes_name_and_nothing_else(world):
    _, client, key = world
    inference, metrics = await key("a"), await key("b", Scope.METRICS)
    admin, reader = await key("c", Scope.ADMIN), await key("d", Scope.ADAPTERS_READ)
    asked = {"/metrics": [metrics], "/v1/models": [inference, reader], "/info": [inference, reader]}
    for path, allowed in asked.items():
        for headers in (inference, metrics, admin, reader):
            answer = await client.get(path, headers=headers)
            assert answer.status == (200 if headers in allowed else 403), path
    refused = await client.post("/v1/chat/completions", json=CHAT, headers=metrics)
    assert (refused.status, (await refused.json())["error"]["type"]) == (403, "permission_error")
    assert (await client.get("/nothing", headers=admin)).status == 404


async def test_live_and_ready_need_no_key(world):
    _, client, _ = world
    assert (await client.get("/live")).status == (await client.get("/ready")).status == 200


async def test_requests_a_minute_are_429_with_retry_after_and_what_is_left(world):
    _, client, key = world
    headers = await key("a", requests_per_minute=2)
    first = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    streamed = await client.post("/v1/chat/completions", json={**CHAT, "stream": True}, headers=headers)
    assert streamed.headers["x-ratelimit-remaining-requests"] == "0"
    third = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert (third.status, (await third.json())["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(third.headers["Retry-After"]) <= 30
    assert third.headers["x-ratelimit-limit-requests"] == "2"


async def test_budget_is_402_and_another_tenant_does_not_notice(world):
    bench, client, key = world
    poor, rich = await key("poor", tokens_per_day=60), await key("rich")
    first = await client.post("/v1/chat/completions", json=CHAT, headers=poor)
    used = (await first.json())["usage"]["total_tokens"]
    second = await client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 60}, headers=poor)
    error = (await second.json())["error"]
    assert (second.status, error["code"], error["type"]) == (402, "budget_exceeded", "insufficient_quota")
    assert f"{60 - used} are left" in error["message"]
    assert int(second.headers["Retry-After"]) <= 24 * 3600
    assert (await client.post("/v1/chat/completions", json=CHAT, headers=rich)).status == 200
    assert len(bench.books.opened) == 2


async def test_request_that_fails_costs_no_budget(world):
    bench, client, key = world
    headers = await key("a", wei_per_day=200)
    bench.engine.fail_after = 1
    for _ in range(5):
        assert (await client.post("/v1/chat/completions", json=CHAT, headers=headers)).status == 500
    bench.engine.fail_after = None
    assert (await client.post("/v1/chat/completions", json=CHAT, headers=headers)).status == 200


async def test_places_of_a_tenant_are_its_own(world):
    bench, client, key = world
    busy, other = await key("busy", max_concurrent=1), await key("other")
    bench.engine.hold_after = 1
    held = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT, headers=busy))
    await bench.engine.held.wait()
    refused = await client.post("/v1/chat/completions", json=CHAT, headers=busy)
    assert (refused.status, (await refused.json())["error"]["code"]) == (429, "concurrency_limit")
    assert refused.headers["Retry-After"] == "1"
    bench.engine.hold_after = None
    assert (await client.post("/v1/chat/completions", json=CHAT, headers=other)).status == 200
    bench.engine.cancel(bench.engine.submits[0].sequence_id)
    assert (await held).status == 503
    assert (await client.post("/v1/chat/completions", json=CHAT, headers=busy)).status == 200


async def test_weight_travels_to_the_engine(world):
    bench, client, key = world
    await client.post("/v1/chat/completions", json=CHAT, headers=await key("heavy", weight=7))
    assert [(submit.tenant, submit.weight) for submit in bench.engine.submits] == [("heavy", 7)]


async def test_private_adapter_exists_for_its_tenants_alone(world):
    bench, client, key = world
    owner, friend, stranger = await key("owner"), await key("friend"), await key("stranger")
    await bench.store.restrict_adapter(PrivateAdapter("alice", "owner", frozenset({"friend"})))
    for headers, is_seen in ((owner, True), (friend, True), (stranger, False)):
        listed = [item["id"] for item in (await (await client.get("/v1/models", headers=headers)).json())["data"]]
        assert ("alice" in listed) == is_seen
        assert (await client.get("/v1/models/alice", headers=headers)).status == (200 if is_seen else 404)
        answer = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert answer.status == (200 if is_seen else 404)


async def test_forbidden_and_unknown_have_the_same_answer(world):
    bench, client, key = world
    await bench.store.restrict_adapter(PrivateAdapter("alice", "owner"))
    stranger = await key("stranger")
    bodies = []
    for name in ("alice", "nobody"):
        answers = [
            await client.post("/v1/chat/completions", json={**CHAT, "model": name}, headers=stranger),
            await client.get(f"/v1/models/{name}", headers=stranger),
            await client.post("/generate", json={"inputs": "x", "parameters": {"adapter_id": name}}, headers=stranger),
        ]
        found = []
        for answer in answers:
            text = (await answer.text()).replace(name, "NAME")
            found.append((answer.status, text.split("request_id")[0], sorted(answer.headers)))
        bodies.append(found)
    assert bodies[0] == bodies[1]


async def test_metrics_do_not_tell_of_private_adapters(world):
    bench, client, key = world
    bench.engine.stats = type(bench.engine.stats)(resident_adapters=("1" * 64, "2" * 64, "3" * 64), adapter_slots=4)
    asked = {**CHAT, "model": "alice"}
    assert (await client.post("/v1/chat/completions", json=asked, headers=await key("a"))).status == 200
    await bench.store.restrict_adapter(PrivateAdapter("alice", "owner"))
    text = await (await client.get("/metrics", headers=await key("m", Scope.METRICS))).text()
    assert 'running_lora_adapters="org/bob"' in text
    assert "1" * 64 not in text
    assert "alice" not in text
    assert 'openlora_adapter_requests_total{adapter="(other)"} 1.0' in text.splitlines()
    assert "3" * 64 not in text  # private at its source: the catalogue lists it to nobody


async def test_revoked_key_is_refused_at_the_next_request(world):
    bench, client, key = world
    headers = await key("a")
    assert (await client.post("/v1/chat/completions", json=CHAT, headers=headers)).status == 200
    [made] = [key for key in bench.store.all_keys() if key.tenant == "a"]
    await bench.store.revoke(made.key_id)
    assert (await client.post("/v1/chat/completions", json=CHAT, headers=headers)).status == 401


async def test_no_key_is_in_the_log(world):
    bench, client, key = world
    headers = await key("a")
    secret = headers["Authorization"].split()[1]
    await client.post("/v1/chat/completions", json=CHAT, headers=headers)
    await client.post("/v1/chat/completions", json=CHAT, headers={"Authorization": f"Bearer {secret}x"})
    await client.get("/metrics", headers=headers)
    assert secret not in bench.log.getvalue()
    assert secret.split("_", 2)[2] not in bench.log.getvalue()


async def test_flood_of_one_tenant_leaves_room_at_the_gate(make_bench, make_client):
    bench = make_bench(keys={"flood": "key-of-the-flood-1", "quiet": "key-of-the-quiet-1"}, max_concurrent_requests=16)
    client = await make_client(bench)
    bench.engine.hold_after = 0
    flood, quiet = ({"Authorization": f"Bearer key-of-the-{name}-1"} for name in ("flood", "quiet"))
    held = [asyncio.create_task(client.post("/v1/chat/completions", json=CHAT, headers=flood)) for _ in range(20)]
    done, waiting = await asyncio.wait(held, return_when=asyncio.ALL_COMPLETED, timeout=1.0)
    assert (len(waiting), {task.result().status for task in done}) == (14, {429})
    bench.engine.hold_after = None
    assert (await client.post("/v1/chat/completions", json=CHAT, headers=quiet)).status == 200
    for submit in list(bench.engine.submits):
        bench.engine.cancel(submit.sequence_id)
    await asyncio.gather(*held)
