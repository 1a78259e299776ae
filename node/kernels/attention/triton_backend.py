"""The attention that needs nothing but torch and its Triton: every GPU, bfloat16, float16 and float32, any head size up to 256.

It is also the one that can be deterministic: see `triton_decode`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from node.kernels.attention.paged import AttentionShape, DecodePlan, PagedAttention, PrefillPlan
from node.kernels.attention.triton_decode import TILE, decode_kernel, plan_items_kernel
from node.kernels.attention.triton_prefill import prefill_kernel

LOG2_E = 1.4426950408889634
_MOST_CHUNKS = 16  # of one sequence when the chunk is fixed; bounds the partial results
_LEAST_CHUNK = 4  # tiles: 256 keys


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the kernels are launched; the defaults won on an H100 (`csrc/README.md`).

    Attributes:
        programs_per_sm: of the decode kernel. warps, stages: of it. use_pdl: programmatic dependent launch (capability 9.0 on).
        prefill_m, prefill_tile, prefill_warps, prefill_stages: rows x heads and keys of a prefill tile.
    """

    programs_per_sm: int = 4
    warps: int = 4
    stages: int = 3
    use_pdl: bool = False
    prefill_m: int = 128
    prefill_tile: int = 64
    prefill_warps: int = 8
    prefill_stages: int = 3


@dataclass(slots=True)
class DecodeItems:
    """The plan kernel's output for one window. See `plan_items_kernel`."""

    items: Tensor
    counts: Tensor
    firsts: Tensor


@dataclass(slots=True)
class TritonDecodePlan(DecodePlan):
    """A decode plan with the items of every window the model has."""

    items: dict[int | None, DecodeItems]


class TritonAttention(PagedAttention):
    """See `PagedAttention`."""

    def __init__(
        self, shape: AttentionShape, device: torch.device, *, is_deterministic: bool = False, tuning: Tuning | None = None
    ) -> None:
        super().__init__(shape, device, is_deterministic=is_deterministic)
        self._tuning = tuning or Tuning()
        longest = triton.cdiv(shape.max_context, TILE)
        self._slots = max(1, _processors(device) * self._tuning.programs_per_sm // shape.groups)
        self._fixed_chunk = max(_LEAST_CHUNK, triton.cdiv(longest, _MOST_CHUNKS)) if is_deterministic else 0
        # A chunk the plan chooses gives at most one item more a sequence than the slots; a fixed one as many as it gives.
        chunks = triton.cdiv(longest, self._fixed_chunk) if is_deterministic else 0
        self._max_items = max(shape.max_batch * (chunks + 1), shape.max_batch + 8 * self._slots)
        self._partial = torch.empty((self._max_items, shape.heads, shape.head_dim), dtype=torch.float32, device=device)
        self._stats = torch.empty((self._max_items, shape.heads, 2), dtype=torch.float32, device=device)
        self._done = torch.zeros((shape.max_batch, shape.groups), dtype=torch.int32, device=device)

    @property
    def name(self) -> str:
        return "triton"

    def plan_decode(self, block_tables: Tensor, context_lens: Tensor, max_context: int) -> TritonDecodePlan:
        items = {window: self._items(context_lens, window) for window in self.shape.windows}
        return TritonDecodePlan(block_tables, context_lens, max_context, items)

    def _items(self, context_lens: Tensor, window: int | None) -> DecodeItems:
        batch = context_lens.shape[0]
        empty = context_lens.new_empty
        found = DecodeItems(empty((self._max_items, 4)), empty(batch + 1), empty(batch))
        plan_items_kernel[(1,)](
            context_lens, found.items, found.counts, found.firsts, batch, self._slots, self._max_items, self._fixed_chunk,
            window or 0, TILE=TILE, BATCH=triton.next_power_of_2(batch), CHUNKS=64, num_warps=4,
        )  # fmt: skip
        return found

    def decode(
        self, q: Tensor, keys: Tensor, values: Tensor, plan: DecodePlan, out: Tensor, *, window: int | None = None
    ) -> Tensor:
        assert isinstance(plan, TritonDecodePlan)  # noqa: S101 - a programmer's mistake
        shape, tuning, found = self.shape, self._tuning, plan.items[window]
        batch = q.shape[0]
        workers = min(self._max_items, max(batch, self._slots))
        pdl = {"launch_pdl": True} if tuning.use_pdl else {}
        decode_kernel[(shape.groups, workers)](
            q, keys, values, out, plan.block_tables, found.items, found.counts, found.firsts,
            self._partial, self._stats, self._done, batch, shape.scale * LOG2_E,
            q.stride(0), out.stride(0), plan.block_tables.stride(0), keys.stride(0), keys.stride(1),
            GROUPS=shape.groups, PER_GROUP=shape.heads_per_group, M=max(16, triton.next_power_of_2(shape.heads_per_group)),
            HEAD=shape.head_dim, D=triton.next_power_of_2(shape.head_dim), BLOCK=shape.block_size, TILE=TILE,
            STAGES=tuning.stages, USE_PDL=tuning.use_pdl, num_warps=tuning.warps, num_stages=tuning.stages, **pdl,
        )  # fmt: skip
        return out

    def plan_prefill(
        self, block_tables: Tensor, query_start: Tensor, context_lens: Tensor, max_query: int, max_context: int
    ) -> PrefillPlan:
        return PrefillPlan(block_tables, query_start, context_lens, max_query, max_context)

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
            BLOCK=shape.block_size, TILE=tuning.prefill_tile, CHUNK=self._fixed_chunk * TILE, STAGES=tuning.prefill_stages,
            num_warps=tuning.prefill_warps, num_stages=tuning.prefill_stages,
        )  # fmt: skip
        return out

    def _prefill_tuning(self) -> Tuning:
        """Small tiles for the fixed order (decode's instruction has 16 rows a warp) and for float32 (shared memory)."""
        tuning = self._tuning
        if self.is_deterministic:
            return Tuning(prefill_m=32, prefill_tile=TILE, prefill_warps=2, prefill_stages=2)
        if self.shape.dtype == torch.float32:
            return Tuning(prefill_m=32, prefill_tile=32, prefill_warps=4, prefill_stages=1)
        return tuning


def _processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; interpreted kernels (tests) run one program at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
