"""Adapters that follow each other through the layers of steps on a GPU.

A sequence's adapter is free when its last step ends, and its successor's cannot be there a moment later: a step would go by in
which the place is empty. But that step has done with the first half of the layers long before it ends, and the one behind it
needs the second half late. So a page's first half is copied once the newest step has passed its middle, its second half when that
step has ended, and the next step, which names the newcomer already, waits for it at its own middle, in its graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class Halves:
    """Two events between the halves of a step's layers, inside its graph where it has one.

    Args:
        compute: The stream that steps are launched on.
    """

    def __init__(self, compute: torch.cuda.Stream) -> None:
        self._compute = compute
        self._gate: torch.cuda.Stream = torch.cuda.Stream(compute.device)  # type: ignore[no-untyped-call]
        # External: graphs record and await these same events whenever they are launched.
        self._passed = torch.cuda.Event(external=True)  # type: ignore[no-untyped-call]
        self._arrived = torch.cuda.Event(external=True)  # type: ignore[no-untyped-call]
        self._passed.record(compute)
        self._arrived.record(compute)

    def reach(self) -> None:
        """A step has come to its middle. Called while it is launched or recorded."""
        stream = torch.cuda.current_stream()
        self._passed.record(stream)
        stream.wait_event(self._arrived)

    def guard(self, stream: torch.cuda.Stream) -> None:
        """Let `stream` wait until the newest step has passed its middle."""
        stream.wait_event(self._passed)

    def hold(self, event: torch.cuda.Event) -> None:
        """Let steps that are launched from now on wait for this event at their middle, besides those before it."""
        self._gate.wait_event(event)
        self._arrived.record(self._gate)


class EarlyArrival:
    """One adapter's copies, in two halves.

    Args:
        begin, first, event: Before the first half, after it, and after the second.
        share: What part of the bytes the first half is.
        show: Writes the slot's tables, in the order of the steps: those launched before read what they held.
    """

    def __init__(
        self,
        begin: torch.cuda.Event,
        first: torch.cuda.Event,
        event: torch.cuda.Event,
        share: float,
        compute: torch.cuda.Stream,
        halves: Halves,
        show: Callable[[], None],
    ) -> None:
        self._begin, self._first, self._event = begin, first, event
        self.early_share: float | None = share
        self._compute = compute
        self._halves = halves
        self._show = show
        self._is_joined = False

    def is_done(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def join(self) -> None:
        if not self._is_joined:
            self._compute.wait_event(self._first)
            self._halves.hold(self._event)
            self._show()
            self._is_joined = True

    def seconds(self) -> float:
        return float(self._begin.elapsed_time(self._first)) / 1e3 / (self.early_share or 1.0)
