"""Around every route: an id, the caller's key, and an answer for every error in the shape of the route."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import structlog
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from node.api.answering import IS_FAILED, PRINCIPAL, RECEIPT_ID, REQUEST_ID, TENANT
from node.api.errors import error_headers, lorax_body, meaning_of, openai_body
from node.api.loopback import is_addressed_as_loopback
from node.api.scopes import OPEN_PATHS, scopes_of
from node.errors import NodeError, RequestError
from node.telemetry.metrics import NodeMetrics
from node.tenancy.door import Principal, check_scope
from node.tenancy.tenancy import Tenancy
from node.tenancy.tenant import ANONYMOUS, Tenant

LORAX_UNSUPPORTED = ("/classify", "/classify_batch")
_LORAX_PATHS = frozenset(
    {"/", "/invocations", "/generate", "/generate_stream", "/health", "/ping", "/startup", "/info", "/tokenize", "/embed"}
).union(LORAX_UNSUPPORTED)
_NOBODY = Principal(Tenant(ANONYMOUS), frozenset())


def identify(new_id: Callable[[], str]) -> Middleware:
    """Give the request an id of ours. A client's own `x-request-id` is never a key of anything: ids must not be forgeable."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        request[REQUEST_ID] = new_id()
        request[TENANT], request[PRINCIPAL] = ANONYMOUS, _NOBODY
        return await handler(request)

    return middleware


def authenticate(tenancy: Tenancy, *, is_for_loopback: bool) -> Middleware:
    """Every path needs a key, unknown ones too, except those that load balancers ask; a known one needs a key with its scope.

    Args:
        is_for_loopback: The node listens to this machine alone: without keys, every request must be addressed to it.
    """

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path in OPEN_PATHS:
            return await handler(request)
        principal = tenancy.door.identify(request.headers.getall("Authorization", []), request.remote or "")
        request[TENANT], request[PRINCIPAL] = principal.tenant.name, principal
        if is_for_loopback and principal.key_id is None and not is_addressed_as_loopback(request):
            raise RequestError(
                f"the Host header is {request.host[:100]!r}; without API keys this node serves this machine alone: address it as "
                "127.0.0.1 or localhost, or make a key: openlora-node keys create NAME"
            )
        resource = request.match_info.route.resource
        if principal.key_id is not None and resource is not None:
            check_scope(principal, scopes_of(request.method, resource.canonical))
        tenancy.meter.count_request(principal.tenant)
        return await handler(request)

    return middleware


def announce_limits(tenancy: Tenancy) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """Say on every answer, refusals and streams too, what is left of the caller's rates."""

    async def prepare(request: web.Request, response: web.StreamResponse) -> None:
        if PRINCIPAL in request and request.path not in OPEN_PATHS:
            response.headers.update(tenancy.meter.headers(request[PRINCIPAL].tenant))

    return prepare


def answer_errors(metrics: NodeMetrics, logger: structlog.typing.FilteringBoundLogger, clock: Callable[[], float]) -> Middleware:
    """Turn every exception into the route's own error shape; nothing unknown shows its text."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        started_s = clock()
        is_asked = request.method == "POST"  # LoRAX counts what it is asked to do, and no probe or scrape
        if is_asked:
            metrics.lorax_requests.inc()
        error: NodeError | None = None
        try:
            response = await handler(request)
        except NodeError as caught:
            error = caught.with_traceback(None)  # it leads here: kept, all that the request touched would wait for the collector
        except web.HTTPException as caught:
            error = _of_http(request, caught)
        except ConnectionError:
            logger.info("client_gone", request_id=request[REQUEST_ID], route=_route(request))
            raise
        except Exception:
            logger.exception("internal_error", request_id=request[REQUEST_ID], route=_route(request))
            error = NodeError("the node made a mistake; the request id below finds it in the node's log")
        if error is not None:
            response = _answer(request, error)
            if is_asked:
                metrics.lorax_failure.labels(meaning_of(error).lorax_type).inc()
        elif is_asked and response.status < 400 and IS_FAILED not in request:
            metrics.lorax_success.inc()
        if not response.prepared:
            response.headers["x-request-id"] = request[REQUEST_ID]
        logger.info(
            "request",
            request_id=request[REQUEST_ID],
            route=_route(request),
            status=response.status,
            code=error.error_code if error is not None else None,
            duration_ms=round((clock() - started_s) * 1000, 1),
        )
        return response

    return middleware


def _answer(request: web.Request, error: NodeError) -> web.Response:
    meaning, request_id = meaning_of(error), request[REQUEST_ID]
    body: dict[str, Any]
    if request.path in _LORAX_PATHS:
        status, body = meaning.lorax_status, lorax_body(error, request_id)
    else:
        status, body = meaning.status, openai_body(error, request_id)
    headers = error_headers(error)
    if RECEIPT_ID in request:
        headers["x-openlora-receipt"] = request[RECEIPT_ID]
    return web.Response(status=status, body=msgspec.json.encode(body), headers=headers, content_type="application/json")


def _of_http(request: web.Request, error: web.HTTPException) -> NodeError:
    """aiohttp's own refusals, in our words."""
    if error.status == 404:
        return RequestError(f"there is no {request.path[:200]!r} here; see /v1/models, /v1/chat/completions", code="not_found")
    if error.status == 405:
        allowed = ", ".join(sorted(getattr(error, "allowed_methods", ())))
        return RequestError(f"{request.method[:16]} is not allowed here; use {allowed}", code="method_not_allowed")
    if error.status == 413:
        return RequestError("the request body is too large", code="body_too_large")
    return RequestError(f"the HTTP request was refused with status {error.status}")


def _route(request: web.Request) -> str:
    """The route's pattern, never the raw path: a label or log field with client text would grow without bound."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "unmatched"
