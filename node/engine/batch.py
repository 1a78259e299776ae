"""A step plan as flat tensors. The arrays are filled with numpy and handed over without a copy: 16 decode rows take a few dozen
microseconds, where a torch call per field and row would take more than the model's smallest layers.

Shape letters: T rows (tokens), Q sequences, W rows that want logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from node.engine.step_plan import Work, logit_rows
from node.kernels.lora import LoraPool, LoraRows, lora_rows
from node.kernels.side import SideGroup, side_rows
from node.models.inputs import StepInputs

Ints = npt.NDArray[np.int64]


def build_inputs(work: Sequence[Work], block_size: int, slot_of: Callable[[str], int]) -> StepInputs:
    """Lay the rows of a step out.

    Args:
        work: At least one, in plan order; rows keep that order.
        block_size: Tokens per KV block.
        slot_of: Slot of a resident adapter, by content hash.
    """
    query_start = np.zeros(len(work) + 1, dtype=np.int32)
    np.cumsum([item.count for item in work], out=query_start[1:])
    total = int(query_start[-1])
    token_ids, positions, kv_slots = (np.empty(total, dtype=np.int64) for _ in range(3))
    wanted = logit_rows(work)
    tables = np.zeros((len(work), max(len(item.sequence.blocks) for item in work)), dtype=np.int32)
    for index, item in enumerate(work):
        blocks = np.frombuffer(item.sequence.blocks, dtype=np.int32)
        tables[index, : len(blocks)] = blocks
        _fill_rows(item, int(query_start[index]), block_size, blocks, token_ids, positions, kv_slots)
    return StepInputs(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(positions),
        kv_slots=torch.from_numpy(kv_slots),
        query_start=torch.from_numpy(query_start),
        context_lens=torch.from_numpy(np.array([item.start + item.count for item in work], dtype=np.int32)),
        block_tables=torch.from_numpy(tables),
        logit_rows=None if wanted is None else torch.tensor(wanted, dtype=torch.int64),
        lora=adapter_rows(work, slot_of),
    )


def _fill_rows(
    item: Work, row: int, block_size: int, blocks: npt.NDArray[np.int32], token_ids: Ints, positions: Ints, kv_slots: Ints
) -> None:
    """Write token ids, positions and KV slots of one sequence's rows, beginning at `row`."""
    tokens = item.sequence.tokens
    if item.count == 1:
        block, offset = divmod(item.start, block_size)
        token_ids[row] = tokens[item.start]
        positions[row] = item.start
        kv_slots[row] = blocks[block] * block_size + offset
        return
    span = slice(row, row + item.count)
    where = np.arange(item.start, item.start + item.count, dtype=np.int64)
    token_ids[span] = np.frombuffer(tokens, dtype=np.int64)[item.start : item.start + item.count]
    positions[span] = where
    kv_slots[span] = blocks[where // block_size].astype(np.int64) * block_size + where % block_size


def adapter_rows(work: Sequence[Work], slot_of: Callable[[str], int]) -> LoraRows | None:
    """The adapters of every row, terms in recipe order (the order they are summed in, so it is part of the answer)."""
    terms = [[(slot_of(term.adapter_id), term.weight) for term in item.sequence.terms] for item in work]
    return lora_rows(terms, [item.count for item in work])


def side_groups(work: Sequence[Work], slot_of: Callable[[str], int], pool: LoraPool) -> tuple[SideGroup, ...] | None:
    """The rows whose adapters have more than pages hold. While no resident adapter has such a thing this looks at nothing."""
    if not pool.sides:
        return None
    terms = [tuple((slot_of(term.adapter_id), term.weight) for term in item.sequence.terms) for item in work]
    return side_rows(pool, terms, [item.count for item in work])
