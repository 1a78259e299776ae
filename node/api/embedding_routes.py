"""`POST /v1/embeddings` and LoRAX's `POST /embed`."""

from __future__ import annotations

import base64
import struct
from typing import Any

from aiohttp import web

from node.api.answering import Answering
from node.api.body import read_json
from node.api.embedding_request import read_embed, read_embeddings
from node.api.exchange import Exchange
from node.api.generation import Generation
from node.api.openai_routes import collect, with_bearer
from node.errors import EngineError


class EmbeddingRoutes:
    """Embeddings go the way of every request: admitted, recorded, receipted."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering

    async def embeddings(self, request: web.Request) -> web.Response:
        """OpenAI's shape, with the same vectors under LoRAX's name."""
        body = await read_json(request, self._answering.max_body_bytes, self._answering.body_timeout_s)
        generation, encoding = read_embeddings(body, self._answering.limits)
        generation = with_bearer(generation, self._answering.source_token(request))
        return await self._answering.once(request, body, lambda: self._embeddings(request, generation, encoding))

    async def _embeddings(self, request: web.Request, generation: Generation, encoding: str) -> web.Response:
        async with self._answering.admitted(request, generation) as exchange:
            vectors = await _vectors(exchange)
            receipt = await exchange.commit()
            data = [
                {"object": "embedding", "index": index, "embedding": _encoded(vector, encoding)}
                for index, vector in enumerate(vectors)
            ]
            count = exchange.prompt_token_count
            answer: dict[str, Any] = {
                "object": "list",
                "data": data,
                "embeddings": data,
                "model": generation.model or self._answering.base_name,
                "usage": {"prompt_tokens": count, "total_tokens": count},
                "openlora": {"request_id": exchange.request_id, "receipt": receipt},
            }
            return self._answering.json(answer, self._answering.headers(generation, exchange))

    async def embed(self, request: web.Request) -> web.Response:
        """LoRAX's shape: one vector."""
        body = await read_json(request, self._answering.max_body_bytes, self._answering.body_timeout_s)
        generation = self._read_embed(request, body)
        return await self._answering.once(request, body, lambda: self._embed(request, generation))

    async def _embed(self, request: web.Request, generation: Generation) -> web.Response:
        async with self._answering.admitted(request, generation) as exchange:
            vectors = await _vectors(exchange)
            receipt = await exchange.commit()
            proof = {"request_id": exchange.request_id, "receipt": receipt}
            answer = {"embeddings": vectors[0], "openlora": proof}
            return self._answering.json(answer, self._answering.headers(generation, exchange))

    def _read_embed(self, request: web.Request, body: dict[str, Any]) -> Generation:
        return read_embed(body, self._answering.limits, self._answering.source_token(request))


async def _vectors(exchange: Exchange) -> list[list[float]]:
    """One unit vector a prompt."""
    await collect(exchange)
    vectors = []
    for choice in exchange.choices:
        if choice.embedding is None:
            raise EngineError("the engine ended without an embedding; send the request again", retry_after_s=1.0)
        vectors.append(_unit(choice.embedding))
    return vectors


def _unit(raw: bytes) -> list[float]:
    values = struct.unpack(f"<{len(raw) // 4}f", raw)
    length = sum(value * value for value in values) ** 0.5
    if length == 0:
        raise EngineError("the text's embedding is zero, so it has no direction; try another adapter")
    return [value / length for value in values]


def _encoded(vector: list[float], encoding: str) -> list[float] | str:
    if encoding == "float":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
