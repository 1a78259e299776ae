"""A step plan written into a step's block: rows and block tables, with numpy.

Shape letters: T rows (tokens), Q sequences, W rows that want logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from node.engine.device_sampler import reads_logits
from node.engine.step_block import BlockLayout, Ints
from node.engine.step_plan import Work, logit_rows
from node.kernels.lora_tiles import Recipe


@dataclass(frozen=True, slots=True)
class StepShape:
    """What the host knows of a plan without looking at tokens.

    Attributes:
        rows, sequences: T and Q.
        logit_rows: [W]. Which rows want logits; None where all do.
        max_query, max_context: The most rows and tokens of one sequence.
        table_width: The most KV blocks of one sequence.
        is_decode: One row a sequence, and nothing but its logits wanted.
    """

    rows: int
    sequences: int
    logit_rows: npt.NDArray[np.int32] | None
    max_query: int
    max_context: int
    table_width: int
    is_decode: bool


def step_shape(work: Sequence[Work]) -> StepShape:
    """Measure a plan."""
    counts = [item.count for item in work]
    max_query = max(counts)
    wanted = logit_rows(work)
    return StepShape(
        rows=sum(counts),
        sequences=len(work),
        logit_rows=None if wanted is None else np.array(wanted, dtype=np.int32),
        max_query=max_query,
        max_context=max([item.start + item.count for item in work]),
        table_width=max([len(item.sequence.blocks) for item in work]),
        is_decode=max_query == 1 and not any(item.wants_prompt_logprobs or item.embeds for item in work),
    )


def recipes_of(work: Sequence[Work], slot_of: Callable[[str], int]) -> list[Recipe]:
    """The (slot, weight) terms of every sequence, in recipe order: the order they are summed in, so it is part of the answer."""
    return [tuple([(slot_of(term.adapter_id), term.weight) for term in item.sequence.terms]) for item in work]


def pending_places(work: Sequence[Work], places: Mapping[str, int]) -> dict[int, int]:
    """Work index -> place among the last step's draws, where the last row's token is still being drawn.

    Raises:
        ValueError: The step before did not draw that token, or somebody else has it.
    """
    found: dict[int, int] = {}
    for index, item in enumerate(work):
        if item.start + item.count > len(item.sequence.tokens):
            place = places.get(item.sequence.id)
            if place is None:
                raise ValueError(f"the token of sequence {item.sequence.id} is neither known nor being drawn")
            found[index] = place
    return found


def wanted_rows(work: Iterable[Work], *, is_watched: bool) -> list[int]:
    """1 for every row whose logits somebody reads, 0 where a token is drawn that needs no more than the largest.

    Args:
        work: Those that want the logits of one row. is_watched: Somebody reads them all.
    """
    if is_watched:
        return [1 for _ in work]
    return [int(reads_logits(item.sequence.sampling, has_grammar=item.sequence.submit.grammar is not None)) for item in work]


def write_decode(
    host: Ints,
    layout: BlockLayout,
    work: Sequence[Work],
    block_size: int,
    pending: Mapping[int, int],
    own: int,
    wanted: Sequence[int],
) -> None:
    """Write one row a sequence; behind them padding up to `layout.rows`: no keys are written for it and its context is 0.

    Args:
        pending: See `pending_places`. own: `sources` value of the first of the run's own tokens. wanted: See `wanted_rows`.
    """
    count, bucket = len(work), layout.rows
    starts = np.array([item.start for item in work], dtype=np.int32)
    tokens = [0 if index in pending else item.sequence.tokens[item.start] for index, item in enumerate(work)]
    sources = [pending.get(index, own + index) for index in range(count)]
    blocks = [item.sequence.blocks[block] for item, block in zip(work, (starts // block_size).tolist(), strict=True)]
    slots = np.array(blocks, dtype=np.int32) * block_size + starts % block_size
    for at, values, padding in (
        (layout.tokens, tokens, 0),
        (layout.sources, sources, own),
        (layout.positions, starts, 0),
        (layout.kv_slots, slots, -1),
        (layout.context_lens, starts + 1, 0),
        (layout.wanted, wanted, 0),
    ):
        host[at : at + count] = values
        host[at + count : at + bucket] = padding
    _write_tables(host, layout, work)


def write_rows(
    host: Ints,
    layout: BlockLayout,
    work: Sequence[Work],
    shape: StepShape,
    block_size: int,
    pending: Mapping[int, int],
    own: int,
    wanted: Sequence[int] = (),
) -> None:
    """Write any number of rows a sequence, padding behind them where the layout has room. See `write_decode`.

    Sequences of one row, most of those that decode beside a prompt, are written together: 63 of them one by one took 0.35 ms.
    """
    counts = np.array([item.count for item in work], dtype=np.int32)
    starts = np.array([item.start for item in work], dtype=np.int32)
    ends = np.cumsum(counts, dtype=np.int32)
    first, rows = ends - counts, int(ends[-1])
    positions = np.arange(rows, dtype=np.int32) + np.repeat(starts - first, counts)
    sources = host[layout.sources : layout.sources + rows]
    sources[:] = np.arange(own, own + rows)
    sources[ends[list(pending)] - 1] = list(pending.values())
    host[layout.positions : layout.positions + rows] = positions
    tokens, blocks = _tokens_and_blocks(work, first, positions, block_size, pending)
    host[layout.tokens : layout.tokens + rows] = tokens
    host[layout.kv_slots : layout.kv_slots + rows] = blocks * block_size + positions % block_size
    host[layout.query_start] = 0
    host[layout.query_start + 1 : layout.query_start + 1 + len(work)] = ends
    host[layout.context_lens : layout.context_lens + len(work)] = starts + counts
    pad_rows(host, layout, rows, len(work), own)
    if shape.logit_rows is not None:
        count = len(shape.logit_rows)
        host[layout.logits : layout.logits + count] = shape.logit_rows
        host[layout.logits + count : layout.logits + layout.logit_rows] = 0
        host[layout.wanted : layout.wanted + len(wanted)] = wanted
    _write_tables(host, layout, work)


def _tokens_and_blocks(
    work: Sequence[Work], first: Ints, positions: Ints, block_size: int, pending: Mapping[int, int]
) -> tuple[Ints, Ints]:
    """[T] each: every row's token, 0 while it is still being drawn, which nobody reads, and its KV block."""
    tokens, found = np.zeros(len(positions), dtype=np.int32), np.empty(len(positions), dtype=np.int32)
    single = [index for index, item in enumerate(work) if item.count == 1]
    rows = first[single]
    tokens[rows] = [0 if index in pending else work[index].sequence.tokens[work[index].start] for index in single]
    found[rows] = [work[index].sequence.blocks[work[index].start // block_size] for index in single]
    for item, row in zip(work, first.tolist(), strict=True):
        if item.count > 1:
            known = np.frombuffer(item.sequence.tokens, dtype=np.int64)[item.start : item.start + item.count]
            tokens[row : row + len(known)] = known
            blocks = np.frombuffer(item.sequence.blocks, dtype=np.int32)
            found[row : row + item.count] = blocks[positions[row : row + item.count] // block_size]
    return tokens, found


def pad_rows(host: Ints, layout: BlockLayout, rows: int, sequences: int, own: int) -> None:
    """Rows of no sequence and sequences of no rows, up to the layout's."""
    for at, padding in ((layout.tokens, 0), (layout.sources, own), (layout.positions, 0), (layout.kv_slots, -1)):
        host[at + rows : at + layout.rows] = padding
    host[layout.query_start + sequences + 1 : layout.query_start + layout.sequences + 1] = rows
    host[layout.context_lens + sequences : layout.context_lens + layout.sequences] = 0


def _write_tables(host: Ints, layout: BlockLayout, work: Sequence[Work]) -> None:
    """Block numbers of every sequence; what lies behind a sequence's own is never followed."""
    at = layout.tables
    for item in work:
        blocks = item.sequence.blocks
        host[at : at + len(blocks)] = blocks
        at += layout.table_width
