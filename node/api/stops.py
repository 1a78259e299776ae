"""Stop strings, matched across token boundaries. No part of a stop string ever leaves."""

from __future__ import annotations


class StopMatcher:
    """Watches one sequence's text.

    Semantics: the answer ends before the stop string that *completes* first in the text (the longest, where several complete
    at the same character), so the result does not depend on how the text was cut into tokens. Text that may still turn out to
    be the beginning of a stop string is held back.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.is_matched = False
        self.has_stops = bool(stops)

    def feed(self, text: str) -> str:
        """Add text; return what is safe to show. After a match nothing more is."""
        if not self._stops:
            return text
        if self.is_matched or not text:
            return ""
        held = self._held + text
        start = self._find(held)
        if start is not None:
            self.is_matched = True
            self._held = ""
            return held[:start]
        keep = self._possible_beginning(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """What was held back and turned out to be ordinary text."""
        rest, self._held = self._held, ""
        return rest

    def _find(self, text: str) -> int | None:
        """Start of the match that ends first; the earliest start among those."""
        found = ((text.find(stop), len(stop)) for stop in self._stops)
        ends = [(start + length, start) for start, length in found if start >= 0]
        return min(ends)[1] if ends else None

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest ending of `text` that begins a stop string."""
        longest = max(len(stop) for stop in self._stops) - 1
        for length in range(min(longest, len(text)), 0, -1):
            ending = text[len(text) - length :]
            if any(stop.startswith(ending) for stop in self._stops):
                return length
        return 0
