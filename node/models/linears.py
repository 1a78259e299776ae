"""Linear modules over some rows of a step, each row with its own adapters.

Shape letters: T rows, H inputs, O outputs, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from node.kernels.head_rows import LogitTops
from node.kernels.lora import LoraPool
from node.kernels.ops import Kernels, LoraSpans, PackedLinear
from node.kernels.side import SideGroup, select_groups, side_linear


@dataclass(frozen=True, slots=True)
class FusedLinear:
    """One product of several linear modules: packed weight, bias [O] or None, and the modules' places in an adapter page."""

    packed: PackedLinear
    bias: Tensor | None
    spans: LoraSpans


@dataclass(frozen=True, slots=True)
class Linears:
    """Multiplies rows that have these adapters. See `StepInputs` for `lora` and `side`; `side` needs `pool`."""

    kernels: Kernels[Any, Any]
    pool: LoraPool | None
    lora: Any
    side: tuple[SideGroup, ...] | None

    def product(self, x: Tensor, module: FusedLinear) -> Any:
        """x: [T, H]. Returns the kernels' product [T, O]."""
        if self.side is not None and self.pool is not None:
            return self.kernels.unfinish(self._side_linear(x, module, self.pool, self.lora, self.side))
        return self.kernels.linear(x, module.packed, module.bias, pool=self.pool, rows=self.lora, spans=module.spans)

    def gated(self, x: Tensor, module: FusedLinear) -> Tensor:
        """silu(gate) * up of gate and up in one module. x: [T, H]; returns [T, O / 2]."""
        if self.side is not None:
            return self.kernels.silu_mul(self.product(x, module))
        return self.kernels.linear_silu_mul(x, module.packed, module.bias, pool=self.pool, rows=self.lora, spans=module.spans)

    def logits(self, x: Tensor, head: FusedLinear, tops: LogitTops | None) -> Tensor:
        """Project x [T, H] on the vocabulary. Returns [T, V] float32. tops: see `Kernels.logits`."""
        rows = self.kernels.head_rows(self.lora, self.pool, int(head.spans.table[0, 0]))
        if self.side is not None and self.pool is not None:
            return self._side_linear(x, head, self.pool, rows, self.side, torch.float32)
        return self.kernels.logits(x, head.packed, head.bias, pool=self.pool, rows=rows, spans=head.spans, tops=tops)

    def of(self, wanted: Tensor | None) -> Linears:
        """The same for a selection of the rows, in its order; None for all. wanted: [W]."""
        if wanted is None:
            return self
        side = None if self.side is None else select_groups(self.side, wanted)
        return Linears(self.kernels, self.pool, self.kernels.select_rows(self.lora, wanted), side)

    def _side_linear(
        self,
        x: Tensor,
        module: FusedLinear,
        pool: LoraPool,
        rows: Any,
        groups: tuple[SideGroup, ...],
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """A product in a step with rows whose adapters have more than pages hold."""
        return side_linear(
            self.kernels,
            x,
            module.packed,
            module.bias,
            pool=pool,
            rows=rows,
            groups=groups,
            spans=module.spans,
            out_dtype=out_dtype,
        )
