"""One tier of adapter memory: pages of one size, which adapter owns which, and who leaves first. Numbers only, no bytes.

The least recently used adapter leaves first, as many as the newcomer needs; one that is pinned or wanted never does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class Place:
    """What one adapter owns: a slot (its row in the tables), pages in rank order, and how many users keep it from leaving.

    `fence` is the mark (see `node.adapters.page_store`) after which nobody on the device reads these pages any more as what they
    held before.
    """

    slot: int
    pages: tuple[int, ...]
    pin_count: int = 0
    fence: int = 0


class Tier:
    """Slots and pages.

    Args:
        page_count: Pages, at least 1. slot_count: adapters at most.
        first_page: The pages are numbered from here on.
    """

    def __init__(self, page_count: int, slot_count: int, first_page: int = 0) -> None:
        if page_count < 1 or slot_count < 1:
            raise ValueError(f"page_count is {page_count} and slot_count {slot_count}; both must be at least 1")
        self.page_count = page_count
        self.slot_count = slot_count
        # Stacks with the lowest number on top: pages that were never needed are never touched.
        self._free_pages = list(range(first_page + page_count - 1, first_page - 1, -1))
        self._free_slots = list(range(slot_count - 1, -1, -1))
        self._page_fences = dict.fromkeys(self._free_pages, 0)
        self._slot_fences = [0] * slot_count
        self._places: OrderedDict[str, Place] = OrderedDict()  # least recently used first

    def __contains__(self, adapter_id: str) -> bool:
        return adapter_id in self._places

    def __getitem__(self, adapter_id: str) -> Place:
        return self._places[adapter_id]

    @property
    def ids(self) -> tuple[str, ...]:
        """Who is here, least recently used first."""
        return tuple(self._places)

    @property
    def free_page_count(self) -> int:
        return len(self._free_pages)

    def touch(self, adapter_id: str) -> None:
        """The adapter was used now."""
        self._places.move_to_end(adapter_id)

    def pin(self, adapter_id: str) -> None:
        """One more user keeps the adapter from leaving."""
        self._places[adapter_id].pin_count += 1

    def unpin(self, adapter_id: str) -> None:
        """One user fewer."""
        place = self._places[adapter_id]
        if place.pin_count < 1:
            raise ValueError(f"adapter {adapter_id} is unpinned more often than pinned")
        place.pin_count -= 1

    def victims(self, page_count: int, wanted: Collection[str]) -> list[str] | None:
        """Who has to leave for an adapter of `page_count` pages: nobody where that is not needed, None where it is not enough."""
        pages, slots = len(self._free_pages), len(self._free_slots)
        chosen: list[str] = []
        for adapter_id, place in self._places.items():
            if pages >= page_count and slots:
                break
            if not place.pin_count and adapter_id not in wanted:
                chosen.append(adapter_id)
                pages += len(place.pages)
                slots += 1
        return chosen if pages >= page_count and slots else None

    def oldest_idle(self, wanted: Collection[str]) -> str | None:
        """The least recently used adapter with pages that nobody pinned or wants."""
        for adapter_id, place in self._places.items():
            if place.pages and not place.pin_count and adapter_id not in wanted:
                return adapter_id
        return None

    def take(self, adapter_id: str, page_count: int) -> Place:
        """Give an adapter a slot and free pages, which there must be (see `victims`)."""
        if adapter_id in self._places:
            raise ValueError(f"adapter {adapter_id} is here already")
        slot = self._free_slots.pop()
        pages = tuple(self._free_pages.pop() for _ in range(page_count))
        fence = max([self._slot_fences[slot], *(self._page_fences[page] for page in pages)])
        self._places[adapter_id] = Place(slot, pages, fence=fence)
        return self._places[adapter_id]

    def drop(self, adapter_id: str, fence: int = 0) -> Place:
        """Take everything back; `fence`: of the last step that may read it. Nobody may have it pinned."""
        place = self._places[adapter_id]
        if place.pin_count:
            raise ValueError(f"adapter {adapter_id} has {place.pin_count} users and cannot leave")
        del self._places[adapter_id]
        self._give_back(place.slot, place.pages, fence)
        return place

    def add_page(self, page: int, fence: int) -> None:
        """One page more; `fence`: of the last step that may read what it held before."""
        if page in self._page_fences:
            raise ValueError(f"page {page} is here already")
        self._page_fences[page] = fence
        self._free_pages.append(page)
        self.page_count += 1

    def remove_page(self) -> int:
        """One page fewer, a free one, which there must be."""
        page = self._free_pages.pop()
        del self._page_fences[page]
        self.page_count -= 1
        return page

    def _give_back(self, slot: int, pages: Sequence[int], fence: int) -> None:
        self._slot_fences[slot] = fence
        self._free_slots.append(slot)
        for page in reversed(pages):
            self._page_fences[page] = fence
            self._free_pages.append(page)
