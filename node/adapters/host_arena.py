"""Adapters in page-locked host memory: verified, in page layout, one copy away from the GPU.

Inclusive: an adapter that was copied to the GPU keeps its pages here until somebody else needs them, so leaving the GPU costs no
copy back. It counts as used when it is read from its files, sent, or leaves the GPU; so what stays on the GPU drifts to the end
here and leaves first, and the two tiers together hold nearly the sum of both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from node.adapters.file_plan import FilePlan
from node.adapters.page_filler import Page
from node.adapters.page_store import count_pages, page_arrays
from node.adapters.tier import Tier
from node.kernels.layout import PageLayout
from node.kernels.lora import SideTensors


@dataclass(frozen=True, slots=True)
class Staged:
    """A verified adapter in the arena."""

    file: FilePlan
    side: SideTensors | None


class HostArena:
    """Pages for adapters between their files and the GPU. Used by the step loop; loader threads write the pages it hands out.

    Args:
        layout: The order of modules inside a page. dtype: of the pages.
        memory_bytes: Bound on all pages together, allocated now.
        allocate: Page-locked bytes, [size] uint8; `node.adapters.pinned.allocate_pinned`.

    Raises:
        ConfigError: Not one page fits, or the memory cannot be locked.
    """

    def __init__(self, layout: PageLayout, dtype: torch.dtype, *, memory_bytes: int, allocate: Callable[[int], Tensor]) -> None:
        page_count = count_pages(layout, dtype, memory_bytes, "adapters.host_memory_bytes")
        page_bytes = layout.page_elements * dtype.itemsize
        self._layout = layout
        self._pages = allocate(page_count * page_bytes)[: page_count * page_bytes].view(dtype).view(page_count, -1)
        self._arrays = page_arrays(self._pages)
        self._tier = Tier(page_count, page_count)
        self._staged: dict[str, Staged] = {}
        self._abandoned: set[str] = set()  # while somebody still reads them
        self.evictions_total = 0

    @property
    def page_count(self) -> int:
        return self._tier.page_count

    @property
    def staged_ids(self) -> tuple[str, ...]:
        """Complete adapters, least recently used first."""
        return tuple(adapter_id for adapter_id in self._tier.ids if adapter_id in self._staged)

    def claim(self, adapter_id: str, rank: int, wanted: Collection[str]) -> list[Page] | None:
        """Pages to fill, which stay the newcomer's until `stage` or `abandon`; None where nobody can leave for it now."""
        if adapter_id in self._abandoned:
            return None
        page_count = self._layout.pages_for_rank(rank)
        victims = self._tier.victims(page_count, wanted)
        if victims is None:
            return None
        for victim in victims:
            self._tier.drop(victim)
            del self._staged[victim]
            self.evictions_total += 1
        place = self._tier.take(adapter_id, page_count)
        self._tier.pin(adapter_id)
        return [self._arrays[page] for page in place.pages]

    def stage(self, adapter_id: str, staged: Staged) -> None:
        """The pages are complete."""
        self._staged[adapter_id] = staged
        self._tier.unpin(adapter_id)

    def abandon(self, adapter_id: str) -> None:
        """The pages will never be what was asked for. Where they are lent they stay as they are until `release`."""
        self._tier.unpin(adapter_id)
        if self._tier[adapter_id].pin_count:
            self._abandoned.add(adapter_id)
        else:
            self._tier.drop(adapter_id)

    def get(self, adapter_id: str) -> Staged | None:
        """A complete adapter, or None."""
        return self._staged.get(adapter_id)

    def lend(self, adapter_id: str) -> list[Tensor]:
        """The pages of an adapter that are complete, which stay as they are until `release`."""
        self._tier.pin(adapter_id)
        self._tier.touch(adapter_id)
        return [self._pages[page] for page in self._tier[adapter_id].pages]

    def release(self, adapter_id: str) -> None:
        """What `lend` gave is not read any more."""
        self._tier.unpin(adapter_id)
        if adapter_id in self._abandoned and not self._tier[adapter_id].pin_count:
            self._abandoned.discard(adapter_id)
            self._tier.drop(adapter_id)

    def __contains__(self, adapter_id: str) -> bool:
        return adapter_id in self._tier

    def is_idle(self, adapter_id: str) -> bool:
        """Whether nobody writes or reads the adapter's pages; true for one that is not here."""
        return adapter_id not in self._tier or not self._tier[adapter_id].pin_count

    def forget(self, adapter_id: str) -> None:
        """Give an idle adapter's pages back now. Unknown ones are ignored."""
        if adapter_id in self._tier:
            self._tier.drop(adapter_id)
            self._staged.pop(adapter_id, None)

    def touch(self, adapter_id: str) -> None:
        """The adapter left the GPU; it may be wanted again soon. Unknown ones are ignored."""
        if adapter_id in self._tier:
            self._tier.touch(adapter_id)
