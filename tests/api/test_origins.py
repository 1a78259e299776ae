"""Pages of other origins in a browser: the node answers their browser's question without a key, and only the operator's pages."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from node.config import ServerSettings

PAGE, STRANGER = "https://app.example", "https://evil.example"
QUESTION = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, Content-Type,x-stainless-os, bad name, x-openlora-voucher",
}
BODY = {"model": "alice", "prompt": "hi", "max_tokens": 4}


async def preflight(client, origin, path="/v1/chat/completions"):
    return await client.options(path, headers={"Origin": origin, **QUESTION})


@pytest.fixture
def open_to(make_bench, make_client):
    async def make(*origins, **options):
        return await make_client(make_bench(cors_origins=origins, **options))

    return make


async def test_preflight_of_an_allowed_page_needs_no_key(open_to):
    client = await open_to(PAGE, keys={"acme": "k" * 40})
    answer = await preflight(client, PAGE)

    assert (answer.status, await answer.read()) == (204, b"")
    assert answer.headers["Access-Control-Allow-Origin"] == PAGE
    assert answer.headers["Access-Control-Allow-Methods"] == "GET, POST"
    assert answer.headers["Access-Control-Allow-Headers"] == "authorization, content-type, x-stainless-os, x-openlora-voucher"
    assert "Access-Control-Allow-Credentials" not in answer.headers
    assert answer.headers["Vary"] == "Origin"


@pytest.mark.parametrize("origins", [(), (PAGE,), ("https://evil.example:8443", "http://evil.example")])
async def test_other_pages_get_no_permission(open_to, origins):
    client = await open_to(*origins)
    question = await preflight(client, STRANGER)
    answer = await client.post("/v1/completions", json=BODY, headers={"Origin": STRANGER})

    assert question.status == 405
    assert answer.status == 200
    for found in (question, answer):
        assert not [name for name in found.headers if name.startswith("Access-Control")]


async def test_answers_refusals_and_streams_can_be_read_with_their_receipt(open_to):
    client = await open_to(PAGE)
    answers = [
        await client.post("/v1/completions", json=BODY, headers={"Origin": PAGE}),
        await client.post("/v1/completions", json={**BODY, "stream": True}, headers={"Origin": PAGE}),
        await client.post("/v1/completions", json={**BODY, "max_tokens": -1}, headers={"Origin": PAGE}),
        await client.get("/nothing", headers={"Origin": PAGE}),
    ]

    assert [answer.status for answer in answers] == [200, 200, 400, 404]
    for answer in answers:
        await answer.read()
        assert answer.headers["Access-Control-Allow-Origin"] == PAGE
        assert "x-openlora-receipt" in answer.headers["Access-Control-Expose-Headers"]


async def test_every_page_is_allowed_where_the_operator_says_so(open_to):
    client = await open_to("*")
    answer = await preflight(client, STRANGER, "/generate")

    assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (204, "*")
    assert "Vary" not in answer.headers


async def test_page_without_its_key_may_read_that_it_has_none(open_to):
    client = await open_to(PAGE, keys={"acme": "k" * 40})
    answer = await client.post("/v1/completions", json=BODY, headers={"Origin": PAGE})

    assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (401, PAGE)


async def test_requests_of_no_page_are_answered_as_before(open_to):
    client = await open_to(PAGE)
    answer = await client.post("/v1/completions", json=BODY)

    assert answer.status == 200
    assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize("origin", ["app.example", "https://app.example/", "https://App.example", "ftp://a", "null", "**", ""])
def test_origin_that_no_browser_sends_refuses_to_start(origin):
    with pytest.raises(ValidationError):
        ServerSettings(cors_origins=(origin,))
