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

    def unpacked(self) -> Tensor:
        """The weight as it was given to `pack_linear`, [O, H], in its dtype: for work at load time, never in a step."""
        if not self.is_panelled:
            return self.data
        if self.data.dim() == 3:
            rows = self.data.permute(0, 2, 1).reshape(-1, self.data.shape[1])
        else:
            rows = self.data.permute(0, 2, 1, 3).reshape(self.data.shape[0] * self.data.shape[2], -1)
        return rows[: self.out_features, : self.in_features]


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
