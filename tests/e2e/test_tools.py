"""Tools on a started node, through the real openai SDK. The model is small: what it says matters less than that it parses."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pytest

pytestmark = pytest.mark.e2e

BASE = "smollm2-135m-instruct"
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"type": "string", "enum": ["c", "f"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "The weather now.", "parameters": PARAMETERS, "strict": True},
    },
    {"type": "function", "function": {"name": "get_time", "description": "The time now."}},
]
ASK: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture(scope="module")
def client(node):
    with openai.OpenAI(base_url=f"{node.url}/v1", api_key="unused", max_retries=0, timeout=120) as client:
        yield client


def ask(client, **extra):
    arguments: dict[str, Any] = {"model": BASE, "messages": ASK, "tools": TOOLS, "max_tokens": 200, "temperature": 0, **extra}
    return client.chat.completions.create(**arguments)


def test_forced_call_has_arguments_of_its_schema(client):
    choice = ask(client, tool_choice={"type": "function", "function": {"name": "get_weather"}}).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "get_weather")
    jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)


def test_required_calls_parse_at_any_temperature(client):
    answer = ask(client, tool_choice="required", parallel_tool_calls=False, temperature=1.0, seed=3, n=3)
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls
        arguments = json.loads(call.function.arguments)
        jsonschema.validate(arguments, PARAMETERS if call.function.name == "get_weather" else {"type": "object"})


def test_streamed_call_adds_up_to_the_whole_one(client):
    choice: Any = {"type": "function", "function": {"name": "get_weather"}}
    whole = ask(client, tool_choice=choice).choices[0].message.tool_calls[0]
    name, arguments, finish = "", "", None
    for chunk in ask(client, tool_choice=choice, stream=True):
        for part in chunk.choices:
            finish = part.finish_reason or finish
            for call in part.delta.tool_calls or ():
                name += call.function.name or ""
                arguments += call.function.arguments or ""
    assert (name, arguments, finish) == (whole.function.name, whole.function.arguments, "tool_calls")


def test_loop_ends_with_an_answer_in_text(client):
    first = ask(client, tool_choice="required", parallel_tool_calls=False).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": '{"degrees": 21, "sky": "clear"}'}
    second = ask(client, messages=[*ASK, first.model_dump(exclude_none=True), result], tool_choice="none", max_tokens=24)
    assert second.choices[0].finish_reason in ("stop", "length")
    assert second.choices[0].message.content
    assert second.choices[0].message.tool_calls is None


def test_auto_answers_in_text_or_with_calls_that_parse(client):
    for seed in range(3):
        choice = ask(client, temperature=1.0, seed=seed, max_tokens=80).choices[0]
        calls = choice.message.tool_calls or []
        assert choice.message.content or calls or choice.finish_reason == "length"
        if choice.finish_reason == "tool_calls":
            assert all(isinstance(json.loads(call.function.arguments), dict) for call in calls)
        assert "<tool_call>" not in (choice.message.content or "")


def test_call_without_room_says_length(client):
    choice = ask(client, tool_choice="required", max_tokens=12).choices[0]
    assert choice.finish_reason == "length"
