"""What the API process and the engine process say to each other (msgspec over two bounded ZeroMQ queues).

Down: one `Submit` per sequence (a request with `n` choices is n sequences), `Cancel`, `Prefetch`, `Evict`, `Shutdown`.
Up: one `Ready` after start, then one `Step` per engine step that has anything to say, and `Stats` at least once a second.
"""

from __future__ import annotations

import msgspec

from node.request import AdapterTerm, DrawnToken, LinearShape, Sampling

__all__ = [
    "Cancel",
    "Command",
    "Event",
    "Evict",
    "LinearShape",
    "Prefetch",
    "Ready",
    "SequenceEvent",
    "Shutdown",
    "StartFailed",
    "Stats",
    "Step",
    "Submit",
]


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag="submit"):
    """Run one sequence.

    `sequence_id` is unique for the life of the node; `tenant` and the terms key fairness and the prefix cache, `weight` is
    the tenant's share among those that want the engine at once. `grammar` is what
    the answer must follow, in llguidance's notation, judged before it came here; None leaves it free.
    """

    sequence_id: str
    tenant: str
    prompt_ids: tuple[int, ...]
    terms: tuple[AdapterTerm, ...]
    sampling: Sampling
    choice_index: int = 0
    weight: int = 1
    grammar: str | None = None
    embeds: bool = False  # wants the last token's hidden state and no tokens (`max_new_tokens` is 0)


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Stop a sequence within one step. Its last event has finish_reason "cancelled". Unknown ids are ignored."""

    sequence_id: str


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Finish nothing more: answer every running sequence with "cancelled" and exit."""


class Prefetch(msgspec.Struct, frozen=True, tag="prefetch"):
    """Bring an adapter into memory before anybody asks for it, where that pushes out nobody who is wanted now."""

    term: AdapterTerm


class Evict(msgspec.Struct, frozen=True, tag="evict"):
    """Let an adapter's memory go as soon as no sequence runs with it. A sequence that names it later loads it again."""

    adapter_id: str


Command = Submit | Cancel | Prefetch | Evict | Shutdown


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The engine can serve. Everything the API process needs to know about the model, so that it never imports torch."""

    model_id: str
    base_id: str  # content hash of the base model, 64 hex digits
    architecture: str
    dtype: str
    device: str
    kernels: str  # "cpp-avx512bf16", "cpp-avx512", "cpp-avx2", "reference"
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    tokenizer_dir: str  # holds tokenizer.json and, where the model has one, chat_template.jinja and special_tokens.json
    linears: tuple[LinearShape, ...]
    kv_block_count: int
    kv_block_size: int
    max_rank: int


class StartFailed(msgspec.Struct, frozen=True, tag="start_failed"):
    """Instead of `Ready`: the engine cannot serve with these settings, and starting it again will not help."""

    kind: str  # the class in `node.errors`
    code: str
    message: str


class SequenceEvent(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """What one step produced for one sequence.

    `finish_reason` is None while it runs, else "stop" (end-of-sequence id), "length", "cancelled" or "error" (then `error_code`
    and `error_message` are set, in the vocabulary of `node.errors`). Token ids of an end-of-sequence are included.
    """

    sequence_id: str
    tokens: tuple[DrawnToken, ...] = ()
    prompt_logprobs: tuple[DrawnToken | None, ...] | None = None  # once, with the first tokens; the prompt's first has none
    cached_prompt_tokens: int = 0  # prefix-cache hit, once, with the first tokens
    embedding: bytes | None = None  # float32, little-endian: the hidden state after the final norm, of a sequence that `embeds`
    finish_reason: str | None = None
    error_code: str | None = None
    error_message: str | None = None


class Step(msgspec.Struct, frozen=True, tag="step", gc=False):
    """All sequence events of one engine step, in one message."""

    events: tuple[SequenceEvent, ...]


class Stats(msgspec.Struct, frozen=True, kw_only=True, tag="stats"):
    """Counters and gauges of the engine. `*_total` only grow during a process's life."""

    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    resident_adapters: tuple[str, ...] = ()  # in the memory that steps compute from: the GPU's, on a GPU
    host_adapters: tuple[str, ...] = ()  # not resident, in page-locked host memory; never on a CPU
    waiting_adapters: tuple[str, ...] = ()
    adapter_slots: int = 0
    steps_total: int = 0
    prompt_tokens_total: int = 0
    cached_prompt_tokens_total: int = 0
    output_tokens_total: int = 0
    preemptions_total: int = 0
    adapter_loads_total: int = 0
    adapter_evictions_total: int = 0
    adapter_file_loads_total: int = 0  # read from their files; the other loads came from host memory
    adapter_host_evictions_total: int = 0
    adapter_sent_bytes_total: int = 0  # from host memory to the GPU
    adapter_load_seconds_total: float = 0.0
    max_adapters_in_one_step: int = 0  # distinct adapters in one decode step, the largest seen
    last_step_adapters: tuple[str, ...] = ()


Event = Ready | StartFailed | Step | Stats
