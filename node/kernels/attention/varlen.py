"""torch's own varlen attention with a block table (torch 2.12 and newer). Blocks of 256 tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from node.kernels.attention.paged import AttentionShape, DecodePlan, PagedAttention, PrefillPlan


class VarlenAttention(PagedAttention):
    """See `PagedAttention`. bfloat16 and float16."""

    def __init__(self, shape: AttentionShape, device: torch.device, *, is_deterministic: bool = False) -> None:
        super().__init__(shape, device, is_deterministic=is_deterministic)
        from torch.nn.attention import varlen  # torch 2.11 has the module without block tables: the registry refuses it there

        self._attend: Any = getattr(varlen, "varlen_attn_out")  # noqa: B009 - absent from torch 2.11's module
        # The offsets of one row a sequence; a decode step takes a prefix of them.
        self._one_each = torch.arange(shape.max_batch + 1, dtype=torch.int32, device=device)

    @property
    def name(self) -> str:
        return "varlen"

    def decode(
        self, q: Tensor, keys: Tensor, values: Tensor, plan: DecodePlan, out: Tensor, *, window: int | None = None
    ) -> Tensor:
        starts = self._one_each[: q.shape[0] + 1]
        return self._run(q, keys, values, out, starts, plan, (1, plan.max_context), window)

    def prefill(
        self, q: Tensor, keys: Tensor, values: Tensor, plan: PrefillPlan, out: Tensor, *, window: int | None = None
    ) -> Tensor:
        return self._run(q, keys, values, out, plan.query_start, plan, (plan.max_query, plan.max_context), window)

    def _run(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        starts: Tensor,
        plan: DecodePlan | PrefillPlan,
        longest: tuple[int, int],
        window: int | None,
    ) -> Tensor:
        self._attend(
            out,
            q,
            keys,
            values,
            starts,
            None,
            *longest,
            scale=self.shape.scale,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=True,
            seqused_k=plan.context_lens,
            block_table=plan.block_tables,
        )
        return out
