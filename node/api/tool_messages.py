"""Messages about tools: reading calls and results, and showing both to a model whose template knows neither."""

from __future__ import annotations

import json
from typing import Any

from node.api.body import parse_object
from node.api.fields import Fields, shown
from node.api.tool_dialect import MAX_CALLS, Tool, ToolDialect
from node.errors import RequestError

_INSTRUCTIONS = (
    "You may call one or more functions to help with the user's request. They are described here, one JSON object a line:\n"
    "<tools>\n{tools}\n</tools>\n"
    "To call a function, answer with its name and arguments as JSON within <tool_call> tags, and nothing after them:\n"
    '<tool_call>\n{{"name": "function-name", "arguments": {{...}}}}\n</tool_call>'
)


def read_calls(fields: Fields, param: str) -> list[dict[str, Any]]:
    """An assistant message's `tool_calls`, arguments parsed: templates write them out again themselves.

    Raises:
        RequestError: A call is malformed or its arguments are no JSON object.
    """
    items = fields.items("tool_calls", MAX_CALLS) or []
    return [_read_call(item, f"{param}.tool_calls[{index}]") for index, item in enumerate(items)]


def _read_call(item: Any, param: str) -> dict[str, Any]:
    outer = Fields(item if isinstance(item, dict) else {}, prefix=f"{param}.")
    inner = outer.inner("function")
    call_id, name = outer.label("id"), inner.text("name", 64) if inner else None
    if inner is None or not call_id or not name or outer.text("type", 32) not in (None, "function"):
        raise RequestError(f"`{param}` must be a function call with id and function.name. Given: {shown(item)}", param=param)
    value = inner.raw("arguments")
    if not isinstance(value, (str, dict)):
        raise inner.error("arguments", "must be a string that holds a JSON object")
    try:
        arguments = parse_object((value or "{}").encode()) if isinstance(value, str) else value
    except RequestError as error:
        raise inner.error("arguments", "must be a string that holds a JSON object") from error
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def check_results(messages: tuple[dict[str, Any], ...]) -> None:
    """Every tool message answers a call of an earlier assistant message.

    Raises:
        RequestError: It does not.
    """
    known: set[str] = set()
    for index, message in enumerate(messages):
        known.update(call["id"] for call in message.get("tool_calls", ()))
        if message["role"] == "tool" and message["tool_call_id"] not in known:
            raise RequestError(
                f"`messages[{index}].tool_call_id` answers no call of an earlier assistant message. "
                f"Given: {shown(message['tool_call_id'])}",
                param=f"messages[{index}].tool_call_id",
            )


def without_tools(
    messages: tuple[dict[str, Any], ...], tools: tuple[Tool, ...], prompt: str | None, dialect: ToolDialect
) -> tuple[dict[str, Any], ...]:
    """The same conversation in system, user and assistant messages only."""
    plain: list[dict[str, Any]] = []
    for message in messages:
        turned = _plain(message, dialect)
        if message["role"] == "tool" and plain and plain[-1]["role"] == "user" and plain[-1].get("is_result"):
            plain[-1]["content"] += "\n" + turned["content"]  # most templates want user and assistant in turns
        else:
            plain.append(turned)
    if tools:
        _instruct(plain, tools, prompt)
    return tuple({"role": message["role"], "content": message["content"]} for message in plain)


def _plain(message: dict[str, Any], dialect: ToolDialect) -> dict[str, Any]:
    if message["role"] == "tool":
        content = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": content, "is_result": True}
    calls = [dialect.write(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    parts = [message["content"], *calls] if message["content"] else calls
    return {"role": message["role"], "content": "\n".join(parts) if calls else message["content"]}


def _instruct(messages: list[dict[str, Any]], tools: tuple[Tool, ...], prompt: str | None) -> None:
    """Put the tools into the system message, which comes first."""
    lines = "\n".join(json.dumps(tool.definition["function"], ensure_ascii=False) for tool in tools)
    text = _INSTRUCTIONS.format(tools=lines)
    text = f"{prompt}\n{text}" if prompt else text
    if messages and messages[0]["role"] == "system":
        messages[0] = {"role": "system", "content": f"{messages[0]['content']}\n\n{text}"}
    else:
        messages.insert(0, {"role": "system", "content": text})
