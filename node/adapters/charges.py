"""How many pages an adapter is charged, and which recipes can never be in memory as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from node.adapters.file_plan import FilePlan
from node.adapters.residency import Residency, ResidencyState
from node.errors import AdapterInvalidError
from node.kernels.layout import PageLayout


@dataclass(frozen=True, slots=True)
class Charges:
    """Sizes of the tiers.

    Attributes:
        layout: The order of modules inside a page. page_bytes: bytes of one.
        page_count, slot_count: Of the memory that steps compute from.
        arena_page_count: Of the host arena before it; None where there is none.
    """

    layout: PageLayout
    page_bytes: int
    page_count: int
    slot_count: int
    arena_page_count: int | None

    def pages_of(self, file: FilePlan) -> int:
        """Pages an adapter is charged. What it needs beside its pages (see `node.adapters.side`) is charged in whole pages,
        where a GPU keeps it, so that one bound holds for both."""
        return self.rank_pages_of(file) + -(-file.side_bytes // self.page_bytes)

    def rank_pages_of(self, file: FilePlan) -> int:
        """Of those: the ones that hold its ranks."""
        return self.layout.pages_for_rank(file.rank)

    def copied_bytes(self, page_count: int, file: FilePlan) -> int:
        """What copying so many of an adapter's pages takes: none needs more of a page than its layers reach."""
        return page_count * file.extent * self.page_bytes // self.layout.page_elements

    def refusal(self, adapter_count: int, files: Sequence[FilePlan]) -> Residency | None:
        """FAILED for a recipe that can never be resident as a whole, as far as its adapters' sizes are known (`files`)."""
        page_count = sum(map(self.pages_of, files))
        if page_count > self.page_count or adapter_count > self.slot_count:
            return self._refusal(adapter_count, page_count, self.page_count, "adapters.memory_bytes")
        largest = max(map(self.rank_pages_of, files), default=0)
        if self.arena_page_count is not None and largest > self.arena_page_count:
            return self._refusal(1, largest, self.arena_page_count, "adapters.host_memory_bytes")
        return None

    def _refusal(self, adapter_count: int, page_count: int, limit: int, setting: str) -> Residency:
        error = AdapterInvalidError(
            f"{adapter_count} adapters of {page_count} pages ({page_count * self.page_bytes} bytes) were asked for; "
            f"{setting} gives {limit} pages ({limit * self.page_bytes} bytes) and {self.slot_count} slots; raise it",
            code="adapter_too_large",
        )
        return Residency(ResidencyState.FAILED, error.error_code, error.message)
