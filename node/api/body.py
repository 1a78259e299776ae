"""A request body, read within limits and parsed as strict JSON.

Stricter than `json.loads` because every laxness has been somebody's advisory: duplicate keys (two readers, two meanings),
NaN, unbounded depth, lone surrogates, and bodies that are measured only after they are in memory.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

from aiohttp import web

from node.errors import RequestError
from node.json_depth import nests_deeper_than

_LARGE_BODY_BYTES = 64 << 10  # parsed on a thread: below this the hand-over costs more than the parse
_MAX_KEYS = 100_000


async def read_json(request: web.Request, max_bytes: int, timeout_s: float, max_depth: int = 32) -> dict[str, Any]:
    """Read and parse one JSON object.

    Raises:
        RequestError: body_too_large, body_timeout, unsupported_media_type or invalid_json.
    """
    _check_media_type(request)
    try:
        async with asyncio.timeout(timeout_s):
            body = await _read_bounded(request, max_bytes)
    except TimeoutError as error:
        raise RequestError(
            f"the request body did not arrive within {timeout_s:g} s; send it faster or make it smaller", code="body_timeout"
        ) from error
    if len(body) > _LARGE_BODY_BYTES:
        return await asyncio.to_thread(parse_object, body, max_depth)
    return parse_object(body, max_depth)


def _check_media_type(request: web.Request) -> None:
    """JSON only, uncompressed: a compressed body costs its sender nothing and its reader everything."""
    if request.content_type != "application/json":
        raise RequestError(
            f"content type {request.content_type!r} is not supported; send application/json", code="unsupported_media_type"
        )
    charset = request.charset
    if charset is not None and charset.lower() not in ("utf-8", "utf8"):
        raise RequestError(f"charset {charset!r} is not supported; send UTF-8", code="unsupported_media_type")
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise RequestError(
            f"content encoding {encoding!r} is not supported; send the body uncompressed", code="unsupported_media_type"
        )


async def _read_bounded(request: web.Request, max_bytes: int) -> bytes:
    """Count while reading; Content-Length only lets us refuse earlier, it is never believed."""
    if request.content_length is not None and request.content_length > max_bytes:
        raise _too_large(request.content_length, max_bytes)
    chunks: list[bytes] = []
    size_bytes = 0
    async for chunk in request.content.iter_any():
        size_bytes += len(chunk)
        if size_bytes > max_bytes:
            raise _too_large(size_bytes, max_bytes)
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large(size_bytes: int, max_bytes: int) -> RequestError:
    return RequestError(
        f"the request body has at least {size_bytes} bytes, more than the limit of {max_bytes} (server.max_body_bytes)",
        code="body_too_large",
    )


def parse_object(body: bytes, max_depth: int = 32) -> dict[str, Any]:
    """Parse `body` as one JSON object (RFC 8259, with unique names as I-JSON, RFC 7493, asks).

    Raises:
        RequestError: Code invalid_json; the message says which rule was broken.
    """
    if nests_deeper_than(body, max_depth):
        raise _invalid(f"objects and arrays nest deeper than {max_depth} levels")
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise _invalid(f"byte {error.start} is not valid UTF-8") from error
    except json.JSONDecodeError as error:
        raise _invalid(f"line {error.lineno}, column {error.colno} is not JSON") from error
    except (ValueError, RecursionError) as error:
        raise _invalid("a number or a nesting is too long") from error
    if not isinstance(value, dict):
        raise _invalid(f"the top level is {_kind(value)}, not an object")
    if re.search(rb"\\u[dD][89a-fA-F]", body):
        _check_surrogates(value)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _MAX_KEYS:
        raise _invalid(f"an object has {len(pairs)} keys, more than {_MAX_KEYS}")
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _invalid(f"the key {repeated[:64]!r} appears more than once in one object")
    return result


def _refuse_constant(name: str) -> Any:
    raise _invalid(f"{name} is not a JSON number")


def _check_surrogates(value: dict[str, Any]) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise _invalid("a string holds half of a surrogate pair") from error


def _kind(value: Any) -> str:
    names = {str: "a string", list: "an array", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), "something else")


def _invalid(reason: str) -> RequestError:
    return RequestError(f"the body is not valid JSON for this node: {reason}", code="invalid_json")
