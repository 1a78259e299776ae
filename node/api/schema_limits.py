"""How large a client's JSON schema may be, judged in microseconds before anything compiles it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from node.errors import GrammarError

MAX_SCHEMA_BYTES = 32 << 10
MAX_DEPTH = 16  # schemas within schemas; each takes two levels of JSON, its keyword and itself
MAX_NODES = 2000  # objects and lists
MAX_PATTERN_BYTES = 1 << 10

_DATA = ("const", "enum", "default", "examples")  # values that may hold anything, "$ref" and "pattern" too
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # whose keys are names


def check_schema(schema: Any, param: str) -> dict[str, Any]:
    """Return the schema as an object, or say which limit it breaks.

    Raises:
        GrammarError: schema_invalid, it is no schema or names something outside itself; schema_too_complex, it is too large.
    """
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise GrammarError(f"`{param}` must be a JSON schema, an object. Given: {type(schema).__name__}", param=param)
    size = len(msgspec.json.encode(schema))
    if size > MAX_SCHEMA_BYTES:
        raise _too_complex(f"`{param}` has {size} bytes; the limit is {MAX_SCHEMA_BYTES}", param)
    for count, (value, depth, has_keywords) in enumerate(_containers(schema), start=1):
        if depth > 2 * MAX_DEPTH:
            raise _too_complex(f"`{param}` nests deeper than {MAX_DEPTH} schemas; use `$defs`", param)
        if count > MAX_NODES:
            raise _too_complex(f"`{param}` has more than {MAX_NODES} objects and lists; make it smaller", param)
        if has_keywords:
            _check_keywords(value, param)
    return schema


def check_pattern(pattern: str, param: str) -> None:
    """Refuse a regular expression that is too long.

    Raises:
        GrammarError: schema_too_complex.
    """
    size = len(pattern.encode())
    if size > MAX_PATTERN_BYTES:
        raise _too_complex(f"`{param}` has {size} bytes; the limit is {MAX_PATTERN_BYTES}", param)


def schemas_within(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schema itself and every schema inside it."""
    return (value for value, _, has_keywords in _containers(schema) if has_keywords)


def _containers(schema: dict[str, Any]) -> Iterator[tuple[Any, int, bool]]:
    """Every object and list with its depth, and whether its keys are keywords; those of a map are names."""
    stack: list[tuple[Any, int, str]] = [(schema, 0, "schema")]
    while stack:
        value, depth, kind = stack.pop()
        yield value, depth, kind == "schema" and isinstance(value, dict)
        items = value.items() if isinstance(value, dict) else (("", item) for item in value)
        stack.extend((item, depth + 1, _kind_below(kind, key)) for key, item in items if isinstance(item, (dict, list)))


def _kind_below(kind: str, key: str) -> str:
    if kind == "data" or (kind == "schema" and key in _DATA):
        return "data"
    return "names" if kind == "schema" and key in _MAPS else "schema"


def _check_keywords(schema: dict[str, Any], param: str) -> None:
    reference, pattern = schema.get("$ref"), schema.get("pattern")
    if isinstance(reference, str) and not reference.startswith("#"):
        raise GrammarError(
            f"`{param}` has the `$ref` {reference[:60]!r}; only references within the schema ('#/...') are followed, "
            "nothing is fetched",
            param=param,
        )
    if isinstance(pattern, str):
        check_pattern(pattern, f"{param}.pattern")


def _too_complex(message: str, param: str) -> GrammarError:
    return GrammarError(message, code="schema_too_complex", param=param)
