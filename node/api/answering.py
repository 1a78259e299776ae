"""What every generation route needs: limits, the request path, who is calling, headers, JSON."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import random
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from node.api.errors import meaning_of
from node.api.exchange import Exchange
from node.api.generation import Generation, Limits
from node.api.idempotency import HEADER, Replays, Work, refuse_streamed
from node.api.serve import Caller, RequestPath
from node.api.sse import EventStream, StreamLimits
from node.api.tokenizer import TextTokenizer, TokenSpan
from node.api.tool_dialect import ToolDialect
from node.api.voucher_header import read_voucher
from node.errors import NodeError
from node.telemetry.metrics import NodeMetrics
from node.tenancy.door import Principal, bearer_token
from node.tenancy.tenancy import Tenancy

TENANT = web.RequestKey("tenant", str)
PRINCIPAL = web.RequestKey("principal", Principal)
REQUEST_ID = web.RequestKey("request_id", str)
RECEIPT_ID = web.RequestKey("receipt_id", str)  # set once the request is admitted: from then on it has a record, however it ends
IS_FAILED = web.RequestKey("is_failed", bool)
_MAX_WARNINGS_CHARS = 512
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answering:
    """Shared by the OpenAI and the LoRAX routes."""

    path: RequestPath
    limits: Limits
    tokenizer: TextTokenizer
    dialect: ToolDialect
    executor: Executor
    metrics: NodeMetrics
    random_source: random.Random
    clock: Callable[[], float]
    now: Callable[[], datetime]
    base_name: str
    max_body_bytes: int
    body_timeout_s: float
    tenancy: Tenancy
    replays: Replays
    stream_limits: StreamLimits

    def _caller(self, request: web.Request) -> Caller:
        """Tenant from the API key, payment from the voucher header.

        Raises:
            PaymentError: The header is there and malformed.
        """
        voucher = read_voucher(request.headers.getall("x-openlora-voucher", []))
        return Caller(request[REQUEST_ID], request[PRINCIPAL].tenant, request.path, voucher)

    def source_token(self, request: web.Request) -> str | None:
        """The Authorization header as an adapter source's own credential, as LoRAX has it. Never on a node with API keys: there
        it carries the node's."""
        return bearer_token(request.headers.getall("Authorization", [])) if self.tenancy.door.is_open else None

    def request_id(self, request: web.Request) -> str:
        """Id of this HTTP exchange, for logs and error bodies."""
        return request[REQUEST_ID]

    @asynccontextmanager
    async def admitted(self, request: web.Request, generation: Generation) -> AsyncIterator[Exchange]:
        """`RequestPath.admitted` for an HTTP request; an error after admission is answered with the receipt's id.

        Raises:
            NodeError: As `RequestPath.admitted`; PaymentError when the voucher header is malformed.
        """
        async with self.path.admitted(generation, self._caller(request)) as exchange:
            request[RECEIPT_ID] = exchange.request_id
            yield exchange

    async def once(self, request: web.Request, body: dict[str, Any], work: Work) -> web.Response:
        """Run `work`, or give the answer again that the request's `Idempotency-Key` has got already."""
        return await self.replays.answer(self._key_scope(request), request.headers.getall(HEADER, []), body, work)

    def _key_scope(self, request: web.Request) -> str:
        """Whose idempotency keys: the tenant's. Without API keys, those who send the same Authorization: it opens adapters."""
        scope = f"{request[PRINCIPAL].tenant.name} {request.path}"
        if not self.tenancy.door.is_open:
            return scope
        return f"{scope} {hashlib.sha256(request.headers.get('Authorization', '').encode()).hexdigest()}"

    def stream(self, request: web.Request) -> EventStream:
        """A stream of events to the caller.

        Raises:
            UnsupportedError: The request has an `Idempotency-Key`.
        """
        refuse_streamed(request.headers.getall(HEADER, []))
        return EventStream(request, self.stream_limits)

    def headers(self, generation: Generation, exchange: Exchange) -> dict[str, str]:
        """What is known at admission."""
        headers = {
            "x-openlora-receipt": exchange.request_id,
            "x-model-id": _latin(self.base_name),
        }
        recipe = exchange.opening.recipe
        if recipe:
            headers["x-adapter-id"] = _latin(",".join(item.entry.name for item in recipe))
            headers["x-openlora-adapters"] = ",".join(item.entry.adapter_id for item in recipe)
            if len(recipe) > 1:
                headers["x-openlora-recipe"] = exchange.opening.recipe_hash
            headers["x-adapter-source"] = ",".join(dict.fromkeys(item.entry.source for item in recipe))
        headers.update(warning_headers(generation.warnings))
        return headers

    async def spans(self, text: str, adds_special: bool) -> list[TokenSpan]:
        """Tokens of a text with offsets, off the event loop."""
        return await self.off_loop(functools.partial(self.tokenizer.spans, text, adds_special=adds_special))

    async def off_loop(self, work: Callable[[], T]) -> T:
        """Do what takes long on a thread, so that others' tokens leave meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self.executor, work)

    def json(self, body: Any, headers: dict[str, str]) -> web.Response:
        """A JSON answer."""
        return web.Response(body=msgspec.json.encode(body), headers=headers, content_type="application/json")

    def count_failure(self, request: web.Request, error: NodeError) -> None:
        """One more failed request, under LoRAX's label, whatever its status says: a stream's left before it failed."""
        request[IS_FAILED] = True
        self.metrics.lorax_failure.labels(meaning_of(error).lorax_type).inc()


def warning_headers(names: tuple[str, ...]) -> dict[str, str]:
    """`x-openlora-warnings` lists fields that were ignored, cut to a sane length."""
    if not names:
        return {}
    text = "ignored unknown fields: " + ", ".join(names)
    return {"x-openlora-warnings": _latin(text)[:_MAX_WARNINGS_CHARS]}


def _latin(text: str) -> str:
    """A header value may hold printable ASCII only; the rest is escaped, so that no name can break the header apart."""
    return "".join(char if " " <= char <= "~" else char.encode("unicode_escape").decode() for char in text)
