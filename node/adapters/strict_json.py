"""JSON from outside, read strictly: what two parsers could understand differently is refused."""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from node.errors import AdapterInvalidError
from node.json_depth import nests_deeper_than

MAX_DEPTH = 32


def parse_strict(raw: bytes, what: str, code: str) -> Any:
    """JSON as RFC 8259 has it: UTF-8 without a byte order mark, no key twice, no NaN or Infinity, bounded depth.

    Raises:
        AdapterInvalidError: With `code`; the message begins with `what`.
    """
    if raw.startswith(codecs.BOM_UTF8):
        raise AdapterInvalidError(f"{what} begins with a byte order mark; save it without one", code=code)
    if nests_deeper_than(raw, MAX_DEPTH):
        raise AdapterInvalidError(f"{what} is nested too deep; at most {MAX_DEPTH} levels are read", code=code)
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique(what, code), parse_constant=_refuse_constant(what, code))
    except UnicodeDecodeError as error:
        raise AdapterInvalidError(f"{what} is not UTF-8 (byte {error.start})", code=code) from error
    except ValueError as error:  # JSONDecodeError, and integers beyond the interpreter's digit limit
        position = f" (character {error.pos})" if isinstance(error, json.JSONDecodeError) else ""
        raise AdapterInvalidError(f"{what} is not valid JSON{position}", code=code) from error


def _unique(what: str, code: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise AdapterInvalidError(f"{what} has the key {twice[:80]!r} twice", code=code)
        return value

    return build


def _refuse_constant(what: str, code: str) -> Callable[[str], Any]:
    def refuse(constant: str) -> Any:
        raise AdapterInvalidError(f"{what} contains {constant}, which is not JSON", code=code)

    return refuse
