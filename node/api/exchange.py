"""One admitted request: its sequences run, their tokens become pieces of text, and its books are closed exactly once."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Protocol

from node.api.choice import Choice, Piece
from node.api.doors import Books, Closing, Engine, Opening, Receipt
from node.api.errors import engine_error
from node.api.interleave import interleave
from node.engine.messages import SequenceEvent, Submit
from node.errors import EngineError

_FAULTS = ("error", "cancelled")  # finish reasons of sequences that have no answer


class PieceSink(Protocol):
    """Takes the pieces of an answer without a task of the event loop in between."""

    @property
    def is_clear(self) -> bool:
        """Whether a piece would be taken now, without waiting."""

    def take(self, piece: Piece) -> Piece | None:
        """Pass a piece on; called only while clear. Returns what must wait for the record: of one that ends the answer at least
        that it does."""


class Exchange:
    """Between admission and receipt.

    Args:
        submits: One message for each choice; `choices` are their growing texts, in the same order.
        is_streamed: Pieces leave as they come. Tokens of an answer that leaves in one go count as delivered only with it.
    """

    def __init__(
        self,
        opening: Opening,
        submits: tuple[Submit, ...],
        choices: tuple[Choice, ...],
        engine: Engine,
        books: Books,
        clock: Callable[[], float],
        is_streamed: bool,
    ) -> None:
        self.opening = opening
        self.choices = choices
        self.first_token_s: float | None = None
        self.started_s = self.arrived_s = clock()  # admitted; the request path sets when it arrived
        self.receipt: Receipt | None = None
        self._submits = submits
        self._engine = engine
        self._books = books
        self._clock = clock
        self._is_streamed = is_streamed
        self._closing: asyncio.Task[Receipt] | None = None
        self._status: str | None = None
        self._ends: dict[int, Piece] = {}  # by choice: what a sink left of the piece that ended the answer

    @property
    def request_id(self) -> str:
        """Also the receipt's id."""
        return self.opening.request_id

    @property
    def is_finished(self) -> bool:
        """Whether every choice has its finish reason."""
        return all(choice.finish_reason is not None for choice in self.choices)

    @property
    def prompt_token_count(self) -> int:
        """Over all prompts, each counted once whatever the number of choices."""
        return sum(len(ids) for ids in self.opening.prompts)

    @property
    def output_token_count(self) -> int:
        """Over all choices, end-of-sequence tokens included."""
        return sum(len(choice.token_ids) for choice in self.choices)

    @property
    def delivered_token_count(self) -> int:
        """Of those, what reached the client: what the record counts."""
        return sum(choice.delivered_count for choice in self.choices)

    @property
    def is_charged(self) -> bool:
        """Whether the books were closed for something delivered, as a whole or until the client went away."""
        closing = self._closing
        is_closed = closing is not None and closing.done() and not closing.cancelled() and closing.exception() is None
        return is_closed and (self._status == "ok" or (self._status == "cancelled" and self.delivered_token_count > 0))

    @property
    def cached_token_count(self) -> int:
        """Prompt tokens whose work the prefix cache saved, each prompt's best hit counted once."""
        best: dict[int, int] = {}
        for choice in self.choices:
            best[choice.prompt_index] = max(best.get(choice.prompt_index, 0), choice.cached_prompt_tokens)
        return sum(best.values())

    async def pieces(self, sink: PieceSink | None = None) -> AsyncGenerator[Piece, None]:
        """The answer as it grows. A piece counts as delivered when the reader comes back for the next one.

        Args:
            sink: Of a single choice it gets, while it is clear, every piece. What it passes on is not yielded.

        Raises:
            NodeError: The engine failed or is gone; the typed error says which.
        """
        sink = sink if len(self._submits) == 1 else None
        async with aclosing(interleave([self._follow(submit, sink) for submit in self._submits])) as events:
            async for index, event in events:
                choice = self.choices[index]
                piece = self._ends.pop(index, None)
                if piece is None:
                    if choice.finish_reason is not None:
                        continue
                    piece = self._taken(choice, event)
                if piece.finish_reason == "stop_sequence" and event.finish_reason is None:
                    self._engine.cancel(self._submits[index].sequence_id)
                yield piece
                if self._is_streamed:
                    choice.delivered_count = len(choice.token_ids)
                if piece.finish_reason is not None and self.is_finished:
                    return
        if not self.is_finished:
            raise EngineError("the engine ended the answer without a finish reason; send the request again", retry_after_s=1.0)

    def _taken(self, choice: Choice, event: SequenceEvent) -> Piece:
        if self.first_token_s is None and event.tokens:
            self.first_token_s = self._clock()
        return choice.take(event)

    def _take_at_once(self, sink: PieceSink, event: SequenceEvent) -> bool:
        choice = self.choices[0]
        if not sink.is_clear or choice.finish_reason is not None or event.finish_reason in _FAULTS:
            return False
        piece = self._taken(choice, event)
        rest = sink.take(piece)
        if rest is not piece:
            choice.delivered_count = len(choice.token_ids)
        if rest is not None:
            self._ends[0] = rest
        return rest is None

    async def _follow(self, submit: Submit, sink: PieceSink | None) -> AsyncIterator[SequenceEvent]:
        async with aclosing(self._engine.submit(submit)) as events:
            if sink is not None:
                events.hand_to(functools.partial(self._take_at_once, sink))
            async for event in events:
                if event.finish_reason == "error":
                    raise engine_error(event.error_code, event.error_message)
                if event.finish_reason == "cancelled":
                    raise EngineError("the engine is stopping and gave this sequence up; retry later", retry_after_s=1.0)
                yield event

    async def commit(self) -> Receipt:
        """Close the books of a complete answer; what the client gets after this is paid for.

        Raises:
            LedgerError: The record is not durable; the answer must end with this error and has no receipt.
        """
        for choice in self.choices:
            choice.delivered_count = len(choice.token_ids)
        self.receipt = await self._close("ok", self._finish_reason())
        return self.receipt

    async def abandon(self, status: str, finish_reason: str) -> None:
        """Stop what still runs and close the books as `status`, unless they are closed already."""
        for submit, choice in zip(self._submits, self.choices, strict=True):
            if choice.finish_reason is None:
                self._engine.cancel(submit.sequence_id)
        if self._closing is None:
            await self._close(status, finish_reason)

    async def _close(self, status: str, finish_reason: str) -> Receipt:
        """The task outlives a cancelled caller: a client that hangs up cannot interrupt its own record."""
        outputs = tuple(tuple(choice.token_ids[: choice.delivered_count]) for choice in self.choices)
        closing = Closing(self.request_id, status, finish_reason, outputs, self.cached_token_count)
        self._status = status
        self._closing = asyncio.create_task(self._books.close(closing))
        return await asyncio.shield(self._closing)

    async def settled(self) -> None:
        """Wait until the books are closed, however that ended."""
        if self._closing is not None:
            await asyncio.wait([self._closing])

    def _finish_reason(self) -> str:
        """One word for the record: "length" if any choice was cut off, else how they ended."""
        reasons = {choice.finish_reason for choice in self.choices}
        return "length" if "length" in reasons else "stop"
