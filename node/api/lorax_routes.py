"""`POST /`, `/generate`, `/generate_stream` (and `/invocations`) as LoRAX has them."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

import msgspec
from aiohttp import web

from node.api.answering import Answering
from node.api.body import read_json
from node.api.choice import Piece
from node.api.errors import lorax_body
from node.api.exchange import Exchange
from node.api.generation import Generation
from node.api.lorax_answers import LoraxAnswers
from node.api.lorax_request import read_lorax
from node.api.openai_routes import collect
from node.api.sse import EventStream
from node.errors import EngineError, NodeError, UnsupportedError


class LoraxRoutes:
    """Reads LoRAX's requests and writes LoRAX's answers; everything between is `RequestPath`."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering

    async def compatible(self, request: web.Request) -> web.StreamResponse:
        """`POST /`: the body's `stream` chooses; a whole answer is a list of one."""
        body = await self._body(request)
        if body.get("stream") is True:
            return await self._stream(request, body)
        return await self._whole(request, body, is_list=True)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """`POST /generate`: one object."""
        return await self._whole(request, await self._body(request), is_list=False)

    async def generate_stream(self, request: web.Request) -> web.StreamResponse:
        """`POST /generate_stream`: events."""
        return await self._stream(request, await self._body(request))

    async def unsupported(self, request: web.Request) -> web.StreamResponse:
        """LoRAX's routes for models of another kind."""
        raise UnsupportedError(
            f"{request.path} needs a model with a classification head; this node serves decoders: use /generate or /embed",
            code="not_implemented",
        )

    async def _body(self, request: web.Request) -> dict[str, Any]:
        return await read_json(request, self._answering.max_body_bytes, self._answering.body_timeout_s)

    def _read(self, request: web.Request, body: dict[str, Any], is_stream: bool) -> Generation:
        bearer = self._answering.source_token(request)
        return read_lorax(body, self._answering.limits, self._answering.random_source, bearer, is_stream)

    async def _whole(self, request: web.Request, body: dict[str, Any], *, is_list: bool) -> web.StreamResponse:
        generation = self._read(request, body, is_stream=False)
        return await self._answering.once(request, body, lambda: self._answered(request, generation, is_list))

    async def _answered(self, request: web.Request, generation: Generation, is_list: bool) -> web.Response:
        async with self._answering.admitted(request, generation) as exchange:
            texts, tokens = await collect(exchange)
            receipt = await exchange.commit()
            answer = LoraxAnswers(generation, exchange, self._answering.tokenizer).whole(texts, tokens, receipt)
            headers = {**self._answering.headers(generation, exchange), **_characters(generation), **self._figures(exchange)}
            return self._answering.json([answer] if is_list else answer, headers)

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """LoRAX answers 200 and puts every error, even a wrong parameter, into the stream; there is no [DONE]."""
        stream = self._answering.stream(request)
        try:
            generation = self._read(request, body, is_stream=True)
            async with self._answering.admitted(request, generation) as exchange:
                stream.add_headers({**self._answering.headers(generation, exchange), **_characters(generation)})
                async with stream.kept_alive():
                    await self._send_tokens(stream, LoraxAnswers(generation, exchange, self._answering.tokenizer), exchange)
        except NodeError as error:
            self._answering.count_failure(request, error)
            await stream.send(lorax_body(error, self._answering.request_id(request)))
        return await stream.close(has_marker=False)

    async def _send_tokens(self, stream: EventStream, answers: LoraxAnswers, exchange: Exchange) -> None:
        events = _Events(stream, answers)
        async with aclosing(exchange.pieces(events)) as pieces:
            async for piece in pieces:
                events.text += piece.text
                last = len(piece.tokens) - 1 if exchange.is_finished else len(piece.tokens)
                for token in piece.tokens[:last]:
                    await stream.send(answers.event(token))
                if exchange.is_finished:
                    if not piece.tokens:
                        raise EngineError("the answer ended without a last token", code="incomplete_generation")
                    receipt = await exchange.commit()
                    await stream.send(answers.last_event(piece.tokens[-1], events.text, receipt))

    def _figures(self, exchange: Exchange) -> dict[str, str]:
        """LoRAX's token and time headers; times are whole milliseconds. Inference holds the queue, not measured apart."""
        now_s = self._answering.clock()
        first_s = exchange.first_token_s or now_s
        total_ms = round((now_s - exchange.arrived_s) * 1000)
        output_count = exchange.output_token_count
        return {
            "x-compute-time": str(total_ms),
            "x-total-time": str(total_ms),
            "x-validation-time": str(round((exchange.started_s - exchange.arrived_s) * 1000)),
            "x-inference-time": str(round((now_s - exchange.started_s) * 1000)),
            "x-time-to-first-token": str(round((first_s - exchange.arrived_s) * 1000)),
            "x-time-per-output-token": str(round((now_s - first_s) * 1000 / max(1, output_count - 1))),
            "x-time-per-token": str(round(total_ms / max(1, output_count))),
            "x-prompt-tokens": str(exchange.prompt_token_count),
            "x-generated-tokens": str(output_count),
            "x-skipped-tokens": "0",
            "x-total-tokens": str(exchange.prompt_token_count + output_count),
        }


class _Events:
    """Pieces as events of a stream, a `PieceSink`, and the text so far. The last token waits for the record: LoRAX's clients
    expect the whole text in its event, and a token in every event."""

    def __init__(self, stream: EventStream, answers: LoraxAnswers) -> None:
        self.text = ""
        self._stream = stream
        self._answers = answers

    @property
    def is_clear(self) -> bool:
        return self._stream.is_clear

    def take(self, piece: Piece) -> Piece | None:
        if piece.finish_reason is not None:
            return piece
        self.text += piece.text
        if piece.tokens:
            self._stream.send_at_once(*(msgspec.json.encode(self._answers.event(token)) for token in piece.tokens))
        return None


def _characters(generation: Generation) -> dict[str, str]:
    return {"x-compute-characters": str(len(generation.prompts[0].text or ""))}
