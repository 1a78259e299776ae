"""One choice of an answer: the tokens of one sequence become text, up to a stop string."""

from __future__ import annotations

from collections import deque

import msgspec

from node.api.detokenizer import IncrementalDetokenizer
from node.api.stops import StopMatcher
from node.api.tokenizer import TextTokenizer
from node.engine.messages import SequenceEvent
from node.request import DrawnToken


class TextToken(msgspec.Struct, frozen=True, gc=False):
    """A token together with the text it added to the answer; "" for control tokens and inside a stop string."""

    drawn: DrawnToken
    text: str


class Piece(msgspec.Struct, frozen=True, gc=False):
    """What became certain for one choice at once.

    Attributes:
        text: New text, possibly "".
        tokens: Tokens whose text is now out completely.
        finish_reason: None while it runs; else "stop", "stop_sequence" or "length".
    """

    choice_index: int
    text: str
    tokens: tuple[TextToken, ...]
    finish_reason: str | None

    def split(self) -> tuple[Piece, Piece]:
        """What it adds to the answer, and that the answer is over."""
        return Piece(self.choice_index, self.text, self.tokens, None), Piece(self.choice_index, "", (), self.finish_reason)


class Choice:
    """The growing text of one sequence. Not thread-safe; lives on the event loop."""

    def __init__(
        self, index: int, prompt_index: int, tokenizer: TextTokenizer, stops: tuple[str, ...], end_ids: frozenset[int]
    ) -> None:
        self.index = index
        self.prompt_index = prompt_index
        self.token_ids: list[int] = []
        self.delivered_count = 0
        self.finish_reason: str | None = None
        self.prompt_logprobs: tuple[DrawnToken | None, ...] | None = None
        self.cached_prompt_tokens = 0
        self.embedding: bytes | None = None
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._detokenizer = IncrementalDetokenizer(tokenizer.decode)
        self._stops = StopMatcher(stops)
        self._waiting: deque[TextToken] = deque()
        self._free_chars = 0  # characters given out that belong to tokens still waiting

    def take(self, event: SequenceEvent) -> Piece:
        """Add one event of the engine; return what became certain. A matched stop string finishes the choice."""
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
        if event.embedding is not None:
            self.embedding = event.embedding
        self.cached_prompt_tokens = max(self.cached_prompt_tokens, event.cached_prompt_tokens)
        if not self._stops.has_stops and event.finish_reason is None and len(event.tokens) == 1:
            return self._plain(event.tokens[0])
        text = ""
        for drawn in event.tokens:
            text += self._add(drawn)
            if self._stops.is_matched:
                self.finish_reason = "stop_sequence"
                break
        else:
            self.finish_reason = event.finish_reason
            if self.finish_reason is not None:
                text += self._flush()
        return Piece(self.index, text, tuple(self._release()), self.finish_reason)

    def _plain(self, drawn: DrawnToken) -> Piece:
        """One token in the middle of a text without stop strings, where nothing ever waits."""
        text = self._text(drawn.token_id)
        return Piece(self.index, text, (TextToken(drawn, text),), None)

    def _text(self, token_id: int) -> str:
        self.token_ids.append(token_id)
        is_silent = token_id in self._end_ids or self._tokenizer.is_special(token_id)
        return "" if is_silent else self._detokenizer.feed(token_id)

    def _add(self, drawn: DrawnToken) -> str:
        added = self._text(drawn.token_id)
        self._waiting.append(TextToken(drawn, added))
        safe = self._stops.feed(added)
        self._free_chars += len(safe)
        return safe

    def _flush(self) -> str:
        """The sequence is over: what was held back was no stop string after all, unless the last bytes complete one."""
        rest = self._detokenizer.finish()
        if rest and self._waiting:
            last = self._waiting.pop()
            self._waiting.append(TextToken(last.drawn, last.text + rest))
        text = self._stops.feed(rest)
        if self._stops.is_matched:
            self.finish_reason = "stop_sequence"
        else:
            text += self._stops.finish()
        self._free_chars += len(text)
        return text

    def _release(self) -> list[TextToken]:
        """Tokens whose text is out; at the end all of them, the last ones cut where the stop string begins."""
        released = []
        while self._waiting and (self.finish_reason is not None or len(self._waiting[0].text) <= self._free_chars):
            token = self._waiting.popleft()
            shown = token.text[: self._free_chars]
            self._free_chars -= len(shown)
            released.append(TextToken(token.drawn, shown))
        return released
