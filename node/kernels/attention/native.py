"""Own attention in CUDA (`csrc/cuda/attention_decode.cu`) for decode and short prompt chunks beside it: bfloat16, head size 64 or
128. Longer prompts are another backend's.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from node.errors import ConfigError
from node.kernels.attention.items import DecodeItems, DecodeWork, ItemCost, ItemPlan, processors
from node.kernels.attention.paged import AttentionShape, DecodePlan, PagedAttention, PrefillPlan, ShortBound
from node.kernels.build_cuda import cuda_library_path

LOG2_E = 1.4426950408889634
_ITEM_BLOCKS = 24  # named in an item


@dataclass(slots=True)
class ChunkPlan(PrefillPlan):
    """Of a short step. `items`, `workers`: see `ItemPlan`."""

    items: dict[int | None, DecodeItems]
    workers: int


@dataclass(frozen=True, slots=True)
class Variant:
    """A compiled kernel and how its work is cut.

    Attributes:
        number: As `launch_attention_decode` counts them. programs_per_sm: What the plan counts on; more may be resident.
        chunk_rows: (Row, query head of a group) pairs of an item of several rows; 0: it takes none.
        cost: What it weighs. has_spare: Launch a program a slot more, which end at once or find an item of a long context.
    """

    number: int
    programs_per_sm: int
    cost: ItemCost
    has_spare: bool = False
    chunk_rows: int = 0


# 3 warps and 48 KiB of shared memory, four blocks a processor; 6 warps and 96 KiB, two, of which cutting contexts for the
# second one never gained what the join costs; 8 warps and 192 KiB, for few sequences: 384 keys are on their way at once.
_SMALL = Variant(0, 4, ItemCost(), has_spare=True)
_MIDDLE = Variant(1, 1, ItemCost())
_LARGE = Variant(2, 1, ItemCost(join_tiles=3))
# 4 warps, which share the rows of a chunk or the keys of a decoding row; 64 KiB, three blocks a processor.
_CHUNKED = Variant(3, 3, ItemCost(), chunk_rows=64)
_SHORT = ShortBound(rows=512, context=512, pairs=1 << 18)  # FA3 is as fast or faster beyond
_MIDDLE_RESIDENT = 2  # blocks of a processor
_FULL = 0.95  # of the last round of small blocks
_WITH_LARGE = (9, 10)  # major capabilities whose processors have 227 KiB of shared memory for a block


class NativeAttention(PagedAttention):
    """See `PagedAttention`. Not for `is_deterministic`: prefill would have other bits.

    Args:
        prefill: Attends with prompt chunks.
        has_follow: Launch decode before the kernel before it has ended, so that it fetches older keys and values meanwhile, and
            the plan beside the kernel before it.
    """

    def __init__(
        self,
        shape: AttentionShape,
        device: torch.device,
        prefill: PagedAttention,
        *,
        has_follow: bool = True,
    ) -> None:
        super().__init__(shape, device)
        path = cuda_library_path()
        if path is None:
            raise ConfigError("the CUDA kernels of these sources are not built; run `python -m node.kernels.build` where nvcc is")
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
        self._decode: Any = torch.ops.openlora.attention_decode.default
        self._prefill = prefill
        major = torch.cuda.get_device_capability(device)[0]
        self._follow = int(has_follow and major >= 9)
        self._has_large = major in _WITH_LARGE
        self._processors = processors(device)
        self.short_bound = _SHORT
        self._work = DecodeWork(
            shape,
            device,
            self._programs(_SMALL),
            item_blocks=_ITEM_BLOCKS,
            chunk_rows=_SHORT.rows,
            has_follow=self._follow > 0,
        )

    @property
    def name(self) -> str:
        return f"native+{self._prefill.name}"

    def plan_decode(self, block_tables: Tensor, context_lens: Tensor, max_context: int) -> ItemPlan:
        variant = self._variant(context_lens.shape[0])
        plan = self._work.plan(block_tables, context_lens, max_context, self._programs(variant), variant.cost)
        if variant.has_spare:
            plan.workers += self._programs(variant)
        return plan

    def _variant(self, batch: int) -> Variant:
        """The largest blocks that all run at once; beyond that small ones where their last round is full, else middle ones."""
        blocks = batch * self.shape.groups
        if self._has_large and blocks <= self._processors:
            return _LARGE
        if blocks <= self._processors * _MIDDLE_RESIDENT:
            return _MIDDLE
        rounds = blocks / (self._processors * _SMALL.programs_per_sm)
        return _SMALL if rounds <= 1 or rounds >= _FULL * ceil(rounds) else _MIDDLE

    def _programs(self, variant: Variant) -> int:
        return max(1, self._processors * variant.programs_per_sm // self.shape.groups)

    def decode(
        self, q: Tensor, keys: Tensor, values: Tensor, plan: DecodePlan, out: Tensor, *, window: int | None = None
    ) -> Tensor:
        assert isinstance(plan, ItemPlan)  # noqa: S101 - a programmer's mistake
        self._run(q, keys, values, plan, self._variant(q.shape[0]), out, window)
        return out

    def _run(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        plan: ItemPlan | ChunkPlan,
        variant: Variant,
        out: Tensor,
        window: int | None,
    ) -> None:
        work, found = self._work, plan.items[window]
        self._decode(
            q,
            keys,
            values,
            plan.block_tables,
            found.items,
            found.counts,
            work.partial,
            work.stats,
            work.done,
            self.shape.scale * LOG2_E,
            window or 0,
            plan.workers,
            variant.number,
            self._follow,
            out,
        )

    def plan_prefill(
        self, block_tables: Tensor, query_start: Tensor, context_lens: Tensor, max_query: int, max_context: int
    ) -> PrefillPlan:
        return self._prefill.plan_prefill(block_tables, query_start, context_lens, max_query, max_context)

    def plan_short_prefill(
        self, block_tables: Tensor, query_start: Tensor, context_lens: Tensor, max_query: int, max_context: int
    ) -> ChunkPlan:
        programs, tokens = self._programs(_CHUNKED), _CHUNKED.chunk_rows // self.shape.heads_per_group
        items = self._work.plan_chunks(block_tables, query_start, context_lens, programs, _CHUNKED.cost, tokens)
        return ChunkPlan(block_tables, query_start, context_lens, max_query, max_context, items, programs)

    def prefill(
        self, q: Tensor, keys: Tensor, values: Tensor, plan: PrefillPlan, out: Tensor, *, window: int | None = None
    ) -> Tensor:
        if not isinstance(plan, ChunkPlan):
            return self._prefill.prefill(q, keys, values, plan, out, window=window)
        self._run(q, keys, values, plan, _CHUNKED, out, window)
        return out
