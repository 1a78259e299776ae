"""Messages, tools and the forms an answer can be held to."""

from __future__ import annotations

from node.api.generation import Limits
from node.api.openapi.shapes import Schema, boolean, items, optional, optionals, record, reference, text

_SCHEMA: Schema = {"type": "object", "description": "A JSON schema."}


def choice_fields(description: str, *choices: str) -> Schema:
    """One of some words."""
    return text(description, choices=choices)


def form_schemas(limits: Limits) -> dict[str, Schema]:
    """`components.schemas` of messages, tools and forms."""
    call = {"name": text("The function."), "arguments": text("A JSON object, as text.")}
    return {
        "ChatMessage": _message(limits),
        "ToolCall": record(
            "A call that the assistant made.",
            {
                "id": text("Names the call.", min_chars=1, max_chars=256),
                "type": text("", choices=("function",)),
                "function": record("", call, required=("name", "arguments")),
            },
            required=("id", "function"),
        ),
        "Tool": record(
            "A function the model may call.",
            {"type": text("", choices=("function",)), "function": _function()},
            required=("function",),
        ),
        "ResponseFormat": _response_format(),
    }


def structured_fields() -> dict[str, Schema]:
    """At most one of them may be asked for."""
    return {
        "response_format": reference("ResponseFormat"),
        "guided_json": {**_SCHEMA, "description": "vLLM's name for a JSON schema."},
        "guided_regex": text("vLLM's name for a regular expression.", min_chars=1),
        "guided_choice": items("vLLM's name for a choice among texts.", text("", min_chars=1), min_items=1, max_items=500),
        "guided_grammar": text("vLLM's name for a Lark grammar.", min_chars=1),
    }


def tool_fields() -> dict[str, Schema]:
    """Of a chat request."""
    named = record(
        "One function.",
        {"type": text("", choices=("function",)), "function": record("", {"name": text("")}, required=("name",))},
        required=("function",),
    )
    return {
        "tools": items("Functions the model may call.", reference("Tool"), max_items=128),
        "tool_choice": {
            "description": "Whether it must.",
            "anyOf": [{"type": "string", "enum": ["none", "auto", "required"]}, named, _allowed_tools(named)],
        },
        "parallel_tool_calls": boolean("Whether several calls may be made at once; default true."),
    }


def _allowed_tools(named: Schema) -> Schema:
    among = record(
        "Whether one must be called, and which may.",
        {"mode": text("", choices=("auto", "required")), "tools": items("Some of `tools`.", named, min_items=1, max_items=128)},
        required=("mode", "tools"),
    )
    return record(
        "A choice among some.",
        {"type": text("", choices=("allowed_tools",)), "allowed_tools": among},
        required=("type", "allowed_tools"),
    )


def _function() -> Schema:
    name = {**text("Its name."), "pattern": "^[a-zA-Z0-9_-]{1,64}$"}
    further = {"description": text("What it does.", max_chars=16 << 10), "parameters": _SCHEMA}
    return record("", {"name": name, **optionals(further)}, required=("name",))


def _response_format() -> Schema:
    wrapped = record("OpenAI's wrapping.", optionals({"name": text("", max_chars=64), "schema": _SCHEMA}))
    return record(
        "The form of the answer.",
        {
            "type": text("", choices=("text", "json_object", "json_schema", "regex")),
            **optionals({"schema": _SCHEMA, "json_schema": wrapped, "pattern": text("A regular expression.", min_chars=1)}),
        },
        required=("type",),
    )


def _message(limits: Limits) -> Schema:
    part = record("A part.", {"type": text("", choices=("text",)), "text": text("")}, required=("type", "text"))
    content: Schema = {
        "description": "Text, or parts of it.",
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": part, "minItems": 1, "maxItems": limits.max_messages},
            {"type": "null"},
        ],
    }
    return record(
        "One message.",
        {
            "role": text("Who speaks.", choices=("system", "developer", "user", "assistant", "tool")),
            "content": content,
            "tool_calls": optional(items("Calls the assistant made.", reference("ToolCall"))),
            "tool_call_id": optional(text("The call a tool's message answers.", max_chars=256)),
        },
        required=("role",),
    )
