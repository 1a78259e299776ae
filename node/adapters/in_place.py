"""The way of adapters on a CPU: the pages that loader threads write are those that steps compute from."""

from __future__ import annotations

from collections.abc import Collection

from node.adapters.charges import Charges
from node.adapters.file_plan import FilePlan
from node.adapters.loader import AdapterPlan, Filled
from node.adapters.page_filler import Page
from node.adapters.page_store import HostPages
from node.adapters.residents import Residents


class InPlaceRoute:
    """One tier: an adapter owns its place while it is filled, and becomes visible as a whole. See `Route`.

    Args:
        store: The pages.
        residents: Who has which.
        charges: How many an adapter takes.
    """

    can_send_early = False
    sent_bytes_total = 0
    is_copying = False
    staged_ids: tuple[str, ...] = ()
    host_evictions_total = 0

    def __init__(self, store: HostPages, residents: Residents, charges: Charges) -> None:
        self._store = store
        self._residents = residents
        self._charges = charges
        self.loads_total = 0

    def begin_step(self) -> None:
        """Nothing arrives but by `complete`."""

    def claim(self, plan: AdapterPlan, wanted: Collection[str]) -> list[Page] | None:
        place = self._residents.claim(plan.adapter_id, self._charges.pages_of(plan.file), wanted)
        return None if place is None else self._store.arrays(place.pages[: self._charges.rank_pages_of(plan.file)])

    def complete(self, filled: Filled) -> None:
        adapter_id, file = filled.plan.adapter_id, filled.plan.file
        self._store.show(self._residents.place_of(adapter_id), file, filled.side)
        self._residents.admit(adapter_id, file)
        self._residents.unpin(adapter_id)
        self.loads_total += 1

    def abandon(self, adapter_id: str) -> None:
        self._residents.abandon(adapter_id)

    def bring(self, adapter_id: str, wanted: Collection[str]) -> bool:
        """There is no memory before this one."""
        return False

    def send_early(self, adapter_id: str, file: FilePlan, wanted: Collection[str]) -> bool:
        """Nobody sees pages before they are proven."""
        return False

    def is_whole(self, adapter_id: str) -> bool:
        return adapter_id in self._residents

    def is_in_time(self, adapter_id: str) -> bool:
        return True

    def join(self, adapter_id: str) -> None:
        """It is here."""

    def holds(self, adapter_id: str) -> bool:
        return False

    def is_idle(self, adapter_id: str) -> bool:
        return True

    def forget(self, adapter_id: str) -> None:
        """Nothing lies before these pages."""
