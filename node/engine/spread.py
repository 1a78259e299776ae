"""Spreads prompts that could all be computed in one step over several, where more sequences wait than could start.

Beside decoding sequences a prompt's row is cheapest in steps that are short and full (8B on an H100, a LoRA each: 14 us a row
in steps of 256 or 288 rows, 16 in steps of 512, 22 beyond), and whoever decodes waits for the end of a long step. But a step
more is a step more for all that is left to do. It pays where others wait for a place or for an adapter's: whoever starts a
step later ends a step later, so does its successor, and prompts that came together stay apart from then on. Where all that
waits could start, or so much that it would take many steps, steps are filled. Where answers are short, places would stand
empty while prompts wait for rows: a size is taken only where it has room for as many prompt rows as there were a step of
late.
"""

from __future__ import annotations

from node.engine.fairness import FairQueue
from node.engine.running import Running

SEEN_STEPS = 64  # the mean of so many counts as of late


class Spread:
    """Bounds the rows of a step.

    Args:
        running, queue: What could start.
        sizes: Rows of a step, shortest first, each with the most prompt rows that are spread over such steps.
    """

    def __init__(self, running: Running, queue: FairQueue, sizes: tuple[tuple[int, int], ...]) -> None:
        self._running = running
        self._queue = queue
        self.sizes = sizes
        self._mean_rows = 0.0  # for prompts, a step

    def note(self, row_count: int) -> None:
        """A step was planned, with so many rows for prompts."""
        self._mean_rows += (row_count - self._mean_rows) / SEEN_STEPS

    def limit(self, decode_count: int) -> int | None:
        """Rows of a step that `decode_count` sequences decode in; None: as many as there are."""
        if not self.sizes:
            return None
        if not decode_count:
            # The very first step: what is in the queue was not looked for yet, and whoever starts together ends together.
            is_first = not len(self._running) and len(self._queue) > self._running.free_places
            return self.sizes[0][0] if is_first else None
        most = self.sizes[-1][1]
        rows = sum(sequence.remaining_count for sequence in self._running if sequence.remaining_count > 1)
        started = 0
        for sequence in self._queue.open_sequences():
            if started == self._running.free_places or rows > most:
                break
            started += 1
            rows += sequence.remaining_count
        if started == len(self._queue):
            return None
        wanted = decode_count + max(1.0, self._mean_rows)
        return next((size for size, limit in self.sizes if rows <= limit and wanted <= size), None)
