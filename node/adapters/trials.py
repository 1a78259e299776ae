"""Adapters whose pages are complete while their bytes are still being hashed, and the one of them that steps compute with.

On an idle GPU a prompt is computed beside the hash of its adapter, on trial. Nothing that came of it leaves before the hash is
known (`AdapterPool.settle`); if it is another one, whoever ran ends with the error that loading ends with, and nobody else is let
near the adapter before it has left. Only where nobody runs, and one adapter at a time: otherwise all that share a step would wait
for that hash.
"""

from __future__ import annotations

from collections.abc import Mapping

from node.adapters.file_plan import FilePlan
from node.adapters.loader import AdapterPlan, Failed
from node.adapters.residency import Residency, ResidencyState
from node.adapters.residents import Residents


class Trials:
    """Names only; `node.adapters.route` moves the bytes.

    Args:
        residents: Where an adapter is pinned while it is on trial.
    """

    def __init__(self, residents: Residents) -> None:
        self._residents = residents
        self._placed: dict[str, FilePlan] = {}
        self._running: str | None = None
        self._refused: dict[str, Residency] = {}

    @property
    def has_any(self) -> bool:
        """Whether an adapter is on trial, or was refused and has not left yet."""
        return self._running is not None or bool(self._refused)

    @property
    def refused(self) -> Mapping[str, Residency]:
        """Adapters that failed on trial and have not left yet, with what to tell whoever named them."""
        return self._refused

    def placed(self, adapter_id: str) -> FilePlan | None:
        """The plan of an adapter whose pages are complete and whose hash is not known."""
        return self._placed.get(adapter_id)

    def is_on(self, adapter_id: str) -> bool:
        """Whether steps may compute with it although its hash is not known."""
        return adapter_id == self._running

    def is_proven(self, adapter_id: str) -> bool:
        """Whether it is neither on trial nor refused."""
        return not self.is_on(adapter_id) and adapter_id not in self._refused

    def place(self, plan: AdapterPlan) -> None:
        """Its pages are complete."""
        self._placed[plan.adapter_id] = plan.file

    def begin(self, adapter_id: str) -> None:
        """Steps may compute with a placed one, which is resident, from now on. One at a time."""
        if self._running is not None:
            raise ValueError(f"adapter {self._running} is on trial, {adapter_id} cannot be as well")
        self._residents.pin(adapter_id)
        self._running = adapter_id

    def prove(self, adapter_id: str) -> None:
        """Its hash is the one that was asked for."""
        self._placed.pop(adapter_id, None)
        if self.is_on(adapter_id):
            self._end(adapter_id)

    def refuse(self, failed: Failed) -> None:
        """Its pages are not what was asked for, which is remembered until it has left if it was on trial until now."""
        self._placed.pop(failed.adapter_id, None)
        if self.is_on(failed.adapter_id):
            self._refused[failed.adapter_id] = Residency(ResidencyState.FAILED, failed.error.error_code, failed.error.message)
            self._end(failed.adapter_id)

    def drop_refused(self) -> None:
        """Let go of those that failed, once nobody holds them any more."""
        for adapter_id in list(self._refused):
            if self._residents.is_pinned(adapter_id):
                continue
            if self._residents.has_place(adapter_id):
                self._residents.evict(adapter_id)
            del self._refused[adapter_id]

    def _end(self, adapter_id: str) -> None:
        self._running = None
        self._residents.unpin(adapter_id)
