"""Token ids to text, a few at a time, so that the pieces concatenate to the whole.

A character may take several tokens and a token's text may depend on the one before it (leading spaces), so a window of recent
ids is decoded again and only what is new in it and complete is given out. The technique is known from TGI and vLLM; unlike
theirs this one gives out the complete characters in front of an incomplete one at once.
"""

from __future__ import annotations

from collections.abc import Callable

_INCOMPLETE = "\ufffd"
# A character has at most 4 bytes and a token at least one, so after this many tokens an incomplete ending is garbage, not
# patience. Without the bound a model that emits only broken bytes makes every step decode a longer window.
_MAX_HELD_TOKENS = 12
_MAX_CONTEXT_TOKENS = 32


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
        held = self._window[self._context_count :]
        if not held:
            return ""
        text = self._decode(self._window)
        # Byte fallback turns a whole run of bytes into U+FFFD when its last character is cut off, given-out ones included.
        return self._give(text) if text.startswith(self._given) else self._decode(held)

    def _give(self, text: str) -> str:
        if len(text) <= len(self._given):
            return ""
        new = text[len(self._given) :]
        self._given = text
        return new

    def _advance(self) -> None:
        """Keep what was just given out as context: decoders treat the first token of a text differently.

        The context begins where whole characters begin, never in the middle of one, and shows some text: behind tokens
        without any, a decoder would still strip the next token's space as the text's first.
        """
        recent = self._window[self._context_count :]
        text = self._decode(recent)
        if text or len(self._window) > _MAX_CONTEXT_TOKENS:
            self._window, self._given = recent, text
        else:
            self._given = self._decode(self._window)
        self._context_count = len(self._window)
