"""Token ids to text, a few at a time, so that the pieces concatenate to the whole.

A character may take several tokens and a token's text may depend on the one before it (leading spaces), so a window of recent
ids is decoded again and only what is new in it and complete is given out. The technique is known from TGI and vLLM; unlike
theirs this one gives out the complete characters in front of an incomplete one at once.
"""

from __future__ import annotations

from collections.abc import Callable

_INCOMPLETE = "\ufffd"
_CONTEXT_TOKENS = 4
# A character has at most 4 bytes and a token at least one, so after this many tokens an incomplete ending is garbage, not
# patience. Without the bound a model that emits only broken bytes makes every step decode a longer window.
_MAX_HELD_TOKENS = 12


class IncrementalDetokenizer:
    """One sequence's text as it grows.

    Args:
        decode: Text of a list of ids, special tokens left out.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._context_count = 0  # tokens of the window whose text is given out completely
        self._given = ""  # text of the window that is given out already

    def feed(self, token_id: int) -> str:
        """Add one token; return the text that is now certain, often "" in the middle of a character."""
        self._window.append(token_id)
        text = self._decode(self._window)
        certain = text.rstrip(_INCOMPLETE)
        held_count = len(self._window) - self._context_count
        if certain != text and held_count <= _MAX_HELD_TOKENS:
            return self._give(certain)
        new = self._give(text)
        self._advance()
        return new

    def finish(self) -> str:
        """The rest, with U+FFFD for bytes that never became a character."""
        return self._give(self._decode(self._window)) if self._window else ""

    def _give(self, text: str) -> str:
        if len(text) <= len(self._given):
            return ""
        new = text[len(self._given) :]
        self._given = text
        return new

    def _advance(self) -> None:
        """Keep a few tokens as context: decoders treat the first token of a text differently."""
        self._window = self._window[-_CONTEXT_TOKENS:]
        self._context_count = len(self._window)
        self._given = self._decode(self._window)
