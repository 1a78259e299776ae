"""Response formats and guided fields: what reaches the engine, what is refused, and the process that judges grammars."""

from __future__ import annotations

import asyncio
import json

import pytest

from node.api.grammar_desk import GrammarDesk, GrammarLimits
from node.api.schema_limits import check_schema
from node.errors import GrammarError, OverloadedError

MESSAGES = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


def chat(**extra):
    return "/v1/chat/completions", {"model": "", "messages": MESSAGES, "max_tokens": 8, **extra}


def completion(**extra):
    return "/v1/completions", {"model": "", "prompt": "hi", "max_tokens": 8, **extra}


def lorax(**parameters):
    return "/generate", {"inputs": "hi", "parameters": parameters}


def json_format(schema, **extra):
    return {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, **extra}}


FORMS = {
    "json_object": (chat(response_format={"type": "json_object"}), '%json {"type": "object"'),
    "json_schema": (chat(response_format=json_format(SCHEMA, strict=True)), '"required": ["a"]'),
    "lorax json_schema on chat": (chat(response_format={"type": "json_schema", "schema": SCHEMA}), '"required": ["a"]'),
    "lorax json_object on chat": (chat(response_format={"type": "json_object", "schema": SCHEMA}), '"required": ["a"]'),
    "schema true": (chat(response_format=json_format(True)), "%json"),
    "guided_json": (completion(guided_json=SCHEMA), '"required": ["a"]'),
    "guided_json text": (completion(guided_json=json.dumps(SCHEMA)), '"required": ["a"]'),
    "guided_regex": (completion(guided_regex="[0-9]{3}"), "start: /[0-9]{3}/"),
    "guided_choice": (completion(guided_choice=["yes", 'n"o']), 'start: "yes" | "n\\"o"'),
    "guided_grammar": (chat(guided_grammar='start: "a"'), 'start: "a"'),
    "guided_grammar GBNF": (chat(guided_grammar='root ::= "a" | "b"'), "start:"),
    "structured_outputs": (chat(structured_outputs={"regex": "a+"}), "start: /a+/"),
    "structured_outputs json_object": (chat(structured_outputs={"json_object": True}), '%json {"type": "object"'),
    "lorax": (lorax(response_format={"type": "json_object", "schema": SCHEMA}), '"required": ["a"]'),
    "lorax without schema": (lorax(response_format={"type": "json_schema", "schema": None}), '%json {"type": "object"'),
}


async def test_every_form_reaches_the_engine_as_a_grammar(bench, client):
    for name, ((path, body), part) in FORMS.items():  # over one worker, which takes longer to start than all of them
        answer = await client.post(path, json=body)
        assert answer.status == 200, (name, await answer.text())
        assert part in (bench.engine.submits[-1].grammar or ""), name
        assert bench.engine.submits[-1].sampling.stop_token_ids
    assert len(bench.engine.submits) == len(FORMS)


@pytest.mark.parametrize("form", [None, {"type": "text"}])
async def test_no_form_is_no_grammar(bench, client, form):
    path, body = chat(response_format=form)
    assert (await client.post(path, json=body)).status == 200
    assert bench.engine.submits[0].grammar is None


async def test_every_choice_gets_the_grammar(bench, client):
    path, body = chat(response_format={"type": "json_object"}, n=3)
    assert (await client.post(path, json=body)).status == 200
    assert len({submit.grammar for submit in bench.engine.submits}) == 1
    assert len(bench.engine.submits) == 3


def nested(depth):
    schema = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


BIG = {"type": "object", "properties": {f"p{i}": {"type": "string", "description": "x" * 20} for i in range(900)}}
LOOP = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
BAD = {
    "reference loop": (chat(response_format=json_format(LOOP)), "schema_invalid"),
    "remote reference": (chat(response_format=json_format({"$ref": "http://127.0.0.1:1/x.json"})), "schema_invalid"),
    "remote reference inside": (chat(response_format=json_format({"items": {"$ref": "//host/x"}})), "schema_invalid"),
    "too deep": (chat(guided_json=json.dumps(nested(40))), "schema_invalid"),
    "unknown type": (chat(response_format=json_format({"type": "strin"})), "schema_invalid"),
    "keyword": (chat(response_format=json_format({"type": "array", "uniqueItems": True})), "schema_invalid"),
    "no schema": (chat(response_format=json_format("x")), "schema_invalid"),
    "too large": (chat(response_format=json_format(BIG)), "schema_too_complex"),
    "long pattern": (chat(response_format=json_format({"type": "string", "pattern": "a" * 1025})), "schema_too_complex"),
    "pattern": (chat(response_format=json_format({"type": "string", "pattern": "(a"})), "schema_invalid"),
    "regex": (completion(guided_regex="(a"), "schema_invalid"),
    "regex look-around": (completion(guided_regex="(?=a)b"), "schema_invalid"),
    "regex empty": (completion(guided_regex=""), "schema_invalid"),
    "regex long": (completion(guided_regex="a" * 1025), "schema_too_complex"),
    "regex number": (completion(guided_regex=7), "schema_invalid"),
    "choice empty": (completion(guided_choice=[]), "schema_invalid"),
    "choice number": (completion(guided_choice=[1]), "schema_invalid"),
    "choice many": (completion(guided_choice=[str(i) for i in range(501)]), "schema_too_complex"),
    "grammar": (completion(guided_grammar="start: nothing"), "schema_invalid"),
    "grammar loop": (completion(guided_grammar="start: start"), "schema_invalid"),
    "grammar that overflows a stack": (
        completion(guided_grammar="start: r0\n" + "\n".join(f'r{i}:"a" r{i + 1}' for i in range(1900)) + '\nr1900: "z"'),
        "schema_too_complex",
    ),
    "grammar of a megabyte": (completion(guided_grammar="start: " + "a" * 900_000), "schema_too_complex"),
    "grammar as JSON": (completion(guided_grammar='{"grammars": []}'), "schema_invalid"),
    "GBNF": (completion(guided_grammar="root ::= ("), "schema_invalid"),
    "two forms": (completion(guided_regex="a", guided_choice=["b"]), "invalid_request"),
    "end ignored": (completion(guided_regex="a", ignore_eos=True), "invalid_request"),
    "structural tag": (chat(structured_outputs={"structural_tag": "x"}), "invalid_request"),
}


async def test_every_bad_form_is_refused_and_the_node_goes_on(bench, client):
    for name, ((path, body), code) in BAD.items():
        answer = await client.post(path, json=body)
        error = (await answer.json())["error"]
        assert (answer.status, error["code"]) == (400, code), (name, error)
        assert error["param"]
        assert len(error["message"]) < 500
    assert bench.engine.submits == []
    path, body = chat(response_format={"type": "json_object"})
    assert (await client.post(path, json=body)).status == 200


async def test_bad_form_on_lorax_is_422_validation(client):
    path, body = lorax(response_format={"type": "json_object", "schema": LOOP})
    answer = await client.post(path, json=body)
    body = await answer.json()
    assert (answer.status, body["error_type"], body["code"]) == (422, "validation", "schema_invalid")
    assert "parameters.response_format.schema" in body["error"]


async def test_nested_quantifiers_are_harmless_here(bench, client):
    path, body = chat(response_format=json_format({"type": "string", "pattern": "(a+)+b"}))
    assert (await client.post(path, json=body)).status == 200


def test_references_and_patterns_in_data_are_only_data():
    data = {"enum": [{"$ref": "http://x", "pattern": "a" * 5000}], "properties": {"$ref": {"type": "string"}, "pattern": {}}}
    assert check_schema(data, "p") == data


def test_schema_with_too_many_parts_is_too_complex():
    with pytest.raises(GrammarError) as caught:
        check_schema({"anyOf": [{} for _ in range(2001)]}, "p")
    assert caught.value.error_code == "schema_too_complex"


# ---- the desk


@pytest.fixture
async def make_desk(tokenizer_dir):
    desks = []

    def make(timeout_s=10.0, memory_bytes=1 << 30, path=tokenizer_dir / "tokenizer.json"):
        desks.append(GrammarDesk(path, 300, (265,), GrammarLimits(timeout_s, memory_bytes)))
        return desks[-1]

    yield make
    for desk in desks:
        await desk.close()


async def test_desk_judges_once_and_remembers_both_verdicts(make_desk):
    desk = make_desk()
    await desk.check("t", 'start: "a"', "p")
    with pytest.raises(GrammarError):
        await desk.check("t", "start: b", "p")
    pid = desk._process.pid
    await desk.close()
    await desk.check("t", 'start: "a"', "p")
    with pytest.raises(GrammarError):
        await desk.check("t", "start: b", "p")
    assert desk._process is None, "nothing was judged again"
    await desk.check("other", 'start: "a"', "p")
    assert desk._process.pid != pid


async def test_worker_that_crashes_is_replaced(make_desk):
    desk = make_desk()
    chain = "start: r0\n" + "\n".join(f'r{i}: "a" r{i + 1}' for i in range(5000)) + '\nr5000: "z"'
    with pytest.raises(GrammarError) as caught:
        await desk.check("t", chain, "p")
    assert caught.value.error_code == "schema_too_complex"
    await desk.check("t", 'start: "a"', "p")


async def test_grammar_is_not_blamed_for_what_an_earlier_one_did_to_the_worker(make_desk):
    desk = make_desk()
    await desk.check("t", 'start: "a"', "p")
    desk._process.kill()
    await desk.check("t", 'start: "b"', "p")


async def test_grammar_that_takes_too_long_is_given_up(make_desk):
    desk = make_desk(timeout_s=1e-9)
    with pytest.raises(GrammarError) as caught:
        await desk.check("t", 'start: "a"', "p")
    assert caught.value.error_code == "schema_too_complex"
    assert desk._process is None


async def test_worker_that_cannot_start_is_overload_and_not_a_verdict(make_desk, tmp_path):
    desk = make_desk(path=tmp_path / "missing.json")
    with pytest.raises(OverloadedError):
        await desk.check("t", 'start: "a"', "p")
    assert len(desk._verdicts) == 0


async def test_one_tenant_cannot_fill_the_queue(make_desk):
    desk = make_desk()
    checks = [asyncio.create_task(desk.check("greedy", f'start: "a{i}"', "p")) for i in range(8)]
    other = asyncio.create_task(desk.check("modest", 'start: "b"', "p"))
    results = await asyncio.gather(*checks, other, return_exceptions=True)
    assert [type(result) for result in results[:8]].count(OverloadedError) == 4
    assert results[8] is None
    assert desk._waiting == {}


async def test_caller_that_hangs_up_leaves_no_answer_for_the_next(make_desk):
    desk = make_desk()
    await desk.check("t", 'start: "a"', "p")
    task = asyncio.create_task(desk.check("t", 'start: "c"', "p"))
    while not desk._turn.locked():
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(GrammarError):
        await desk.check("t", "start: d", "p")


async def test_memory_of_the_worker_is_bounded(make_desk):
    desk = make_desk(memory_bytes=64 << 20)
    with pytest.raises(OverloadedError):
        await desk.check("t", 'start: "a"', "p")
