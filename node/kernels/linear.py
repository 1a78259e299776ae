"""The two nouns a linear layer needs: weights packed for one kernel path, and where its modules live in an adapter page.

Shape letters: T rows (tokens), H inputs, O outputs, M modules of the model, R page rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from node.kernels.layout import ModuleSpan

SPAN_FIELDS = 6  # module index, A offset, B offset, inputs, outputs, first output column


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """The weight of one linear layer in the order its kernel reads it. Built by `Kernels.pack_linear` only.

    Attributes:
        data: Compiled path: [ceil(O / 32), ceil(H / 2), 32, 2] bfloat16 or [ceil(O / 32), H, 32] float32, zero padded.
            Reference path: the plain [O, H] weight.
        out_features: O.
        in_features: H.
        is_panelled: Whether `data` has the compiled path's order.
    """

    data: Tensor
    out_features: int
    in_features: int
    is_panelled: bool

    def unpacked(self, first: int = 0, count: int | None = None) -> Tensor:
        """Rows [first, first + count) of the weight as it was given to `pack_linear`, [count, H], in its dtype.

        For work at load time, never in a step. `count` None is all that follow.
        """
        last = self.out_features if count is None else first + count
        if not self.is_panelled:
            return self.data[first:last]
        panel = self.data.shape[2]
        start = first // panel
        panels = self.data[start : -(-last // panel)]
        if panels.dim() == 3:
            rows = panels.permute(0, 2, 1).reshape(-1, panels.shape[1])
        else:
            rows = panels.permute(0, 2, 1, 3).reshape(panels.shape[0] * panel, -1)
        return rows[first - start * panel : last - start * panel, : self.in_features]


@dataclass(frozen=True, slots=True)
class LoraSpans:
    """The modules whose deltas one fused linear adds, and the output column each one starts at.

    Attributes:
        table: [modules, 6] int64, CPU. Rows of (module index, A offset, B offset, inputs, outputs, first column).
    """

    table: Tensor


def lora_spans(modules: Sequence[tuple[ModuleSpan, int]]) -> LoraSpans:
    """Build `LoraSpans` from (span, first output column) pairs; q, k and v of one fused linear are three pairs."""
    rows = [[s.index, s.a_offset, s.b_offset, s.in_features, s.out_features, column] for s, column in modules]
    return LoraSpans(torch.tensor(rows, dtype=torch.int64).reshape(len(rows), SPAN_FIELDS))
