"""The way of adapters to a device: loader threads fill the host arena, and the device copies from there.

An adapter is sent when a slot and pages are free for it; one that waits may be staged long before. Where nobody runs it is sent
before it is staged, as soon as its pages are complete (`node.adapters.trials`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from node.adapters.charges import Charges
from node.adapters.copies import Copies
from node.adapters.file_plan import FilePlan
from node.adapters.host_arena import HostArena, Staged
from node.adapters.loader import AdapterPlan, Filled
from node.adapters.page_filler import Page
from node.adapters.page_store import DevicePages
from node.adapters.residents import Residents

COPIES_BYTES = 1 << 30  # on their way at once: more would arrive steps later, and whoever could run waits until all are sent


class ArenaRoute:
    """Two tiers, and the copies between them. See `Route`.

    Args:
        store: The device's pages. arena: the tier before them.
        residents: Who has which page of the device.
        charges: How many an adapter takes there.
        clock: Monotonic seconds.
    """

    can_send_early = True

    def __init__(
        self, store: DevicePages, arena: HostArena, residents: Residents, charges: Charges, clock: Callable[[], float]
    ) -> None:
        self._store = store
        self._arena = arena
        self._residents = residents
        self._charges = charges
        self._copies = Copies(clock)  # of the residents: on their way
        self.loads_total = 0
        self.sent_bytes_total = 0

    def begin_step(self) -> None:
        """Copies that are done keep nobody any more."""
        for adapter_id in self._copies.begin_step():
            self._residents.unpin(adapter_id)
            self._arena.release(adapter_id)

    def claim(self, plan: AdapterPlan, wanted: Collection[str]) -> list[Page] | None:
        return self._arena.claim(plan.adapter_id, plan.file.rank, wanted)

    def complete(self, filled: Filled) -> None:
        self._arena.stage(filled.plan.adapter_id, Staged(filled.plan.file, filled.side))

    def abandon(self, adapter_id: str) -> None:
        self._arena.abandon(adapter_id)

    def bring(self, adapter_id: str, wanted: Collection[str]) -> bool:
        staged = self._arena.get(adapter_id)
        if staged is not None:
            self._send(adapter_id, staged, wanted)
        return staged is not None

    def send_early(self, adapter_id: str, file: FilePlan, wanted: Collection[str]) -> bool:
        self._send(adapter_id, Staged(file, None), wanted)
        return adapter_id in self._residents

    def _send(self, adapter_id: str, staged: Staged, wanted: Collection[str]) -> None:
        """Copy an adapter from the arena to the device, if a slot and pages can be free for it now."""
        if self._copies.is_full(COPIES_BYTES):
            return
        place = self._residents.claim(adapter_id, self._charges.pages_of(staged.file), wanted)
        if place is None:
            return
        sources = self._arena.lend(adapter_id)
        byte_count = self._charges.copied_bytes(len(sources), staged.file)
        self._copies.add(adapter_id, self._store.send(place, sources, staged.file, staged.side), byte_count)
        self._residents.admit(adapter_id, staged.file)
        self.loads_total += 1
        self.sent_bytes_total += byte_count

    @property
    def is_copying(self) -> bool:
        return len(self._copies) > 0

    def is_whole(self, adapter_id: str) -> bool:
        return adapter_id in self._residents and adapter_id not in self._copies

    def is_in_time(self, adapter_id: str) -> bool:
        return adapter_id not in self._copies or self._copies.is_hidden(adapter_id)

    def join(self, adapter_id: str) -> None:
        self._copies.join(adapter_id)

    @property
    def staged_ids(self) -> tuple[str, ...]:
        return self._arena.staged_ids

    @property
    def host_evictions_total(self) -> int:
        return self._arena.evictions_total

    def holds(self, adapter_id: str) -> bool:
        return adapter_id in self._arena

    def is_idle(self, adapter_id: str) -> bool:
        return self._arena.is_idle(adapter_id)

    def forget(self, adapter_id: str) -> None:
        self._arena.forget(adapter_id)
