"""The one table from the node's errors to HTTP: OpenAI's statuses and types on `/v1/*`, LoRAX's on `/`, `/generate*`.

Sources: OpenAI's documented error object; `InferError` of LoRAX's router, as lorax-client 0.6.3 reads it: the client knows the
types "validation", "generation", "overloaded" and "incomplete_generation", any other type is told apart by its status.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

from node.errors import (
    AdapterChangedError,
    AdapterError,
    AdapterForbiddenError,
    AdapterIdError,
    AdapterInvalidError,
    AdapterNotFoundError,
    AdapterUnavailableError,
    AuthError,
    ChainError,
    ConfigError,
    ContextLengthError,
    EngineError,
    GrammarError,
    KeystoreError,
    LedgerError,
    ModelLoadError,
    ModelNotFoundError,
    NodeError,
    OverloadedError,
    PaymentError,
    RequestError,
    UnsupportedError,
    every_error,
)


@dataclass(frozen=True, slots=True)
class HttpMeaning:
    """How one error looks on the wire, in both shapes."""

    status: int
    openai_type: str
    lorax_status: int
    lorax_type: str


def _request(status: int, lorax_status: int = 422, lorax_type: str = "validation") -> HttpMeaning:
    return HttpMeaning(status, "invalid_request_error", lorax_status, lorax_type)


def _adapter(status: int, openai_type: str = "invalid_request_error") -> HttpMeaning:
    return HttpMeaning(status, openai_type, 424, "generation")


def meaning_of(error: NodeError) -> HttpMeaning:
    """The row for `error`: by code where a class covers several, else by the nearest class."""
    by_code = _by_code().get(error.error_code)
    if by_code is not None:
        return by_code
    by_class = _by_class()
    return next((by_class[kind] for kind in type(error).__mro__ if kind in by_class), _INTERNAL)


_INTERNAL = HttpMeaning(500, "server_error", 500, "internal_error")


@functools.cache
def _by_code() -> dict[str, HttpMeaning]:
    return {
        "not_found": HttpMeaning(404, "not_found_error", 404, "not_found"),
        "not_implemented": HttpMeaning(501, "invalid_request_error", 501, "not_implemented"),
        "method_not_allowed": HttpMeaning(405, "invalid_request_error", 405, "method_not_allowed"),
        "receipt_not_found": HttpMeaning(404, "not_found_error", 404, "not_found"),
        "body_timeout": HttpMeaning(408, "invalid_request_error", 408, "timeout"),
        "body_too_large": HttpMeaning(413, "invalid_request_error", 413, "body_too_large"),
        "unsupported_media_type": HttpMeaning(415, "invalid_request_error", 415, "unsupported_media_type"),
        "adapter_gated": _adapter(403, "permission_error"),
        "adapter_queue_full": HttpMeaning(429, "rate_limit_error", 429, "overloaded"),
        "source_limit": _adapter(504),
        "cache_full": _adapter(507, "server_error"),
        "idempotency_key_reused": _request(409, 409),
        "insufficient_scope": HttpMeaning(403, "permission_error", 403, "authentication"),
        "key_not_found": HttpMeaning(404, "not_found_error", 404, "not_found"),
        "draining": HttpMeaning(503, "service_unavailable_error", 503, "healthcheck"),
        "incomplete_generation": HttpMeaning(500, "server_error", 500, "incomplete_generation"),
        "engine_failed": HttpMeaning(500, "server_error", 424, "generation"),
    }


@functools.cache
def _by_class() -> dict[type[NodeError], HttpMeaning]:
    return {
        RequestError: _request(400),
        ContextLengthError: _request(400),
        UnsupportedError: _request(400),
        GrammarError: _request(400),
        ModelNotFoundError: HttpMeaning(404, "not_found_error", 424, "generation"),
        AdapterError: _adapter(422),
        AdapterIdError: _adapter(400),
        AdapterNotFoundError: _adapter(404, "not_found_error"),
        AdapterForbiddenError: _adapter(403, "permission_error"),
        AdapterInvalidError: _adapter(422),
        AdapterChangedError: _adapter(409),
        AdapterUnavailableError: _adapter(503, "service_unavailable_error"),
        AuthError: HttpMeaning(401, "authentication_error", 401, "authentication"),
        PaymentError: HttpMeaning(402, "insufficient_quota", 402, "payment"),
        OverloadedError: HttpMeaning(429, "rate_limit_error", 429, "overloaded"),
        EngineError: HttpMeaning(503, "service_unavailable_error", 503, "healthcheck"),
        LedgerError: HttpMeaning(503, "service_unavailable_error", 503, "ledger"),
        ChainError: HttpMeaning(503, "service_unavailable_error", 503, "chain"),
        KeystoreError: _INTERNAL,
        ConfigError: _INTERNAL,
        ModelLoadError: HttpMeaning(503, "service_unavailable_error", 503, "healthcheck"),
    }


def openai_body(error: NodeError, request_id: str | None = None) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`, with our request id where one exists."""
    body: dict[str, Any] = {
        "message": error.message,
        "type": meaning_of(error).openai_type,
        "param": error.param,
        "code": error.error_code,
    }
    if request_id is not None:
        body["request_id"] = request_id
    return {"error": body}


def lorax_body(error: NodeError, request_id: str | None = None) -> dict[str, Any]:
    """`{"error", "error_type"}` as LoRAX has it; `code` is extra, for programs that want to tell 424 from 424."""
    meaning = meaning_of(error)
    prefix = {"validation": "Input validation error: ", "generation": "Request failed during generation: "}
    body: dict[str, Any] = {
        "error": prefix.get(meaning.lorax_type, "") + error.message,
        "error_type": meaning.lorax_type,
        "code": error.error_code,
    }
    if request_id is not None:
        body["request_id"] = request_id
    return body


def error_headers(error: NodeError) -> dict[str, str]:
    """Retry-After in whole seconds, rounded up, where waiting helps; the challenge that RFC 9110 asks for with a 401."""
    headers: dict[str, str] = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if meaning_of(error).status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def engine_error(code: str | None, message: str | None) -> NodeError:
    """The typed error for a sequence that the engine ended with `finish_reason` "error"."""
    text = message or "the engine could not finish this sequence; send the request again"
    if code is None or code == "engine_failed":
        return EngineError(text, code="engine_failed")
    if code == "schema_too_complex":
        return GrammarError(text, code=code)
    for kind in every_error(NodeError):
        if code == kind.code:
            return kind(text, retry_after_s=1.0 if kind in (EngineError, OverloadedError) else None)
    if code.startswith("adapter_"):
        return AdapterInvalidError(text, code=code)
    return EngineError(text, code="engine_failed")
