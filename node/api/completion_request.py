"""Reading `POST /v1/completions`."""

from __future__ import annotations

import random
from typing import Any

import msgspec

from node.api.adapter_fields import read_named
from node.api.fields import Fields, shown
from node.api.generation import Generation, Limits, Prompt
from node.api.model_fields import read_model, read_source
from node.api.sampling_fields import (
    read_best_of,
    read_choice_count,
    read_max_tokens,
    read_sampling,
    read_stop,
    read_stream,
    refuse_templates,
)
from node.api.structured_fields import read_constraint
from node.errors import ContextLengthError, RequestError


def read_completion(body: dict[str, Any], limits: Limits, random_source: random.Random) -> Generation:
    """Check every field.

    Raises:
        RequestError: A field is missing, of the wrong type or out of its range.
        UnsupportedError: suffix, client templates. GrammarError: See `structured_fields`.
    """
    fields = Fields(body)
    model = read_model(fields)
    prompts = read_prompts(fields, limits)
    fields.refuse("suffix", "", remedy="put the whole context into `prompt`")
    refuse_templates(fields)
    constraint = read_constraint(fields)
    is_stream, has_usage_chunk = read_stream(fields)
    named = read_named(fields, model, limits)
    source, token = read_source(fields)
    logprobs = fields.integer("logprobs", 0, limits.max_logprobs)
    top_logprobs = -1 if logprobs is None else logprobs
    echoes = fields.boolean("echo")
    kept_count = read_choice_count(fields, limits)
    choice_count = read_best_of(fields, limits, kept_count, is_stream=is_stream)
    answers = choice_count * len(prompts)
    if answers > limits.max_sequences:
        raise RequestError(
            f"`prompt` and `n` or `best_of` ask for {answers} answers; the limit is {limits.max_sequences}", param="n"
        )
    max_new_tokens = read_max_tokens(fields, "max_tokens", minimum=0 if echoes else 1)
    scored = max(top_logprobs, 0) if choice_count > kept_count else top_logprobs
    sampling = read_sampling(fields, limits, random_source, scored)
    if echoes and top_logprobs >= 0:
        sampling = msgspec.structs.replace(sampling, prompt_logprobs=True, prompt_top=top_logprobs)
    stop = read_stop(fields, "stop", limits)
    fields.label("user")
    return Generation(
        shape="completion",
        model=model,
        terms=named.terms,
        prompts=prompts,
        sampling=sampling,
        max_new_tokens=16 if max_new_tokens is None else max_new_tokens,  # OpenAI's default for this endpoint
        choice_count=choice_count,
        stop=stop,
        adapter_source=source,
        adapter_token=token,
        is_stream=is_stream,
        has_usage_chunk=has_usage_chunk,
        top_logprobs=top_logprobs,
        has_prompt_text=echoes,
        constraint=constraint,
        merge=named.merge,
        lists_adapters=named.is_listed,
        kept_count=kept_count,
        warnings=tuple(fields.unknown()),
    )


def read_prompts(fields: Fields, limits: Limits, key: str = "prompt") -> tuple[Prompt, ...]:
    """A string, a list of strings, a list of token ids, or a list of such lists; never a mixture."""
    value = fields.raw(key)
    if isinstance(value, str):
        return (_text_prompt(value, key),)
    if not isinstance(value, list) or not value:
        raise fields.error(key, "must be a non-empty string, list of strings, list of token ids or list of such lists")
    if _are_ids(value):
        return (_ids_prompt(value, key, limits),)
    if len(value) > limits.max_prompts:
        raise fields.error(key, f"must have at most {limits.max_prompts} prompts")
    if all(isinstance(item, str) for item in value):
        return tuple(_text_prompt(item, f"{key}[{index}]") for index, item in enumerate(value))
    if all(isinstance(item, list) for item in value):
        return tuple(_ids_prompt(item, f"{key}[{index}]", limits) for index, item in enumerate(value))
    raise fields.error(key, "must not mix strings, token ids and lists")


def _are_ids(values: list[Any]) -> bool:
    """Whether all are integers; JSON has none but `int`, and true is none. Prompts of thousands of ids are looked at at once."""
    return set(map(type, values)) == {int}


def _text_prompt(text: str, name: str) -> Prompt:
    if not text:
        raise RequestError(f"`{name}` must not be empty. Given: ''", param=name)
    return Prompt(text=text)


def _ids_prompt(ids: list[Any], name: str, limits: Limits) -> Prompt:
    if not ids:
        raise RequestError(f"`{name}` must not be empty. Given: []", param=name)
    if len(ids) >= limits.max_model_len:
        raise ContextLengthError(
            f"`{name}` has {len(ids)} tokens; the model's context of {limits.max_model_len} must also hold the answer", param=name
        )
    if not _are_ids(ids) or min(ids) < 0 or max(ids) >= limits.vocab_size:
        bad = next(item for item in ids if type(item) is not int or not 0 <= item < limits.vocab_size)
        raise RequestError(f"`{name}` must hold token ids between 0 and {limits.vocab_size - 1}. Given: {shown(bad)}", param=name)
    return Prompt(token_ids=tuple(ids))
