"""How deep JSON nests, measured before it is parsed.

Every parser here is recursive, and the EVM libraries raise Python's recursion limit to 100,000 when they are imported: a deep
text would then overflow the C stack and end the process instead of raising an error.
"""

from __future__ import annotations

import re

_MARKS = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)


def nests_deeper_than(text: bytes, max_depth: int) -> bool:
    """Whether objects and arrays in `text` nest deeper than `max_depth`; brackets inside strings do not count.

    Linear in the length of `text`, whatever it holds; invalid JSON is judged by its brackets alone.
    """
    depth = 0
    for match in _MARKS.finditer(text):
        mark = text[match.start()]
        if mark in b"[{":
            depth += 1
            if depth > max_depth:
                return True
        elif mark in b"]}":
            depth -= 1
    return False
