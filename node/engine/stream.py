"""The events of one sequence on their way to whoever submitted it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Self

import msgspec

from node.engine.messages import SequenceEvent

Take = Callable[[SequenceEvent], bool]


class SequenceStream:
    """An async iterator over the events of one sequence; it ends after the one with a `finish_reason`.

    A reader slower than the engine finds the waiting events joined to one. They are bounded: one a token, at most
    `max_new_tokens` tokens a sequence, and the client bounds the sequences. A reader with a function for events
    (`hand_to`) is not woken for those it takes: waking a task costs more than a token is worth.

    Args:
        on_abandon: Called once when the reader closes the stream before its end.
    """

    def __init__(self, sequence_id: str, tenant: str, on_abandon: Callable[[str], None]) -> None:
        self.sequence_id = sequence_id
        self.tenant = tenant
        self._on_abandon = on_abandon
        self._events: deque[SequenceEvent] = deque()
        self._waiter: asyncio.Future[None] | None = None  # of a reader that found no event
        self._take: Take | None = None
        self._fault: Exception | None = None
        self.is_finished = False  # the last event has arrived
        self.is_cancelled = False  # the engine was told to stop it; set by the client
        self._is_closed = False  # the reader has taken it, or has left

    def hand_to(self, take: Take) -> None:
        """Offer events to `take` while the reader waits, on whose behalf it says whether it took one. The reader gets the last
        event whatever `take` says of it. What it raises is raised to the reader."""
        self._take = take

    def put(self, event: SequenceEvent) -> None:
        """Deliver an event."""
        self.add(event)
        self.hand_over()

    def add(self, event: SequenceEvent) -> None:
        """Keep an event until `hand_over`."""
        if event.finish_reason is not None:
            self.is_finished = True
        if not self._is_closed:
            self._events.append(event)

    def hand_over(self) -> None:
        """Let a reader that waits have what was added."""
        waiter = self._waiter
        if waiter is None or waiter.done() or not self._events:
            return
        if self._take is not None and self._is_taken(self._take):
            return
        waiter.set_result(None)

    def _is_taken(self, take: Take) -> bool:
        event = self._next()
        try:
            if not self._events and take(event) and event.finish_reason is None:
                return True
        except Exception as error:  # noqa: BLE001 - raised to the reader, whose function it is
            self._fault = error
        self._events.appendleft(event)
        return False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SequenceEvent:
        while not self._events:
            if self._is_closed:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._fault is not None:
            raise self._fault
        event = self._next()
        self._is_closed = self._is_closed or event.finish_reason is not None
        return event

    def _next(self) -> SequenceEvent:
        event = self._events.popleft()
        return self._joined(event) if self._events else event

    def _joined(self, first: SequenceEvent) -> SequenceEvent:
        """An event and those waiting behind it that only have more tokens: a reader that is behind catches up at one go."""
        tokens, finish_reason = list(first.tokens), first.finish_reason
        while finish_reason is None and self._events and _only_adds_tokens(self._events[0]):
            event = self._events.popleft()
            tokens += event.tokens
            finish_reason = event.finish_reason
        return msgspec.structs.replace(first, tokens=tuple(tokens), finish_reason=finish_reason)

    async def aclose(self) -> None:
        """Stop reading. A sequence that still runs is cancelled."""
        if not self._is_closed:
            self._is_closed = True
            self._events.clear()
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(None)
            if not self.is_finished:
                self._on_abandon(self.sequence_id)


def _only_adds_tokens(event: SequenceEvent) -> bool:
    is_whole = event.finish_reason in (None, "stop", "length")
    return is_whole and event.prompt_logprobs is None and event.embedding is None and not event.cached_prompt_tokens
