"""Runs a step plan: tensors in, tokens out. Owns the model, the KV cache and the adapter memory; knows no queue and no user."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from node.engine.batch import build_inputs, side_groups
from node.engine.grammar import mask_width
from node.engine.sampler import DrawRow, RowMask, draw, score_prompt
from node.engine.step_plan import Work, WorkResult, following_tokens
from node.kernels.lora import LoraPool
from node.models.inputs import CausalLM, KVCache
from node.request import DrawnToken

# Shown the work and the logits [W, V] float32 of every step; changes neither.
LogitsWatcher = Callable[[Sequence[Work], Tensor], None]


class SlotTable(Protocol):
    """Where resident adapters are. `node.adapters.pool.AdapterPool` is one."""

    @property
    def tensors(self) -> LoraPool: ...

    def slot_of(self, adapter_id: str) -> int: ...


class MaskSource(Protocol):
    """Which tokens each row may draw. `node.engine.grammar_masks.GrammarMasks` is one."""

    def constrained(self, sequence_ids: Sequence[str]) -> list[int]: ...

    def allows(self, sequence_id: str, token_id: int) -> bool: ...

    def fill_mask(self, sequence_ids: Sequence[str], buffer: np.ndarray) -> list[int]: ...


@dataclass(slots=True)
class Flight:
    """A step whose logits [W, V] float32 are there, and the hidden states [E, H] float32 of works that embed. `results` follow
    when its tokens are drawn."""

    work: list[Work]
    logits: Tensor
    hidden: Tensor | None = None
    results: list[WorkResult] = field(default_factory=list)


class Runner:
    """The CPU's arithmetic: every part of a step is done when its method returns. See `node.engine.engine.StepRunner`.

    Args:
        model: The decoder.
        kv: Its paged cache; block numbers of the plan index it.
        adapters: Adapter memory that the plan's adapters are resident in.
        masks: What rows with a grammar may draw; asked after the forward pass, when all tokens before the draw are known.
        watch_logits: For whoever compares bits; None in a node.
    """

    is_ahead = False

    def __init__(
        self, model: CausalLM, kv: KVCache, adapters: SlotTable, masks: MaskSource, watch_logits: LogitsWatcher | None = None
    ) -> None:
        self._model = model
        self._kv = kv
        self._adapters = adapters
        self._masks = masks
        self._watch_logits = watch_logits

    @torch.inference_mode()
    def launch(self, work: list[Work]) -> Flight:
        """Run the model over every row of a plan's work."""
        inputs = build_inputs(work, self._kv.block_size, self._adapters.slot_of)
        inputs.side = side_groups(work, self._adapters.slot_of, self._adapters.tensors)
        rows = embedding_rows(work)
        inputs.hidden_rows = torch.tensor(rows, dtype=torch.int64) if rows else None
        logits = self._model.forward(inputs, self._kv, self._adapters.tensors)
        if self._watch_logits is not None:
            self._watch_logits(work, logits)
        return Flight(work, logits, inputs.hidden)

    @torch.inference_mode()
    def draw(self, flight: Flight) -> None:
        """Draw the tokens."""
        flight.results = sample(flight.work, flight.logits, self._masks)
        if flight.hidden is not None:
            add_embeddings(flight.work, flight.results, flight.hidden)

    def collect(self, flight: Flight) -> list[WorkResult]:
        """Return one result per work, in order."""
        return flight.results


def embedding_rows(work: Sequence[Work]) -> list[int]:
    """Of the rows that want logits, the last one of every work that ends a sequence which embeds."""
    rows, end = [], 0
    for item in work:
        end += item.logit_count
        if item.embeds:
            rows.append(end - 1)
    return rows


def add_embeddings(work: Sequence[Work], results: list[WorkResult], hidden: Tensor) -> None:
    """Put hidden states [E, H] float32, on the host, into the results of the works they belong to, in place."""
    states = iter(hidden.numpy())
    for index, item in enumerate(work):
        if item.embeds:
            results[index] = replace(results[index], embedding=next(states).tobytes())


def sample(work: list[Work], logits: Tensor, masks: MaskSource | None = None) -> list[WorkResult]:
    """Turn the logits of a step into results. logits: [W, V] float32, rows as `batch.logit_rows` asked for them."""
    prompt_logprobs: dict[int, tuple[DrawnToken, ...]] = {}
    places: dict[int, int] = {}  # work index -> its place among the drawing rows
    drawing_rows: list[int] = []
    row = 0
    for index, item in enumerate(work):
        if item.wants_prompt_logprobs:
            prompt_logprobs[index] = _prompt_logprobs(item, logits[row : row + item.count])
        elif not item.draws_token:
            continue
        row += item.count if item.wants_prompt_logprobs else 1
        if item.draws_token:
            places[index] = len(drawing_rows)
            drawing_rows.append(row - 1)
    drawn = _draw(logits, drawing_rows, [work[index] for index in places], masks)
    return [
        WorkResult(drawn[places[index]] if index in places else None, prompt_logprobs.get(index, ()))
        for index in range(len(work))
    ]


def _draw(logits: Tensor, rows: list[int], work: list[Work], masks: MaskSource | None) -> list[DrawnToken | None]:
    """Draw one token for each of `rows`."""
    if not rows:
        return []
    if len(rows) != logits.shape[0]:
        logits = logits[rows]
    return draw(logits, [draw_row(item) for item in work], _lazy_mask(masks, work, logits.shape[1]))


@dataclass(frozen=True, slots=True)
class LazyMask:
    """A `TokenMask` that asks the grammars only what the sampler asks it: the CPU computes logits and masks on the same cores."""

    rows: list[int]
    sequence_ids: list[str]
    masks: MaskSource
    vocab_size: int

    def forbids(self, row: int, token_id: int) -> bool:
        """Whether a row may not draw a token."""
        return not self.masks.allows(self.sequence_ids[row], token_id)

    def words_of(self, rows: Sequence[int]) -> np.ndarray:
        """Masks [n, ceil(V / 32)] int32 of some rows."""
        buffer = np.empty((len(rows), mask_width(self.vocab_size)), dtype=np.int32)
        self.masks.fill_mask([self.sequence_ids[row] for row in rows], buffer)
        return buffer


def _lazy_mask(masks: MaskSource | None, work: list[Work], vocab_size: int) -> LazyMask | None:
    if masks is None:
        return None
    sequence_ids = [item.sequence.id for item in work]
    rows = masks.constrained(sequence_ids)
    return LazyMask(rows, sequence_ids, masks, vocab_size) if rows else None


def row_mask(masks: MaskSource | None, work: list[Work], vocab_size: int) -> RowMask | None:
    """What works that draw may draw, for a device whose sampler cannot ask back; None where none of them has a grammar."""
    if masks is None:
        return None
    sequence_ids = [item.sequence.id for item in work]
    if not masks.constrained(sequence_ids):
        return None
    # Pinned: the copy engine takes the words while the host goes on, and torch keeps them until it has.
    words = torch.empty((len(work), mask_width(vocab_size)), dtype=torch.int32, pin_memory=torch.cuda.is_available())
    return RowMask(masks.fill_mask(sequence_ids, words.numpy()), words)


def draw_row(item: Work) -> DrawRow:
    """What the sampler must know of a work that draws."""
    sequence = item.sequence
    return DrawRow(sequence.sampling, sequence.submit.choice_index, sequence.tokens, sequence.prompt_count)


def _prompt_logprobs(item: Work, logits: Tensor) -> tuple[DrawnToken, ...]:
    """The prompt token after each row with its log-probability; rows at or beyond the prompt's end have none."""
    following = following_tokens(item)
    if not following:
        return ()
    scored = score_prompt(logits[: len(following)], torch.tensor(following), item.sequence.sampling.prompt_top)
    return tuple(scored.tolist())
