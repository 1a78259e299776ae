"""Bodies that must be refused with a clear answer, after which the node answers the next good request unchanged."""

from __future__ import annotations

import json

import pytest

CHAT = {"model": "alice", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "seed": 1}
COMPLETION = {"model": "", "prompt": "hi", "max_tokens": 8, "seed": 1}
JSON = {"Content-Type": "application/json"}


async def assert_healthy(bench, client):
    """A golden request is answered, and nothing refused has left a trace in the books."""
    opened = len(bench.books.opened)
    answer = await client.post("/v1/completions", json=COMPLETION)
    assert (await answer.json())["choices"][0]["text"] == "hello world"
    assert len(bench.books.opened) == len(bench.books.closed) == opened + 1
    assert (await client.get("/health")).status == 200


def chat(**changes):
    return "/v1/chat/completions", {**CHAT, **changes}


def completion(**changes):
    return "/v1/completions", {**COMPLETION, **changes}


RAW_BODIES = {
    "not json": (b"hello", 400, "invalid_json"),
    "empty": (b"", 400, "invalid_json"),
    "truncated": (b'{"model": "a', 400, "invalid_json"),
    "trailing garbage": (json.dumps(CHAT).encode() + b"x", 400, "invalid_json"),
    "a list": (b"[]", 400, "invalid_json"),
    "null": (b"null", 400, "invalid_json"),
    "not utf-8": (b'{"model": "\xff\xfe"}', 400, "invalid_json"),
    "byte order mark": (b"\xef\xbb\xbf{}", 400, "invalid_json"),
    "duplicate keys": (b'{"model": "a", "model": "b"}', 400, "invalid_json"),
    "nan": (b'{"temperature": NaN}', 400, "invalid_json"),
    "infinity": (b'{"temperature": -Infinity}', 400, "invalid_json"),
    "lone surrogate": (b'{"model": "\\ud800"}', 400, "invalid_json"),
    "depth 10000": (b'{"model":' + b"[" * 10_000 + b"]" * 10_000 + b"}", 400, "invalid_json"),
    "depth in objects": (b'{"a":' * 5_000 + b"1" + b"}" * 5_000, 400, "invalid_json"),
    "many escaped quotes": (b'{"a": "' + b'\\"' * 200_000, 400, "invalid_json"),
    "long integer": (b'{"seed": ' + b"9" * 10_000 + b"}", 400, "invalid_json"),
    "too many keys": (b"{" + b",".join(b'"%d":1' % key for key in range(100_001)) + b"}", 400, "invalid_json"),
    "too large": (b'{"a": "' + b"x" * (2 << 20) + b'"}', 413, "body_too_large"),
}


@pytest.mark.parametrize("name", RAW_BODIES)
async def test_raw_body_is_refused(bench, client, name):
    body, status, code = RAW_BODIES[name]
    answer = await client.post("/v1/chat/completions", data=body, headers=JSON)
    error = (await answer.json())["error"]
    assert (answer.status, error["code"], error["type"]) == (status, code, "invalid_request_error")
    await assert_healthy(bench, client)


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/json; charset=utf-16"},
    ],
)
async def test_content_type_other_than_json_is_415(client, headers):
    answer = await client.post("/v1/chat/completions", data=json.dumps(CHAT).encode(), headers=headers)
    assert answer.status == 415
    assert (await answer.json())["error"]["code"] == "unsupported_media_type"


async def test_chunked_body_without_length_is_counted_while_it_arrives(bench, client):
    async def endless():
        yield b'{"a": "'
        for _ in range(64):
            yield b"x" * 65536
        yield b'"}'

    answer = await client.post("/v1/completions", data=endless(), headers=JSON)
    assert answer.status == 413


IMAGE = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}
CASES = {
    "model missing": ("/v1/chat/completions", {"messages": CHAT["messages"]}, 400, "model"),
    "model null": (*chat(model=None), 400, "model"),
    "model number": (*chat(model=7), 400, "model"),
    "model with control characters": (*chat(model="a\nb"), 400, "model"),
    "model unknown": (*chat(model="nobody"), 404, "model"),
    "model malformed": (*chat(model="../etc/passwd"), 400, None),
    "messages missing": (*chat(messages=None), 400, "messages"),
    "messages empty": (*chat(messages=[]), 400, "messages"),
    "messages no list": (*chat(messages="hi"), 400, "messages"),
    "message no object": (*chat(messages=["hi"]), 400, "messages[0]"),
    "message role unknown": (*chat(messages=[{"role": "wizard", "content": "x"}]), 400, "messages[0]"),
    "message content null": (*chat(messages=[{"role": "user", "content": None}]), 400, "messages[0]"),
    "message content empty list": (*chat(messages=[{"role": "user", "content": []}]), 400, "messages[0]"),
    "message 5000": (*chat(messages=[{"role": "user", "content": "x"}] * 5000), 400, "messages"),
    "image part": (*chat(messages=[{"role": "user", "content": [IMAGE]}]), 400, "messages[0].content[0]"),
    "tool role": (*chat(messages=[{"role": "tool", "content": "x"}]), 400, "messages[0].tool_call_id"),
    "tools": (*chat(tools=[{"type": "function"}]), 400, "tools[0].function"),
    "response_format": (*chat(response_format={"type": "xml"}), 400, "response_format.type"),
    "response_format schema": (
        *chat(response_format={"type": "json_schema", "json_schema": {"schema": 7}}),
        400,
        "response_format.json_schema.schema",
    ),
    "response_format no object": (*chat(response_format="json"), 400, "response_format"),
    "guided regex": (*chat(guided_regex="(a"), 400, "guided_regex"),
    "chat template": (*chat(chat_template="{{ 1 }}"), 400, "chat_template"),
    "chat template arguments": (*chat(chat_template_kwargs={"tokenize": True}), 400, "chat_template_kwargs"),
    "prompt missing": (*completion(prompt=None), 400, "prompt"),
    "prompt empty": (*completion(prompt=""), 400, "prompt"),
    "prompt empty list": (*completion(prompt=[]), 400, "prompt"),
    "prompt of an empty list": (*completion(prompt=[[]]), 400, "prompt[0]"),
    "prompt with an empty string": (*completion(prompt=["a", ""]), 400, "prompt[1]"),
    "prompt id negative": (*completion(prompt=[-1]), 400, "prompt"),
    "prompt id beyond vocabulary": (*completion(prompt=[300]), 400, "prompt"),
    "prompt mixed": (*completion(prompt=["a", 1]), 400, "prompt"),
    "prompt mixed lists": (*completion(prompt=[[1], "a"]), 400, "prompt"),
    "prompt booleans": (*completion(prompt=[True]), 400, "prompt"),
    "prompt 1000 strings": (*completion(prompt=["a"] * 1000), 400, "prompt"),
    "prompt beyond context": (*completion(prompt=[1] * 600), 400, "prompt"),
    "context": (*completion(prompt=[1] * 500, max_tokens=100), 400, "prompt"),
    "max_tokens 0": (*chat(max_tokens=0), 400, "max_tokens"),
    "max_tokens -1": (*chat(max_tokens=-1), 400, "max_tokens"),
    "max_tokens 2**63": (*chat(max_tokens=2**63), 400, "max_tokens"),
    "max_tokens 1.5": (*chat(max_tokens=1.5), 400, "max_tokens"),
    "max_tokens string": (*chat(max_tokens="10"), 400, "max_tokens"),
    "max_tokens true": (*chat(max_tokens=True), 400, "max_tokens"),
    "max_completion_tokens 0": (*chat(max_completion_tokens=0), 400, "max_completion_tokens"),
    "n 0": (*chat(n=0), 400, "n"),
    "n 10**9": (*chat(n=10**9), 400, "n"),
    "best_of below n": (*completion(n=3, best_of=2), 400, "best_of"),
    "best_of 10**9": (*completion(n=1, best_of=10**9), 400, "best_of"),
    "best_of streamed": (*completion(n=1, best_of=2, stream=True), 400, "best_of"),
    "best_of of many prompts": (*completion(prompt=["a"] * 64, best_of=8), 400, "n"),
    "adapter_id beside another model": (*completion(model="alice", adapter_id="org/bob"), 400, "model"),
    "adapter_id a list": (*completion(model="", adapter_id=["alice"]), 400, "adapter_id"),
    "lora_path a list": (*chat(model="", lora_path=["alice"]), 400, "lora_path"),
    "adapter_id and lora_path": (*chat(model="", adapter_id="alice", lora_path="alice"), 400, "lora_path"),
    "adapters and adapter_id": (*chat(model="", adapters=[{"model": "alice"}], adapter_id="org/bob"), 400, "adapter_id"),
    "merged_adapters empty": (*chat(model="", merged_adapters={"ids": []}), 400, "merged_adapters.ids"),
    "part of no kind": (*chat(messages=[{"role": "user", "content": [{"type": "refusal"}]}]), 400, "messages[0].content[0]"),
    "suffix": (*completion(suffix="x"), 400, "suffix"),
    "temperature -1": (*chat(temperature=-1), 400, "temperature"),
    "temperature 3": (*chat(temperature=3), 400, "temperature"),
    "temperature word": (*chat(temperature="hot"), 400, "temperature"),
    "top_p 0": (*chat(top_p=0), 400, "top_p"),
    "top_p 1.1": (*chat(top_p=1.1), 400, "top_p"),
    "top_k -2": (*chat(top_k=-2), 400, "top_k"),
    "min_p 2": (*chat(min_p=2), 400, "min_p"),
    "typical_p 0": (*chat(typical_p=0), 400, "typical_p"),
    "repetition_penalty 0": (*chat(repetition_penalty=0), 400, "repetition_penalty"),
    "frequency_penalty 2.1": (*chat(frequency_penalty=2.1), 400, "frequency_penalty"),
    "presence_penalty -3": (*chat(presence_penalty=-3), 400, "presence_penalty"),
    "logit_bias many": (*chat(logit_bias={str(key): 1 for key in range(301)}), 400, "logit_bias"),
    "logit_bias key": (*chat(logit_bias={"abc": 1}), 400, "logit_bias"),
    "logit_bias id": (*chat(logit_bias={"300": 1}), 400, "logit_bias"),
    "logit_bias value": (*chat(logit_bias={"1": 1e9}), 400, "logit_bias.1"),
    "logit_bias twice": (*chat(logit_bias={"1": 1, "01": 2}), 400, "logit_bias"),
    "logit_bias list": (*chat(logit_bias=[1]), 400, "logit_bias"),
    "top_logprobs 10**6": (*chat(logprobs=True, top_logprobs=10**6), 400, "top_logprobs"),
    "top_logprobs without logprobs": (*chat(top_logprobs=1), 400, "top_logprobs"),
    "logprobs 10**6": (*completion(logprobs=10**6), 400, "logprobs"),
    "stop 1000": (*chat(stop=["x"] * 1000), 400, "stop"),
    "stop empty": (*chat(stop=""), 400, "stop"),
    "stop long": (*chat(stop="x" * 100_000), 400, "stop"),
    "stop numbers": (*chat(stop=[1]), 400, "stop"),
    "seed 2**80": (*chat(seed=2**80), 400, "seed"),
    "stream yes": (*chat(stream="yes"), 400, "stream"),
    "stream_options without stream": (*chat(stream_options={"include_usage": True}), 400, "stream_options"),
    "user control characters": (*chat(user="a\x00b"), 400, "user"),
    "user 10 kB": (*chat(user="u" * 10_000), 400, "user"),
    "adapter_source": (*chat(adapter_source="ftp"), 400, "adapter_source"),
}


@pytest.mark.parametrize("name", CASES)
async def test_bad_field_is_refused_by_name_and_leaves_the_node_healthy(bench, client, name):
    path, body, status, param = CASES[name]
    answer = await client.post(path, json=body)
    error = (await answer.json())["error"]
    assert (answer.status, error["param"]) == (status, param)
    assert len(error["message"]) < 500
    await assert_healthy(bench, client)


async def test_temperature_beyond_double_range_is_refused(client):
    body = json.dumps(CHAT)[:-1] + ', "temperature": 1e309}'
    answer = await client.post("/v1/chat/completions", data=body.encode(), headers=JSON)
    assert answer.status == 400
    assert (await answer.json())["error"]["param"] == "temperature"


async def test_context_error_names_the_three_numbers(client):
    answer = await client.post("/v1/completions", json={**COMPLETION, "prompt": [1] * 500, "max_tokens": 100})
    error = (await answer.json())["error"]
    assert error["code"] == "context_length_exceeded"
    assert all(number in error["message"] for number in ("512", "500", "100"))


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("POST", "/v1/../admin", 404, "not_found"),
        ("POST", "/v1%2Fcompletions", 404, "not_found"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("GET", "/v1/receipts/none", 404, "receipt_not_found"),
        ("GET", "/v1/models/none", 404, "model_not_found"),
    ],
)
async def test_wrong_path_or_method_is_json(client, method, path, status, code):
    answer = await client.request(method, path)
    assert answer.status == status
    assert (await answer.json())["error"]["code"] == code


async def test_unexpected_exception_is_500_without_its_text(bench, client):
    async def broken(name, source=None, token=None):
        raise RuntimeError("secret at 0x7fff")

    bench.catalog.resolve = broken
    answer = await client.post("/v1/chat/completions", json=CHAT)
    text = await answer.text()
    assert answer.status == 500
    assert "secret" not in text
    assert json.loads(text)["error"]["request_id"] == answer.headers["x-request-id"]


async def test_client_request_id_is_not_taken_over(client):
    answer = await client.post("/v1/completions", json=COMPLETION, headers={"x-request-id": "forged"})
    assert answer.headers["x-request-id"] != "forged"
