"""Typed, bounded reading of one JSON object. Every refusal names the parameter, the limit and what was given."""

from __future__ import annotations

import math
from typing import Any

from node.errors import RequestError, UnsupportedError

_MAX_SHOWN = 80  # characters of a given value that an error repeats


def shown(value: Any) -> str:
    """`value` as an error may repeat it: short, so that a megabyte of input is not a megabyte of answer."""
    text = repr(value) if not isinstance(value, (dict, list)) else f"{type(value).__name__} of {len(value)} items"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}... ({len(text)} characters)"


class Fields:
    """One JSON object whose fields are read once each; what is never read is reported as unknown.

    A field that is null counts as absent: OpenAI's SDK and lorax-client both send explicit nulls.
    """

    def __init__(self, body: dict[str, Any], prefix: str = "") -> None:
        self._body = body
        self._prefix = prefix
        self._read: set[str] = set()

    def name(self, key: str) -> str:
        """The parameter's full name, for messages and `param`."""
        return f"{self._prefix}{key}"

    def raw(self, key: str) -> Any:
        """The value as it came, None when absent."""
        self._read.add(key)
        return self._body.get(key)

    def unknown(self) -> list[str]:
        """Names of the fields nobody read, sorted."""
        return sorted(self.name(key) for key in self._body if key not in self._read)

    def ignore(self, *keys: str) -> None:
        """Mark fields that are accepted without effect, so that they are not reported."""
        self._read.update(keys)

    def refuse(self, key: str, *harmless: Any, remedy: str) -> None:
        """Refuse a feature by name unless it is absent or asks for nothing."""
        value = self.raw(key)
        if value is None or any(value == item and type(value) is type(item) for item in harmless):
            return
        raise UnsupportedError(
            f"`{self.name(key)}` is not supported by this node; {remedy}. Given: {shown(value)}", param=self.name(key)
        )

    def error(self, key: str, rule: str) -> RequestError:
        """`key` broke `rule`."""
        name = self.name(key)
        return RequestError(f"`{name}` {rule}. Given: {shown(self._body.get(key))}", param=name)

    def integer(self, key: str, minimum: int, maximum: int, rule: str | None = None) -> int | None:
        """A whole number within [minimum, maximum]; true and 1.5 are not whole numbers, and neither is "10"."""
        value = self.raw(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, "must be an integer")
        if not minimum <= value <= maximum:
            raise self.error(key, rule or f"must be between {minimum} and {maximum}")
        return value

    def number(
        self, key: str, minimum: float, maximum: float, *, above_minimum: bool = False, rule: str | None = None
    ) -> float | None:
        """A finite number within [minimum, maximum], or (minimum, maximum] with `above_minimum`."""
        value = self.raw(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, "must be a number")
        is_inside = (minimum < value if above_minimum else minimum <= value) and value <= maximum
        if not is_inside or not math.isfinite(value):
            bound = "greater than" if above_minimum else "at least"
            raise self.error(key, rule or f"must be {bound} {minimum:g} and at most {maximum:g}")
        return float(value)

    def boolean(self, key: str, default: bool = False) -> bool:
        """true or false; "yes" is neither."""
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "must be true or false")
        return value

    def text(self, key: str, max_chars: int) -> str | None:
        """A string of at most `max_chars` characters."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.error(key, "must be a string")
        if len(value) > max_chars:
            raise self.error(key, f"must have at most {max_chars} characters")
        return value

    def label(self, key: str, max_chars: int = 256) -> str | None:
        """A short printable string: a name, a user id, a salt. Control characters would forge log and header lines."""
        value = self.text(key, max_chars)
        if value is not None and not value.isprintable():
            raise self.error(key, "must not contain control characters")
        return value

    def items(self, key: str, max_items: int) -> list[Any] | None:
        """A list of at most `max_items` values."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.error(key, "must be a list")
        if len(value) > max_items:
            raise self.error(key, f"must have at most {max_items} items")
        return value

    def inner(self, key: str) -> Fields | None:
        """A nested object."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, "must be an object")
        return Fields(value, prefix=f"{self.name(key)}.")
