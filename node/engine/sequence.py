"""One sequence: a prompt on its way to an answer, as the scheduler sees it."""

from __future__ import annotations

from array import array

from node.engine.messages import SequenceEvent, Submit
from node.request import AdapterTerm, DrawnToken, Sampling

FairKey = tuple[str, tuple[tuple[str, float], ...]]


class Sequence:
    """Tokens, progress and blocks of one sequence. Mutated by the scheduler only; others read.

    Args:
        submit: What was asked.
        arrival_index: Position in the order of arrival; decides who is preempted first.
        namespace: Root of its prefix-cache keys.

    Attributes:
        tokens: Prompt, then output ids, as 64-bit integers that numpy can view without a copy.
        computed_count: Leading tokens whose keys and values are in `blocks`, or will be when the open plans have run.
        pending_count: Tokens that open plans draw and that `tokens` does not hold yet: 0 or 1.
        epoch: How often its blocks were taken away.
        blocks: KV blocks in order, as 32-bit integers.
        keys: Prefix-cache keys of the leading full blocks, extended on demand.
        published_count: How many of `blocks` were offered to the prefix cache.
        chunk_count: Prefill chunks received since admission.
        cached_count: Prompt tokens found in the prefix cache at the first admission.
        prompt_logprobs: Collected so far when asked for; the first token has none.
        holds_adapters: Whether adapter memory keeps its adapters for it.
        is_admitted: Whether it has ever been admitted (then `cached_count` is final).
        has_spoken: Whether its first event has left.
    """

    __slots__ = (
        "arrival_index",
        "blocks",
        "cached_count",
        "chunk_count",
        "computed_count",
        "epoch",
        "fair_key",
        "has_spoken",
        "holds_adapters",
        "is_admitted",
        "keys",
        "namespace",
        "pending_count",
        "prompt_count",
        "prompt_logprobs",
        "published_count",
        "submit",
        "tokens",
    )

    def __init__(self, submit: Submit, arrival_index: int, namespace: bytes) -> None:
        self.submit = submit
        self.arrival_index = arrival_index
        self.namespace = namespace
        self.fair_key: FairKey = (submit.tenant, tuple((term.adapter_id, term.weight) for term in submit.terms))
        self.tokens = array("q", submit.prompt_ids)
        self.prompt_count = len(submit.prompt_ids)
        self.computed_count = 0
        self.pending_count = 0
        self.epoch = 0
        self.blocks = array("i")
        self.keys: list[bytes] = []
        self.published_count = 0
        self.chunk_count = 0
        self.cached_count = 0
        self.prompt_logprobs: list[DrawnToken | None] = [None]
        self.holds_adapters = False
        self.is_admitted = False
        self.has_spoken = False

    @property
    def id(self) -> str:
        return self.submit.sequence_id

    @property
    def tenant(self) -> str:
        return self.submit.tenant

    @property
    def weight(self) -> int:
        """What its tenant weighs in fair queueing."""
        return self.submit.weight

    @property
    def sampling(self) -> Sampling:
        return self.submit.sampling

    @property
    def terms(self) -> tuple[AdapterTerm, ...]:
        return self.submit.terms

    @property
    def token_count(self) -> int:
        """Tokens it has, those among them that are only being drawn."""
        return len(self.tokens) + self.pending_count

    @property
    def remaining_count(self) -> int:
        """Tokens whose keys and values are still to be computed; 1 means that the next row draws a token."""
        return self.token_count - self.computed_count

    @property
    def is_ending(self) -> bool:
        """Whether the token being drawn is its last one for certain: no further row may be planned."""
        return self.pending_count > 0 and self.token_count - self.prompt_count >= self.submit.sampling.max_new_tokens

    @property
    def output_count(self) -> int:
        return len(self.tokens) - self.prompt_count

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt rows still need logits: asked for, and not all collected yet."""
        return self.sampling.prompt_logprobs and len(self.prompt_logprobs) < self.prompt_count

    def event(
        self, tokens: tuple[DrawnToken, ...] = (), finish_reason: str | None = None, embedding: bytes | None = None
    ) -> SequenceEvent:
        """Build the next event; the first one also carries the prefix hit and the prompt's log-probabilities."""
        is_first = not self.has_spoken
        self.has_spoken = True
        has_prompt_logprobs = is_first and self.sampling.prompt_logprobs and finish_reason != "cancelled"
        return SequenceEvent(
            sequence_id=self.id,
            tokens=tokens,
            finish_reason=finish_reason,
            prompt_logprobs=tuple(self.prompt_logprobs) if has_prompt_logprobs else None,
            cached_prompt_tokens=self.cached_count if is_first else 0,
            embedding=embedding,
        )

    def error(self, code: str, message: str) -> SequenceEvent:
        """Build the last event of a sequence that failed."""
        self.has_spoken = True
        return SequenceEvent(sequence_id=self.id, finish_reason="error", error_code=code, error_message=message)
