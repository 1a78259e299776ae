"""Says how far a start is, so that whoever waits for one sees where it goes."""

from __future__ import annotations

from collections.abc import Callable

Note = Callable[[str], None]


class StartNotes:
    """Called with what is done.

    Args:
        clock: Monotonic seconds; the start begins now.
        say: Called with what is done, the seconds since the start began and those since the last note.
    """

    def __init__(self, clock: Callable[[], float], say: Callable[[str, float, float], None]) -> None:
        self._clock = clock
        self._say = say
        self._begun_s = self._last_s = clock()

    def __call__(self, done: str) -> None:
        now_s = self._clock()
        self._say(done, now_s - self._begun_s, now_s - self._last_s)
        self._last_s = now_s


def no_notes(_: str) -> None:
    """For whoever does not want to know."""
