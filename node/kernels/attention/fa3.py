"""FlashAttention 3 (2407.08608) on Hopper, where the module `flash_attn_interface` is installed.

Its operator is called directly, because the Python wrapper takes no output tensor. The scheduler's table is made once a step;
without it every layer would launch that kernel again.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from node.kernels.attention.paged import AttentionShape, DecodePlan, PagedAttention, PrefillPlan

_MOST_SPLITS = 16  # of one sequence's keys; the scheduler's kernel takes as many as the lengths of a step need


@dataclass(slots=True)
class Fa3DecodePlan(DecodePlan):
    """The scheduler's table for every window the model has, and the query offsets 0, 1, .. that it was made for."""

    metadata: dict[int | None, Tensor]


@dataclass(slots=True)
class Fa3PrefillPlan(PrefillPlan):
    """The same for prompt chunks."""

    metadata: dict[int | None, Tensor]


class Fa3Attention(PagedAttention):
    """See `PagedAttention`. bfloat16 and float16.

    Args:
        splits: most parts that a sequence's keys are cut into in decode.
    """

    def __init__(
        self, shape: AttentionShape, device: torch.device, *, is_deterministic: bool = False, splits: int = _MOST_SPLITS
    ) -> None:
        super().__init__(shape, device, is_deterministic=is_deterministic)
        importlib.import_module("flash_attn_interface")  # registers the operators
        self._ops: Any = torch.ops.flash_attn_3
        self._splits = splits

    @property
    def name(self) -> str:
        return "fa3"

    def plan_decode(self, block_tables: Tensor, context_lens: Tensor, max_context: int) -> Fa3DecodePlan:
        metadata = {
            window: self._metadata(context_lens, None, 1, self._context(block_tables), window, self._splits)
            for window in self.shape.windows
        }
        return Fa3DecodePlan(block_tables, context_lens, max_context, metadata)

    def decode(
        self, q: Tensor, keys: Tensor, values: Tensor, plan: DecodePlan, out: Tensor, *, window: int | None = None
    ) -> Tensor:
        assert isinstance(plan, Fa3DecodePlan)  # noqa: S101 - a programmer's mistake
        self._ops.fwd(
            q.unsqueeze(1),
            keys,
            values,
            out=out.unsqueeze(1),
            seqused_k=plan.context_lens,
            page_table=plan.block_tables,
            softmax_scale=self.shape.scale,
            is_causal=True,
            window_size_left=_left(window),
            scheduler_metadata=plan.metadata[window],
            num_splits=self._splits,
            pack_gqa=True,
        )
        return out

    def plan_prefill(
        self, block_tables: Tensor, query_start: Tensor, context_lens: Tensor, max_query: int, max_context: int
    ) -> Fa3PrefillPlan:
        metadata = {
            window: self._metadata(context_lens, query_start, max_query, self._context(block_tables), window, 1)
            for window in self.shape.windows
        }
        return Fa3PrefillPlan(block_tables, query_start, context_lens, max_query, max_context, metadata)

    def prefill(
        self, q: Tensor, keys: Tensor, values: Tensor, plan: PrefillPlan, out: Tensor, *, window: int | None = None
    ) -> Tensor:
        assert isinstance(plan, Fa3PrefillPlan)  # noqa: S101 - a programmer's mistake
        self._ops.fwd(
            q,
            keys,
            values,
            out=out,
            cu_seqlens_q=plan.query_start,
            seqused_k=plan.context_lens,
            max_seqlen_q=plan.max_query,
            page_table=plan.block_tables,
            softmax_scale=self.shape.scale,
            is_causal=True,
            window_size_left=_left(window),
            scheduler_metadata=plan.metadata[window],
            num_splits=1,
        )
        return out

    def _context(self, block_tables: Tensor) -> int:
        """The context that the operator assumes, and that the table must therefore be made for: a whole row of blocks."""
        return block_tables.shape[1] * self.shape.block_size

    def _metadata(
        self, context_lens: Tensor, query_start: Tensor | None, max_query: int, context: int, window: int | None, splits: int
    ) -> Tensor:
        shape = self.shape
        table: Tensor = self._ops.get_scheduler_metadata(
            context_lens.shape[0],
            max_query,
            context,
            shape.heads,
            shape.groups,
            shape.head_dim,
            shape.head_dim,
            shape.dtype,
            context_lens,
            cu_seqlens_q=query_start,
            page_size=shape.block_size,
            is_causal=True,
            window_size_left=_left(window),
            num_splits=splits,
            pack_gqa=True if query_start is None else None,
        )
        return table


def _left(window: int | None) -> int:
    """Keys before the row itself that it sees; -1 for all."""
    return -1 if window is None else window - 1
