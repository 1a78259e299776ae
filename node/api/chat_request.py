"""Reading `POST /v1/chat/completions`."""

from __future__ import annotations

import random
from typing import Any

from node.api.adapter_fields import read_named
from node.api.fields import Fields, shown
from node.api.generation import Generation, Limits, Prompt
from node.api.model_fields import read_model, read_source
from node.api.sampling_fields import (
    read_choice_count,
    read_max_tokens,
    read_sampling,
    read_stop,
    read_stream,
    refuse_templates,
)
from node.api.structured_fields import read_constraint
from node.api.tool_dialect import GENERIC, ToolDialect
from node.api.tool_fields import ToolUse, read_tools
from node.api.tool_messages import check_results, read_calls, without_tools
from node.errors import RequestError, UnsupportedError

_ROLES = ("system", "developer", "user", "assistant", "tool")


def read_chat(body: dict[str, Any], limits: Limits, random_source: random.Random, dialect: ToolDialect = GENERIC) -> Generation:
    """Check every field.

    Args:
        dialect: How the base model writes tool calls.

    Raises:
        RequestError: A field is missing, of the wrong type or out of its range.
        UnsupportedError: Images, audio, client templates. GrammarError: See `structured_fields` and `tool_fields`.
    """
    fields = Fields(body)
    model = read_model(fields)
    messages = _read_messages(fields, limits)
    check_results(messages)
    _refuse_features(fields)
    use = read_tools(fields)
    constraint = use.constraint(dialect, read_constraint(fields))
    top_logprobs = _read_logprobs(fields, limits)
    is_stream, has_usage_chunk = read_stream(fields)
    named = read_named(fields, model, limits)
    source, token = read_source(fields)
    max_new_tokens = read_max_tokens(fields, "max_completion_tokens", "max_tokens")
    choice_count = read_choice_count(fields, limits)
    sampling = read_sampling(fields, limits, random_source, top_logprobs)
    stop = read_stop(fields, "stop", limits)
    fields.label("user")
    fields.ignore("store", "metadata", "service_tier", "parallel_tool_calls", "tool_prompt", "logprobs")
    return Generation(
        shape="chat",
        model=model,
        terms=named.terms,
        prompts=(_prompt(messages, use, dialect),),
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        choice_count=choice_count,
        stop=stop,
        adapter_source=source,
        adapter_token=token,
        is_stream=is_stream,
        has_usage_chunk=has_usage_chunk,
        top_logprobs=top_logprobs,
        constraint=constraint,
        calls=dialect if use.tools else None,
        merge=named.merge,
        lists_adapters=named.is_listed,
        warnings=tuple(fields.unknown()),
    )


def _refuse_features(fields: Fields) -> None:
    refuse_templates(fields)
    fields.refuse("functions", [], remedy="send them as `tools`")
    fields.refuse("function_call", "none", "auto", remedy="send `tool_choice`")
    for key in ("audio", "prediction", "web_search_options", "guideline"):
        fields.refuse(key, remedy="leave it out")
    fields.refuse("modalities", ["text"], [], remedy='only ["text"] is served')


def _read_logprobs(fields: Fields, limits: Limits) -> int:
    is_wanted = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", 0, limits.max_logprobs)
    if top is not None and not is_wanted:
        raise fields.error("top_logprobs", "is only allowed when `logprobs` is true")
    return (top or 0) if is_wanted else -1


def _read_messages(fields: Fields, limits: Limits) -> tuple[dict[str, Any], ...]:
    messages = fields.items("messages", limits.max_messages)
    if not messages:
        raise fields.error("messages", "must be a list with at least one message")
    return tuple(_read_message(message, f"messages[{index}]", limits) for index, message in enumerate(messages))


def _read_message(message: Any, name: str, limits: Limits) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RequestError(f"`{name}` must be an object with role and content. Given: {shown(message)}", param=name)
    fields = Fields(message, prefix=f"{name}.")
    role = fields.text("role", 32)
    if role == "function":
        raise UnsupportedError(f"`{name}.role` 'function' is not supported by this node; use 'tool'", param=name)
    if role not in _ROLES:
        raise RequestError(f"`{name}.role` must be one of {', '.join(_ROLES)}. Given: {shown(message.get('role'))}", param=name)
    for key in ("function_call", "audio"):
        fields.refuse(key, [], remedy="only text messages and tool calls are served")
    calls = read_calls(fields, name)
    if calls and role != "assistant":
        raise fields.error("tool_calls", f"belongs to assistant messages, not to role {role!r}")
    given = fields.raw("content")
    content = "" if given is None and calls else _read_content(given, name, limits)
    if role == "tool":
        return {"role": role, "content": content, "tool_call_id": _read_call_id(fields)}
    # OpenAI renamed "system" to "developer"; the templates of open models know only the former.
    message = {"role": "system" if role == "developer" else role, "content": content}
    return {**message, "tool_calls": calls} if calls else message


def _read_call_id(fields: Fields) -> str:
    call_id = fields.label("tool_call_id")
    if not call_id:
        raise fields.error("tool_call_id", "must name the call that the message answers")
    return call_id


def _prompt(messages: tuple[dict[str, Any], ...], use: ToolUse, dialect: ToolDialect) -> Prompt:
    """The conversation as the base model's template takes it."""
    if dialect.is_native:
        return Prompt(messages=messages, tools=tuple(tool.definition for tool in use.tools))
    return Prompt(messages=without_tools(messages, use.tools, use.prompt, dialect))


def _read_content(content: Any, name: str, limits: Limits) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise RequestError(f"`{name}.content` must be a string or a list of text parts. Given: {shown(content)}", param=name)
    if len(content) > limits.max_messages:
        raise RequestError(f"`{name}.content` must have at most {limits.max_messages} parts. Given: {len(content)}", param=name)
    return "".join(_read_part(part, f"{name}.content[{index}]") for index, part in enumerate(content))


def _read_part(part: Any, name: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    # What an assistant refused with is text like any other; OpenAI's name for it is its kind's.
    if kind in ("text", "refusal") and isinstance(part.get(kind), str):
        text: str = part[kind]
        return text
    if isinstance(kind, str) and kind not in ("text", "refusal"):
        raise UnsupportedError(
            f"`{name}` has type {kind[:32]!r}; this node serves text only and fetches nothing that a message names",
            code="modality_not_supported",
            param=name,
        )
    raise RequestError(f"`{name}` must be a text part with a string in `text`. Given: {shown(part)}", param=name)
