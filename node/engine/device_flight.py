"""A step on its way through a GPU: which of its logits' rows draw a token, and what prompts are told of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from node.engine.device_sampler import DeviceDraw
from node.engine.step_block import upload
from node.engine.step_plan import Work


@dataclass(slots=True)
class DeviceFlight:
    """A step on the device. `logits` [W, V] float32; `drawing`: work index of every row that draws, `rows` their logits' rows
    (None: all of them, in order)."""

    work: list[Work]
    logits: Tensor
    drawing: list[int]
    rows: list[int] | None
    prompt_logprobs: dict[int, Tensor] = field(default_factory=dict)
    draw: DeviceDraw | None = None
    hidden: Tensor | None = None

    @property
    def drawing_logits(self) -> Tensor:
        """[n, V]: the rows that draw."""
        if self.rows is None or len(self.rows) == self.logits.shape[0]:
            return self.logits
        return self.logits[upload(self.rows, self.logits.device)]

    def prompt_row_logprobs(self) -> dict[int, Tensor]:
        """[rows] log-probability of the prompt token after each row, on the device, by work index."""
        found: dict[int, Tensor] = {}
        first = 0
        for index, item in enumerate(self.work):
            if item.wants_prompt_logprobs:
                following = item.sequence.tokens[item.start + 1 : min(item.start + item.count + 1, item.sequence.prompt_count)]
                logits = self.logits[first : first + len(following)]
                ids = upload(following, logits.device)
                found[index] = logits.log_softmax(dim=1).gather(1, ids[:, None])[:, 0]
            if self.rows is not None:
                first += item.count if item.wants_prompt_logprobs else int(item.draws_token)
        return found


def drawing_rows(work: Sequence[Work]) -> tuple[list[int], list[int]]:
    """Rows of the logits that draw a token, and whose they are."""
    rows: list[int] = []
    drawing: list[int] = []
    end = 0
    for index, item in enumerate(work):
        end += item.count if item.wants_prompt_logprobs else int(item.draws_token)
        if item.draws_token:
            rows.append(end - 1)
            drawing.append(index)
    return rows, drawing
