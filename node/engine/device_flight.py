"""A step on its way through a GPU: which of its logits' rows draw a token, and what prompts are told of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from node.engine.device_sampler import DeviceDraw
from node.engine.sampler import ScoredPrompt, score_prompt
from node.engine.step_block import upload
from node.engine.step_plan import Work, following_tokens


@dataclass(slots=True)
class DeviceFlight:
    """A step on the device. `logits` [W, V] float32; `drawing`: work index of every row that draws, `rows` their logits' rows
    (None: all of them, in order); `answer_turn`: where the tokens are (`StepBlock`)."""

    work: list[Work]
    logits: Tensor
    drawing: list[int]
    rows: list[int] | None
    answer_turn: int
    prompt_logprobs: dict[int, ScoredPrompt] = field(default_factory=dict)
    draw: DeviceDraw | None = None
    hidden: Tensor | None = None

    @property
    def drawing_logits(self) -> Tensor:
        """[n, V]: the rows that draw."""
        if self.rows is None or len(self.rows) == self.logits.shape[0]:
            return self.logits
        return self.logits[upload(self.rows, self.logits.device)]

    def prompt_row_logprobs(self) -> dict[int, ScoredPrompt]:
        """The prompt token after each row with its log-probability, on the device, by work index."""
        found: dict[int, ScoredPrompt] = {}
        first = 0
        for index, item in enumerate(self.work):
            if item.wants_prompt_logprobs:
                following = following_tokens(item)
                logits = self.logits[first : first + len(following)]
                found[index] = score_prompt(logits, upload(following, logits.device), item.sequence.sampling.prompt_top)
            if self.rows is not None:
                first += item.logit_count
        return found


def drawing_rows(work: Sequence[Work]) -> tuple[list[int], list[int]]:
    """Rows of the logits that draw a token, and whose they are."""
    rows: list[int] = []
    drawing: list[int] = []
    end = 0
    for index, item in enumerate(work):
        end += item.logit_count
        if item.draws_token:
            rows.append(end - 1)
            drawing.append(index)
    return rows, drawing
