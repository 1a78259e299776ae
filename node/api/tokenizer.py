"""The base model's tokenizer in the API process: text to ids, ids to text, without torch or transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from node.errors import ModelLoadError


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Contents of `special_tokens.json`. `adds_bos`: the model was trained with bos before plain text."""

    bos_token: str | None = None
    bos_token_id: int | None = None
    eos_token: str | None = None
    eos_token_id: int | None = None
    adds_bos: bool = False

    @classmethod
    def read(cls, path: Path) -> SpecialTokens:
        """Read the file; a model without one has no special tokens of note."""
        if not path.is_file():
            return cls()
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            bos_token=values.get("bos_token"),
            bos_token_id=values.get("bos_token_id"),
            eos_token=values.get("eos_token"),
            eos_token_id=values.get("eos_token_id"),
            adds_bos=bool(values.get("add_bos", False)),
        )


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """A token of an encoded text with its character offsets [start, stop)."""

    token_id: int
    text: str
    start: int
    stop: int


class TextTokenizer:
    """Encodes and decodes with one `tokenizer.json`. Methods are pure, on any thread; encoding releases the interpreter lock."""

    def __init__(self, tokenizer: Tokenizer, special: SpecialTokens) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.special = special
        added = tokenizer.get_added_tokens_decoder()
        self._special_texts = {token_id: token.content for token_id, token in added.items() if token.special}
        self._added_texts = {token_id: token.content for token_id, token in added.items()}
        self._is_byte_level = _uses_byte_level(json.loads(tokenizer.to_str()).get("decoder"))
        self._bytes_of_char = _byte_level_alphabet()
        self._texts: dict[int, str] = {}  # of tokens by themselves, at most the vocabulary: log-probabilities show many

    @classmethod
    def open(cls, directory: Path) -> TextTokenizer:
        """Read `tokenizer.json` and `special_tokens.json`.

        Raises:
            ModelLoadError: The tokenizer is missing or cannot be read.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ModelLoadError(f"{path} does not exist; the base model needs a tokenizer.json", code="model_not_found_on_disk")
        try:
            tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:
            raise ModelLoadError(
                f"{path} is not a tokenizer this node can read; convert it again", code="model_corrupt"
            ) from error
        return cls(tokenizer, SpecialTokens.read(directory / "special_tokens.json"))

    def encode(self, text: str, *, adds_special: bool = True) -> list[int]:
        """Token ids of `text`; with `adds_special` as the model saw plain text in training (bos where it has one)."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=adds_special).ids
        return self._with_bos(ids) if adds_special else ids

    def spans(self, text: str, *, adds_special: bool = True) -> list[TokenSpan]:
        """Tokens of `text` with offsets, for `/tokenize`."""
        encoding = self._tokenizer.encode(text, add_special_tokens=adds_special)
        rows = zip(encoding.ids, encoding.offsets, strict=True)
        spans = [TokenSpan(token_id, self.token_text(token_id), start, stop) for token_id, (start, stop) in rows]
        ids = self._with_bos(encoding.ids) if adds_special else encoding.ids
        return [TokenSpan(ids[0], self.token_text(ids[0]), 0, 0), *spans] if len(ids) > len(spans) else spans

    def _with_bos(self, ids: list[int]) -> list[int]:
        """Tokenizers converted from GGUF carry no post-processor, so bos may still be missing here."""
        bos = self.special.bos_token_id
        if not self.special.adds_bos or bos is None or (ids and ids[0] == bos):
            return ids
        return [bos, *ids]

    def decode(self, ids: list[int]) -> str:
        """Text of `ids` without special tokens."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a control token, which is never part of an answer's text."""
        return token_id in self._special_texts

    def token_text(self, token_id: int) -> str:
        """One token's text by itself; bytes that are no complete character show as U+FFFD."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self.token_bytes(token_id).decode("utf-8", errors="replace")
        return text

    def places(self, ids: Sequence[int], text: str) -> list[int]:
        """Where each token begins in the text it is part of, in characters. Control tokens that the text does not show, and the
        space that some tokenizers put before it, take no room; a character of several tokens belongs to the first."""
        found, at = [], 0
        for token_id in ids:
            found.append(at)
            shown = self.token_text(token_id)
            if text.startswith(shown, at):
                at += len(shown)
            elif shown.startswith(" ") and text.startswith(shown[1:], at):
                at += len(shown) - 1
            elif not self.is_special(token_id):
                at = min(len(text), at + sum(byte & 0xC0 != 0x80 for byte in self.token_bytes(token_id)))
        return found

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; b"" for an id beyond the vocabulary (padding rows of the output matrix)."""
        if token_id in self._added_texts:
            return self._added_texts[token_id].encode()
        piece: str | None = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        if self._is_byte_level and all(char in self._bytes_of_char for char in piece):
            return bytes(self._bytes_of_char[char] for char in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()


def _uses_byte_level(decoder: dict[str, Any] | None) -> bool:
    """Whether pieces are written in GPT-2's byte alphabet."""
    if decoder is None:
        return False
    if decoder.get("type") == "Sequence":
        return any(_uses_byte_level(inner) for inner in decoder.get("decoders", []))
    return decoder.get("type") == "ByteLevel"


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's map: printable Latin-1 bytes stand for themselves, the other 68 for U+0100 onwards, in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet
