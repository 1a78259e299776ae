"""Adapter memory of the engine: which adapter has which slot and pages, and who must leave for whom.

Called by the step loop only. On a CPU an adapter goes through: inspected (headers read, size known), filling (owns a slot and
pages that no step can see), resident. On a GPU it fills pages of the host arena, is staged there, and is sent to the GPU when a
slot and pages are free for it; adapters that wait may be staged long before. Where nobody runs it is sent before it is staged, as
soon as its pages are complete (`node.adapters.trials`).

In each tier the least recently used adapter leaves first; one that runs, or that an earlier sequence of this step wants, never
does. That order makes progress certain: the first in line only ever waits for adapters that finish.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from node.adapters.arrivals import Arrivals
from node.adapters.charges import Charges
from node.adapters.copies import Copies
from node.adapters.file_plan import FilePlan
from node.adapters.host_arena import HostArena, Staged
from node.adapters.loader import AdapterLoader, AdapterPlan, Failed, Filled, Placed
from node.adapters.page_filler import Page
from node.adapters.page_store import DevicePages, HostPages
from node.adapters.residency import LOADING, READY, Residency
from node.adapters.slot_ranks import SlotRanks
from node.adapters.tier import Place, Tier
from node.adapters.trials import Trials
from node.adapters.wishes import Wishes
from node.kernels.layout import PageLayout
from node.kernels.lora import LoraPool
from node.request import AdapterTerm

PROOF_WAIT_S = 1.0  # between two looks at whether the loader's threads are alive
COPIES_BYTES = 1 << 30  # on their way at once: more would arrive steps later, and whoever could run waits until all are sent


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
        if (arena is None) != isinstance(store, HostPages):
            raise ValueError("pages of a device are filled from a host arena, others in place")
        self._layout = layout
        self._store = store
        self._arena = arena
        self._loader = loader
        pages, ranks = store.tensors.pages, store.tensors.ranks
        self._page_bytes = layout.page_elements * pages.dtype.itemsize
        self._tier = Tier(int(pages.shape[0]) - store.first_page, int(ranks.shape[1]), store.first_page)
        self._resident: dict[str, FilePlan] = {}  # of the tier: those a batch may name
        self._slot_ranks = SlotRanks(layout, self._tier.slot_count)
        self._copies = Copies(clock)  # of those: on their way
        self._marks: dict[str, int] = {}  # of those: after their last step
        self._arrivals = Arrivals(loader, clock)
        self._running_count = 0
        self._wanted: set[str] = set()
        self._borrow: Callable[[int], None] | None = None
        arena_pages = None if arena is None else arena.page_count
        self._charges = Charges(layout, self._page_bytes, self._tier.page_count, self._tier.slot_count, arena_pages)
        self._wishes = Wishes()
        self._trials = Trials()
        self.loads_total = 0
        self.evictions_total = 0
        self.file_loads_total = 0
        self.sent_bytes_total = 0
        self.load_seconds_total = 0.0

    @property
    def _in_place(self) -> HostPages:
        if not isinstance(self._store, HostPages):
            raise TypeError("the pages of a device are not written in place")
        return self._store

    @property
    def _device(self) -> DevicePages:
        if isinstance(self._store, HostPages):
            raise TypeError("pages in host memory are written in place")
        return self._store

    @property
    def tensors(self) -> LoraPool:
        """What kernels read."""
        return self._store.tensors

    @property
    def page_count(self) -> int:
        return self._tier.page_count

    @property
    def slot_count(self) -> int:
        return self._tier.slot_count

    @property
    def resident_ids(self) -> tuple[str, ...]:
        """Adapters that can run now, least recently used first."""
        return tuple(adapter_id for adapter_id in self._tier.ids if adapter_id in self._resident and self._is_proven(adapter_id))

    @property
    def host_ids(self) -> tuple[str, ...]:
        """Adapters that wait in host memory, one copy away from running."""
        staged = () if self._arena is None else self._arena.staged_ids
        return tuple(adapter_id for adapter_id in staged if adapter_id not in self._resident)

    @property
    def host_evictions_total(self) -> int:
        return 0 if self._arena is None else self._arena.evictions_total

    @property
    def is_copying(self) -> bool:
        """Whether an adapter is on its way to a device, whose arrival nobody tells."""
        return len(self._copies) > 0

    def slot_of(self, adapter_id: str) -> int:
        """Slot of a resident adapter."""
        if adapter_id not in self._resident:
            raise KeyError(adapter_id)
        return self._tier[adapter_id].slot

    @property
    def layer_ranks(self) -> npt.NDArray[np.int32]:
        """[S] int32: a slot's ranks where all modules of all layers have the same, else 0."""
        return self._slot_ranks.values

    def adapts(self, adapter_id: str, module: int) -> bool:
        """Whether a resident adapter changes a linear module, by its row in `LoraPool.ranks`: the host's side of that table."""
        return bool((self._resident[adapter_id].module_indices == module).any())

    # ---- the border with other memory, where there is one

    def borrow_from(self, lender: Callable[[int], None]) -> None:
        """Where to ask for more pages: called with how many would do, it may `add_page` some.

        A recipe is still refused when it is larger than the pages there were at first: whoever lends has to keep the rest.
        """
        self._borrow = lender

    def add_page(self, page: int) -> None:
        """One page more, which launched steps may still read as what it was."""
        self._tier.add_page(page, self._store.foreign_mark())

    def take_page(self) -> int | None:
        """Give up a page, for which the least recently used adapter leaves where none is free; None when all are in use."""
        if not self._tier.free_page_count:
            victim = self._tier.oldest_idle(self._wanted)
            if victim is None:
                return None
            self._evict(victim)
        return self._tier.remove_page()

    # ---- AdapterMemory, as the scheduler calls it

    def begin_step(self) -> None:
        """Take over what the loader and the copies finished, and forget what the last step wanted."""
        self._wanted.clear()
        self._store.begin_step()
        self._release_copied()
        self._drop_refused()  # of the step before: whoever ran with it has heard of it by now
        self._take_arrivals()

    def holds(self, terms: Sequence[AdapterTerm]) -> bool:
        """Whether all adapters of a recipe are here, none of them still on its way or on trial."""
        adapter_ids = [term.adapter_id for term in terms]
        return all(name in self._resident and name not in self._copies and self._is_proven(name) for name in adapter_ids)

    def ensure(self, terms: Sequence[AdapterTerm]) -> Residency:
        """Want all adapters of a recipe, start what is missing, say whether they can run."""
        directories = {term.adapter_id: term.directory for term in terms}
        refusal = self._refusal(directories)
        if refusal is not None:
            return refusal
        self._wanted.update(directories)
        for adapter_id in directories:
            if adapter_id in self._resident:
                self._tier.touch(adapter_id)
        for adapter_id, directory in directories.items():
            if adapter_id not in self._resident:
                self._start(adapter_id, directory)
        return READY if all(map(self._can_run, directories)) else LOADING

    def pin(self, terms: Sequence[AdapterTerm]) -> None:
        """A sequence with this recipe runs from now on."""
        self._running_count += 1
        for term in terms:
            self._tier.pin(term.adapter_id)
            self._copies.join(term.adapter_id)

    def unpin(self, terms: Sequence[AdapterTerm]) -> None:
        """That sequence runs no more."""
        self._running_count -= 1
        for term in terms:
            self._tier.unpin(term.adapter_id)
            self._marks[term.adapter_id] = self._store.mark()

    # ---- trials, as the engine settles them

    @property
    def has_trials(self) -> bool:
        """Whether steps compute with an adapter whose hash is not known, or did with one that was refused."""
        return self._trials.has_any

    def settle(self, adapter_ids: Collection[str]) -> Mapping[str, Residency]:
        """Wait until the hash of these adapters is known, where one of them is on trial: for bytes that are in memory already.

        Returns:
            What to tell whoever named an adapter that was refused on trial.
        """
        while any(map(self._trials.is_on, adapter_ids)):
            self._take_arrivals(PROOF_WAIT_S)
        return self._trials.refused

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
        self._wishes.go(adapter_id, is_here=self._is_known(adapter_id))

    def grant_wishes(self) -> None:
        """Do the next thing for each wish, after what this step wants is known: wishes never push that out."""
        for adapter_id in filter(self._is_idle, self._wishes.going):
            if adapter_id not in self._wanted:
                self._wishes.is_gone(adapter_id)
                self._forget(adapter_id)
        for adapter_id, directory in self._wishes.coming:
            if adapter_id in self._resident or self._refusal([adapter_id]) is not None:
                self._wishes.has_come(adapter_id)
            elif self._arrivals.has_room:
                self._start(adapter_id, directory)

    def _is_known(self, adapter_id: str) -> bool:
        return adapter_id in self._tier or (self._arena is not None and adapter_id in self._arena)

    def _is_idle(self, adapter_id: str) -> bool:
        """Whether nothing holds an adapter: no sequence, no loader, no copy."""
        is_free = adapter_id not in self._tier or not self._tier[adapter_id].pin_count
        return is_free and (self._arena is None or self._arena.is_idle(adapter_id))

    def _forget(self, adapter_id: str) -> None:
        if adapter_id in self._tier:
            self._evict(adapter_id)
        if self._arena is not None:
            self._arena.forget(adapter_id)
        self._arrivals.forget(adapter_id)

    def _can_run(self, adapter_id: str) -> bool:
        """A step that names an adapter on its way waits for it, everybody else in that step too: only while nobody runs, or
        where there will be nothing left to wait for."""
        if adapter_id not in self._resident or (self._running_count and not self._is_proven(adapter_id)):
            return False
        return adapter_id not in self._copies or not self._running_count or self._copies.is_hidden(adapter_id)

    # ---- loading

    def _refusal(self, adapter_ids: Collection[str]) -> Residency | None:
        """Why a recipe cannot run: an adapter failed a moment ago, or all together never fit."""
        for adapter_id in adapter_ids:
            failure = self._arrivals.failure_of(adapter_id) or self._trials.refused.get(adapter_id)
            if failure is not None:
                return failure
        return self._charges.refusal(len(adapter_ids), self._arrivals.files_of(adapter_ids))

    def _start(self, adapter_id: str, directory: str | Path) -> None:
        """Do the next thing that brings an adapter closer, if there is room for it now."""
        staged = None if self._arena is None else self._arena.get(adapter_id)
        if staged is not None:
            self._send(adapter_id, staged)
            return
        if (placed := self._trials.placed(adapter_id)) is not None:
            self._try(adapter_id, placed)
        if adapter_id in self._arrivals or not self._arrivals.has_room:
            return
        plan = self._arrivals.plan(adapter_id, Path(directory))
        pages = None if plan is None else self._fill_pages(plan)
        if plan is not None and pages is not None:
            is_urgent = self._arena is not None and self._is_waited_for(adapter_id) and not self._arrivals.is_filling
            self._arrivals.fill(plan, pages, is_urgent=is_urgent)

    def _is_waited_for(self, adapter_id: str) -> bool:
        """Whether a sequence wants it and nobody runs."""
        return adapter_id in self._wanted and not self._running_count

    def _try(self, adapter_id: str, placed: FilePlan) -> None:
        """Send an adapter before its hash is known, where somebody waits for it and for nothing else."""
        if self._is_waited_for(adapter_id) and not self._trials.has_any:
            self._send(adapter_id, Staged(placed, None))
            if adapter_id in self._resident:
                self._tier.pin(adapter_id)  # by its trial
                self._trials.begin(adapter_id)

    def _is_proven(self, adapter_id: str) -> bool:
        return not self._trials.is_on(adapter_id) and adapter_id not in self._trials.refused

    def _fill_pages(self, plan: AdapterPlan) -> list[Page] | None:
        """Pages for the loader to write; None when there are none now."""
        if self._arena is not None:
            return self._arena.claim(plan.adapter_id, plan.file.rank, self._wanted)
        place = self._claim(plan.adapter_id, self._charges.pages_of(plan.file))
        return None if place is None else self._in_place.arrays(place.pages[: self._layout.pages_for_rank(plan.file.rank)])

    def _claim(self, adapter_id: str, page_count: int) -> Place | None:
        """A slot and pages, pinned until they are complete, evicting only when that yields enough; None when it does not."""
        victims = self._tier.victims(page_count, self._wanted)
        if victims is None and self._borrow is not None:
            self._borrow(page_count)
            victims = self._tier.victims(page_count, self._wanted)
        if victims is None:
            return None
        for victim in victims:
            self._evict(victim)
        place = self._tier.take(adapter_id, page_count)
        self._tier.pin(adapter_id)
        return place

    def _evict(self, adapter_id: str) -> None:
        place = self._tier.drop(adapter_id, self._marks.pop(adapter_id, 0))
        self._resident.pop(adapter_id, None)
        self._store.hide(place.slot)
        self._slot_ranks.clear(place.slot)
        self.evictions_total += 1
        if self._arena is not None:
            self._arena.touch(adapter_id)

    def _send(self, adapter_id: str, staged: Staged) -> None:
        """Copy a staged or placed adapter to the device, if a slot and pages can be free for it now."""
        if self._copies.is_full(COPIES_BYTES):
            return
        place = self._claim(adapter_id, self._charges.pages_of(staged.file))
        if place is None or self._arena is None:
            return
        sources = self._arena.lend(adapter_id)
        byte_count = len(sources) * staged.file.extent * self._page_bytes // self._layout.page_elements
        self._copies.add(adapter_id, self._device.send(place, sources, staged.file, staged.side), byte_count)
        self._resident[adapter_id] = staged.file
        self._slot_ranks.set(place.slot, staged.file)
        self.loads_total += 1
        self.sent_bytes_total += byte_count

    def _release_copied(self) -> None:
        """Copies that are done keep nobody any more."""
        for adapter_id in self._copies.begin_step():
            self._tier.unpin(adapter_id)
            if self._arena is not None:
                self._arena.release(adapter_id)

    def _take_arrivals(self, wait_s: float = 0.0) -> None:
        for outcome in self._arrivals.take(wait_s):
            if isinstance(outcome, Placed):
                self._trials.place(outcome.plan)
            elif isinstance(outcome, Filled):
                if self._trials.prove(outcome.plan.adapter_id):
                    self._tier.unpin(outcome.plan.adapter_id)
                self._take_over(outcome)
            else:
                if self._trials.refuse(outcome):
                    self._tier.unpin(outcome.adapter_id)
                self._give_up(outcome)

    def _drop_refused(self) -> None:
        """Let go of what failed on trial, once nobody holds it any more."""
        for adapter_id in list(self._trials.refused):
            if adapter_id in self._tier and self._tier[adapter_id].pin_count:
                continue
            if adapter_id in self._tier:
                self._evict(adapter_id)
            self._trials.forget(adapter_id)

    def _take_over(self, filled: Filled) -> None:
        """Pages that the loader completed: staged in the arena, or visible at once where steps compute from them."""
        adapter_id, file = filled.plan.adapter_id, filled.plan.file
        self.file_loads_total += 1
        self.load_seconds_total += filled.seconds
        if self._arena is not None:
            self._arena.stage(adapter_id, Staged(file, filled.side))
            return
        self._in_place.show(self._tier[adapter_id], file, filled.side)
        self._slot_ranks.set(self._tier[adapter_id].slot, file)
        self._tier.unpin(adapter_id)
        self._resident[adapter_id] = file
        self.loads_total += 1

    def _give_up(self, failed: Failed) -> None:
        """Pages that will never be what was asked for."""
        if self._arena is not None:
            self._arena.abandon(failed.adapter_id)
            return
        self._tier.unpin(failed.adapter_id)
        self._tier.drop(failed.adapter_id)

    def close(self) -> None:
        """End the loader's threads."""
        self._loader.close()
