"""Adapters that could not be loaded, remembered for a moment: long enough for every sequence that waits to hear of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from node.adapters.residency import Residency, ResidencyState
from node.errors import AdapterError

REMEMBERED_FAILURES = 1024
FAILURE_S = 1.0  # and short enough to try again soon


class LoadFailures:
    """What to tell whoever asks for an adapter that failed.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._found: OrderedDict[str, tuple[AdapterError, float]] = OrderedDict()

    def note(self, adapter_id: str, error: AdapterError) -> None:
        """Loading this adapter failed just now; of too many the one that failed first is forgotten."""
        self._found[adapter_id] = (error, self._clock() + FAILURE_S)
        while len(self._found) > REMEMBERED_FAILURES:
            self._found.popitem(last=False)

    def of(self, adapter_id: str) -> Residency | None:
        """FAILED, or None when the adapter may be tried."""
        found = self._found.get(adapter_id)
        if found is None:
            return None
        error, until_s = found
        if self._clock() >= until_s:
            del self._found[adapter_id]
            return None
        return Residency(ResidencyState.FAILED, error.error_code, error.message)
