"""The adapters of the rows that want logits. On a CPU; a GPU's come from the host with the step.

Shape letters: T rows (tokens), W rows that want logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from node.kernels.lora import LoraPool, LoraRows


def head_rows(rows: LoraRows | None, pool: LoraPool | None, logit_rows: Tensor | None, module: int) -> LoraRows | None:
    """See `Kernels.head_rows`. A row that adapters do not change here is not looked up at all."""
    if rows is None or pool is None or not bool(pool.ranks[module].any()):
        return None
    return rows if logit_rows is None else select_rows(rows, logit_rows)


def select_rows(lora: LoraRows, rows: Tensor) -> LoraRows:
    """The adapters of some rows, in the order of `rows` [W] int64."""
    first = lora.row_start[rows].long()
    counts = lora.row_start[rows + 1].long() - first
    row_start = torch.zeros(rows.numel() + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=row_start[1:])
    terms = torch.arange(int(row_start[-1])) + torch.repeat_interleave(first - row_start[:-1], counts)
    return LoraRows(row_start=row_start.int(), slot=lora.slot[terms], weight=lora.weight[terms])
