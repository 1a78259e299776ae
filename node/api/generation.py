"""What a client asked for, whichever shape it came in: the three request readers end here and the request path starts here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from attribution.record import Merge
from node.api.structured_fields import Constraint
from node.api.tool_dialect import ToolDialect
from node.config import ServerSettings
from node.request import Sampling

Shape = Literal["chat", "completion", "lorax", "embedding"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What the door accepts. Every bound appears in the message that refuses for it."""

    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    max_choices: int
    max_stop_sequences: int
    max_logprobs: int
    default_max_tokens: int
    max_terms: int
    max_prompts: int = 64
    max_sequences: int = 128  # prompts times choices, of one request
    max_stop_chars: int = 256
    max_messages: int = 4096
    max_logit_bias: int = 300
    max_text_chars: int = 4 << 20

    @classmethod
    def of(
        cls,
        server: ServerSettings,
        *,
        vocab_size: int,
        max_model_len: int,
        eos_token_ids: tuple[int, ...],
        max_terms: int,
    ) -> Limits:
        """The configured limits together with the model's."""
        return cls(
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            eos_token_ids=eos_token_ids,
            max_choices=server.max_choices,
            max_stop_sequences=server.max_stop_sequences,
            max_logprobs=server.max_logprobs,
            default_max_tokens=server.default_max_tokens,
            max_terms=max_terms,
        )


@dataclass(frozen=True, slots=True)
class NamedTerm:
    """One adapter of the request, still by name. `weight`, a plain decimal, multiplies the adapter's own scale."""

    name: str
    weight: str = "1"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: exactly one of text, token ids and messages is set."""

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    tools: tuple[dict[str, Any], ...] = ()  # for a chat template that shows them


@dataclass(frozen=True, slots=True)
class Generation:
    """A validated request.

    Attributes:
        model: The client's spelling, for answers and logs; "" asks for the base model.
        terms: Adapters by name with weights; empty is the base model.
        merge: How several terms become one adapter; None adds them as they are.
        lists_adapters: Another field than `model` names the terms, so `model` can only be the base.
        prompts: One or more; choices are numbered prompt by prompt.
        sampling: Complete but for `max_new_tokens`, which is 0 here: it depends on the prompt's length.
        max_new_tokens: What the client asked for; None leaves it to the node.
        choice_count: Choices made for each prompt. kept_count: of those the best, which are given; None gives all.
        stop: Stop strings; no part of one is ever in an answer.
        truncate_prompt_tokens: Keep only so many tokens of the prompt's end (LoRAX `truncate`), None keeps all.
        top_logprobs: Alternatives reported for each token; -1 reports no log-probabilities.
        constraint: What form the answer must have, None for any.
        calls: How tool calls are written in the answer, None when it is to be taken as it is.
        embeds: The answer is each prompt's hidden state and no token.
        warnings: Names of fields that were ignored.
    """

    shape: Shape
    model: str
    terms: tuple[NamedTerm, ...]
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    max_new_tokens: int | None
    choice_count: int = 1
    kept_count: int | None = None
    stop: tuple[str, ...] = ()
    adapter_source: str | None = None
    adapter_token: str | None = field(default=None, repr=False)
    is_stream: bool = False
    has_usage_chunk: bool = False
    truncate_prompt_tokens: int | None = None
    top_logprobs: int = -1
    has_details: bool = False
    has_prompt_details: bool = False
    has_prompt_text: bool = False
    constraint: Constraint | None = None
    calls: ToolDialect | None = None
    merge: Merge | None = None
    lists_adapters: bool = False
    embeds: bool = False
    warnings: tuple[str, ...] = ()
