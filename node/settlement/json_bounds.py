"""JSON from strangers, refused before it is parsed when it could nest too deeply.

Why not leave it to the parser: the EVM libraries raise Python's recursion limit to 100,000 when they are imported, and from then
on a few hundred thousand brackets overflow the C stack of any parser and end the process.
"""

from __future__ import annotations

import json
from typing import Any

MAX_BRACKETS = 4096  # nesting cannot exceed the number of brackets; a receipt with a thousand logs has 2,000


def loads_bounded(data: bytes, max_brackets: int = MAX_BRACKETS) -> Any:
    """Parse JSON that has few enough brackets.

    Raises:
        ValueError: Too many brackets, not UTF-8 or not JSON.
    """
    if has_too_many_brackets(data, max_brackets):
        raise ValueError(f"more than {max_brackets} brackets")
    return json.loads(data)


def has_too_many_brackets(data: bytes | bytearray, max_brackets: int = MAX_BRACKETS) -> bool:
    """Whether the text could nest deeper than `max_brackets`."""
    return data.count(b"[") + data.count(b"{") > max_brackets
