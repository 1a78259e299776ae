"""`Kernels` in plain torch, over `node.kernels.reference`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from node.kernels import reference
from node.kernels.head_rows import head_rows, select_rows
from node.kernels.linear import LoraSpans, PackedLinear
from node.kernels.lora import LoraPool, LoraRows
from node.kernels.ops import Kernels


class TorchKernels(Kernels[Tensor, LoraRows]):
    """The reference implementation. See `Kernels` for every argument.

    Args:
        is_deterministic: Linear layers and attention go row by row, so that a row's bits never depend on its batch or chunk.
        device: Where the tensors lie. `LoraRows` and `LoraPool.slot_pages` lie on the CPU.
    """

    def __init__(self, *, is_deterministic: bool = False, device: torch.device | None = None) -> None:
        self._device = device or torch.device("cpu")
        self._linear = reference.linear_by_row if is_deterministic else reference.linear
        self._attention = reference.paged_attention_by_row if is_deterministic else reference.paged_attention

    @property
    def name(self) -> str:
        return "reference"

    @property
    def device(self) -> torch.device:
        return self._device

    def pack_linear(self, weight: Tensor) -> PackedLinear:
        return PackedLinear(weight.contiguous(), weight.shape[0], weight.shape[1], is_panelled=False)

    def linear(
        self,
        x: Tensor,
        packed: PackedLinear,
        bias: Tensor | None = None,
        *,
        pool: LoraPool | None = None,
        rows: LoraRows | None = None,
        spans: LoraSpans | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        out_dtype = out_dtype or x.dtype
        if rows is None or pool is None or spans is None:
            return self._linear(x, packed.data, bias, out_dtype)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = self._linear(x, packed.data, bias, wide)
        return (y + reference.lora_delta(x, pool, rows, spans.table, packed.out_features)).to(out_dtype)

    def finish(self, product: Tensor, out_dtype: torch.dtype) -> Tensor:
        return product

    def unfinish(self, y: Tensor) -> Tensor:
        return y

    def select_rows(self, rows: LoraRows | None, wanted: Tensor) -> LoraRows | None:
        return None if rows is None else select_rows(rows, wanted.cpu().long())

    def head_rows(self, rows: LoraRows | None, pool: LoraPool | None, module: int) -> LoraRows | None:
        return head_rows(rows, pool, module)

    def sgmv(self, y: Tensor, x: Tensor, pool: LoraPool, rows: LoraRows, spans: LoraSpans) -> None:
        delta = reference.lora_delta(x, pool, rows, spans.table, y.shape[1])
        y.copy_((y.to(delta.dtype) + delta).to(y.dtype))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return reference.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return reference.add_rms_norm(x, residual, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return reference.silu_mul(gate_up)

    def rope_kv_write(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        kv_slots: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        *,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 1e-6,
    ) -> Tensor:
        return reference.rope_kv_write(qkv, cos, sin, positions, kv_slots, key_cache, value_cache, q_norm, k_norm, eps)

    def paged_attention(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_tables: Tensor,
        query_start: Tensor,
        context_lens: Tensor,
        scale: float,
        sliding_window: int | None = None,
        plan: Any = None,
    ) -> Tensor:
        return self._attention(q, key_cache, value_cache, block_tables, query_start, context_lens, scale, sliding_window)
