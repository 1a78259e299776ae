"""Adapters on their way from the host arena to a device, and whether a step that names one would have to wait for it.

A step is planned while the one before it runs. A copy that began before that and takes less time than it is done when the planned
step begins, so the step may name the adapter, and nobody waits. Both times are taken from what went before.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from node.adapters.page_store import Arrival

SEEN_STEPS, SEEN_COPIES = 4, 8  # the shortest and the slowest of so many are what is counted on
SHARE = 0.7  # of a step that copies may take to count as hidden behind it


@dataclass(frozen=True, slots=True)
class _Copy:
    """One adapter's bytes, sent during step `step`."""

    arrival: Arrival
    byte_count: int
    step: int


class Copies:
    """In the order they were sent, which is the order they arrive in.

    Args:
        clock: Monotonic seconds.

    Attributes:
        byte_count: On their way.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._copies: OrderedDict[str, _Copy] = OrderedDict()
        self._joined: set[str] = set()
        self._step = 0
        self._begun_s = clock()
        self._steps_s: deque[float] = deque(maxlen=SEEN_STEPS)
        self._byte_s: deque[float] = deque(maxlen=SEEN_COPIES)  # seconds a byte
        self.byte_count = 0  # on their way

    def __len__(self) -> int:
        return len(self._copies)

    def __contains__(self, adapter_id: str) -> bool:
        return adapter_id in self._copies

    def begin_step(self) -> list[str]:
        """The next step is planned from here on; returns the adapters that have arrived, which are forgotten."""
        now_s = self._clock()
        self._steps_s.append(now_s - self._begun_s)
        self._begun_s = now_s
        self._step += 1
        done = [adapter_id for adapter_id, copy in self._copies.items() if copy.arrival.is_done()]
        for adapter_id in done:
            copy = self._copies.pop(adapter_id)
            self.byte_count -= copy.byte_count
            self._joined.discard(adapter_id)
            copy.arrival.join()  # its tables are shown in the order of the steps
            self._byte_s.append(copy.arrival.seconds() / max(1, copy.byte_count))
        return done

    def is_full(self, byte_limit: int) -> bool:
        """Whether one more would stand in line for longer than a step, behind those of this step or `byte_limit` in all."""
        if self.byte_count >= byte_limit or not self._byte_s:
            return self.byte_count >= byte_limit
        sent = sum(copy.byte_count for copy in self._copies.values() if copy.step == self._step)
        return sent > 0 and sent * max(self._byte_s) >= SHARE * min(self._steps_s)

    def add(self, adapter_id: str, arrival: Arrival, byte_count: int) -> None:
        """A copy was started."""
        self._copies[adapter_id] = _Copy(arrival, byte_count, self._step)
        self.byte_count += byte_count

    def join(self, adapter_id: str) -> None:
        """Work launched from now on waits for this adapter, on the device, if it is still on its way."""
        copy = self._copies.get(adapter_id)
        if copy is not None:
            copy.arrival.join()
            self._joined.add(adapter_id)

    def is_hidden(self, adapter_id: str) -> bool:
        """Whether this adapter will have arrived, as far as one can tell, when the step that is being planned begins."""
        if not self._byte_s:
            return False
        if self._copies[adapter_id].step == self._step:
            return self._is_early(adapter_id)
        ahead = 0
        for name, copy in self._copies.items():
            ahead += copy.byte_count
            if name == adapter_id:
                break
        return ahead * max(self._byte_s) <= SHARE * min(self._steps_s)

    def _is_early(self, adapter_id: str) -> bool:
        """Whether the part that is needed first will have arrived when the step begins, during the second half of the step
        before it. What earlier steps joined arrives before."""
        ahead = 0.0
        for name, copy in self._copies.items():
            if copy.step == self._step or name not in self._joined:
                share = copy.arrival.early_share if copy.step == self._step else 1.0
                if share is None:
                    return False
                ahead += share * copy.byte_count
            if name == adapter_id:
                break
        return ahead * max(self._byte_s) <= SHARE * min(self._steps_s) / 2
