"""Adapter memory of the engine: which adapter has which slot and pages, and who must leave for whom.

Called by the step loop only. An adapter goes through: inspected (headers read, size known), filling (owns a slot and pages that
no step can see), resident. The least recently used resident adapter leaves first; one that runs, or that an earlier sequence of
this step wants, never does. That order makes progress certain: the first in line only ever waits for adapters that finish.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from node.adapters.loader import AdapterLoader, AdapterPlan, Failed, Filled, Inspected, Page
from node.adapters.residency import LOADING, READY, Residency, ResidencyState
from node.errors import AdapterError, AdapterInvalidError, ConfigError
from node.kernels.layout import PageLayout
from node.kernels.lora import LoraPool
from node.kernels.memory import empty_huge
from node.request import AdapterTerm

SLOT_LIMIT = 1024
PAGE_LIMIT = 1 << 16
REMEMBERED_PLANS = 64  # a plan of a 30-layer model takes about 100 kB
REMEMBERED_FAILURES = 1024
FAILURE_S = 1.0  # long enough for every sequence that waits to hear of it, short enough to try again soon


@dataclass(slots=True)
class _Place:
    """A slot, its pages, and how many running sequences use them."""

    slot: int
    pages: tuple[int, ...]
    pin_count: int = 0


class AdapterPool:
    """Slots and pages of one engine.

    Args:
        layout: The order of modules inside a page.
        dtype: Of the pages: float32 or bfloat16.
        memory_bytes: Bound on all pages together.
        max_rank: The largest rank served; sizes the page list of a slot.
        loader: The thread that fills pages.
        clock: Monotonic seconds.

    Raises:
        ConfigError: Not one page fits into memory_bytes.
    """

    def __init__(
        self,
        layout: PageLayout,
        dtype: torch.dtype,
        *,
        memory_bytes: int,
        max_rank: int,
        loader: AdapterLoader,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        page_bytes = layout.page_elements * dtype.itemsize
        self.page_count = min(memory_bytes // page_bytes, PAGE_LIMIT)
        if self.page_count < 1:
            raise ConfigError(f"adapters.memory_bytes is {memory_bytes}; one page of this model takes {page_bytes}; raise it")
        self._layout = layout
        self._loader = loader
        self._clock = clock
        # Pages take no memory until they are written, so a large bound costs nothing by itself.
        pages = empty_huge((self.page_count, layout.page_elements), dtype)
        # numpy has no bfloat16: the loader writes its bits.
        self._pages: Page = pages.numpy() if dtype == torch.float32 else pages.view(torch.uint16).numpy()
        slot_count = min(self.page_count, SLOT_LIMIT)
        self.tensors = LoraPool(
            pages=pages,
            slot_pages=torch.full((slot_count, layout.pages_for_rank(max_rank)), -1, dtype=torch.int32),
            ranks=torch.zeros((layout.module_count, slot_count), dtype=torch.int32),
            scales=torch.zeros((layout.module_count, slot_count), dtype=torch.float32),
            page_rank=layout.page_rank,
        )
        self._free_pages = list(range(self.page_count - 1, -1, -1))
        self._free_slots = list(range(slot_count - 1, -1, -1))
        self._resident: OrderedDict[str, _Place] = OrderedDict()  # least recently used first
        self._filling: dict[str, _Place] = {}
        self._inspecting: set[str] = set()
        self._plans: OrderedDict[str, AdapterPlan] = OrderedDict()
        self._failures: OrderedDict[str, tuple[AdapterError, float]] = OrderedDict()
        self._wanted: set[str] = set()
        self.loads_total = 0
        self.evictions_total = 0
        self.load_seconds_total = 0.0

    @property
    def slot_count(self) -> int:
        return int(self.tensors.slot_pages.shape[0])

    @property
    def resident_ids(self) -> tuple[str, ...]:
        """Adapters that can run now, least recently used first."""
        return tuple(self._resident)

    @property
    def is_loading(self) -> bool:
        """Whether the loader has anything of ours."""
        return bool(self._inspecting or self._filling)

    def slot_of(self, adapter_id: str) -> int:
        """Slot of a resident adapter."""
        return self._resident[adapter_id].slot

    # ---- AdapterMemory, as the scheduler calls it

    def begin_step(self) -> None:
        """Take over what the loader finished, and forget what the last step wanted."""
        self._wanted.clear()
        for outcome in self._loader.outcomes():
            if isinstance(outcome, Inspected):
                self._inspecting.discard(outcome.plan.adapter_id)
                self._remember(outcome.plan)
            elif isinstance(outcome, Filled):
                self._show(outcome)
            else:
                self._fail(outcome)

    def ensure(self, terms: Sequence[AdapterTerm]) -> Residency:
        """Want all adapters of a recipe, start what is missing, say whether they can run."""
        directories = {term.adapter_id: term.directory for term in terms}
        for adapter_id in directories:
            failure = self._failure(adapter_id)
            if failure is not None:
                return failure
        too_large = self._too_large(list(directories))
        if too_large is not None:
            return too_large
        self._wanted.update(directories)
        missing = [adapter_id for adapter_id in directories if adapter_id not in self._resident]
        for adapter_id in directories:
            if adapter_id in self._resident:
                self._resident.move_to_end(adapter_id)
        for adapter_id in missing:
            self._start(adapter_id, Path(directories[adapter_id]))
        return LOADING if missing else READY

    def pin(self, terms: Sequence[AdapterTerm]) -> None:
        """A sequence with this recipe runs from now on."""
        for term in terms:
            self._resident[term.adapter_id].pin_count += 1

    def unpin(self, terms: Sequence[AdapterTerm]) -> None:
        """That sequence runs no more."""
        for term in terms:
            place = self._resident[term.adapter_id]
            if place.pin_count < 1:
                raise ValueError(f"adapter {term.adapter_id} is unpinned more often than pinned")
            place.pin_count -= 1

    # ---- loading

    def _start(self, adapter_id: str, directory: Path) -> None:
        """Do the next thing that brings an adapter closer, if there is room for it now."""
        if adapter_id in self._inspecting or adapter_id in self._filling or self._loader.job_count >= self._loader.job_limit:
            return
        plan = self._plans.get(adapter_id)
        if plan is None or plan.directory != directory:
            self._inspecting.add(adapter_id)
            self._loader.inspect(adapter_id, directory)
            return
        place = self._claim(self._page_count_of(plan))
        if place is not None:
            self._filling[adapter_id] = place
            self._loader.fill(plan, [self._pages[page] for page in place.pages[: self._layout.pages_for_rank(plan.rank)]])

    def _page_count_of(self, plan: AdapterPlan) -> int:
        """Pages an adapter is charged. What it needs beside its pages (see `node.adapters.side`) is charged in whole pages that
        stay untouched, so that one bound holds for both."""
        page_bytes = self._layout.page_elements * self._pages.itemsize
        return self._layout.pages_for_rank(plan.rank) + -(-plan.side_bytes // page_bytes)

    def _claim(self, page_count: int) -> _Place | None:
        """Take a slot and pages, evicting only when that yields enough; None when it does not."""
        idle = [key for key, place in self._resident.items() if not place.pin_count and key not in self._wanted]
        victims: list[str] = []
        pages, slots = len(self._free_pages), len(self._free_slots)
        while (pages < page_count or not slots) and idle:
            victims.append(idle.pop(0))
            pages += len(self._resident[victims[-1]].pages)
            slots += 1
        if pages < page_count or not slots:
            return None
        for victim in victims:
            self._evict(victim)
        return _Place(self._free_slots.pop(), tuple(self._free_pages.pop() for _ in range(page_count)))

    def _evict(self, adapter_id: str) -> None:
        place = self._resident.pop(adapter_id)
        self.tensors.ranks[:, place.slot] = 0
        self.tensors.slot_pages[place.slot] = -1
        self.tensors.sides.pop(place.slot, None)
        self._give_back(place)
        self.evictions_total += 1

    def _give_back(self, place: _Place) -> None:
        self._free_slots.append(place.slot)
        self._free_pages.extend(reversed(place.pages))

    def _show(self, filled: Filled) -> None:
        """Make a complete adapter visible to the step loop: from here on its slot can be named in a batch."""
        plan = filled.plan
        place = self._filling.pop(plan.adapter_id)
        count = self._layout.pages_for_rank(plan.rank)
        self.tensors.slot_pages[place.slot, :count] = torch.tensor(place.pages[:count], dtype=torch.int32)
        if filled.side is not None:
            self.tensors.sides[place.slot] = filled.side
        for module in plan.modules:
            index = self._layout.spans[module.name].index
            self.tensors.ranks[index, place.slot] = module.rank
            self.tensors.scales[index, place.slot] = module.scale
        self._resident[plan.adapter_id] = place
        self.loads_total += 1
        self.load_seconds_total += filled.seconds

    def _remember(self, plan: AdapterPlan) -> None:
        self._plans[plan.adapter_id] = plan
        while len(self._plans) > REMEMBERED_PLANS:
            self._plans.popitem(last=False)

    # ---- failing

    def _fail(self, failed: Failed) -> None:
        self._inspecting.discard(failed.adapter_id)
        self._plans.pop(failed.adapter_id, None)
        place = self._filling.pop(failed.adapter_id, None)
        if place is not None:
            self._give_back(place)
        self._failures[failed.adapter_id] = (failed.error, self._clock() + FAILURE_S)
        while len(self._failures) > REMEMBERED_FAILURES:
            self._failures.popitem(last=False)

    def _failure(self, adapter_id: str) -> Residency | None:
        found = self._failures.get(adapter_id)
        if found is None:
            return None
        error, until_s = found
        if self._clock() >= until_s:
            del self._failures[adapter_id]
            return None
        return Residency(ResidencyState.FAILED, error.error_code, error.message)

    def _too_large(self, adapter_ids: Sequence[str]) -> Residency | None:
        """Whether a recipe can never be resident as a whole, as far as its adapters' sizes are known."""
        plans = [self._plans[adapter_id] for adapter_id in adapter_ids if adapter_id in self._plans]
        page_count = sum(self._page_count_of(plan) for plan in plans)
        if page_count <= self.page_count and len(adapter_ids) <= self.slot_count:
            return None
        page_bytes = self._layout.page_elements * self._pages.itemsize
        error = AdapterInvalidError(
            f"{len(adapter_ids)} adapters of {page_count} pages ({page_count * page_bytes} bytes) were asked for; adapter memory "
            f"has {self.page_count} pages ({self.page_count * page_bytes} bytes) and {self.slot_count} slots; "
            "raise adapters.memory_bytes",
            code="adapter_too_large",
        )
        return Residency(ResidencyState.FAILED, error.error_code, error.message)

    def close(self) -> None:
        """End the loader thread."""
        self._loader.close()
