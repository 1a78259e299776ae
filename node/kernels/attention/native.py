"""Own decode in CUDA (`csrc/cuda/attention_decode.cu`): bfloat16, head size 64 or 128. Prefill is another backend's."""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from torch import Tensor

from node.errors import ConfigError
from node.kernels.attention.items import DecodeWork, ItemPlan, processors
from node.kernels.attention.paged import AttentionShape, DecodePlan, PagedAttention, PrefillPlan
from node.kernels.build_cuda import cuda_library_path

LOG2_E = 1.4426950408889634
# Of each variant, as the plan counts them: 48 KiB of shared memory a block, four at once; and 96 KiB, two at once, of which
# cutting contexts for the second one never gained what the join costs.
_PROGRAMS_PER_SM = (4, 1)
_FULL = 0.95  # of the last round of small blocks


class NativeAttention(PagedAttention):
    """See `PagedAttention`. Not for `is_deterministic`: prefill would have other bits.

    Args:
        prefill: Attends with prompt chunks.
        has_follow: Launch decode before the kernel before it has ended, so that it fetches older keys and values meanwhile.
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
        self._follow = int(has_follow and torch.cuda.get_device_capability(device)[0] >= 9)
        self._processors = processors(device)
        self._work = DecodeWork(shape, device, self._programs(0))

    @property
    def name(self) -> str:
        return f"native+{self._prefill.name}"

    def plan_decode(self, block_tables: Tensor, context_lens: Tensor, max_context: int) -> ItemPlan:
        variant = self._variant(context_lens.shape[0])
        plan = self._work.plan(block_tables, context_lens, max_context, self._programs(variant))
        if variant == 0:
            plan.workers += self._programs(0)  # blocks that find no item end at once, and long contexts find a free block
        return plan

    def _variant(self, batch: int) -> int:
        """Small blocks where they fill the GPU in whole rounds (2 % faster at 64, 128 and 256 even contexts), else large ones."""
        rounds = batch * self.shape.groups / (self._processors * _PROGRAMS_PER_SM[0])
        return 0 if rounds >= _FULL * ceil(rounds) else 1

    def _programs(self, variant: int) -> int:
        return max(1, self._processors * _PROGRAMS_PER_SM[variant] // self.shape.groups)

    def decode(
        self, q: Tensor, keys: Tensor, values: Tensor, plan: DecodePlan, out: Tensor, *, window: int | None = None
    ) -> Tensor:
        assert isinstance(plan, ItemPlan)  # noqa: S101 - a programmer's mistake
        work, found = self._work, plan.items[window]
        self._decode(
            q,
            keys,
            values,
            plan.block_tables,
            found.items,
            found.counts,
            found.firsts,
            work.partial,
            work.stats,
            work.done,
            self.shape.scale * LOG2_E,
            plan.workers,
            self._variant(q.shape[0]),
            self._follow,
            out,
        )
        return out

    def plan_prefill(
        self, block_tables: Tensor, query_start: Tensor, context_lens: Tensor, max_query: int, max_context: int
    ) -> PrefillPlan:
        return self._prefill.plan_prefill(block_tables, query_start, context_lens, max_query, max_context)

    def prefill(
        self, q: Tensor, keys: Tensor, values: Tensor, plan: PrefillPlan, out: Tensor, *, window: int | None = None
    ) -> Tensor:
        return self._prefill.prefill(q, keys, values, plan, out, window=window)
