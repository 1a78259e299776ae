"""What one step computes, and what came of it: the scheduler plans `Work`, a runner answers with `WorkResult`."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from node.engine.messages import SequenceEvent
from node.engine.sequence import Sequence
from node.request import DrawnToken


@dataclass(frozen=True, slots=True)
class Work:
    """Rows of one sequence in one step: tokens `start` .. `start + count - 1`, the last of which may still be being drawn.

    Attributes:
        draws_token: The last row's logits give the next token.
        wants_prompt_logprobs: The logits of every row are wanted.
        epoch: Of the sequence's blocks; another one means that they were taken away meanwhile.
    """

    sequence: Sequence
    start: int
    count: int
    draws_token: bool
    wants_prompt_logprobs: bool
    epoch: int

    @property
    def logit_count(self) -> int:
        """How many of the rows want logits: the last ones."""
        return self.count if self.wants_prompt_logprobs else int(self.draws_token)

    @property
    def embeds(self) -> bool:
        """Whether the last row's hidden state is wanted."""
        return self.draws_token and self.sequence.submit.embeds

    @classmethod
    def of(cls, sequence: Sequence, start: int, count: int) -> Work:
        """The work of these rows, as things stand."""
        end, total = start + count, sequence.token_count
        wants_logprobs = sequence.wants_prompt_logprobs and start + 1 < sequence.prompt_count
        return cls(
            sequence,
            start,
            count,
            draws_token=end == total,
            wants_prompt_logprobs=wants_logprobs,
            epoch=sequence.epoch,
        )


def logit_rows(work: Seq[Work]) -> list[int] | None:
    """Which rows of a step want logits, all of its works' rows in one line; None where all do."""
    counts = [item.logit_count for item in work]
    if sum(counts) == sum([item.count for item in work]):
        return None  # as in every decode step
    rows: list[int] = []
    end = 0
    for item, count in zip(work, counts, strict=True):
        end += item.count
        rows.extend(range(end - count, end))
    return rows


def following_tokens(work: Work) -> list[int]:
    """The prompt tokens after each row, which the rows' logits predict; there is none after the prompt's last row."""
    end = min(work.start + work.count + 1, work.sequence.prompt_count)
    return list(work.sequence.tokens[work.start + 1 : end])


@dataclass(slots=True)
class StepPlan:
    """The rows of one step, and what became of sequences that will not run at all."""

    work: list[Work] = field(default_factory=list)
    events: list[SequenceEvent] = field(default_factory=list)
    row_count: int = 0


@dataclass(frozen=True, slots=True)
class WorkResult:
    """What a step computed for one `Work`.

    Attributes:
        drawn: The next token when the work draws one; None when it does not, or when the logits were not finite.
        prompt_logprobs: The prompt's token after each row with its log-probability, for works that want them.
        has_failed: Nothing could be computed for this work.
        is_skipped: Nothing was tried: its blocks or adapters are gone. Whoever still wants it computes it anew.
        embedding: Hidden state of the last row, float32 bytes, for works that embed.
    """

    drawn: DrawnToken | None = None
    prompt_logprobs: tuple[DrawnToken, ...] = ()
    has_failed: bool = False
    is_skipped: bool = False
    embedding: bytes | None = None
