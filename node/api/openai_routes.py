"""`POST /v1/chat/completions` and `POST /v1/completions`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import msgspec
from aiohttp import web

from node.api.answering import Answering
from node.api.body import read_json
from node.api.chat_request import read_chat
from node.api.choice import Piece, TextToken
from node.api.completion_request import read_completion
from node.api.errors import openai_body
from node.api.exchange import Exchange
from node.api.generation import Generation
from node.api.openai_answers import OpenAiAnswers
from node.api.sse import EventStream
from node.errors import NodeError

_SOURCE_TOKENS = ("hf_", "pb_")  # how the hub's and Predibase's begin


class OpenAiRoutes:
    """Reads OpenAI's requests and writes OpenAI's answers; everything between is `RequestPath`."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """One chat completion."""
        body = await read_json(request, self._answering.max_body_bytes, self._answering.body_timeout_s)
        generation = read_chat(body, self._answering.limits, self._answering.random_source, self._answering.dialect)
        return await self._answer(request, body, generation)

    async def completion(self, request: web.Request) -> web.StreamResponse:
        """One completion, of one or several prompts."""
        body = await read_json(request, self._answering.max_body_bytes, self._answering.body_timeout_s)
        generation = read_completion(body, self._answering.limits, self._answering.random_source)
        return await self._answer(request, body, generation)

    async def _answer(self, request: web.Request, body: dict[str, Any], generation: Generation) -> web.StreamResponse:
        generation = with_bearer(generation, self._answering.source_token(request))
        if generation.is_stream:
            return await self._stream(request, generation)
        return await self._answering.once(request, body, lambda: self._whole(request, generation))

    async def _whole(self, request: web.Request, generation: Generation) -> web.Response:
        async with self._answering.admitted(request, generation) as exchange:
            texts, tokens = await collect(exchange)
            receipt = await exchange.commit()
            answers = self._answers(generation, exchange)
            headers = self._answering.headers(generation, exchange)
            build = functools.partial(answers.whole, texts, tokens, receipt)
            body = await self._answering.off_loop(build) if generation.sampling.prompt_logprobs else build()
            return self._answering.json(body, headers)

    async def _stream(self, request: web.Request, generation: Generation) -> web.StreamResponse:
        """Errors before the first token are plain answers with their status; later ones are an event, then [DONE]."""
        stream = self._answering.stream(request)
        try:
            async with self._answering.admitted(request, generation) as exchange:
                stream.add_headers(self._answering.headers(generation, exchange))
                async with stream.kept_alive():
                    await self._send_pieces(stream, self._answers(generation, exchange), exchange)
        except NodeError as error:
            if not stream.is_open:
                raise
            self._answering.count_failure(request, error)
            await stream.send(openai_body(error, self._answering.request_id(request)))
        return await stream.close(has_marker=True)

    async def _send_pieces(self, stream: EventStream, answers: OpenAiAnswers, exchange: Exchange) -> None:
        chunks = _Chunks(stream, answers)
        async with aclosing(exchange.pieces(chunks)) as pieces:
            async for piece in pieces:
                if chunks.opening is not None:
                    await stream.send(chunks.opening)
                    chunks.opening = None
                for part in chunks.parts(piece):
                    build = functools.partial(chunks.of, part)
                    chunk = await self._answering.off_loop(build) if chunks.begins_scored(part.choice_index) else build()
                    if chunk is None:
                        continue
                    if part.finish_reason is not None and exchange.is_finished:
                        await self._send_last(stream, answers, exchange, chunk)
                    else:
                        await stream.send(chunk)

    async def _send_last(self, stream: EventStream, answers: OpenAiAnswers, exchange: Exchange, chunk: dict[str, Any]) -> None:
        """The record is durable before the end of the answer leaves, behind its last token; the receipt rides on the very last
        chunk."""
        receipt = await exchange.commit()
        if not answers.generation.has_usage_chunk:
            await stream.send({**chunk, "openlora": answers.proof(receipt)})
            return
        await stream.send(chunk, {**answers.usage_chunk(), "openlora": answers.proof(receipt)})

    def _answers(self, generation: Generation, exchange: Exchange) -> OpenAiAnswers:
        return OpenAiAnswers(
            generation,
            exchange,
            self._answering.tokenizer,
            int(self._answering.now().timestamp()),
            generation.model or self._answering.base_name,
        )


class _Chunks:
    """Pieces as chunks of a stream; a `PieceSink`."""

    def __init__(self, stream: EventStream, answers: OpenAiAnswers) -> None:
        self.opening = answers.opening_chunk()  # None: there is none, or it has left
        self._stream = stream
        self._answers = answers
        self._offsets: dict[int, int] = {}  # by choice: where the next text begins
        self._around: tuple[bytes, bytes] | None = None  # a text in the middle of an answer that is nothing but text

    def of(self, piece: Piece) -> dict[str, Any] | None:
        """None where there is nothing to show. That is no beginning either: an echoed prompt waits for what shows."""
        if not (piece.text or piece.tokens or piece.finish_reason):
            return None
        offset = self._offsets.get(piece.choice_index, 0)
        self._offsets[piece.choice_index] = offset + len(piece.text)
        return self._answers.chunk(piece, offset)

    @property
    def is_clear(self) -> bool:
        return self.opening is None and self._stream.is_clear and not self.begins_scored(0)

    def begins_scored(self, choice_index: int) -> bool:
        """Whether the choice's next chunk is its first and holds the log-probabilities of its prompt, which may be very many."""
        return self._answers.generation.sampling.prompt_logprobs and choice_index not in self._answers.echoed

    def parts(self, piece: Piece) -> Sequence[Piece]:
        """A finish reason has a chunk of its own, as OpenAI's have, behind what there is to show: that need not wait for it."""
        shows = piece.text or (piece.tokens and self._answers.generation.top_logprobs >= 0)
        return piece.split() if piece.finish_reason is not None and shows else (piece,)

    def take(self, piece: Piece) -> Piece | None:
        if piece.finish_reason is None:
            self._send_at_once(piece)
            return None
        *shown, end = self.parts(piece)
        for part in shown:
            self._send_at_once(part)
        return end

    def _send_at_once(self, piece: Piece) -> None:
        if self._around is not None and piece.text:
            before, behind = self._around
            self._stream.send_at_once(b"%b%b%b" % (before, msgspec.json.encode(piece.text), behind))
            return
        chunk = self.of(piece)
        if chunk is not None:
            self._stream.send_at_once(msgspec.json.encode(chunk))
            self._around = self._answers.around_text()


def with_bearer(generation: Generation, bearer: str | None) -> Generation:
    """The Authorization header as the adapter source's token, where it is one: OpenAI's clients always send something there, and
    a placeholder would be refused by sources that serve anybody."""
    if generation.adapter_token is not None or bearer is None or not bearer.startswith(_SOURCE_TOKENS):
        return generation
    return replace(generation, adapter_token=bearer)


async def collect(exchange: Exchange) -> tuple[list[str], list[list[TextToken]]]:
    """Text and tokens of every choice, complete."""
    texts = [""] * len(exchange.choices)
    tokens: list[list[TextToken]] = [[] for _ in exchange.choices]
    async with aclosing(exchange.pieces()) as pieces:
        async for piece in pieces:
            texts[piece.choice_index] += piece.text
            tokens[piece.choice_index].extend(piece.tokens)
    return texts, tokens
