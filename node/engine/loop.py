"""The step loop of the engine process: take commands, run a step, send its events; sleep when there is nothing to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from node.engine.messages import (
    Cancel,
    Command,
    Event,
    Evict,
    Prefetch,
    SequenceEvent,
    Shutdown,
    Stats,
    Step,
    Submit,
)
from node.request import AdapterTerm

COPY_POLL_S = 0.001  # less than a copy takes
STATS_INTERVAL_S = 0.5  # half of what is promised: a long step may come in between


class Channel(Protocol):
    """See `node.engine.channel.EngineChannel`."""

    @property
    def is_blocked(self) -> bool: ...

    def receive(self, timeout_s: float) -> list[Command]: ...

    def send(self, event: Event) -> None: ...


class Steppable(Protocol):
    """See `node.engine.engine.Engine`."""

    @property
    def has_work(self) -> bool: ...

    @property
    def is_copying(self) -> bool: ...

    def add(self, submit: Submit) -> list[SequenceEvent]: ...

    def cancel(self, sequence_id: str) -> list[SequenceEvent]: ...

    def cancel_all(self) -> list[SequenceEvent]: ...

    def prefetch(self, term: AdapterTerm) -> None: ...

    def evict(self, adapter_id: str) -> None: ...

    def step(self) -> tuple[list[SequenceEvent], bool]: ...

    def stats(self) -> Stats: ...


class EngineLoop:
    """Runs an engine until it is told to stop.

    Args:
        engine: What runs. channel: where commands come from and events go.
        clock: Monotonic seconds.
    """

    def __init__(self, engine: Steppable, channel: Channel, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._channel = channel
        self._clock = clock
        self._stats_due_s = clock()
        self._is_idle = True
        self._is_stopping = False

    def run(self) -> None:
        """Loop until `Shutdown`; every sequence then gets its last event."""
        while not self._is_stopping:
            self.run_once()
        self._send(self._engine.cancel_all())

    def run_once(self) -> None:
        """One turn: commands first, because a cancel must not wait behind a step it makes pointless."""
        self._take(self._channel.receive(self._wait_s()))
        if not self._channel.is_blocked:
            self._send_stats()
            if self._engine.has_work and not self._is_stopping:
                events, has_computed = self._engine.step()
                self._is_idle = not has_computed
                self._send(events)

    def _wait_s(self) -> float:
        """How long the loop may sleep: not at all while rows are being computed."""
        if self._engine.has_work and not self._is_idle and not self._channel.is_blocked:
            return 0.0
        if self._engine.has_work and self._engine.is_copying:
            return COPY_POLL_S
        return max(0.001, self._stats_due_s - self._clock())

    def _take(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Submit):
                self._is_idle = False
                self._send(self._engine.add(command))
            elif isinstance(command, Cancel):
                self._send(self._engine.cancel(command.sequence_id))
            elif isinstance(command, Prefetch):
                self._is_idle = False
                self._engine.prefetch(command.term)
            elif isinstance(command, Evict):
                self._engine.evict(command.adapter_id)
            elif isinstance(command, Shutdown):
                self._is_stopping = True

    def _send(self, events: list[SequenceEvent]) -> None:
        if events:
            self._channel.send(Step(tuple(events)))

    def _send_stats(self) -> None:
        now_s = self._clock()
        if now_s >= self._stats_due_s:
            self._stats_due_s = now_s + STATS_INTERVAL_S
            self._channel.send(self._engine.stats())
