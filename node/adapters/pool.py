"""Adapter memory of the engine, as its step loop calls it: which adapters are here, who may run now, who is to come or to go.

What it is made of: the memory that steps compute from (`residents`), the way into it (`route`: in place on a CPU, by a host arena
on a GPU), and what brings an adapter along that way (`loading`, with its `trials`). Who needs adapters now (`demand`) is asked
before anybody leaves: in each tier the least recently used leaves first; one that runs, or that an earlier sequence of this step
wants, never does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from node.adapters.charges import Charges
from node.adapters.demand import Demand
from node.adapters.host_arena import HostArena
from node.adapters.loader import AdapterLoader
from node.adapters.loading import Loading
from node.adapters.page_store import DevicePages, HostPages
from node.adapters.residency import LOADING, READY, Residency
from node.adapters.residents import Residents
from node.adapters.route import open_route
from node.adapters.wishes import Wishes
from node.kernels.layout import PageLayout
from node.kernels.lora import LoraPool
from node.request import AdapterTerm


class AdapterPool:
    """Slots and pages of one engine.

    Args:
        layout: The order of modules inside a page.
        store: The pages that steps compute from.
        arena: The tier before them; None where loader threads write the store's pages themselves (`HostPages`).
        loader: The threads that fill pages.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        layout: PageLayout,
        store: HostPages | DevicePages,
        loader: AdapterLoader,
        arena: HostArena | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._loader = loader
        self._residents = Residents(layout, store, on_leave=None if arena is None else arena.touch)
        page_bytes = layout.page_elements * store.tensors.pages.dtype.itemsize
        arena_pages = None if arena is None else arena.page_count
        charges = Charges(layout, page_bytes, self._residents.page_count, self._residents.slot_count, arena_pages)
        self._route = open_route(store, arena, self._residents, charges, clock)
        self._demand = Demand()
        self._loading = Loading(loader, self._route, self._residents, charges, self._demand, clock)
        self._wishes = Wishes()

    @property
    def tensors(self) -> LoraPool:
        """What kernels read."""
        return self._store.tensors

    @property
    def page_count(self) -> int:
        return self._residents.page_count

    @property
    def slot_count(self) -> int:
        return self._residents.slot_count

    @property
    def resident_ids(self) -> tuple[str, ...]:
        """Adapters that can run now, least recently used first."""
        return tuple(filter(self._loading.is_proven, self._residents.ids))

    @property
    def host_ids(self) -> tuple[str, ...]:
        """Adapters that wait in host memory, one copy away from running."""
        return tuple(adapter_id for adapter_id in self._route.staged_ids if adapter_id not in self._residents)

    @property
    def is_copying(self) -> bool:
        """Whether an adapter is on its way to a device, whose arrival nobody tells."""
        return self._route.is_copying

    @property
    def layer_ranks(self) -> npt.NDArray[np.int32]:
        """[S] int32: a slot's ranks where all modules of all layers have the same, else 0."""
        return self._residents.layer_ranks

    def slot_of(self, adapter_id: str) -> int:
        """Slot of a resident adapter."""
        return self._residents.slot_of(adapter_id)

    def adapts(self, adapter_id: str, module: int) -> bool:
        """Whether a resident adapter changes a linear module, by its row in `LoraPool.ranks`: the host's side of that table."""
        return self._residents.adapts(adapter_id, module)

    # ---- counters

    @property
    def loads_total(self) -> int:
        return self._route.loads_total

    @property
    def evictions_total(self) -> int:
        return self._residents.evictions_total

    @property
    def host_evictions_total(self) -> int:
        return self._route.host_evictions_total

    @property
    def file_loads_total(self) -> int:
        return self._loading.file_loads_total

    @property
    def sent_bytes_total(self) -> int:
        return self._route.sent_bytes_total

    @property
    def load_seconds_total(self) -> float:
        return self._loading.load_seconds_total

    # ---- the border with other memory, where there is one

    def borrow_from(self, lender: Callable[[int], None]) -> None:
        """Where to ask for more pages: called with how many would do, it may `add_page` some.

        A recipe is still refused when it is larger than the pages there were at first: whoever lends has to keep the rest.
        """
        self._residents.borrow_from(lender)

    def add_page(self, page: int) -> None:
        """One page more, which launched steps may still read as what it was."""
        self._residents.add_page(page)

    def take_page(self) -> int | None:
        """Give up a page, for which the least recently used adapter leaves where none is free; None when all are in use."""
        return self._residents.take_page(self._demand.wanted)

    # ---- AdapterMemory, as the scheduler calls it

    def begin_step(self) -> None:
        """Take over what the loader and the copies finished, and forget what the last step wanted."""
        self._demand.begin_step()
        self._store.begin_step()
        self._route.begin_step()
        self._loading.begin_step()

    def holds(self, terms: Sequence[AdapterTerm]) -> bool:
        """Whether all adapters of a recipe are here, none of them still on its way or on trial."""
        adapter_ids = [term.adapter_id for term in terms]
        return all(self._route.is_whole(name) and self._loading.is_proven(name) for name in adapter_ids)

    def ensure(self, terms: Sequence[AdapterTerm]) -> Residency:
        """Want all adapters of a recipe, start what is missing, say whether they can run."""
        directories = {term.adapter_id: term.directory for term in terms}
        refusal = self._loading.refusal(directories)
        if refusal is not None:
            return refusal
        self._demand.want(directories)
        for adapter_id in directories:
            if adapter_id in self._residents:
                self._residents.touch(adapter_id)
        for adapter_id, directory in directories.items():
            if adapter_id not in self._residents:
                self._loading.start(adapter_id, directory)
        return READY if all(map(self._can_run, directories)) else LOADING

    def pin(self, terms: Sequence[AdapterTerm]) -> None:
        """A sequence with this recipe runs from now on."""
        self._demand.running_count += 1
        for term in terms:
            self._residents.pin(term.adapter_id)
            self._route.join(term.adapter_id)

    def unpin(self, terms: Sequence[AdapterTerm]) -> None:
        """That sequence runs no more."""
        self._demand.running_count -= 1
        for term in terms:
            self._residents.end_run(term.adapter_id)

    def _can_run(self, adapter_id: str) -> bool:
        """A step that names an adapter on its way waits for it, everybody else in that step too: only while nobody runs, or
        where there will be nothing left to wait for."""
        if adapter_id not in self._residents:
            return False
        return not self._demand.running_count or (self._loading.is_proven(adapter_id) and self._route.is_in_time(adapter_id))

    # ---- trials, as the engine settles them

    @property
    def has_trials(self) -> bool:
        """Whether steps compute with an adapter whose hash is not known, or did with one that was refused."""
        return self._loading.has_trials

    def settle(self, adapter_ids: Collection[str]) -> Mapping[str, Residency]:
        """Wait until the hash of these adapters is known, where one of them is on trial: for bytes that are in memory already.

        Returns:
            What to tell whoever named an adapter that was refused on trial.
        """
        return self._loading.settle(adapter_ids)

    # ---- wishes, as the operator has them

    @property
    def has_wishes(self) -> bool:
        """Whether an adapter is to come that can still come, or to go that nobody holds."""
        return bool(self._wishes.coming) or any(map(self._is_idle, self._wishes.going))

    def prefetch(self, term: AdapterTerm) -> None:
        """Load an adapter ahead of its first request. Of too many wishes the oldest is forgotten."""
        self._wishes.come(term.adapter_id, Path(term.directory))

    def dismiss(self, adapter_id: str) -> None:
        """Let an adapter go from every tier once nobody runs with it, is loading it or wants it."""
        self._wishes.go(adapter_id, is_here=self._residents.has_place(adapter_id) or self._route.holds(adapter_id))

    def grant_wishes(self) -> None:
        """Do the next thing for each wish, after what this step wants is known: wishes never push that out."""
        for adapter_id in filter(self._is_idle, self._wishes.going):
            if adapter_id not in self._demand.wanted:
                self._wishes.is_gone(adapter_id)
                self._forget(adapter_id)
        for adapter_id, directory in self._wishes.coming:
            if adapter_id in self._residents or self._loading.refusal([adapter_id]) is not None:
                self._wishes.has_come(adapter_id)
            elif self._loading.has_room:
                self._loading.start(adapter_id, directory)

    def _is_idle(self, adapter_id: str) -> bool:
        """Whether nothing holds an adapter: no sequence, no loader, no copy."""
        return not self._residents.is_pinned(adapter_id) and self._route.is_idle(adapter_id)

    def _forget(self, adapter_id: str) -> None:
        if self._residents.has_place(adapter_id):
            self._residents.evict(adapter_id)
        self._route.forget(adapter_id)
        self._loading.forget(adapter_id)

    def close(self) -> None:
        """End the loader's threads."""
        self._loader.close()
