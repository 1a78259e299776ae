"""Sampling parameters in OpenAI's spelling, with the extras that vLLM made customary, shared by chat and completions."""

from __future__ import annotations

import random
from typing import Any

from node.api.fields import Fields
from node.api.generation import Limits
from node.request import Sampling

_MAX_SEED = (1 << 63) - 1
_MAX_TOKENS_FIELD = (1 << 31) - 1


def read_max_tokens(fields: Fields, *keys: str, minimum: int = 1) -> int | None:
    """The first of `keys` that is given. Whether it fits the context is known only once the prompt is tokenized."""
    values = [fields.integer(key, minimum, _MAX_TOKENS_FIELD) for key in keys]
    return next((value for value in values if value is not None), None)


def read_sampling(fields: Fields, limits: Limits, random_source: random.Random, top_logprobs: int) -> Sampling:
    """Everything but the token budget. Without a seed one is drawn, so that the record can name it."""
    ignores_eos = fields.boolean("ignore_eos") or fields.boolean("ignore_eos_token")
    return Sampling(
        max_new_tokens=0,
        temperature=_or(fields.number("temperature", 0, 2), 1.0),
        top_k=_read_top_k(fields, limits),
        top_p=_or(fields.number("top_p", 0, 1, above_minimum=True), 1.0),
        min_p=_or(fields.number("min_p", 0, 1), 0.0),
        typical_p=_or(fields.number("typical_p", 0, 1, above_minimum=True), 1.0),
        repetition_penalty=_or(fields.number("repetition_penalty", 0, 10, above_minimum=True), 1.0),
        frequency_penalty=_or(fields.number("frequency_penalty", -2, 2), 0.0),
        presence_penalty=_or(fields.number("presence_penalty", -2, 2), 0.0),
        logit_bias=_read_logit_bias(fields, limits),
        seed=read_seed(fields, random_source),
        stop_token_ids=() if ignores_eos else limits.eos_token_ids,
        logprobs=top_logprobs,
    )


def read_seed(fields: Fields, random_source: random.Random) -> int:
    """The client's seed, or a fresh one of 63 bits."""
    seed = fields.integer("seed", -_MAX_SEED - 1, _MAX_SEED)
    return random_source.getrandbits(63) if seed is None else seed


def _read_top_k(fields: Fields, limits: Limits) -> int:
    """-1 and 0 both switch it off: vLLM's and transformers' spelling."""
    top_k = fields.integer("top_k", -1, _MAX_TOKENS_FIELD)
    return 0 if top_k is None or top_k < 0 else min(top_k, limits.vocab_size)


def _read_logit_bias(fields: Fields, limits: Limits) -> tuple[tuple[int, float], ...]:
    bias = fields.inner("logit_bias")
    if bias is None:
        return ()
    keys = bias.unknown()
    if len(keys) > limits.max_logit_bias:
        raise fields.error("logit_bias", f"must have at most {limits.max_logit_bias} entries")
    read = dict(_read_bias(fields, bias, name.removeprefix("logit_bias."), limits) for name in keys)
    if len(read) != len(keys):
        raise fields.error("logit_bias", 'must name every token once; "1" and "01" are the same token')
    return tuple(sorted(read.items()))


def _read_bias(fields: Fields, bias: Fields, key: str, limits: Limits) -> tuple[int, float]:
    is_id = key.isascii() and key.isdigit() and len(key) <= 10
    if not is_id or int(key) >= limits.vocab_size:
        raise fields.error("logit_bias", f"must have token ids between 0 and {limits.vocab_size - 1} as keys, not {key[:32]!r}")
    value = bias.number(key, -100, 100)
    return int(key), _or(value, 0.0)


def read_stop(fields: Fields, key: str, limits: Limits) -> tuple[str, ...]:
    """A string or a list of strings, none of them empty."""
    value = fields.raw(key)
    if value is None:
        return ()
    stops: list[Any] = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise fields.error(key, "must be a string or a list of strings")
    if len(stops) > limits.max_stop_sequences:
        raise fields.error(key, f"supports up to {limits.max_stop_sequences} stop sequences")
    if not all(0 < len(stop) <= limits.max_stop_chars for stop in stops):
        raise fields.error(key, f"must hold strings of 1 to {limits.max_stop_chars} characters")
    return tuple(dict.fromkeys(stops))


def read_stream(fields: Fields) -> tuple[bool, bool]:
    """(`stream`, whether a last chunk with usage is wanted)."""
    is_stream = fields.boolean("stream")
    options = fields.inner("stream_options")
    if options is None:
        return is_stream, False
    if not is_stream:
        raise fields.error("stream_options", "is only allowed when `stream` is true")
    include_usage = options.boolean("include_usage")
    options.ignore("include_obfuscation", "continuous_usage_stats")
    return is_stream, include_usage


def read_choice_count(fields: Fields, limits: Limits) -> int:
    """`n`."""
    return fields.integer("n", 1, limits.max_choices) or 1


def read_best_of(fields: Fields, limits: Limits, choice_count: int, *, is_stream: bool) -> int:
    """`best_of`: how many answers are made for each prompt, of which the best `n` are given."""
    best_of = fields.integer("best_of", 1, limits.max_choices)
    if best_of is None or best_of == choice_count:
        return choice_count
    if best_of < choice_count:
        raise fields.error("best_of", f"must be at least `n` ({choice_count})")
    if is_stream:
        raise fields.error("best_of", "cannot be streamed: which answer is best is known at the end")
    return best_of


def refuse_templates(fields: Fields) -> None:
    """Ways to make the server run a client's template; each has been an advisory somewhere."""
    for key in ("chat_template", "chat_template_kwargs"):
        fields.refuse(key, {}, remedy="the base model's own template is used")


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
