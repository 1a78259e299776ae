"""The attention that needs nothing but torch and its Triton: every GPU, bfloat16, float16 and float32, any head size up to 256.

It is also the one that can be deterministic: see `triton_decode`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from node.kernels.attention.items import DecodeWork, ItemPlan, processors
from node.kernels.attention.paged import AttentionShape, DecodePlan, PagedAttention, PrefillPlan
from node.kernels.attention.triton_decode import TILE, decode_kernel
from node.kernels.attention.triton_prefill import prefill_kernel

LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the kernels are launched; the defaults won on an H100 (`csrc/README.md`).

    Attributes:
        programs_per_sm: of the decode kernel. warps, stages: of it. use_pdl: programmatic dependent launch (capability 9.0 on).
        prefill_m, prefill_tile, prefill_warps, prefill_stages: rows x heads and keys of a prefill tile.
    """

    programs_per_sm: int = 2
    warps: int = 2
    stages: int = 3
    use_pdl: bool = False
    prefill_m: int = 128
    prefill_tile: int = 64
    prefill_warps: int = 4
    prefill_stages: int = 3


class TritonAttention(PagedAttention):
    """See `PagedAttention`."""

    def __init__(
        self, shape: AttentionShape, device: torch.device, *, is_deterministic: bool = False, tuning: Tuning | None = None
    ) -> None:
        super().__init__(shape, device, is_deterministic=is_deterministic)
        self._tuning = tuning or Tuning()
        programs = processors(device) * self._tuning.programs_per_sm // shape.groups
        self.work = DecodeWork(shape, device, programs, is_deterministic=is_deterministic)

    @property
    def name(self) -> str:
        return "triton"

    def plan_decode(self, block_tables: Tensor, context_lens: Tensor, max_context: int) -> ItemPlan:
        return self.work.plan(block_tables, context_lens, max_context)

    def decode(
        self, q: Tensor, keys: Tensor, values: Tensor, plan: DecodePlan, out: Tensor, *, window: int | None = None
    ) -> Tensor:
        assert isinstance(plan, ItemPlan)  # noqa: S101 - a programmer's mistake
        shape, tuning, work, found = self.shape, self._decode_tuning(), self.work, plan.items[window]
        batch = q.shape[0]
        pdl = {"launch_pdl": True} if tuning.use_pdl else {}
        decode_kernel[(shape.groups, plan.workers)](
            q, keys, values, out, plan.block_tables, found.items, found.counts,
            work.partial, work.stats, work.done, batch, shape.scale * LOG2_E,
            q.stride(0), out.stride(0), plan.block_tables.stride(0), keys.stride(0), keys.stride(1),
            GROUPS=shape.groups, PER_GROUP=shape.heads_per_group, M=max(16, triton.next_power_of_2(shape.heads_per_group)),
            HEAD=shape.head_dim, D=triton.next_power_of_2(shape.head_dim), BLOCK=shape.block_size, TILE=TILE,
            STAGES=tuning.stages, USE_PDL=tuning.use_pdl, WIDTH=found.items.shape[1],
            num_warps=tuning.warps, num_stages=tuning.stages, **pdl,
        )  # fmt: skip
        return out

    def prefill(
        self, q: Tensor, keys: Tensor, values: Tensor, plan: PrefillPlan, out: Tensor, *, window: int | None = None
    ) -> Tensor:
        shape, tuning = self.shape, self._prefill_tuning()
        m = max(tuning.prefill_m, triton.next_power_of_2(shape.heads_per_group))
        rows = m // shape.heads_per_group
        grid = (shape.groups, plan.context_lens.shape[0], triton.cdiv(plan.max_query, rows))
        prefill_kernel[grid](
            q, keys, values, out, plan.block_tables, plan.query_start, plan.context_lens, shape.scale * LOG2_E, window or 0,
            q.stride(0), out.stride(0), plan.block_tables.stride(0), keys.stride(0), keys.stride(1),
            PER_GROUP=shape.heads_per_group, ROWS=rows, M=m, HEAD=shape.head_dim, D=triton.next_power_of_2(shape.head_dim),
            BLOCK=shape.block_size, TILE=tuning.prefill_tile, CHUNK=self.work.chunk_keys, STAGES=tuning.prefill_stages,
            num_warps=tuning.prefill_warps, num_stages=tuning.prefill_stages,
        )  # fmt: skip
        return out

    def _decode_tuning(self) -> Tuning:
        """More warps and fewer tiles in flight for float32, whose tiles are twice as large."""
        return Tuning(warps=4, stages=2) if self.shape.dtype == torch.float32 else self._tuning

    def _prefill_tuning(self) -> Tuning:
        """With a fixed order, the very tile of decode: the layout of a tile over threads is the order of a row's sums."""
        if self.is_deterministic:
            decode = self._decode_tuning()
            return Tuning(prefill_m=16, prefill_tile=TILE, prefill_warps=decode.warps, prefill_stages=decode.stages)
        if self.shape.dtype == torch.float32:
            return Tuning(prefill_m=32, prefill_tile=32, prefill_warps=4, prefill_stages=1)
        return self._tuning
