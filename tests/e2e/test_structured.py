"""Structured output from a started node: the real openai SDK and lorax-client, answers judged by pydantic and jsonschema."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

pytestmark = pytest.mark.e2e

BASE = "smollm2-135m-instruct"
ASK: list[Any] = [{"role": "user", "content": "Ada Lovelace was born in 1815 in London. Describe her in JSON."}]
ROOT = Path(__file__).parents[2]
LORAX_PYTHON = ROOT / ".venv-lorax" / "bin" / "python"
LORAX_SCRIPT = ROOT / "tests" / "api" / "clients" / "lorax_structured.py"


class Person(BaseModel):
    """What the model must fill in."""

    name: str = Field(max_length=30)
    born: int = Field(ge=1000, le=2100)
    city: Literal["London", "Paris", "Rome"]
    tags: list[str] = Field(max_length=2)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "pair": {"type": "array", "items": {"enum": ["x", "y", 1, None]}, "minItems": 2, "maxItems": 2},
    },
    "required": ["name", "age", "pair"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(node):
    with openai.OpenAI(base_url=f"{node.url}/v1", api_key="unused", max_retries=0, timeout=120) as client:
        yield client


def test_sdk_parses_an_answer_into_its_class(client):
    answer = client.chat.completions.parse(model=BASE, messages=ASK, max_tokens=400, temperature=0, response_format=Person)
    person = answer.choices[0].message.parsed
    assert isinstance(person, Person)
    assert answer.choices[0].finish_reason == "stop"
    assert json.loads(answer.choices[0].message.content) == person.model_dump()


@pytest.mark.parametrize("model", [BASE, "lincoln"])
def test_json_schema_holds_for_several_choices_whatever_the_temperature(client, model):
    answer = client.chat.completions.create(
        model=model,
        messages=ASK,
        max_tokens=200,
        temperature=1.0,
        seed=5,
        n=3,
        logprobs=True,
        response_format={"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": SCHEMA}},
    )
    assert len(answer.choices) == 3
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
        assert all(token.logprob <= 0 for token in choice.logprobs.content)


def test_stream_is_the_whole_answer_and_the_seed_repeats_it(client):
    arguments: dict[str, Any] = {
        "model": BASE,
        "messages": ASK,
        "max_tokens": 200,
        "temperature": 0.8,
        "seed": 11,
        "response_format": {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}},
    }
    whole = client.chat.completions.create(**arguments).choices[0].message.content
    pieces = client.chat.completions.create(**arguments, stream=True)
    assert "".join(choice.delta.content or "" for piece in pieces for choice in piece.choices) == whole
    jsonschema.validate(json.loads(whole), SCHEMA)


def test_answer_without_room_says_length(client):
    answer = client.chat.completions.create(
        model=BASE, messages=ASK, max_tokens=5, response_format={"type": "json_object"}, temperature=0
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content.startswith("{")


def test_guided_fields_hold_on_completions(client):
    for extra, pattern in (
        ({"guided_regex": r"[0-9]{3}-[0-9]{4}"}, r"[0-9]{3}-[0-9]{4}"),
        ({"guided_choice": ["red", "green"]}, "red|green"),
        ({"guided_grammar": 'start: "<" /[a-z]{1,9}/ ">"'}, "<[a-z]{1,9}>"),
        ({"structured_outputs": {"regex": "(ab){2,4}"}}, "(ab){2,4}"),
    ):
        answer = client.completions.create(model=BASE, prompt="Answer:", max_tokens=40, temperature=1, extra_body=extra)
        assert re.fullmatch(pattern, answer.choices[0].text), (extra, answer.choices[0].text)
        assert answer.choices[0].finish_reason == "stop"


def test_constrained_and_free_answers_share_a_batch_and_change_nothing(client, node):
    free = {"model": BASE, "prompt": ["Once upon a time"] * 2, "max_tokens": 16, "temperature": 0}
    alone = node.post("/v1/completions", free).body["choices"]
    with client.chat.completions.create(
        model=BASE, messages=ASK, max_tokens=120, stream=True, response_format={"type": "json_object"}
    ) as stream:
        next(iter(stream))
        beside = node.post("/v1/completions", free).body["choices"]
    assert [choice["text"] for choice in beside] == [choice["text"] for choice in alone]


def test_bad_schema_is_refused_by_name_and_bills_nothing(client, node):
    schema = {"$ref": "https://example.org/schema.json"}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=BASE, messages=ASK, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        )
    assert (caught.value.code, caught.value.param) == ("schema_invalid", "response_format.json_schema.schema")
    assert "x-openlora-receipt" not in caught.value.response.headers


@pytest.mark.skipif(not LORAX_PYTHON.exists(), reason=f"{LORAX_PYTHON} is absent; scripts/test makes it")
def test_lorax_client_gets_json_of_its_schema(node):
    done = subprocess.run(
        [str(LORAX_PYTHON), str(LORAX_SCRIPT), node.url, json.dumps(SCHEMA)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    jsonschema.validate(json.loads(seen["whole"]), SCHEMA)
    assert seen["whole"] == seen["stream"]
    assert seen["finish"] == "eos_token"
