"""Answers in OpenAI's shapes, chat and completions, whole and in chunks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from node.api.best_of import ranked
from node.api.choice import Choice, Piece, TextToken
from node.api.doors import Receipt
from node.api.exchange import Exchange
from node.api.generation import Generation
from node.api.tokenizer import TextTokenizer
from node.api.tool_calls import ToolCallReader, merged
from node.request import DrawnToken, TokenLogprob

_MARK = "\x00text\x00"
_FINISH = {"stop": "stop", "stop_sequence": "stop", "length": "length"}


@dataclass(frozen=True, slots=True)
class OpenAiAnswers:
    """Builds the JSON of one request's answer.

    Attributes:
        created_s: UTC seconds.
        model: Name that the answer carries: the adapter's, or the base model's.
    """

    generation: Generation
    exchange: Exchange
    tokenizer: TextTokenizer
    created_s: int
    model: str
    echoed: dict[int, int] = field(default_factory=dict, init=False, repr=False)  # choices whose prompt has left: its characters
    readers: dict[int, ToolCallReader] = field(default_factory=dict, init=False, repr=False)  # by choice

    def whole(self, texts: list[str], tokens: list[list[TextToken]], receipt: Receipt) -> dict[str, Any]:
        """The complete answer."""
        rows = [(self.exchange.choices[place], texts[place], tokens[place]) for place in self._given(tokens)]
        choices = [{**self._choice(*row), "index": index} for index, row in enumerate(rows)]
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {**self._frame(kind), "choices": choices, "usage": self.usage(), "openlora": self.proof(receipt)}

    def _given(self, tokens: list[list[TextToken]]) -> Sequence[int]:
        """Places of the choices that the answer holds."""
        kept = self.generation.kept_count
        if kept is None or kept == self.generation.choice_count:
            return range(len(tokens))
        return ranked(self.exchange.choices, tokens, kept)

    def opening_chunk(self) -> dict[str, Any] | None:
        """Chat announces every choice's role before its text."""
        if not self._is_chat:
            return None
        content = "" if self.generation.calls is None else None
        choices = [
            {"index": choice.index, "delta": {"role": "assistant", "content": content}, "logprobs": None, "finish_reason": None}
            for choice in self.exchange.choices
        ]
        return {**self._frame("chat.completion.chunk"), "choices": choices}

    def chunk(self, piece: Piece, text_offset: int) -> dict[str, Any] | None:
        """One piece, or None when it shows nothing, such as the wrapping of a tool call.

        Args:
            text_offset: Where its text begins in the choice, for completion log-probabilities.
        """
        finish = _FINISH[piece.finish_reason] if piece.finish_reason is not None else None
        if not self._is_chat:
            return {**self._frame("text_completion"), "choices": [self._completion_chunk(piece, text_offset, finish)]}
        logprobs = self._logprobs(list(piece.tokens), text_offset) if piece.tokens else None
        entry: dict[str, Any] = {"index": piece.choice_index, "logprobs": logprobs, "finish_reason": finish}
        if self.generation.calls is None:
            entry["delta"] = {"content": piece.text} if piece.text or finish is None else {}
        else:
            entry["delta"] = self._read_calls(piece.choice_index, piece.text, is_last=finish is not None)
            entry["finish_reason"] = self._call_finish(piece.choice_index, finish)
            if not entry["delta"] and finish is None and logprobs is None:
                return None
        return {**self._frame("chat.completion.chunk"), "choices": [entry]}

    def _completion_chunk(self, piece: Piece, text_offset: int, finish: str | None) -> dict[str, Any]:
        """One piece of a completion; the first of a choice begins with the prompt, where `echo` asks for it."""
        choice, is_first = self.exchange.choices[piece.choice_index], piece.choice_index not in self.echoed
        echo = self._echo(choice) if is_first else ""
        offset = self.echoed.setdefault(choice.index, len(echo)) + text_offset
        has_prompt = is_first and self.generation.has_prompt_text
        logprobs = self._logprobs(list(piece.tokens), offset) if piece.tokens or has_prompt else None
        if has_prompt and logprobs is not None:
            logprobs = self._with_prompt(choice, logprobs)
        return {"index": choice.index, "logprobs": logprobs, "finish_reason": finish, "text": echo + piece.text}

    def around_text(self) -> tuple[bytes, bytes] | None:
        """What stands before and behind the text in later chunks of the only choice, as JSON; None where there is more in them
        than a text."""
        if self.generation.top_logprobs >= 0 or self.generation.calls is not None:
            return None
        parts = msgspec.json.encode(self.chunk(Piece(0, _MARK, (), None), text_offset=1)).split(msgspec.json.encode(_MARK))
        return (parts[0], parts[1]) if len(parts) == 2 else None

    def _read_calls(self, choice_index: int, text: str, *, is_last: bool) -> dict[str, Any]:
        """What a piece of text adds to a message that may call tools."""
        if self.generation.calls is None:
            return {"content": text}
        reader = self.readers.get(choice_index)
        if reader is None:
            reader = self.readers[choice_index] = ToolCallReader(self.generation.calls)
        content, deltas = reader.feed(text)
        if is_last:
            content += reader.finish()
        delta: dict[str, Any] = {"content": content} if content else {}
        if deltas:
            delta["tool_calls"] = merged(deltas, lambda index: self._call_id(choice_index, index))
        return delta

    def _call_finish(self, choice_index: int, finish: str | None) -> str | None:
        """An answer that ended with calls was ended by them; one that was cut off says so."""
        return "tool_calls" if finish == "stop" and self.readers[choice_index].call_count else finish

    def _call_id(self, choice_index: int, index: int) -> str:
        seed = f"{self.exchange.request_id}:{choice_index}:{index}"
        return "call_" + hashlib.sha256(seed.encode()).hexdigest()[:24]

    def usage_chunk(self) -> dict[str, Any]:
        """The extra last chunk of `stream_options.include_usage`."""
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return {**self._frame(kind), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Token counts."""
        prompt, output = self.exchange.prompt_token_count, self.exchange.output_token_count
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": self.exchange.cached_token_count},
        }

    def proof(self, receipt: Receipt) -> dict[str, Any]:
        """What ties the answer to its record."""
        return {"request_id": self.exchange.request_id, "receipt": receipt}

    @property
    def _is_chat(self) -> bool:
        return self.generation.shape == "chat"

    def _frame(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl-" if self._is_chat else "cmpl-"
        return {"id": prefix + self.exchange.request_id, "object": kind, "created": self.created_s, "model": self.model}

    def _choice(self, choice: Choice, text: str, tokens: list[TextToken]) -> dict[str, Any]:
        finish = _FINISH[choice.finish_reason or "stop"]
        if not self._is_chat:
            echo = self._echo(choice)
            logprobs = self._logprobs(tokens, len(echo))
            if self.generation.has_prompt_text and logprobs is not None:
                logprobs = self._with_prompt(choice, logprobs)
            return {"index": choice.index, "logprobs": logprobs, "finish_reason": finish, "text": echo + text}
        entry: dict[str, Any] = {"index": choice.index, "logprobs": self._logprobs(tokens, 0), "finish_reason": finish}
        if self.generation.calls is None:
            return {**entry, "message": {"role": "assistant", "content": text, "refusal": None}}
        read = self._read_calls(choice.index, text, is_last=True)
        message: dict[str, Any] = {"role": "assistant", "content": read.get("content"), "refusal": None}
        if "tool_calls" in read:
            message["tool_calls"] = [{name: call[name] for name in ("id", "type", "function")} for call in read["tool_calls"]]
        return {**entry, "message": message, "finish_reason": self._call_finish(choice.index, finish)}

    def _logprobs(self, tokens: list[TextToken], text_offset: int) -> dict[str, Any] | None:
        if self.generation.top_logprobs < 0:
            return None
        if self._is_chat:
            return {"content": [self._chat_logprob(token) for token in tokens], "refusal": None}
        return self._completion_logprobs(tokens, text_offset)

    def _chat_logprob(self, token: TextToken) -> dict[str, Any]:
        drawn = token.drawn
        own = self._named(TokenLogprob(drawn.token_id, drawn.logprob if drawn.logprob is not None else 0.0))
        return {**own, "top_logprobs": [self._named(item) for item in drawn.top]}

    def _named(self, item: TokenLogprob) -> dict[str, Any]:
        raw = self.tokenizer.token_bytes(item.token_id)
        return {"token": raw.decode("utf-8", errors="replace"), "logprob": item.logprob, "bytes": list(raw)}

    def _completion_logprobs(self, tokens: list[TextToken], text_offset: int) -> dict[str, Any]:
        offsets, position = [], text_offset
        for token in tokens:
            offsets.append(position)
            position += len(token.text)
        return {**self._scored([token.drawn for token in tokens]), "text_offset": offsets}

    def _scored(self, tokens: Sequence[DrawnToken]) -> dict[str, Any]:
        return {
            "tokens": [self.tokenizer.token_text(token.token_id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._by_text(token) for token in tokens] if self.generation.top_logprobs > 0 else None,
        }

    def _by_text(self, token: DrawnToken) -> dict[str, float | None]:
        """The likeliest tokens, best first, and the token itself, which OpenAI always shows. Of tokens with the same text the
        best counts: whoever looks whether a token was the likeliest compares the largest value with the token's own."""
        found: dict[str, float | None] = {}
        for item in token.top:
            found.setdefault(self.tokenizer.token_text(item.token_id), item.logprob)
        found.setdefault(self.tokenizer.token_text(token.token_id), token.logprob)
        return found

    def _echo(self, choice: Choice) -> str:
        """The prompt's text, where `echo` asks for it."""
        if not self.generation.has_prompt_text:
            return ""
        prompt = self.generation.prompts[choice.prompt_index]
        return prompt.text if prompt.text is not None else self.tokenizer.decode(list(prompt.token_ids or ()))

    def _with_prompt(self, choice: Choice, logprobs: dict[str, Any]) -> dict[str, Any]:
        """The prompt's tokens before the answer's. The first has no log-probability: nothing came before it."""
        ids = self.exchange.opening.prompts[choice.prompt_index]
        scored = self._scored([token for token in choice.prompt_logprobs or () if token is not None])
        top = None if scored["top_logprobs"] is None else [None, *scored["top_logprobs"], *logprobs["top_logprobs"]]
        return {
            "tokens": [self.tokenizer.token_text(ids[0]), *scored["tokens"], *logprobs["tokens"]],
            "token_logprobs": [None, *scored["token_logprobs"], *logprobs["token_logprobs"]],
            "top_logprobs": top,
            "text_offset": [*self.tokenizer.places(ids, self._echo(choice)), *logprobs["text_offset"]],
        }
