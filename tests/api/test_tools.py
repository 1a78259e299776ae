"""Tools: what the model is shown and held to, and how its calls come back, whole and in deltas."""

from __future__ import annotations

import dataclasses
import itertools
import json
from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.api.chat_template import ChatTemplate
from node.api.tokenizer import SpecialTokens
from node.api.tool_calls import ToolCallReader, merged
from node.api.tool_dialect import GENERIC, Tool, dialect_of
from node.api.tool_messages import without_tools
from node.engine.grammar import Vocabulary

QWEN = (
    "{%- if tools %}{{ '<tools>' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"
    "{% for message in messages %}{{ message.role }}:{{ message.content }}"
    "{% for call in message.tool_calls %}<tool_call>\n"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}"
    "\n</tool_call>{% endfor %}\n{% endfor %}"
)
LLAMA = (
    "{%- if not tools is defined %}{%- set tools = none %}{%- endif %}"
    '{%- if tools is not none %}{{ \'Respond in the format {"name": function name, "parameters": dictionary}.\' }}'
    "{% for tool in tools %}{{ tool | tojson }}{% endfor %}{%- endif %}"
    "{% for message in messages %}{{ message.role }}:{{ message.content }}{% endfor %}"
    '{{ \'{"name": "\' }}{{ \'", "parameters": \' }}'
)


def template(source):
    return ChatTemplate(source, SpecialTokens(), lambda: datetime(2026, 1, 2, tzinfo=UTC))


HERMES = template(QWEN).dialect
LLAMA_DIALECT = template(LLAMA).dialect
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time"}}


def tool(definition, is_strict=False):
    function = definition["function"]
    return Tool(function["name"], {"type": "object", **function.get("parameters", {})}, definition, is_strict)


TOOLS = (tool(WEATHER), tool(CLOCK))


def ask(**extra):
    return {"model": "", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 200, "tools": [WEATHER, CLOCK], **extra}


@pytest.fixture
def bench(make_bench):
    """A context in which the tools' descriptions fit, a byte a token."""
    made = make_bench()
    made.services = dataclasses.replace(
        made.services, ready=msgspec.structs.replace(made.services.ready, max_model_len=4096, kv_block_count=256)
    )
    return made


# ---- dialects


def test_templates_are_known_by_what_they_write():
    assert HERMES.is_native
    assert HERMES.trigger == "<tool_call>"
    assert LLAMA_DIALECT.is_native
    assert LLAMA_DIALECT.separator is None
    assert template("{{ messages }}").dialect is GENERIC
    assert template(None).dialect is GENERIC
    assert template("{{ tools }}[TOOL_CALLS]{{ messages }}").dialect is GENERIC
    assert dialect_of("<tool_call> arguments <function=", frozenset({"tools"})) is GENERIC


@pytest.fixture(scope="module")
def vocabulary(tokenizer_dir):
    return Vocabulary(tokenizer_dir / "tokenizer.json", 300, [265])


def follows(vocabulary, tokenizer, grammar, text):
    """(whether every byte of `text` is allowed, whether the answer may end there)."""
    matcher = vocabulary.compile(grammar)
    token_ids = tokenizer.encode(text)
    taken = matcher.try_consume_tokens(token_ids)
    return taken == len(token_ids), matcher.is_accepting()


def call_text(dialect, name, arguments):
    return dialect.write(name, arguments)


@pytest.mark.parametrize("dialect", [HERMES, LLAMA_DIALECT, GENERIC])
def test_forced_grammar_takes_a_call_and_nothing_else(vocabulary, tokenizer, dialect):
    grammar = dialect.grammar(TOOLS, is_forced=True, is_parallel=False)
    call = call_text(dialect, "get_weather", {"city": "Rome"})
    assert follows(vocabulary, tokenizer, grammar, call) == (True, True)
    assert follows(vocabulary, tokenizer, grammar, "hello") == (False, False)
    assert follows(vocabulary, tokenizer, grammar, call_text(dialect, "get_weather", {"city": 7}))[0] is False
    assert follows(vocabulary, tokenizer, grammar, call_text(dialect, "nobody", {}))[0] is False
    assert follows(vocabulary, tokenizer, grammar, f"{call}\n{call}")[0] is False


@pytest.mark.parametrize("dialect", [HERMES, LLAMA_DIALECT])
def test_auto_grammar_takes_text_or_text_and_then_calls_that_parse(vocabulary, tokenizer, dialect):
    grammar = dialect.grammar(TOOLS, is_forced=False, is_parallel=True)
    call = call_text(dialect, "get_weather", {"city": "Rome"})
    assert follows(vocabulary, tokenizer, grammar, "Just text, with { braces } and <tags>.") == (True, True)
    assert follows(vocabulary, tokenizer, grammar, f"Let me see. {call}") == (True, True)
    assert follows(vocabulary, tokenizer, grammar, call.replace("get_weather", "nobody"))[0] is False
    assert follows(vocabulary, tokenizer, grammar, call[: len(call) // 2])[1] is False


def test_parallel_calls_follow_each_other_and_can_be_forbidden(vocabulary, tokenizer):
    call = call_text(HERMES, "get_time", {})
    several, single = (HERMES.grammar(TOOLS, is_forced=False, is_parallel=parallel) for parallel in (True, False))
    assert follows(vocabulary, tokenizer, several, f"{call}\n{call}") == (True, True)
    assert follows(vocabulary, tokenizer, single, f"{call}\n{call}")[0] is False


def test_calls_beside_a_schema_are_an_alternative(vocabulary, tokenizer):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    grammar = HERMES.grammar(TOOLS, is_forced=False, is_parallel=True, schema=schema)
    assert follows(vocabulary, tokenizer, grammar, '{"a": 1}') == (True, True)
    assert follows(vocabulary, tokenizer, grammar, call_text(HERMES, "get_time", {})) == (True, True)
    assert follows(vocabulary, tokenizer, grammar, "text")[0] is False


def test_keyword_that_cannot_be_enforced_is_passed_over_unless_strict(vocabulary, tokenizer):
    definition = {"type": "function", "function": {"name": "f", "parameters": {"propertyNames": {"pattern": "x"}}}}
    lenient = HERMES.grammar((tool(definition),), is_forced=True, is_parallel=False)
    assert follows(vocabulary, tokenizer, lenient, call_text(HERMES, "f", {"x": 1}))[0]
    with pytest.raises(Exception, match="cannot enforce"):
        vocabulary.compile(HERMES.grammar((tool(definition, is_strict=True),), is_forced=True, is_parallel=False))


# ---- the reader

texts = st.text(alphabet=st.sampled_from('ab <{}[]"\\\n:,tool_cé'), max_size=30).filter(
    lambda text: "<tool_call>" not in text and '{"name": "' not in text
)
arguments = st.dictionaries(texts, st.recursive(texts | st.integers() | st.none(), lambda inner: st.lists(inner), max_leaves=5))


@given(
    dialect=st.sampled_from([HERMES, LLAMA_DIALECT]),
    content=texts,
    calls=st.lists(st.tuples(st.sampled_from(["f", "get_time"]), arguments), max_size=3),
    cuts=st.lists(st.integers(0, 400), max_size=8),
)
def test_reader_finds_the_same_however_the_text_is_cut(dialect, content, calls, cuts):
    if dialect.separator is None:
        calls = calls[:1]
    if calls and content.rstrip().endswith("<"):
        content = ""
    text = content + (dialect.separator or "").join(dialect.write(*call) for call in calls)
    reader, shown, deltas = ToolCallReader(dialect), "", []
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    for start, end in itertools.pairwise(edges):
        more, found = reader.feed(text[start:end])
        shown += more
        deltas += found
    shown += reader.finish()
    assert shown == (content.rstrip() if calls else content)
    entries = merged(deltas, lambda index: f"call-{index}")
    assert [entry["function"]["name"] for entry in entries] == [name for name, _ in calls]
    assert [json.loads(entry["function"]["arguments"]) for entry in entries] == [values for _, values in calls]


@pytest.mark.parametrize("length", range(1, 60))
def test_answer_cut_off_within_a_call_shows_no_markup(length):
    text = HERMES.write("get_weather", {"city": "Rome"})[:length]
    reader = ToolCallReader(HERMES)
    content, _ = reader.feed(text)
    if length >= len("<tool_call>"):
        assert content + reader.finish() == ""


# ---- messages


def test_generic_model_is_told_of_tools_in_its_system_message():
    plain = without_tools(({"role": "user", "content": "hi"},), TOOLS, "Use these.", GENERIC)
    assert [message["role"] for message in plain] == ["system", "user"]
    assert plain[0]["content"].startswith("Use these.\n")
    assert '"name": "get_weather"' in plain[0]["content"]
    assert "<tool_call>" in plain[0]["content"]


def test_generic_model_sees_calls_and_results_as_text_in_turns():
    call = {"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": {}}}
    other = {**call, "id": "c2"}
    plain = without_tools(
        (
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "time?"},
            {"role": "assistant", "content": "", "tool_calls": [call, other]},
            {"role": "tool", "content": "12:00", "tool_call_id": "c1"},
            {"role": "tool", "content": "13:00", "tool_call_id": "c2"},
        ),
        TOOLS,
        None,
        GENERIC,
    )
    assert [message["role"] for message in plain] == ["system", "user", "assistant", "user"]
    assert plain[0]["content"].startswith("Be brief.\n\n")
    assert plain[2]["content"].count("<tool_call>") == 2
    assert plain[3]["content"] == ("<tool_response>\n12:00\n</tool_response>\n<tool_response>\n13:00\n</tool_response>")


def test_native_template_gets_tools_and_parsed_arguments():
    call = {"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": {"zone": "UTC"}}}
    text = template(QWEN).render(({"role": "assistant", "content": "", "tool_calls": [call]},), (WEATHER,))
    assert '"name": "get_weather"' in text
    assert '{"name": "get_time", "arguments": {"zone": "UTC"}}' in text


# ---- over HTTP


async def test_call_comes_back_as_a_tool_call(bench, client):
    bench.engine.answer = "Sure. " + GENERIC.write("get_weather", {"city": "Rome"})
    answer = await (await client.post("/v1/chat/completions", json=ask())).json()
    choice = answer["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", "Sure.")
    (call,) = choice["message"]["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "get_weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}
    assert call["id"].startswith("call_")
    assert "index" not in call
    assert 'head[lazy]: TEXT "<tool_call>"' in bench.engine.submits[0].grammar


async def test_text_answer_beside_tools_is_plain(bench, client):
    bench.engine.answer = "hello world"
    answer = await (await client.post("/v1/chat/completions", json=ask())).json()
    choice = answer["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "hello world")
    assert "tool_calls" not in choice["message"]


async def test_streamed_calls_come_in_openais_deltas(bench, client):
    bench.engine.answer = GENERIC.write("get_weather", {"city": "Rome"}) + "\n" + GENERIC.write("get_time", {})
    answer = await client.post("/v1/chat/completions", json=ask(stream=True, n=2))
    events = [json.loads(line[6:]) for line in (await answer.text()).split("\n\n") if line.startswith("data: {")]
    for index in (0, 1):
        choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
        parts = [part for choice in choices for part in choice["delta"].get("tool_calls", ())]
        calls: dict = {}
        for part in parts:
            call = calls.setdefault(part["index"], {"arguments": "", **part})
            call["arguments"] += part["function"]["arguments"]
        assert [call["function"]["name"] for call in calls.values()] == ["get_weather", "get_time"]
        assert [json.loads(call["arguments"]) for call in calls.values()] == [{"city": "Rome"}, {}]
        assert all("name" not in part["function"] for part in parts if "id" not in part)
        assert choices[-1]["finish_reason"] == "tool_calls"
        assert all(not choice["delta"].get("content") for choice in choices)
    ids = {
        part["id"]
        for event in events
        for choice in event["choices"]
        for part in choice["delta"].get("tool_calls", ())
        if "id" in part
    }
    assert len(ids) == 4


async def test_call_that_is_cut_off_says_length(bench, client):
    bench.engine.answer = GENERIC.write("get_weather", {"city": "Rome"})
    answer = await (await client.post("/v1/chat/completions", json=ask(max_tokens=60))).json()
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("choice", "start"),
    [
        ("required", "start: call "),
        ({"type": "function", "function": {"name": "get_time"}}, "start: call \n"),
        ("get_time", "start: call \n"),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_time"}}]},
            },
            "start: call ",
        ),
    ],
)
async def test_forced_choice_begins_with_a_call(bench, client, choice, start):
    bench.engine.answer = GENERIC.write("get_time", {})
    answer = await (await client.post("/v1/chat/completions", json=ask(tool_choice=choice))).json()
    assert bench.engine.submits[0].grammar.startswith(start)
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    if choice != "required":
        assert "get_weather" not in bench.engine.submits[0].grammar


async def test_allowed_tools_leaves_the_text_free_and_the_others_out(bench, client):
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "get_time"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    answer = await (await client.post("/v1/chat/completions", json=ask(tool_choice=choice))).json()
    assert answer["choices"][0]["message"]["content"] == "hello world"
    assert "get_time" in bench.engine.submits[0].grammar
    assert "get_weather" not in bench.engine.submits[0].grammar


async def test_choice_none_leaves_tools_out(bench, client):
    bench.engine.answer = GENERIC.write("get_time", {})
    answer = await (await client.post("/v1/chat/completions", json=ask(tool_choice="none"))).json()
    assert bench.engine.submits[0].grammar is None
    assert "<tool_call>" in answer["choices"][0]["message"]["content"]


async def test_tools_loop_feeds_the_result_back(bench, client):
    bench.engine.answer = GENERIC.write("get_time", {})
    first = await (await client.post("/v1/chat/completions", json=ask())).json()
    message = first["choices"][0]["message"]
    call_id = message["tool_calls"][0]["id"]
    bench.engine.answer = "hello"
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": message["content"], "tool_calls": message["tool_calls"]},
        {"role": "tool", "tool_call_id": call_id, "content": "noon"},
    ]
    second = await client.post("/v1/chat/completions", json=ask(messages=messages))
    assert second.status == 200, await second.text()
    prompt = bench.tokenizer.decode(list(bench.engine.submits[-1].prompt_ids))
    assert "<tool_response>\nnoon\n</tool_response>" in prompt
    assert "get_time" in prompt


RESULT = {"role": "tool", "tool_call_id": "x", "content": "1"}
CALL = {"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BAD = {
    "type": (ask(tools=[{"type": "custom", "custom": {"name": "x"}}]), "tools[0].type"),
    "name": (ask(tools=[{"type": "function", "function": {"name": "a b"}}]), "tools[0].function.name"),
    "repeated": (ask(tools=[CLOCK, CLOCK]), "tools"),
    "many": (ask(tools=[CLOCK] * 129), "tools"),
    "no object": (ask(tools=["x"]), "tools[0]"),
    "parameters": (ask(tools=[{"type": "function", "function": {"name": "f", "parameters": 1}}]), "tools[0].function.parameters"),
    "parameters no object": (
        ask(tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]),
        "tools[0].function.parameters",
    ),
    "parameters unknown type": (
        ask(tools=[{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "strin"}}}}}]),
        "tools",
    ),
    "choice": (ask(tool_choice="nobody"), "tool_choice"),
    "choice named": (ask(tool_choice={"type": "function", "function": {"name": "nobody"}}), "tool_choice"),
    "choice object": (ask(tool_choice={"type": "allowed_tools"}), "tool_choice"),
    "allowed mode": (ask(tool_choice={"type": "allowed_tools", "allowed_tools": {"mode": "none", "tools": []}}), "tool_choice"),
    "allowed nobody": (
        ask(
            tool_choice={
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "nobody"}}]},
            }
        ),
        "tool_choice",
    ),
    "required without tools": (ask(tools=[], tool_choice="required"), "tool_choice"),
    "parallel": (ask(parallel_tool_calls="yes"), "parallel_tool_calls"),
    "functions": (ask(functions=[{"name": "f"}]), "functions"),
    "with regex": (ask(guided_regex="a"), "guided_regex"),
    "end ignored": (ask(ignore_eos=True), "tools"),
    "result without call": (ask(messages=[RESULT]), "messages[0].tool_call_id"),
    "result of another call": (
        ask(messages=[{"role": "assistant", "tool_calls": [CALL]}, {**RESULT, "tool_call_id": "y"}]),
        "messages[1].tool_call_id",
    ),
    "call of a user": (ask(messages=[{"role": "user", "content": "x", "tool_calls": [CALL]}]), "messages[0].tool_calls"),
    "call without id": (ask(messages=[{"role": "assistant", "tool_calls": [{**CALL, "id": None}]}]), "messages[0].tool_calls[0]"),
    "call arguments": (
        ask(messages=[{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "[1]"}}]}]),
        "messages[0].tool_calls[0].function.arguments",
    ),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_tools_are_refused_by_name(bench, client, name):
    body, param = BAD[name]
    answer = await client.post("/v1/chat/completions", json=body)
    error = (await answer.json())["error"]
    assert (answer.status, error["param"]) == (400, param), error
    assert bench.engine.submits == []
