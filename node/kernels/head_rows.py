"""The adapters of the rows that want logits. On a CPU; a GPU's come from the host with the step.

Shape letters: T rows (tokens), W rows that want logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from node.kernels.lora import LoraPool, LoraRows


@dataclass(slots=True)
class LogitTops:
    """The largest logits of every row, which kernels may find while they project on the vocabulary.

    Attributes:
        wanted: [W] int32, 0 where nobody reads the row's logits: they may be left unwritten where `parts` is there.
        parts: [W, P, 2] int32, set by the kernels that found them: of each part of the vocabulary the largest logit (float32
            bits; NaN where one is) and the lowest token that has it. None: every row's logits are written.
    """

    wanted: Tensor
    parts: Tensor | None = None


def head_rows(rows: LoraRows | None, pool: LoraPool | None, module: int) -> LoraRows | None:
    """See `Kernels.head_rows`. A row that adapters do not change here is not looked up at all."""
    return rows if rows is not None and pool is not None and bool(pool.ranks[module].any()) else None


def select_rows(lora: LoraRows, rows: Tensor) -> LoraRows:
    """The adapters of some rows, in the order of `rows` [W] int64."""
    first = lora.row_start[rows].long()
    counts = lora.row_start[rows + 1].long() - first
    row_start = torch.zeros(rows.numel() + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=row_start[1:])
    terms = torch.arange(int(row_start[-1])) + torch.repeat_interleave(first - row_start[:-1], counts)
    return LoraRows(row_start=row_start.int(), slot=lora.slot[terms], weight=lora.weight[terms])
