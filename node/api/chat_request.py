"""Reading `POST /v1/chat/completions`."""

from __future__ import annotations

import random
from typing import Any

from node.api.fields import Fields, shown
from node.api.generation import Generation, Limits, NamedTerm, Prompt
from node.api.model_fields import read_model, read_source
from node.api.sampling_fields import (
    read_choice_count,
    read_max_tokens,
    read_sampling,
    read_stop,
    read_stream,
    refuse_guidance,
    refuse_structured_output,
)
from node.errors import RequestError, UnsupportedError

_ROLES = ("system", "developer", "user", "assistant")


def read_chat(body: dict[str, Any], limits: Limits, random_source: random.Random) -> Generation:
    """Check every field.

    Raises:
        RequestError: A field is missing, of the wrong type or out of its range.
        UnsupportedError: Tools, images, audio, structured output, client templates.
    """
    fields = Fields(body)
    model = read_model(fields)
    messages = _read_messages(fields, limits)
    _refuse_features(fields)
    top_logprobs = _read_logprobs(fields, limits)
    is_stream, has_usage_chunk = read_stream(fields)
    source, token = read_source(fields)
    max_new_tokens = read_max_tokens(fields, "max_completion_tokens", "max_tokens")
    choice_count = read_choice_count(fields, limits)
    sampling = read_sampling(fields, limits, random_source, top_logprobs)
    stop = read_stop(fields, "stop", limits)
    fields.label("user")
    fields.ignore("store", "metadata", "service_tier", "parallel_tool_calls", "tool_choice", "logprobs")
    return Generation(
        shape="chat",
        model=model,
        terms=(NamedTerm(model),) if model else (),
        prompts=(Prompt(messages=messages),),
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        choice_count=choice_count,
        stop=stop,
        adapter_source=source,
        adapter_token=token,
        is_stream=is_stream,
        has_usage_chunk=has_usage_chunk,
        top_logprobs=top_logprobs,
        warnings=tuple(fields.unknown()),
    )


def _refuse_features(fields: Fields) -> None:
    refuse_structured_output(fields)
    refuse_guidance(fields)
    for key in ("tools", "functions"):
        fields.refuse(key, [], remedy="describe the functions in the prompt")
    fields.refuse("function_call", "none", "auto", remedy="leave it out")
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
    if role in ("tool", "function"):
        raise UnsupportedError(f"`{name}.role` {role!r} is not supported by this node; tools are not served", param=name)
    if role not in _ROLES:
        raise RequestError(f"`{name}.role` must be one of {', '.join(_ROLES)}. Given: {shown(message.get('role'))}", param=name)
    for key in ("tool_calls", "function_call", "audio"):
        fields.refuse(key, [], remedy="only text messages are served")
    content = _read_content(fields.raw("content"), name, limits)
    # OpenAI renamed "system" to "developer"; the templates of open models know only the former.
    return {"role": "system" if role == "developer" else role, "content": content}


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
    if kind == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    if isinstance(kind, str) and kind not in ("text", "refusal"):
        raise UnsupportedError(
            f"`{name}` has type {kind[:32]!r}; this node serves text only and fetches nothing that a message names",
            code="modality_not_supported",
            param=name,
        )
    raise RequestError(f"`{name}` must be a text part with a string in `text`. Given: {shown(part)}", param=name)
