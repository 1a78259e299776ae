"""Where the pages lie that a step computes from, as `node.adapters.residents` sees it: plain memory here, a GPU in
`node.adapters.device_pages`.

A device runs behind the step loop, so pages that an adapter has left may still be read. `mark()` names a point in the order of
launched work; `begin_step` moves it on. A copy into pages waits, on the device, for the mark of their last reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from node.adapters.file_plan import FilePlan
from node.adapters.page_filler import Page
from node.adapters.tier import Place
from node.errors import ConfigError
from node.kernels.layout import PageLayout
from node.kernels.lora import LoraPool, SideTensors
from node.kernels.memory import empty_huge

SLOT_LIMIT = 1024
PAGE_LIMIT = 1 << 16


class Arrival(Protocol):
    """An adapter on its way into a device's pages."""

    def is_done(self) -> bool:
        """Whether every byte is there; never waits."""
        ...

    def join(self) -> None:
        """Let all work that is launched from now on wait, on the device, until every byte is there."""

    def seconds(self) -> float:
        """How long the bytes took, once they are there."""
        ...

    @property
    def early_share(self) -> float | None:
        """What part of the bytes a step waits for before it begins, the rest being there before it needs them; it may name the
        adapter although the step before it still reads the pages. None: neither."""
        ...


class PageStore(Protocol):
    """Pages and tables that kernels read. Used by the step loop only, and never waits."""

    @property
    def tensors(self) -> LoraPool: ...

    @property
    def first_page(self) -> int:
        """Pages before this one hold something else at first."""
        ...

    def begin_step(self) -> None:
        """Everything launched until now belongs to the marks before this one."""

    def mark(self) -> int:
        """The point after everything that is launched before the next `begin_step`."""
        ...

    def foreign_mark(self) -> int:
        """The same, for pages that held no adapter: no order of layers says which part of them is still read."""
        ...

    def hide(self, slot: int) -> None:
        """An adapter left its slot: no step that is launched from now on names it."""


class DevicePages(PageStore, Protocol):
    """Pages that are filled by copying them from the host arena."""

    def send(self, place: Place, sources: Sequence[Tensor], file: FilePlan, side: SideTensors | None) -> Arrival:
        """Start to copy an adapter into its place, tables included.

        Args:
            place: Its slot and pages. sources: [page_elements] each, pinned; untouched until the arrival is done.
            file: Ranks and scales. side: what it needs beside its pages, in host memory.
        """
        ...


class HostPages:
    """The CPU's pages: the memory that loader threads write is the memory that kernels read.

    Args:
        layout: The order of modules inside a page.
        dtype: Of the pages: float32 or bfloat16.
        memory_bytes: Bound on all pages together.
        max_rank: The largest rank served; sizes the page list of a slot.

    Raises:
        ConfigError: Not one page fits into memory_bytes.
    """

    def __init__(self, layout: PageLayout, dtype: torch.dtype, *, memory_bytes: int, max_rank: int) -> None:
        page_count = count_pages(layout, dtype, memory_bytes)
        self.first_page = 0
        # Pages take no memory until they are written, so a large bound costs nothing by itself.
        pages = empty_huge((page_count, layout.page_elements), dtype)
        self._arrays = page_arrays(pages)
        slot_count = min(page_count, SLOT_LIMIT)
        self.tensors = LoraPool(
            pages=pages,
            slot_pages=torch.full((slot_count, layout.pages_for_rank(max_rank)), -1, dtype=torch.int32),
            ranks=torch.zeros((layout.module_count, slot_count), dtype=torch.int32),
            scales=torch.zeros((layout.module_count, slot_count), dtype=torch.float32),
            page_rank=layout.page_rank,
        )
        self._ranks = self.tensors.ranks.numpy()
        self._scales = self.tensors.scales.numpy()
        self._slot_pages = self.tensors.slot_pages.numpy()

    def begin_step(self) -> None:
        """Nothing runs behind the step loop."""

    def mark(self) -> int:
        return 0

    def foreign_mark(self) -> int:
        return 0

    def arrays(self, pages: Sequence[int]) -> list[Page]:
        """Pages to be filled in place."""
        return [self._arrays[page] for page in pages]

    def show(self, place: Place, file: FilePlan, side: SideTensors | None) -> None:
        """Make complete pages visible: from here on their slot can be named in a batch."""
        count = -(-file.rank // self.tensors.page_rank)
        self._slot_pages[place.slot, :count] = place.pages[:count]
        self._ranks[file.module_indices, place.slot] = file.ranks
        self._scales[file.module_indices, place.slot] = file.scales
        if side is not None:
            self.tensors.sides[place.slot] = side

    def hide(self, slot: int) -> None:
        self._ranks[:, slot] = 0
        self._slot_pages[slot] = -1
        self.tensors.sides.pop(slot, None)


def count_pages(layout: PageLayout, dtype: torch.dtype, memory_bytes: int, setting: str = "adapters.memory_bytes") -> int:
    """How many pages fit.

    Raises:
        ConfigError: None. `setting` is what to raise.
    """
    page_bytes = layout.page_elements * dtype.itemsize
    page_count = min(memory_bytes // page_bytes, PAGE_LIMIT)
    if page_count < 1:
        raise ConfigError(f"{setting} is {memory_bytes}; one page of this model takes {page_bytes}; raise it")
    return page_count


def page_arrays(pages: Tensor) -> Page:
    """[pages, page_elements] as loader threads write them: numpy has no bfloat16, so they write its bits."""
    array: Page = pages.numpy() if pages.dtype == torch.float32 else pages.view(torch.uint16).numpy()
    return array
