"""Web pages of other origins: which may read this node's answers (CORS, https://fetch.spec.whatwg.org/#http-cors-protocol).

None by default. Without API keys a node trusts whoever reaches it, and every page that the operator's browser opens reaches this
machine; LoRAX and vLLM let all of them read. A key is in no cookie, so an allowed page has only what it was given.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

_ANY = "*"
_PREFLIGHT_S = 600
_METHODS = "GET, POST"
_NAME = re.compile(r"[a-z0-9-]{1,64}")  # of a header that a page wants to send
_MAX_NAMES = 32
_READABLE = ", ".join(
    (
        "retry-after",
        "x-request-id",
        "x-model-id",
        "x-adapter-id",
        "x-adapter-source",
        "x-openlora-adapters",
        "x-openlora-receipt",
        "x-openlora-recipe",
        "x-openlora-warnings",
        "idempotency-replayed",
    )
)


def answer_preflights(origins: Sequence[str]) -> Middleware:
    """A browser asks before it sends a page's request, and shows no key then: that question is answered without one.

    Args:
        origins: `server.cors_origins`.
    """

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        is_preflight = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
        if not is_preflight or not _is_allowed(request, origins):
            return await handler(request)
        headers = {"Access-Control-Allow-Methods": _METHODS, "Access-Control-Max-Age": str(_PREFLIGHT_S)}
        names = _wanted_headers(request)
        if names:
            headers["Access-Control-Allow-Headers"] = ", ".join(names)
        return web.Response(status=204, headers=headers)

    return middleware


def let_origins_read(origins: Sequence[str]) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """Mark every answer to an allowed page, refusals and streams too, as one that it may read.

    Args:
        origins: `server.cors_origins`.
    """

    async def prepare(request: web.Request, response: web.StreamResponse) -> None:
        if not origins:
            return
        if _ANY not in origins:
            response.headers.add("Vary", "Origin")  # also where it is refused: a cache must not give one page another's answer
        if _is_allowed(request, origins):
            response.headers["Access-Control-Allow-Origin"] = _ANY if _ANY in origins else request.headers["Origin"]
            response.headers["Access-Control-Expose-Headers"] = _READABLE

    return prepare


def _is_allowed(request: web.Request, origins: Sequence[str]) -> bool:
    origin = request.headers.get("Origin")
    return origin is not None and (_ANY in origins or origin in origins)


def _wanted_headers(request: web.Request) -> list[str]:
    """What the page wants to send, as far as these are names of headers: clients' libraries send many of their own, and none
    means anything here that the page could not say in the body."""
    asked = request.headers.get("Access-Control-Request-Headers", "").lower().split(",")[:_MAX_NAMES]
    return [name for name in map(str.strip, asked) if _NAME.fullmatch(name)]
