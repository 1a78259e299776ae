"""LoRAX's endpoints over fakes: shapes, statuses, explicit nulls, merges."""

from __future__ import annotations

import json
from dataclasses import replace

import msgspec
import pytest

from node.errors import AdapterInvalidError, AdapterUnavailableError, OverloadedError

ALL_NULL = dict.fromkeys(
    (
        "adapter_id",
        "adapter_source",
        "merged_adapters",
        "api_token",
        "best_of",
        "temperature",
        "repetition_penalty",
        "top_k",
        "top_p",
        "typical_p",
        "max_new_tokens",
        "return_full_text",
        "truncate",
        "return_k_alternatives",
        "seed",
        "response_format",
    )
)


def ask(**parameters):
    return {"inputs": "hi", "parameters": parameters}


def events_of(text):
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line]


async def test_root_answers_with_a_list_of_one(client):
    answer = await client.post("/", json=ask(details=True))
    body = await answer.json()
    assert isinstance(body, list)
    assert len(body) == 1
    assert body[0]["generated_text"] == "hello world"
    details = body[0]["details"]
    assert {"finish_reason", "prompt_tokens", "generated_tokens", "skipped_tokens", "seed", "prefill", "tokens"} == set(details)
    assert details["finish_reason"] == "eos_token"
    first = details["tokens"][0]
    assert first == {"id": first["id"], "text": "hello", "logprob": -0.5, "special": False, "skipped": False}
    assert details["tokens"][-1]["special"] is True


async def test_generate_answers_with_one_object_and_receipt(bench, client):
    answer = await client.post("/generate", json=ask(adapter_id="alice"))
    body = await answer.json()
    assert "details" not in body
    assert body["openlora"]["request_id"] == answer.headers["x-openlora-receipt"]
    assert answer.headers["x-adapter-id"] == "alice"
    assert answer.headers["x-model-id"] == "tiny-base"
    assert int(answer.headers["x-generated-tokens"]) == len(bench.one_closing().outputs[0])


async def test_generate_counts_characters_and_milliseconds_in_loraxs_headers(client):
    body = {**ask(), "inputs": "hi you"}
    whole = (await client.post("/generate", json=body)).headers
    streamed = (await client.post("/generate_stream", json=body)).headers

    assert whole["x-compute-characters"] == streamed["x-compute-characters"] == "6"
    assert whole["x-compute-time"] == whole["x-total-time"]
    parts = int(whole["x-validation-time"]) + int(whole["x-inference-time"])
    assert abs(int(whole["x-total-time"]) - parts) <= 1  # each is rounded
    assert whole["x-time-per-output-token"].isdecimal()


async def test_every_optional_parameter_may_be_null(client):
    answer = await client.post("/generate", json={"inputs": "hi", "parameters": ALL_NULL, "stream": False, "unknown": 1})
    assert answer.status == 200
    assert (await client.post("/generate", json={"inputs": "hi", "parameters": None})).status == 200


async def test_stream_has_one_event_a_token_and_no_done(bench, client):
    answer = await client.post("/generate_stream", json=ask(details=True))
    events = events_of(await answer.text())
    assert [event["token"]["text"] for event in events[:-1]] == ["hello", " wor", "l", "d"]
    assert all(event["generated_text"] is None for event in events[:-1])
    assert events[-1]["generated_text"] == "hello world"
    assert events[-1]["details"]["finish_reason"] == "eos_token"
    assert "openlora" in events[-1]
    assert len(events) == len(bench.one_closing().outputs[0])


async def test_root_with_stream_true_streams(client):
    answer = await client.post("/", json={**ask(), "stream": True})
    assert answer.content_type == "text/event-stream"
    assert events_of(await answer.text())[-1]["generated_text"] == "hello world"


async def test_stop_string_is_in_neither_tokens_nor_text(client):
    body = await (await client.post("/generate", json=ask(stop=["o wor"], details=True))).json()
    assert body["generated_text"] == "hell"
    assert body["details"]["finish_reason"] == "stop_sequence"
    assert "".join(token["text"] for token in body["details"]["tokens"]) == "hell"


async def test_decoder_input_details_give_the_prefill(bench, client):
    body = await (await client.post("/generate", json=ask(decoder_input_details=True))).json()
    prefill = body["details"]["prefill"]
    assert [item["id"] for item in prefill] == bench.tokenizer.encode("hi")
    assert prefill[0]["logprob"] is None
    assert prefill[1]["logprob"] == -1.0


async def test_return_full_text_prepends_the_prompt(client):
    body = await (await client.post("/generate", json=ask(return_full_text=True))).json()
    assert body["generated_text"] == "hihello world"


async def test_truncate_keeps_the_end_of_the_prompt(bench, client):
    await client.post("/generate", json={"inputs": "abc", "parameters": {"truncate": 1}})
    assert list(bench.engine.submits[0].prompt_ids) == bench.tokenizer.encode("c")


async def test_alternatives_are_listed_when_asked_for(client):
    body = await (await client.post("/generate", json=ask(return_k_alternatives=2, details=True))).json()
    assert len(body["details"]["tokens"][0]["alternative_tokens"]) == 2


async def test_greedy_unless_a_sampling_parameter_is_set(bench, client):
    await client.post("/generate", json=ask())
    await client.post("/generate", json=ask(top_p=0.5))
    await client.post("/generate", json=ask(do_sample=True, temperature=0.5, seed=3))
    assert [submit.sampling.temperature for submit in bench.engine.submits] == [0.0, 1.0, 0.5]
    assert bench.engine.submits[2].sampling.seed == 3


async def test_linear_merge_becomes_weighted_terms(bench, client):
    merge = {"ids": ["alice", "org/bob"], "weights": [0.25, 0.75], "merge_strategy": "linear", "density": 0.0}
    answer = await client.post("/generate", json=ask(merged_adapters=merge))
    assert answer.status == 200
    terms = bench.engine.submits[0].terms
    assert [(term.adapter_id, term.weight) for term in terms] == [("1" * 64, 0.25), ("2" * 64, 0.75)]
    assert answer.headers["x-adapter-id"] == "alice,org/bob"


TOO_LONG = {"inputs": "a" * 600, "parameters": {}}
VALIDATION = {
    "inputs empty": ({"inputs": ""}, "`inputs` cannot be empty"),
    "inputs missing": ({}, "`inputs` cannot be empty"),
    "temperature": (ask(temperature=-1), "`parameters.temperature` must be non-negative"),
    "top_p": (ask(top_p=0), "must be > 0.0 and < 1.0"),
    "typical_p": (ask(typical_p=1.5), "must be > 0.0 and < 1.0"),
    "top_k": (ask(top_k=0), "must be strictly positive"),
    "repetition_penalty": (ask(repetition_penalty=0), "must be strictly positive"),
    "frequency_penalty": (ask(frequency_penalty=3), "must be >= -2.0 and <= 2.0"),
    "max_new_tokens": (ask(max_new_tokens=0), "must be strictly positive"),
    "stop": (ask(stop=["x"] * 9), "supports up to 8 stop sequences"),
    "best_of": (ask(best_of=9), "`parameters.best_of` must be > 0 and <= 8. Given: 9"),
    "best_of greedy": (ask(best_of=2), "you must use sampling when `best_of` is > 1"),
    "best_of seeded": (ask(best_of=2, do_sample=True, seed=3), "`seed` must not be set when `best_of` > 1"),
    "seed": (ask(seed=2**64), "`parameters.seed`"),
    "adapter_id outside": ({**ask(), "adapter_id": "alice"}, "`adapter_id` belongs into `parameters`"),
    "merged_adapters outside": ({**ask(), "merged_adapters": {"ids": ["alice"]}}, "`merged_adapters` belongs into"),
    "another server's field": (ask(lora_path="alice"), "`parameters.lora_path` names no adapter on this route"),
    "watermark": (ask(watermark=True), "`parameters.watermark`"),
    "response_format": (ask(response_format={"type": "json_object", "schema": 7}), "`parameters.response_format.schema`"),
    "both adapters": (ask(adapter_id="alice", merged_adapters={"ids": ["alice"]}), "at most one of"),
    "merge empty": (ask(merged_adapters={"ids": []}), "`parameters.merged_adapters.ids`"),
    "merge lengths": (ask(merged_adapters={"ids": ["alice"], "weights": [1, 2]}), "must have as many values"),
    "merge density": (ask(merged_adapters={"ids": ["alice", "org/bob"], "merge_strategy": "ties"}), "share of values that ties"),
    "merge method": (
        ask(merged_adapters={"ids": ["alice", "org/bob"], "merge_strategy": "linear", "majority_sign_method": "loudest"}),
        "must be total or frequency",
    ),
    "merge weight text": (ask(merged_adapters={"ids": ["alice"], "weights": ["1e3"]}), "must be a number"),
    "merge weight digits": (ask(merged_adapters={"ids": ["alice"], "weights": [1e-19]}), "at most 18 decimals"),
    "merge weight bool": (ask(merged_adapters={"ids": ["alice"], "weights": [True]}), "must be a number"),
    "merge unknown": (ask(merged_adapters={"ids": ["alice"], "merge_strategy": "blend"}), "must be linear"),
    "merge zero": (ask(merged_adapters={"ids": ["alice"], "weights": [0]}), "every weight"),
    "merge twice": (ask(merged_adapters={"ids": ["alice", "alice"], "weights": [1, 1]}), "twice"),
    "merge too many": (ask(merged_adapters={"ids": ["a", "b", "c", "d", "e"]}), "at most 4 items"),
    "too long": (TOO_LONG, "`inputs` tokens + `max_new_tokens` must be <= 512"),
}


@pytest.mark.parametrize("name", VALIDATION)
async def test_wrong_parameter_is_422_validation(bench, client, name):
    body, text = VALIDATION[name]
    answer = await client.post("/generate", json=body)
    error = await answer.json()
    assert (answer.status, error["error_type"]) == (422, "validation")
    assert error["error"].startswith("Input validation error: ")
    assert text in error["error"]
    assert bench.books.opened == []


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (AdapterInvalidError("rank 512 exceeds the maximum of 128", code="adapter_rank_unsupported"), "adapter_rank_unsupported"),
        (AdapterUnavailableError("the source does not answer", retry_after_s=3), "source_unavailable"),
    ],
)
async def test_adapter_failure_is_424_generation_with_its_code(bench, client, fault, code):
    bench.catalog.faults["broken"] = fault
    answer = await client.post("/generate", json=ask(adapter_id="broken"))
    error = await answer.json()
    assert (answer.status, error["error_type"], error["code"]) == (424, "generation", code)


async def test_unknown_adapter_is_424_generation(client):
    answer = await client.post("/generate", json=ask(adapter_id="nobody"))
    assert (answer.status, (await answer.json())["error_type"]) == (424, "generation")


async def test_stream_errors_arrive_inside_a_200_stream(bench, client):
    for body in (ask(temperature=-1), ask(adapter_id="nobody"), ask(decoder_input_details=True)):
        answer = await client.post("/generate_stream", json=body)
        events = events_of(await answer.text())
        assert answer.status == 200
        assert [set(event) >= {"error", "error_type"} for event in events] == [True]
    assert bench.books.opened == []


async def test_best_of_gives_the_likeliest_and_shows_the_others(bench, client):
    bench.engine.choice_answers = (("first", -2.0), ("second", -0.25), ("third", -1.0))
    body = ask(best_of=3, do_sample=True, details=True, return_full_text=False)

    answer = await (await client.post("/generate", json=body)).json()

    details = answer["details"]
    assert (answer["generated_text"], details["tokens"][0]["logprob"]) == ("second", -0.25)
    assert details["prompt_tokens"] == len(bench.books.opened[0].prompts[0])
    assert [item["generated_text"] for item in details["best_of_sequences"]] == ["third", "first"]
    required = {"generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens"}
    assert all(set(item) == required for item in details["best_of_sequences"])
    assert len(bench.one_closing().outputs) == 3  # all were made, all are in the record
    assert len({submit.choice_index for submit in bench.engine.submits}) == 3


async def test_best_of_without_details_is_one_answer(bench, client):
    bench.engine.choice_answers = (("first", -2.0), ("second", -0.25))
    answer = await (await client.post("/", json=ask(best_of=2, temperature=0.9))).json()

    assert ([item["generated_text"] for item in answer], "details" in answer[0]) == (["second"], False)


async def test_best_of_is_not_streamed(bench, client):
    answer = await client.post("/generate_stream", json=ask(best_of=2, do_sample=True))

    assert "not supported when streaming" in events_of(await answer.text())[0]["error"]
    assert bench.books.opened == []


async def test_seed_of_64_bits_draws_by_its_bits_and_comes_back(bench, client):
    most = 2**64 - 1
    answer = await (await client.post("/generate", json=ask(seed=most, do_sample=True, details=True))).json()

    assert (answer["details"]["seed"], bench.engine.submits[0].sampling.seed) == (most, -1)


@pytest.mark.parametrize("name", ["", "tiny-base", "__base_model__"])
async def test_base_model_goes_by_each_of_its_names(bench, client, name):
    answer = await client.post("/generate", json=ask(adapter_id=name))

    assert (answer.status, bench.engine.submits[0].terms, bench.catalog.asked) == (200, (), [])


async def test_answer_says_where_its_adapters_came_from(bench, client):
    bench.catalog.known["org/bob"] = replace(bench.catalog.known["org/bob"], source="hub")
    merged = {"ids": ["alice", "org/bob"], "weights": [1, 1]}
    one = await client.post("/generate", json=ask(adapter_id="org/bob"))
    both = await client.post("/generate", json=ask(merged_adapters=merged))

    assert (one.headers["x-adapter-source"], both.headers["x-adapter-source"]) == ("hub", "local,hub")


async def test_full_house_is_429_overloaded(make_bench, make_client):
    bench = make_bench(max_concurrent_requests=1)
    client = await make_client(bench)
    bench.engine.hold_after = 1
    running = await client.post("/generate_stream", json=ask())
    await bench.engine.held.wait()
    refused = await client.post("/generate", json=ask())
    assert (refused.status, (await refused.json())["error_type"]) == (429, "overloaded")
    assert refused.headers["Retry-After"] == "1"
    running.close()


async def test_authorization_is_the_source_token_only_without_api_keys(bench, client):
    await client.post("/generate", json=ask(adapter_id="alice"), headers={"Authorization": "Bearer hf_secret"})
    assert bench.catalog.asked == [("alice", None, "hf_secret")]


async def test_overload_of_the_catalog_keeps_its_status(bench, client):
    bench.catalog.faults["cold"] = OverloadedError("too many downloads", code="adapter_queue_full", retry_after_s=2.5)
    answer = await client.post("/generate", json=ask(adapter_id="cold"))
    assert (answer.status, answer.headers["Retry-After"]) == (429, "3")


async def test_tokenize_gives_ids_texts_and_offsets(client):
    answer = await client.post("/tokenize", json={"inputs": "hello w"})
    body = await answer.json()
    assert [(item["text"], item["start"], item["stop"]) for item in body] == [("hello", 0, 5), (" w", 5, 7)]


@pytest.mark.parametrize("path", ["/classify", "/classify_batch"])
async def test_route_for_another_kind_of_model_is_501_with_a_reason(client, path):
    answer = await client.post(path, json={"inputs": "x"})
    assert answer.status == 501
    assert "classification head" in (await answer.json())["error"]


async def test_failed_generation_names_its_receipt(bench, client):
    bench.engine.fail_after = 0
    answer = await client.post("/generate", json={"inputs": "x"})
    assert (answer.status, (await answer.json())["error_type"]) == (424, "generation")
    assert answer.headers["x-openlora-receipt"] == bench.one_closing().request_id


async def test_prompt_details_of_more_tokens_than_there_may_be_are_refused(make_bench, make_client):
    bench = make_bench(max_body_bytes=4 << 20)
    bench = type(bench)(**{**vars(bench), "services": _long_context(bench.services)})
    client = await make_client(bench)
    body = {"inputs": "a" * 60_000, "parameters": {"best_of": 3, "do_sample": True, "decoder_input_details": True}}
    answer = await client.post("/generate", json=body)
    error = await answer.json()

    assert (answer.status, error["error_type"]) == (422, "validation")
    assert "180000" in error["error"]


def _long_context(services):
    fields = {name: getattr(services, name) for name in services.__dataclass_fields__}
    ready = msgspec.structs.replace(services.ready, max_model_len=70_000)
    return type(services)(**{**fields, "ready": ready})
