"""A token bucket: a rate with room for bursts of one minute."""

from __future__ import annotations

from collections.abc import Callable

MINUTE_S = 60.0


class MinuteBucket:
    """Holds up to `per_minute` units and refills evenly. Not thread-safe.

    Args:
        per_minute: Capacity, and what flows in within a minute; at least 1.
        clock: Monotonic seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._at_s = clock()

    @property
    def remaining(self) -> int:
        """Whole units that can be taken now."""
        self._refill()
        return int(self._level)

    def wait_s(self, amount: int) -> float | None:
        """Seconds until `amount` can be taken: 0 for now, None for never."""
        if amount > self.per_minute:
            return None
        self._refill()
        return max(0.0, (amount - self._level) * MINUTE_S / self.per_minute)

    def take(self, amount: int) -> None:
        """Take what `wait_s` said is there."""
        self._level -= amount

    def give_back(self, amount: int) -> None:
        """Return what was taken and not used."""
        self._level = min(float(self.per_minute), self._level + amount)

    @property
    def full_s(self) -> float:
        """Seconds until it is full again."""
        self._refill()
        return (self.per_minute - self._level) * MINUTE_S / self.per_minute

    def _refill(self) -> None:
        now_s = self._clock()
        self._level = min(float(self.per_minute), self._level + (now_s - self._at_s) * self.per_minute / MINUTE_S)
        self._at_s = now_s
