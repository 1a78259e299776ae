"""Adapters on their way from verified files into pages: what the loader's threads have in hand, and what headers said so far."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path

from node.adapters.file_plan import FilePlan
from node.adapters.load_failures import LoadFailures
from node.adapters.loader import AdapterLoader, AdapterPlan, Failed, Filled, Inspected, Placed
from node.adapters.page_filler import Page
from node.adapters.residency import Residency

REMEMBERED_PLANS = 4096  # small: what headers say is shared by all adapters of a shape (`file_plan`)


class Arrivals:
    """Which adapters are being inspected (headers read, so that their size is known) or filled. For the step loop only.

    Args:
        loader: The threads that do it.
        clock: Monotonic seconds.
    """

    def __init__(self, loader: AdapterLoader, clock: Callable[[], float]) -> None:
        self._loader = loader
        self._inspecting: set[str] = set()
        self._filling: set[str] = set()
        self._plans: OrderedDict[str, AdapterPlan] = OrderedDict()
        self._failures = LoadFailures(clock)

    def __contains__(self, adapter_id: str) -> bool:
        return adapter_id in self._inspecting or adapter_id in self._filling

    def __len__(self) -> int:
        return len(self._inspecting) + len(self._filling)

    @property
    def has_room(self) -> bool:
        """Whether the loader takes one more job."""
        return self._loader.job_count < self._loader.job_limit

    def failure_of(self, adapter_id: str) -> Residency | None:
        """What to tell whoever asks for an adapter that failed a moment ago."""
        return self._failures.of(adapter_id)

    def files_of(self, adapter_ids: Iterable[str]) -> list[FilePlan]:
        """What is known of these adapters' files."""
        return [self._plans[adapter_id].file for adapter_id in adapter_ids if adapter_id in self._plans]

    def plan(self, adapter_id: str, directory: Path) -> AdapterPlan | None:
        """The plan of an adapter in this directory; None begins to read its headers. Needs `has_room`."""
        plan = self._plans.get(adapter_id)
        if plan is not None and plan.directory == directory:
            return plan
        self._inspecting.add(adapter_id)
        self._loader.inspect(adapter_id, directory)
        return None

    @property
    def is_filling(self) -> bool:
        """Whether any adapter's pages are being written."""
        return bool(self._filling)

    def fill(self, plan: AdapterPlan, pages: list[Page], *, is_urgent: bool = False) -> None:
        """Begin to write an adapter into `pages`. Needs `has_room`. See `AdapterLoader.fill`."""
        self._filling.add(plan.adapter_id)
        self._loader.fill(plan, pages, is_urgent=is_urgent)

    def take(self, wait_s: float = 0.0) -> list[Placed | Filled | Failed]:
        """What became of pages: complete, complete and proven, or never to be either, in the order in which it happened.

        Args:
            wait_s: How long to wait where nothing has happened.
        """
        found: list[Placed | Filled | Failed] = []
        for outcome in self._loader.outcomes(wait_s):
            if isinstance(outcome, Inspected):
                self._inspecting.discard(outcome.plan.adapter_id)
                self._remember(outcome.plan)
            elif isinstance(outcome, Failed):
                self._failures.note(outcome.adapter_id, outcome.error)
                if self._give_up(outcome.adapter_id):
                    found.append(outcome)
            else:
                if isinstance(outcome, Filled):
                    self._filling.discard(outcome.plan.adapter_id)
                found.append(outcome)
        return found

    def forget(self, adapter_id: str) -> None:
        """Read its headers again when it is next wanted."""
        self._plans.pop(adapter_id, None)

    def _give_up(self, adapter_id: str) -> bool:
        """Whether it had pages."""
        self._inspecting.discard(adapter_id)
        self.forget(adapter_id)
        was_filling = adapter_id in self._filling
        self._filling.discard(adapter_id)
        return was_filling

    def _remember(self, plan: AdapterPlan) -> None:
        self._plans[plan.adapter_id] = plan
        while len(self._plans) > REMEMBERED_PLANS:
            self._plans.popitem(last=False)
