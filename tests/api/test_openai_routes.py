"""OpenAI's two endpoints over fakes: shapes, streams, choices, receipts, failures."""

from __future__ import annotations

import json
from typing import Any

import pytest

from node.errors import AdapterNotFoundError

CHAT = {"model": "alice", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 32, "seed": 1}
COMPLETION = {"model": "", "prompt": "hi", "max_tokens": 32}


def events_of(text: str) -> list[Any]:
    """The JSON of every `data:` line; [DONE] stays a string."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_chat_answers_with_text_usage_and_receipt(bench, client):
    answer = await client.post("/v1/chat/completions", json=CHAT)
    body = await answer.json()
    assert answer.status == 200
    assert body["object"] == "chat.completion"
    assert body["model"] == "alice"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "hello world", "refusal": None}
    assert body["choices"][0]["finish_reason"] == "stop"
    output_count = len(bench.tokenizer.encode("hello world")) + 1
    assert body["usage"]["completion_tokens"] == output_count
    assert body["usage"]["prompt_tokens"] == len(bench.books.opened[0].prompts[0])
    assert body["openlora"]["receipt"]["receipt"]["requestId"] == answer.headers["x-openlora-receipt"]
    assert answer.headers["x-adapter-id"] == "alice"
    assert answer.headers["x-openlora-adapters"] == "1" * 64


async def test_chat_prompt_follows_the_template_without_a_second_bos(bench, client):
    await client.post("/v1/chat/completions", json=CHAT)
    expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert list(bench.engine.submits[0].prompt_ids) == bench.tokenizer.encode(expected, adds_special=False)


async def test_chat_closes_the_books_once_with_every_output_token(bench, client):
    await client.post("/v1/chat/completions", json=CHAT)
    closing = bench.one_closing()
    assert closing.status == "ok"
    assert closing.finish_reason == "stop"
    assert list(closing.outputs[0]) == [*bench.tokenizer.encode("hello world"), bench.engine.eos_id]
    assert closing.cached_tokens == 1


async def test_chat_stream_ends_with_receipt_then_done(bench, client):
    answer = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    events = events_of(await answer.text())
    assert answer.content_type == "text/event-stream"
    assert events[-1] == "[DONE]"
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1])
    assert text == "hello world"
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert events[-2]["openlora"]["request_id"] == answer.headers["x-openlora-receipt"]
    assert all("openlora" not in event for event in events[:-2])
    assert bench.one_closing().status == "ok"


async def test_chat_stream_with_usage_puts_usage_and_receipt_last(client):
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    events = events_of(await (await client.post("/v1/chat/completions", json=body)).text())
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["prompt_tokens"] > 0
    assert "openlora" in events[-2]
    assert "openlora" not in events[-3]


async def test_chat_with_three_choices_runs_three_sequences_and_one_record(bench, client):
    body = await (await client.post("/v1/chat/completions", json={**CHAT, "n": 3})).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [submit.choice_index for submit in bench.engine.submits] == [0, 1, 2]
    assert len({submit.sequence_id for submit in bench.engine.submits}) == 3
    assert len(bench.one_closing().outputs) == 3
    assert body["usage"]["prompt_tokens"] == len(bench.books.opened[0].prompts[0])


async def test_chat_stream_with_two_choices_finishes_both_before_the_receipt(client):
    body = {**CHAT, "n": 2, "stream": True}
    events = events_of(await (await client.post("/v1/chat/completions", json=body)).text())
    texts = {0: "", 1: ""}
    for event in events[1:-1]:
        texts[event["choices"][0]["index"]] += event["choices"][0]["delta"].get("content", "")
    assert texts == {0: "hello world", 1: "hello world"}
    assert sum(event["choices"][0]["finish_reason"] is not None for event in events[1:-1]) == 2
    assert "openlora" in events[-2]


async def test_chat_logprobs_name_token_bytes_and_alternatives(client):
    body = await (await client.post("/v1/chat/completions", json={**CHAT, "logprobs": True, "top_logprobs": 2})).json()
    first = body["choices"][0]["logprobs"]["content"][0]
    assert first["token"] == "hello"
    assert first["bytes"] == list(b"hello")
    assert first["logprob"] == -0.5
    assert len(first["top_logprobs"]) == 2


async def test_completion_of_two_prompts_numbers_choices_prompt_by_prompt(bench, client):
    body = await (await client.post("/v1/completions", json={**COMPLETION, "prompt": ["a", "b"], "n": 2})).json()
    assert body["object"] == "text_completion"
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    prompts = [list(submit.prompt_ids) for submit in bench.engine.submits]
    assert prompts == [bench.tokenizer.encode(text) for text in ("a", "a", "b", "b")]
    assert len(bench.one_closing().outputs) == 4


async def test_completion_of_token_ids_passes_them_unchanged(bench, client):
    answer = await client.post("/v1/completions", json={**COMPLETION, "prompt": [[1, 2, 3], [4]]})
    assert answer.status == 200
    assert [submit.prompt_ids for submit in bench.engine.submits] == [(1, 2, 3), (4,)]


async def test_completion_logprobs_carry_offsets(client):
    body = await (await client.post("/v1/completions", json={**COMPLETION, "logprobs": 1})).json()
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["tokens"][0] == "hello"
    assert logprobs["text_offset"][:2] == [0, 5]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"])


async def test_completion_budget_is_cut_by_max_tokens_with_length(client):
    body = await (await client.post("/v1/completions", json={**COMPLETION, "max_tokens": 1})).json()
    assert body["choices"][0] == {"index": 0, "logprobs": None, "finish_reason": "length", "text": "hello"}


async def test_stop_string_across_tokens_ends_the_answer_before_it_and_cancels_the_rest(bench, client):
    body = await (await client.post("/v1/completions", json={**COMPLETION, "stop": ["lo wo"]})).json()
    assert body["choices"][0]["text"] == "hel"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert bench.engine.cancelled == [bench.engine.submits[0].sequence_id]
    assert bench.one_closing().status == "ok"


async def test_ignore_eos_hands_the_engine_no_end_ids(bench, client):
    await client.post("/v1/completions", json={**COMPLETION, "ignore_eos": True, "max_tokens": 3})
    assert bench.engine.submits[0].sampling.stop_token_ids == ()


@pytest.mark.parametrize("model", ["", "tiny-base"])
async def test_base_model_by_name_or_empty_uses_no_adapter(bench, client, model):
    answer = await client.post("/v1/completions", json={**COMPLETION, "model": model})
    assert answer.status == 200
    assert bench.engine.submits[0].terms == ()
    assert bench.catalog.asked == []
    assert "x-adapter-id" not in answer.headers


async def test_unknown_model_is_404_and_opens_no_books(bench, client):
    answer = await client.post("/v1/completions", json={**COMPLETION, "model": "nobody"})
    error = (await answer.json())["error"]
    assert answer.status == 404
    assert (error["code"], error["param"], error["type"]) == ("model_not_found", "model", "not_found_error")
    assert bench.books.opened == []


async def test_unknown_fields_are_answered_and_listed_in_a_header(client):
    answer = await client.post("/v1/completions", json={**COMPLETION, "frobnicate": 1, "another\nthing": 2})
    assert answer.status == 200
    assert "frobnicate" in answer.headers["x-openlora-warnings"]
    assert "\n" not in answer.headers["x-openlora-warnings"]


async def test_engine_failure_before_the_first_token_is_a_plain_error_recorded_as_failed(bench, client):
    bench.engine.fail_after = 0
    answer = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert answer.status == 500
    assert (await answer.json())["error"]["code"] == "engine_failed"
    closing = bench.one_closing()
    assert (closing.status, closing.outputs) == ("failed", ((),))


async def test_engine_failure_within_a_stream_is_an_event_then_done(bench, client):
    bench.engine.fail_after = 1
    answer = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    events = events_of(await answer.text())
    assert events[-2]["error"]["code"] == "engine_failed"
    assert events[-1] == "[DONE]"
    assert bench.one_closing().status == "failed"


async def test_engine_death_within_a_request_is_503_with_retry_after(bench, client):
    bench.engine.die_after = 1
    answer = await client.post("/v1/chat/completions", json=CHAT)
    assert answer.status == 503
    assert int(answer.headers["Retry-After"]) >= 1
    assert bench.one_closing().status == "failed"
    assert (await client.get(f"/v1/receipts/{answer.headers['x-openlora-receipt']}")).status == 200
    refused = await client.post("/v1/chat/completions", json=CHAT)
    assert refused.status == 503
    assert "x-openlora-receipt" not in refused.headers
    assert len(bench.books.opened) == 1


async def test_commit_failure_withholds_answer_and_receipt(bench, client, ledger_fault):
    bench.books.close_fault = ledger_fault
    answer = await client.post("/v1/chat/completions", json=CHAT)
    body = await answer.json()
    assert answer.status == 503
    assert body["error"]["code"] == "ledger_unavailable"
    assert "openlora" not in body
    assert len(bench.books.closed) == 1
    assert (await client.get("/health")).status == 503


async def test_commit_failure_ends_a_stream_with_its_code_and_no_receipt(bench, client, ledger_fault):
    bench.books.close_fault = ledger_fault
    answer = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    events = events_of(await answer.text())
    assert events[-2]["error"]["code"] == "ledger_unavailable"
    assert all("openlora" not in event for event in events[:-1])
    assert all(event["choices"][0]["finish_reason"] is None for event in events[:-2])
    assert len(bench.books.closed) == 1


async def test_admission_failure_runs_nothing(bench, client, ledger_fault):
    bench.books.open_fault = ledger_fault
    answer = await client.post("/v1/chat/completions", json=CHAT)
    assert answer.status == 503
    assert bench.engine.submits == []
    assert bench.books.closed == []


# ---- echo


async def test_completion_echo_puts_the_prompt_before_the_answer(client):
    body = {**COMPLETION, "prompt": ["hi", "yo"], "echo": True}
    answer = await (await client.post("/v1/completions", json=body)).json()

    assert [choice["text"] for choice in answer["choices"]] == ["hihello world", "yohello world"]


async def test_completion_echo_of_token_ids_is_their_text(bench, client):
    body = {**COMPLETION, "prompt": bench.tokenizer.encode("hi you"), "echo": True}
    answer = await (await client.post("/v1/completions", json=body)).json()

    assert answer["choices"][0]["text"] == "hi youhello world"


async def test_completion_echo_with_logprobs_scores_the_prompt_too(bench, client):
    body = {**COMPLETION, "prompt": "hi you", "echo": True, "logprobs": 0}
    choice = (await (await client.post("/v1/completions", json=body)).json())["choices"][0]

    count = len(bench.tokenizer.encode("hi you"))
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][:count] == [None, *[-1.0] * (count - 1)]
    assert logprobs["text_offset"][count] == len("hi you")
    assert "".join(logprobs["tokens"][:count]) == "hi you"
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["text_offset"])
    assert bench.engine.submits[0].sampling.prompt_logprobs


async def test_completion_echo_of_special_ids_scores_them_though_their_text_is_empty(bench, client):
    special = bench.tokenizer.special.eos_token_id
    body = {**COMPLETION, "prompt": [special, special], "echo": True, "logprobs": 0}
    choice = (await (await client.post("/v1/completions", json=body)).json())["choices"][0]

    assert choice["text"] == "hello world"
    assert choice["logprobs"]["token_logprobs"][:2] == [None, -1.0]
    assert choice["logprobs"]["text_offset"][:3] == [0, 0, 0]


async def test_completion_echo_of_no_new_tokens_is_allowed(bench, client):
    bench.engine.answer_ids = []
    answer = await client.post("/v1/completions", json={**COMPLETION, "echo": True, "max_tokens": 0, "logprobs": 0})

    assert answer.status == 200
    assert bench.engine.submits[0].sampling.max_new_tokens == 0


async def test_completion_echo_streams_the_prompt_once(client):
    answer = await client.post("/v1/completions", json={**COMPLETION, "echo": True, "stream": True})
    texts = [event["choices"][0]["text"] for event in events_of(await answer.text()) if event != "[DONE]" and event["choices"]]

    assert "".join(texts) == "hihello world"


async def test_completion_echo_names_the_likeliest_tokens_of_the_prompt(bench, client):
    body = {**COMPLETION, "prompt": "hi you", "echo": True, "logprobs": 2}
    logprobs = (await (await client.post("/v1/completions", json=body)).json())["choices"][0]["logprobs"]

    ids = bench.tokenizer.encode("hi you")
    assert logprobs["top_logprobs"][0] is None
    for token_id, found in zip(ids[1:], logprobs["top_logprobs"][1:], strict=False):
        text = bench.tokenizer.token_text
        assert found == {text(token_id + 1): -0.5, text(token_id + 2): -1.5, text(token_id): -1.0}
    assert len(logprobs["top_logprobs"]) == len(logprobs["tokens"]) == len(logprobs["text_offset"])
    assert bench.engine.submits[0].sampling.prompt_top == 2


async def test_completion_logprobs_of_tokens_with_the_same_text_are_those_of_the_best(bench, client):
    halves = bench.tokenizer.encode("\u00e9")  # two bytes, neither of which is a character
    body = {**COMPLETION, "prompt": [*halves, halves[1]], "echo": True, "logprobs": 1}
    assert len({bench.tokenizer.token_text(token_id) for token_id in (halves[1], halves[1] + 1)}) == 1
    logprobs = (await (await client.post("/v1/completions", json=body)).json())["choices"][0]["logprobs"]

    assert logprobs["top_logprobs"][1:3] == [{"\ufffd": -0.5}, {"\ufffd": -0.5}]
    assert logprobs["token_logprobs"][1:3] == [-1.0, -1.0]


@pytest.mark.parametrize("extra", [{}, {"stop": "hello world!"}, {"logprobs": 0}, {"logprobs": 2}, {"logprobs": 1, "n": 2}])
async def test_completion_echo_streamed_adds_up_to_the_whole_answer(client, extra):
    body = {**COMPLETION, "prompt": "hi you", "echo": True, **extra}
    whole = (await (await client.post("/v1/completions", json=body)).json())["choices"]
    events = events_of(await (await client.post("/v1/completions", json={**body, "stream": True})).text())
    chunks = [choice for event in events if event != "[DONE]" for choice in event["choices"]]

    for choice in whole:
        own = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
        assert "".join(chunk["text"] for chunk in own) == choice["text"]
        scored = [chunk["logprobs"] for chunk in own if chunk["logprobs"] is not None]
        for key, values in (choice["logprobs"] or {}).items():
            assert values == (None if values is None else [item for part in scored for item in part[key]])


async def test_completion_echo_of_more_log_probabilities_than_there_may_be_is_refused(client):
    body = {**COMPLETION, "prompt": [[1] * 400] * 30, "echo": True, "logprobs": 5}
    answer = await client.post("/v1/completions", json=body)
    error = (await answer.json())["error"]

    assert (answer.status, error["param"]) == (400, "logprobs")
    assert all(number in error["message"] for number in ("12000", "72000", "65536"))


async def test_best_of_gives_the_likeliest_of_every_prompt_and_records_all(bench, client):
    bench.engine.choice_answers = (("first", -2.0), ("second", -0.25), ("third", -1.0))
    body = {**COMPLETION, "prompt": ["hi", "ho"], "n": 2, "best_of": 3}

    answer = await (await client.post("/v1/completions", json=body)).json()

    assert [choice["text"] for choice in answer["choices"]] == ["second", "third", "second", "third"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    closing = bench.one_closing()
    assert len(closing.outputs) == 6
    assert answer["usage"]["completion_tokens"] == sum(map(len, closing.outputs))


async def test_best_of_that_is_n_keeps_the_order(bench, client):
    bench.engine.choice_answers = (("first", -2.0), ("second", -0.25))
    answer = await (await client.post("/v1/completions", json={**COMPLETION, "n": 2, "best_of": 2})).json()

    assert [choice["text"] for choice in answer["choices"]] == ["first", "second"]


@pytest.mark.parametrize(
    ("sent", "token"), [("hf_secret", "hf_secret"), ("pb_secret", "pb_secret"), ("unused", None), ("EMPTY", None), ("sk-1", None)]
)
async def test_authorization_that_is_a_sources_token_is_passed_on(bench, client, sent, token):
    headers = {"Authorization": f"Bearer {sent}"}
    await client.post("/v1/chat/completions", json=CHAT, headers=headers)
    await client.post("/v1/completions", json={**COMPLETION, "model": "alice", "api_token": "own"}, headers=headers)

    assert bench.catalog.asked == [("alice", None, token), ("alice", None, "own")]


async def test_key_of_this_node_is_never_a_sources_token(make_bench, make_client):
    bench = make_bench(keys={"ann": "hf_key_of_ann_1234567"})
    client = await make_client(bench)
    for path, body in (("/v1/chat/completions", CHAT), ("/generate", {"inputs": "hi", "parameters": {"adapter_id": "alice"}})):
        await client.post(path, json=body, headers={"Authorization": "Bearer hf_key_of_ann_1234567"})

    assert bench.catalog.asked == [("alice", None, None)] * 2


async def test_refusal_of_an_earlier_turn_is_text(bench, client):
    refused = {"role": "assistant", "content": [{"type": "refusal", "refusal": "I will not."}]}
    answer = await client.post("/v1/chat/completions", json={**CHAT, "messages": [refused, *CHAT["messages"]]})

    assert answer.status == 200
    assert "I will not." in bench.tokenizer.decode(list(bench.engine.submits[0].prompt_ids))


async def test_adapter_that_the_caller_unloaded_says_so(bench, client):
    bench.catalog.faults["alice"] = AdapterNotFoundError("alice was unloaded", code="adapter_unloaded", param="model")
    answer = await client.post("/v1/chat/completions", json=CHAT)

    assert (answer.status, (await answer.json())["error"]["code"]) == (404, "adapter_unloaded")
