"""FlashAttention 2 (2307.08691) with paged keys and values, where the package `flash-attn` is installed. Blocks of 256 tokens."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from node.kernels.attention.paged import AttentionShape, DecodePlan, PagedAttention, PrefillPlan


class Fa2Attention(PagedAttention):
    """See `PagedAttention`. bfloat16 and float16. The library returns its result in a tensor of its own, which is then copied."""

    def __init__(self, shape: AttentionShape, device: torch.device, *, is_deterministic: bool = False) -> None:
        super().__init__(shape, device, is_deterministic=is_deterministic)
        self._library: Any = importlib.import_module("flash_attn")

    @property
    def name(self) -> str:
        return "fa2"

    def decode(
        self, q: Tensor, keys: Tensor, values: Tensor, plan: DecodePlan, out: Tensor, *, window: int | None = None
    ) -> Tensor:
        found = self._library.flash_attn_with_kvcache(
            q.unsqueeze(1),
            keys,
            values,
            cache_seqlens=plan.context_lens,
            block_table=plan.block_tables,
            softmax_scale=self.shape.scale,
            causal=True,
            window_size=_window(window),
        )
        return out.copy_(found.squeeze(1))

    def prefill(
        self, q: Tensor, keys: Tensor, values: Tensor, plan: PrefillPlan, out: Tensor, *, window: int | None = None
    ) -> Tensor:
        found = self._library.flash_attn_varlen_func(
            q,
            keys,
            values,
            cu_seqlens_q=plan.query_start,
            cu_seqlens_k=cumulative(plan.context_lens),
            max_seqlen_q=plan.max_query,
            max_seqlen_k=plan.max_context,
            softmax_scale=self.shape.scale,
            causal=True,
            window_size=_window(window),
            block_table=plan.block_tables,
        )
        return out.copy_(found)


def cumulative(lens: Tensor) -> Tensor:
    """[Q] int32 lengths -> [Q + 1] int32 starts."""
    starts = torch.zeros(lens.shape[0] + 1, dtype=torch.int32, device=lens.device)
    torch.cumsum(lens, 0, dtype=torch.int32, out=starts[1:])
    return starts


def _window(window: int | None) -> tuple[int, int]:
    return (-1, -1) if window is None else (window - 1, 0)
