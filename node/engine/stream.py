"""The events of one sequence on their way to whoever submitted it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Self

import msgspec

from node.engine.messages import SequenceEvent


class SequenceStream:
    """An async iterator over the events of one sequence; it ends after the one with a `finish_reason`.

    A reader slower than the engine finds the waiting events joined to one. They are bounded: one a token, at most
    `max_new_tokens` tokens a sequence, and the client bounds the sequences.

    Args:
        on_abandon: Called once when the reader closes the stream before its end.
    """

    def __init__(self, sequence_id: str, tenant: str, on_abandon: Callable[[str], None]) -> None:
        self.sequence_id = sequence_id
        self.tenant = tenant
        self._on_abandon = on_abandon
        self._events: deque[SequenceEvent] = deque()
        self._has_news = asyncio.Event()
        self.is_finished = False  # the last event has arrived
        self.is_cancelled = False  # the engine was told to stop it; set by the client
        self._is_closed = False  # the reader has taken it, or has left

    def put(self, event: SequenceEvent) -> None:
        """Deliver an event."""
        self.is_finished = self.is_finished or event.finish_reason is not None
        if not self._is_closed:
            self._events.append(event)
            self._has_news.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SequenceEvent:
        while not self._events:
            if self._is_closed:
                raise StopAsyncIteration
            self._has_news.clear()
            await self._has_news.wait()
        event = self._events.popleft()
        if self._events:
            event = self._joined(event)
        self._is_closed = self._is_closed or event.finish_reason is not None
        return event

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
            self._has_news.set()
            if not self.is_finished:
                self._on_abandon(self.sequence_id)


def _only_adds_tokens(event: SequenceEvent) -> bool:
    is_whole = event.finish_reason in (None, "stop", "length")
    return is_whole and event.prompt_logprobs is None and event.embedding is None and not event.cached_prompt_tokens
