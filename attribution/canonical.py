"""Canonical JSON: one value, one byte string, so that a hash of JSON means something.

The subset of RFC 8785 (JSON Canonicalization Scheme) without fractions: objects, arrays, strings, booleans, null and integers
within +-(2**53 - 1). Larger numbers travel as decimal strings. Floats are refused: two languages print them differently.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from attribution.errors import CanonicalError

MAX_INTEGER = 2**53 - 1  # RFC 8785 numbers are IEEE doubles; beyond this two integers would share one spelling
MAX_DEPTH = 64
_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKETS = re.compile(r"[\[\]{}]")


def dumps(value: Any) -> bytes:
    """Return the canonical UTF-8 bytes of `value`.

    Raises:
        TypeError: A float, a non-string key or any type JSON does not have.
        CanonicalError: An integer beyond 2**53 - 1, an unpaired surrogate, or nesting deeper than 64.
    """
    text = json.dumps(_ordered(value, 0), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CanonicalError("a string holds an unpaired surrogate, which UTF-8 cannot carry; remove it") from error


def loads(data: bytes, *, max_bytes: int = 4 << 20) -> Any:
    """Parse JSON of the canonical subset. The bytes need not be canonical themselves; duplicate keys are refused.

    Raises:
        CanonicalError: Too long, not UTF-8, not JSON, a duplicate key, a fraction, NaN, or an integer beyond 2**53 - 1.
    """
    if len(data) > max_bytes:
        raise CanonicalError(f"the JSON is {len(data)} bytes; the limit is {max_bytes}")
    try:
        text = data.decode("utf-8")
        _check_depth(text)
        return json.loads(
            text,
            object_pairs_hook=_unique_object,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
            parse_int=_bounded_integer,
        )
    except UnicodeDecodeError as error:
        raise CanonicalError(f"the JSON is not UTF-8: byte {error.start} cannot be decoded") from error
    except json.JSONDecodeError as error:
        raise CanonicalError(f"not JSON: the text stops making sense at line {error.lineno}, column {error.colno}") from error


def digest(value: Any) -> str:
    """SHA-256 over the canonical bytes, 64 hex digits: what `sha256sum` prints for a file that holds them."""
    return hashlib.sha256(dumps(value)).hexdigest()


def _check_depth(text: str) -> None:
    """Refuse deep nesting before parsing: json's C scanner recurses, and with a raised recursion limit it overruns the stack."""
    depth = 0
    for bracket in _BRACKETS.findall(_STRINGS.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            raise CanonicalError(f"the JSON nests deeper than {MAX_DEPTH}; flatten it")


def _ordered(value: Any, depth: int) -> Any:
    """Check `value` and put its keys into UTF-16 order (RFC 8785, 3.2.3), which differs from code point order."""
    kind = type(value)
    if kind is str or value is None or kind is bool:
        return value
    if kind is int:
        return _check_integer(value)
    if depth >= MAX_DEPTH:
        raise CanonicalError(f"the value nests deeper than {MAX_DEPTH}; flatten it")
    if kind is dict:
        for key in value:
            if type(key) is not str:
                raise TypeError(f"object key {key!r} is a {type(key).__name__}; canonical JSON has string keys only")
        keys = sorted(value) if all(map(str.isascii, value)) else sorted(value, key=_utf16)
        return {key: _ordered(value[key], depth + 1) for key in keys}
    if kind is list or kind is tuple:
        return [_ordered(item, depth + 1) for item in value]
    raise TypeError(f"{kind.__name__} {value!r:.40} has no canonical form; use integers or decimal strings")


def _utf16(key: str) -> bytes:
    return key.encode("utf-16-be", "surrogatepass")


def _check_integer(value: int) -> int:
    if not -MAX_INTEGER <= value <= MAX_INTEGER:
        raise CanonicalError(f"integer {value} is beyond 2**53 - 1; write it as a decimal string")
    return value


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise CanonicalError(f"key {key!r} occurs twice in one object; readers would disagree about its value")
        result[key] = value
    return result


def _refuse_number(text: str) -> Any:
    raise CanonicalError(f"number {text:.40} is not an integer; use an integer or a decimal string")


def _bounded_integer(text: str) -> int:
    if len(text) > 17:
        raise CanonicalError(f"integer {text[:20]}... has {len(text)} digits; write it as a decimal string")
    return _check_integer(int(text))
