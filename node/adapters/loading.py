"""Brings adapters closer: on a CPU inspected (headers read, size known), filling, resident; on a GPU inspected, filling pages of
the host arena, staged there, sent. One thing at a time for each adapter, as there is room for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from node.adapters.arrivals import Arrivals
from node.adapters.charges import Charges
from node.adapters.demand import Demand
from node.adapters.file_plan import FilePlan
from node.adapters.loader import AdapterLoader, Filled, Placed
from node.adapters.residency import Residency
from node.adapters.residents import Residents
from node.adapters.route import Route
from node.adapters.trials import Trials

PROOF_WAIT_S = 1.0  # between two looks at whether the loader's threads are alive


class Loading:
    """Adapters that are not resident yet, or not proven.

    Args:
        loader: The threads that fill pages.
        route: Where these lie, and how they get to the steps.
        residents: Who is there. charges: who can never be.
        demand: Who waits.
        clock: Monotonic seconds.

    Attributes:
        file_loads_total: Adapters read from their files. load_seconds_total: what threads spent on it.
    """

    def __init__(
        self,
        loader: AdapterLoader,
        route: Route,
        residents: Residents,
        charges: Charges,
        demand: Demand,
        clock: Callable[[], float],
    ) -> None:
        self._route = route
        self._charges = charges
        self._demand = demand
        self._arrivals = Arrivals(loader, clock)
        self._trials = Trials(residents)
        self.file_loads_total = 0
        self.load_seconds_total = 0.0

    @property
    def has_room(self) -> bool:
        """Whether the loader takes one more job."""
        return self._arrivals.has_room

    @property
    def has_trials(self) -> bool:
        """Whether an adapter is on trial, or was refused and has not left yet."""
        return self._trials.has_any

    def is_proven(self, adapter_id: str) -> bool:
        """Whether a resident adapter's hash is the one that was asked for."""
        return self._trials.is_proven(adapter_id)

    def refusal(self, adapter_ids: Collection[str]) -> Residency | None:
        """Why a recipe cannot run: an adapter failed a moment ago, or all together never fit."""
        for adapter_id in adapter_ids:
            failure = self._arrivals.failure_of(adapter_id) or self._trials.refused.get(adapter_id)
            if failure is not None:
                return failure
        return self._charges.refusal(len(adapter_ids), self._arrivals.files_of(adapter_ids))

    def start(self, adapter_id: str, directory: str | Path) -> None:
        """Do the next thing that brings an adapter closer which is not resident, if there is room for it now."""
        if self._route.bring(adapter_id, self._demand.wanted):
            return
        if (placed := self._trials.placed(adapter_id)) is not None:
            self._try(adapter_id, placed)
        if adapter_id in self._arrivals or not self._arrivals.has_room:
            return
        plan = self._arrivals.plan(adapter_id, Path(directory))
        pages = None if plan is None else self._route.claim(plan, self._demand.wanted)
        if plan is not None and pages is not None:
            can_try = self._route.can_send_early and self._demand.is_waited_for(adapter_id)
            self._arrivals.fill(plan, pages, is_urgent=can_try and not self._arrivals.is_filling)

    def _try(self, adapter_id: str, placed: FilePlan) -> None:
        """Send an adapter before its hash is known, where somebody waits for it and for nothing else."""
        is_alone = self._demand.is_waited_for(adapter_id) and not self._trials.has_any
        if is_alone and self._route.send_early(adapter_id, placed, self._demand.wanted):
            self._trials.begin(adapter_id)

    def begin_step(self) -> None:
        """Let go of what failed on trial and take over what the loader finished."""
        self._trials.drop_refused()  # of the step before: whoever ran with it has heard of it by now
        self._take_arrivals()

    def settle(self, adapter_ids: Collection[str]) -> Mapping[str, Residency]:
        """Wait until the hash of these adapters is known. See `AdapterPool.settle`."""
        while any(map(self._trials.is_on, adapter_ids)):
            self._take_arrivals(PROOF_WAIT_S)
        return self._trials.refused

    def forget(self, adapter_id: str) -> None:
        """Read an adapter's headers again when it is next wanted."""
        self._arrivals.forget(adapter_id)

    def _take_arrivals(self, wait_s: float = 0.0) -> None:
        for outcome in self._arrivals.take(wait_s):
            if isinstance(outcome, Placed):
                self._trials.place(outcome.plan)
            elif isinstance(outcome, Filled):
                self._trials.prove(outcome.plan.adapter_id)
                self.file_loads_total += 1
                self.load_seconds_total += outcome.seconds
                self._route.complete(outcome)
            else:
                self._trials.refuse(outcome)
                self._route.abandon(outcome.adapter_id)
