"""Where an adapter's numbers live: pages of a fixed rank over every linear module of the model.

A page holds `page_rank` ranks of all modules: for each module first A as [page_rank, in_features], then B transposed as
[page_rank, out_features], both rank-major, so that a kernel that needs 3 of 16 ranks reads 3 rows and nothing else.
An adapter of rank r owns ceil(r / page_rank) pages; modules it does not touch have rank 0 and are never read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModuleSpan:
    """One linear module of one layer inside a page. Offsets and sizes are in elements, not bytes."""

    name: str  # "model.layers.3.self_attn.q_proj"
    index: int  # its row in the rank and scale tables
    in_features: int
    out_features: int
    a_offset: int
    b_offset: int


class PageLayout:
    """The fixed order of all modules inside a page.

    Args:
        modules: (name, in_features, out_features) of every linear module, in model order.
        page_rank: Ranks per page: 8 on the CPU, 16 on a GPU (the MMA tile).
    """

    def __init__(self, modules: Sequence[tuple[str, int, int]], page_rank: int) -> None:
        if page_rank < 1:
            raise ValueError(f"page_rank is {page_rank}; it must be at least 1")
        self.page_rank = page_rank
        self.spans: dict[str, ModuleSpan] = {}
        offset = 0
        for index, (name, in_features, out_features) in enumerate(modules):
            b_offset = offset + page_rank * in_features
            self.spans[name] = ModuleSpan(name, index, in_features, out_features, offset, b_offset)
            offset = b_offset + page_rank * out_features
        self.page_elements = offset

    @property
    def module_count(self) -> int:
        return len(self.spans)

    def half(self) -> int | None:
        """Elements of a page that the first half of the layers reads, which lie before all others; None where none do."""
        layers = {name: int(found[1]) for name in self.spans if (found := re.search(r"\.layers\.(\d+)\.", f".{name}"))}
        if not layers:
            return None
        middle = (max(layers.values()) + 1) // 2
        first = [span for span in self.spans.values() if layers.get(span.name, middle) < middle]
        end = max((span.b_offset + self.page_rank * span.out_features for span in first), default=0)
        rest = min(span.a_offset for span in self.spans.values() if layers.get(span.name, middle) >= middle)
        return end if 0 < end <= rest else None

    def pages_for_rank(self, rank: int) -> int:
        """How many pages an adapter whose largest module rank is `rank` owns."""
        return -(-rank // self.page_rank)
