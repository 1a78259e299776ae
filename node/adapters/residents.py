"""Adapters in the memory that steps compute from: who has which slot and pages, and who leaves for whom.

The least recently used adapter leaves first; one that is pinned, or that an earlier sequence of this step wants, never does. That
order makes progress certain: the first in line only ever waits for adapters that finish.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import numpy.typing as npt

from node.adapters.file_plan import FilePlan
from node.adapters.page_store import DevicePages, HostPages
from node.adapters.slot_ranks import SlotRanks
from node.adapters.tier import Place, Tier
from node.kernels.layout import PageLayout


class Residents:
    """Owns the tier in front of kernels. An adapter has a place in it first and is resident, may be named, from `admit` on.

    Args:
        layout: The order of modules inside a page.
        store: The pages that steps compute from.
        on_leave: Called with each adapter that leaves; None where nobody has to know.
    """

    def __init__(self, layout: PageLayout, store: HostPages | DevicePages, on_leave: Callable[[str], None] | None = None) -> None:
        self._store = store
        pages, ranks = store.tensors.pages, store.tensors.ranks
        self._tier = Tier(int(pages.shape[0]) - store.first_page, int(ranks.shape[1]), store.first_page)
        self._files: dict[str, FilePlan] = {}  # of the tier: those a batch may name
        self._marks: dict[str, int] = {}  # of those: after their last step
        self._slot_ranks = SlotRanks(layout, self._tier.slot_count)
        self._on_leave = on_leave
        self._borrow: Callable[[int], None] | None = None
        self.evictions_total = 0

    def __contains__(self, adapter_id: str) -> bool:
        """Whether a batch may name it."""
        return adapter_id in self._files

    @property
    def ids(self) -> tuple[str, ...]:
        """Those a batch may name, least recently used first."""
        return tuple(adapter_id for adapter_id in self._tier.ids if adapter_id in self._files)

    @property
    def page_count(self) -> int:
        return self._tier.page_count

    @property
    def slot_count(self) -> int:
        return self._tier.slot_count

    @property
    def layer_ranks(self) -> npt.NDArray[np.int32]:
        """[S] int32: a slot's ranks where all modules of all layers have the same, else 0."""
        return self._slot_ranks.values

    def slot_of(self, adapter_id: str) -> int:
        """Slot of a resident adapter."""
        if adapter_id not in self._files:
            raise KeyError(adapter_id)
        return self._tier[adapter_id].slot

    def adapts(self, adapter_id: str, module: int) -> bool:
        """Whether a resident adapter changes a linear module, by its row in `LoraPool.ranks`."""
        return bool((self._files[adapter_id].module_indices == module).any())

    # ---- pages that come and go

    def borrow_from(self, lender: Callable[[int], None]) -> None:
        """Where to ask for more pages: called with how many would do, it may `add_page` some."""
        self._borrow = lender

    def add_page(self, page: int) -> None:
        """One page more, which launched steps may still read as what it was."""
        self._tier.add_page(page, self._store.foreign_mark())

    def take_page(self, wanted: Collection[str]) -> int | None:
        """Give up a page, for which the least recently used adapter leaves where none is free; None when all are in use."""
        if not self._tier.free_page_count:
            victim = self._tier.oldest_idle(wanted)
            if victim is None:
                return None
            self.evict(victim)
        return self._tier.remove_page()

    # ---- adapters that come and go

    def has_place(self, adapter_id: str) -> bool:
        """Whether it owns a slot and pages, complete or not."""
        return adapter_id in self._tier

    def place_of(self, adapter_id: str) -> Place:
        """Its slot and pages."""
        return self._tier[adapter_id]

    def claim(self, adapter_id: str, page_count: int, wanted: Collection[str]) -> Place | None:
        """A slot and pages, pinned until they are complete, evicting only when that yields enough; None when it does not."""
        victims = self._tier.victims(page_count, wanted)
        if victims is None and self._borrow is not None:
            self._borrow(page_count)
            victims = self._tier.victims(page_count, wanted)
        if victims is None:
            return None
        for victim in victims:
            self.evict(victim)
        place = self._tier.take(adapter_id, page_count)
        self._tier.pin(adapter_id)
        return place

    def admit(self, adapter_id: str, file: FilePlan) -> None:
        """Its place holds it, or will when a step that names it needs it."""
        self._files[adapter_id] = file
        self._slot_ranks.set(self._tier[adapter_id].slot, file)

    def abandon(self, adapter_id: str) -> None:
        """Its pages, which it has pinned since `claim`, will never be complete."""
        self._tier.unpin(adapter_id)
        self._tier.drop(adapter_id)

    def evict(self, adapter_id: str) -> None:
        """Take the place of an adapter that nobody has pinned."""
        place = self._tier.drop(adapter_id, self._marks.pop(adapter_id, 0))
        self._files.pop(adapter_id, None)
        self._store.hide(place.slot)
        self._slot_ranks.clear(place.slot)
        self.evictions_total += 1
        if self._on_leave is not None:
            self._on_leave(adapter_id)

    # ---- what keeps an adapter

    def touch(self, adapter_id: str) -> None:
        """It was used now."""
        self._tier.touch(adapter_id)

    def is_pinned(self, adapter_id: str) -> bool:
        """Whether it is here and cannot leave."""
        return adapter_id in self._tier and self._tier[adapter_id].pin_count > 0

    def pin(self, adapter_id: str) -> None:
        """One user more keeps it from leaving: a sequence, a copy, a trial."""
        self._tier.pin(adapter_id)

    def unpin(self, adapter_id: str) -> None:
        """One user fewer."""
        self._tier.unpin(adapter_id)

    def end_run(self, adapter_id: str) -> None:
        """A sequence that pinned it runs no more; launched steps may still read its pages."""
        self._tier.unpin(adapter_id)
        self._marks[adapter_id] = self._store.mark()
