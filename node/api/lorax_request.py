"""Reading LoRAX's `POST /`, `/generate` and `/generate_stream`, with the wording of LoRAX's own validation.

Sources: `router/src/lib.rs` and `router/src/validation.rs` of LoRAX; lorax-client 0.6.3 sends all 22 parameters, nulls included.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

from node.api.fields import Fields
from node.api.generation import Generation, Limits, NamedTerm, Prompt
from node.api.merge_fields import MAX_NAME_CHARS, Merged, read_merged_adapters
from node.api.model_fields import read_source
from node.api.sampling_fields import read_seed, read_stop
from node.api.structured_fields import read_constraint
from node.errors import RequestError
from node.request import Sampling

_NAMING = frozenset({"adapter_id", "adapter_source", "merged_adapters", "api_token", "adapters", "lora_path"})
_FOREIGN = frozenset({"adapters", "lora_path"})
_MAX_INTEGER = (1 << 32) - 1


def read_lorax(
    body: dict[str, Any], limits: Limits, random_source: random.Random, bearer: str | None = None, is_stream: bool | None = None
) -> Generation:
    """Check every field.

    Args:
        bearer: The token of the Authorization header; the adapter source's credential where the body has none.
        is_stream: What the route says, or None on `/`, where the body's `stream` says it.

    Raises:
        RequestError: A field is missing, of the wrong type or out of its range.
        UnsupportedError: watermark. GrammarError: See `structured_fields`.
    """
    outer = Fields(body)
    inputs = outer.text("inputs", limits.max_text_chars)
    if not inputs:
        raise RequestError("`inputs` cannot be empty", param="inputs")
    body_stream = outer.boolean("stream")
    fields = outer.inner("parameters") or Fields({})
    generation = _read_parameters(fields, limits, random_source, bearer)
    streams = body_stream if is_stream is None else is_stream
    if streams and generation.has_prompt_details:
        raise RequestError(
            "`decoder_input_details` == true is not supported when streaming tokens", param="parameters.decoder_input_details"
        )
    if streams and generation.choice_count > 1:
        raise RequestError("`best_of` != 1 is not supported when streaming tokens", param="parameters.best_of")
    _refuse_misplaced(outer, fields)
    return replace(
        generation,
        prompts=(Prompt(text=inputs),),
        is_stream=streams,
        warnings=(*outer.unknown(), *fields.unknown()),
    )


def _refuse_misplaced(outer: Fields, fields: Fields) -> None:
    """A field that names an adapter where nobody reads it: passing it over would let the base model answer."""
    for name in outer.unknown():
        if name in _NAMING:
            raise RequestError(f"`{name}` belongs into `parameters`", param=name)
    for name in fields.unknown():
        if name.removeprefix("parameters.") in _FOREIGN:
            raise RequestError(f"`{name}` names no adapter on this route; send `adapter_id` or `merged_adapters`", param=name)


def _read_parameters(fields: Fields, limits: Limits, random_source: random.Random, bearer: str | None) -> Generation:
    model, (terms, merge) = read_lorax_adapters(fields, limits)
    source, token = read_source(fields)
    constraint = read_constraint(fields)
    fields.refuse("watermark", False, remedy="leave it out")
    has_prompt_details = fields.boolean("decoder_input_details")
    has_details = fields.boolean("details") or has_prompt_details
    alternatives = fields.integer("return_k_alternatives", 0, limits.max_logprobs)
    sampling = _read_sampling(fields, limits, random_source)
    best_of = _read_best_of(fields, limits, sampling)
    fields.ignore("apply_chat_template")
    return Generation(
        shape="lorax",
        model=model,
        terms=terms,
        prompts=(),
        sampling=_with_logprobs(sampling, alternatives or 0, has_prompt_details),
        choice_count=best_of,
        kept_count=1,
        max_new_tokens=fields.integer("max_new_tokens", 1, _MAX_INTEGER, "must be strictly positive"),
        stop=read_stop(fields, "stop", limits),
        adapter_source=source,
        adapter_token=token or bearer,
        truncate_prompt_tokens=fields.integer("truncate", 1, limits.max_model_len),
        top_logprobs=alternatives or 0,
        has_details=has_details,
        has_prompt_details=has_prompt_details,
        has_prompt_text=fields.boolean("return_full_text"),
        constraint=constraint,
        merge=merge,
    )


def _with_logprobs(sampling: Sampling, alternatives: int, has_prompt_details: bool) -> Sampling:
    values = {name: getattr(sampling, name) for name in Sampling.__struct_fields__}
    return Sampling(**{**values, "logprobs": alternatives, "prompt_logprobs": has_prompt_details})


def read_lorax_adapters(fields: Fields, limits: Limits) -> tuple[str, Merged]:
    """`adapter_id` or `merged_adapters`: what an answer calls them, and what they are.

    Raises:
        RequestError: Both at once, or see `read_merged_adapters`.
    """
    adapter_id = fields.label("adapter_id", MAX_NAME_CHARS) or ""
    terms, merge = read_merged_adapters(fields, limits)
    if adapter_id and terms:
        raise RequestError("at most one of `adapter_id` or `adapters` may be provided", param="parameters.merged_adapters")
    if terms:
        return ",".join(term.name for term in terms), (terms, merge)
    return adapter_id, ((NamedTerm(adapter_id),) if adapter_id else (), None)


def _read_best_of(fields: Fields, limits: Limits, sampling: Sampling) -> int:
    """How many answers are made, of which the best is given."""
    most = limits.max_choices
    best_of = fields.integer("best_of", 1, most, f"must be > 0 and <= {most}") or 1
    if best_of > 1 and sampling.temperature == 0:
        raise RequestError("you must use sampling when `best_of` is > 1", param="parameters.best_of")
    if best_of > 1 and fields.raw("seed") is not None:
        raise RequestError("`seed` must not be set when `best_of` > 1", param="parameters.seed")
    return best_of


def _read_seed(fields: Fields, random_source: random.Random) -> int:
    """LoRAX's seeds have 64 bits and no sign; ours have one, and draw by the same bits."""
    seed = fields.integer("seed", -(1 << 63), (1 << 64) - 1)
    if seed is None:
        return read_seed(fields, random_source)
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def _read_sampling(fields: Fields, limits: Limits, random_source: random.Random) -> Sampling:
    """LoRAX draws only when asked to: any of the sampling parameters asks, else the answer is greedy."""
    temperature = fields.number("temperature", 0, math.inf, rule="must be non-negative")
    top_k = fields.integer("top_k", 1, _MAX_INTEGER, "must be strictly positive")
    top_p = fields.number("top_p", 0, 1, above_minimum=True, rule="must be > 0.0 and < 1.0")
    typical_p = fields.number("typical_p", 0, 1, above_minimum=True, rule="must be > 0.0 and < 1.0")
    is_drawn = fields.boolean("do_sample") or any(value is not None for value in (temperature, top_k, top_p, typical_p))
    ignores_eos = fields.boolean("ignore_eos_token")
    repetition = fields.number("repetition_penalty", 0, math.inf, above_minimum=True, rule="must be strictly positive")
    penalty_rule = "must be >= -2.0 and <= 2.0"
    return Sampling(
        max_new_tokens=0,
        temperature=(1.0 if temperature is None else temperature) if is_drawn else 0.0,
        top_k=min(top_k or 0, limits.vocab_size),
        top_p=top_p or 1.0,
        typical_p=typical_p or 1.0,
        repetition_penalty=repetition or 1.0,
        frequency_penalty=fields.number("frequency_penalty", -2, 2, rule=penalty_rule) or 0.0,
        presence_penalty=fields.number("presence_penalty", -2, 2, rule=penalty_rule) or 0.0,
        seed=_read_seed(fields, random_source),
        stop_token_ids=() if ignores_eos else limits.eos_token_ids,
    )
