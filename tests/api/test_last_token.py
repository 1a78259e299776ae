"""The last token of a streamed answer leaves when it is there; only what says that the answer is over waits for the record."""

from __future__ import annotations

import asyncio
import json

import pytest

COMPLETION = {"model": "alice", "prompt": "hi", "max_tokens": 2, "stream": True}
CHAT = {"model": "alice", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "stream": True}


class HeldBooks:
    """Keeps records from becoming durable until `may_close` is set."""

    def __init__(self, books):
        self.is_closing, self.may_close, self._close = asyncio.Event(), asyncio.Event(), books.close
        books.close = self.close

    async def close(self, closing):
        self.is_closing.set()
        await self.may_close.wait()
        return await self._close(closing)


@pytest.fixture
def held(bench):
    return HeldBooks(bench.books)


async def read_events(answer, count):
    """The next `count` events, or those up to the end marker."""
    found = []
    while len(found) < count:
        line = await asyncio.wait_for(answer.content.readline(), 10)
        if not line or line.startswith(b"data: [DONE]"):
            break
        if line.startswith(b"data: "):
            found.append(json.loads(line[6:]))
    return found


def text_of(choice):
    return choice.get("text") or choice.get("delta", {}).get("content") or ""


@pytest.mark.parametrize("keys", [{}, {"logprobs": 1}])
async def test_completion_shows_its_last_token_before_the_record_is_durable(bench, client, held, keys):
    answer = await client.post("/v1/completions", json={**COMPLETION, **keys})
    tokens = await read_events(answer, 2)
    await asyncio.wait_for(held.is_closing.wait(), 10)
    assert [text_of(event["choices"][0]) for event in tokens] == ["hello", " wor"]
    assert all(event["choices"][0]["finish_reason"] is None and "openlora" not in event for event in tokens)
    assert bench.books.closed == []
    held.may_close.set()
    (end,) = await read_events(answer, 9)
    assert end["choices"] == [{"index": 0, "logprobs": None, "finish_reason": "length", "text": ""}]
    assert end["openlora"]["request_id"] == answer.headers["x-openlora-receipt"]
    assert len(bench.one_closing().outputs[0]) == 2


@pytest.mark.parametrize("keys", [{}, {"logprobs": True, "top_logprobs": 2}])
async def test_chat_ends_with_an_empty_delta_behind_its_last_token(client, held, keys):
    answer = await client.post("/v1/chat/completions", json={**CHAT, **keys})
    events = await read_events(answer, 3)
    assert [text_of(event["choices"][0]) for event in events] == ["", "hello", " wor"]
    assert bool(events[-1]["choices"][0]["logprobs"]) is bool(keys)
    held.may_close.set()
    (end,) = await read_events(answer, 9)
    assert end["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}]


async def test_answer_of_one_token_shows_it_at_once(client, held):
    answer = await client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 1})
    events = await read_events(answer, 2)
    assert [text_of(event["choices"][0]) for event in events] == ["", "hello"]
    held.may_close.set()
    assert [event["choices"][0]["finish_reason"] for event in await read_events(answer, 9)] == ["length"]


async def test_usage_chunk_still_comes_last_with_the_receipt(client, held):
    answer = await client.post("/v1/completions", json={**COMPLETION, "stream_options": {"include_usage": True}})
    await read_events(answer, 2)
    held.may_close.set()
    end, usage = await read_events(answer, 9)
    assert (end["choices"][0]["finish_reason"], "openlora" in end) == ("length", False)
    assert (usage["choices"], usage["usage"]["completion_tokens"], "openlora" in usage) == ([], 2, True)


async def test_end_of_sequence_token_that_shows_nothing_has_no_chunk_of_its_own(bench, client):
    events = await read_events(await client.post("/v1/completions", json={**COMPLETION, "max_tokens": 32}), 99)
    shown = [text_of(event["choices"][0]) for event in events]
    assert "".join(shown) == "hello world"
    assert [text for text in shown if not text] == [""]
    assert len(bench.one_closing().outputs[0]) == len(bench.tokenizer.encode("hello world")) + 1


async def test_stop_string_of_a_stream_is_held_back_and_ends_it_with_its_receipt(bench, client):
    events = await read_events(await client.post("/v1/completions", json={**COMPLETION, "max_tokens": 32, "stop": ["lo wo"]}), 99)
    assert "".join(text_of(event["choices"][0]) for event in events) == "hel"
    assert (events[-1]["choices"][0]["finish_reason"], "openlora" in events[-1]) == ("stop", True)
    assert bench.engine.cancelled == [bench.engine.submits[0].sequence_id]
    assert bench.one_closing().status == "ok"


async def test_text_that_might_have_become_a_stop_string_leaves_with_the_last_token(client, held):
    answer = await client.post("/v1/completions", json={**COMPLETION, "stop": [" worlds"]})
    events = await read_events(answer, 2)
    assert [text_of(event["choices"][0]) for event in events] == ["hello", " wor"]
    held.may_close.set()
    assert [event["choices"][0]["finish_reason"] for event in await read_events(answer, 9)] == ["length"]


async def test_record_that_fails_ends_a_stream_whose_tokens_are_out_without_finish_or_receipt(bench, client, ledger_fault):
    bench.books.close_fault = ledger_fault
    *tokens, error = await read_events(await client.post("/v1/completions", json=COMPLETION), 99)
    assert "".join(text_of(event["choices"][0]) for event in tokens) == "hello wor"
    assert all(event["choices"][0]["finish_reason"] is None for event in tokens)
    assert error["error"]["code"] == "ledger_unavailable"


async def test_hang_up_behind_the_last_token_leaves_one_whole_record(bench, client, held):
    answer = await client.post("/v1/completions", json=COMPLETION)
    await read_events(answer, 2)
    await asyncio.wait_for(held.is_closing.wait(), 10)
    answer.close()
    held.may_close.set()
    await asyncio.wait_for(bench.books.closed_event.wait(), 10)
    closing = bench.one_closing()
    assert (closing.status, len(closing.outputs[0])) == ("ok", 2)


async def test_every_choice_has_its_finish_reason_in_a_chunk_of_its_own(client):
    events = await read_events(await client.post("/v1/chat/completions", json={**CHAT, "n": 2}), 99)
    choices = [event["choices"][0] for event in events[1:]]
    ends = [choice for choice in choices if choice["finish_reason"]]
    assert sorted(choice["index"] for choice in ends) == [0, 1]
    assert all(choice["delta"] == {} for choice in ends)
    assert [sum(bool(text_of(choice)) for choice in choices if choice["index"] == index) for index in (0, 1)] == [2, 2]
    assert ["openlora" in event for event in events] == [False] * (len(events) - 1) + [True]


async def test_loraxs_last_token_waits_for_the_record_since_its_event_is_the_end(client, held):
    answer = await client.post("/generate_stream", json={"inputs": "hi", "parameters": {"max_new_tokens": 2}})
    (first,) = await read_events(answer, 1)
    await asyncio.wait_for(held.is_closing.wait(), 10)
    assert (first["token"]["text"], first["generated_text"]) == ("hello", None)
    held.may_close.set()
    (last,) = await read_events(answer, 9)
    assert (last["token"]["text"], last["generated_text"]) == (" wor", "hello wor")
    assert last["openlora"]["request_id"] == answer.headers["x-openlora-receipt"]


async def test_stop_string_ends_loraxs_stream_with_its_receipt(bench, client):
    body = {"inputs": "hi", "parameters": {"max_new_tokens": 32, "stop": ["lo wo"]}}
    events = await read_events(await client.post("/generate_stream", json=body), 99)
    assert "".join(event["token"]["text"] for event in events) == events[-1]["generated_text"] == "hel"
    assert "receipt" in events[-1]["openlora"]
    assert bench.one_closing().status == "ok"
