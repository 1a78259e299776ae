"""Says in the log how far a start is, so that whoever waits for one sees where it goes."""

from __future__ import annotations

import logging
from collections.abc import Callable


class StartNotes:
    """Called with what is done.

    Args:
        clock: Monotonic seconds; the start begins now.
        logger: Where the notes go.
    """

    def __init__(self, clock: Callable[[], float], logger: logging.Logger) -> None:
        self._clock = clock
        self._logger = logger
        self._begun_s = self._last_s = clock()

    def __call__(self, done: str) -> None:
        now_s = self._clock()
        self._logger.info("start: %s after %.2f s (%.2f)", done, now_s - self._begun_s, now_s - self._last_s)
        self._last_s = now_s


def no_notes(_: str) -> None:
    """For an engine that nobody waits for."""
