"""Bounds of the scheduler, and what they say to a sequence that arrives."""

from __future__ import annotations

from dataclasses import dataclass

from node.engine.blocks import BlockPool
from node.engine.messages import SequenceEvent
from node.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds from the settings; see `EngineSettings`.

    Attributes:
        spread_sizes: See `Spread`; empty: a prompt's row costs the same in every step.
    """

    max_sequences: int
    max_batch_tokens: int
    queue_limit: int
    max_model_len: int
    vocab_size: int
    spread_sizes: tuple[tuple[int, int], ...] = ()

    @property
    def place_count(self) -> int:
        """The most sequences that run at once: each needs a row a step once it draws tokens."""
        return min(self.max_sequences, self.max_batch_tokens)

    def refusal(self, sequence: Sequence, blocks: BlockPool, waiting_count: int) -> SequenceEvent | None:
        """The only event of a sequence that can never run or finds the queue full; None for one that may wait."""
        wanted = sequence.prompt_count + sequence.sampling.max_new_tokens
        if sequence.prompt_count == 0:
            return sequence.error("invalid_request", "the prompt has no tokens; at least 1 is needed")
        stranger = next((token_id for token_id in sequence.submit.prompt_ids if not 0 <= token_id < self.vocab_size), None)
        if stranger is not None:
            return sequence.error(
                "invalid_request",
                f"the prompt has the token id {stranger}; the model's vocabulary is 0 to {self.vocab_size - 1}",
            )
        if wanted > self.max_model_len:
            return sequence.error(
                "context_length_exceeded",
                f"the prompt has {sequence.prompt_count} tokens and {sequence.sampling.max_new_tokens} more were asked for; "
                f"the model's context is {self.max_model_len} tokens; shorten the prompt or ask for fewer",
            )
        # The last token drawn is never fed back, so it needs no block.
        block_count = blocks.blocks_for(max(wanted - 1, sequence.prompt_count))
        if block_count > blocks.block_limit:
            return sequence.error(
                "context_length_exceeded",
                f"{wanted} tokens need {block_count} KV blocks and the engine has {blocks.block_limit}; "
                "shorten the request or raise engine.kv_cache_bytes",
            )
        if waiting_count >= self.queue_limit:
            return sequence.error(
                "queue_full", f"{waiting_count} sequences are waiting, the limit is {self.queue_limit}; retry later"
            )
        return None
