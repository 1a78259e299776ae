"""Tool calls found in an answer's text while it grows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from node.api.tool_dialect import ToolDialect


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A part of one call: its name with the first, then its arguments' text as it comes."""

    index: int
    name: str | None
    arguments: str


class ToolCallReader:
    """Splits one choice's text into content and calls.

    The text follows `ToolDialect.grammar`, so what stands between trigger and arguments is fixed; an answer that was cut off ends
    anywhere. White space before a call is dropped, text that may become the trigger waits.
    """

    def __init__(self, dialect: ToolDialect) -> None:
        self._dialect = dialect
        self._held = ""
        self._state = "text"
        self._depth = 0
        self._is_string = False
        self._is_escaped = False
        self.call_count = 0

    def feed(self, text: str) -> tuple[str, list[CallDelta]]:
        """Add text; return the content and the parts of calls that became certain."""
        self._held += text
        content, deltas = "", []
        while True:
            before = (self._state, len(self._held))
            if self._state == "text":
                content += self._take_text()
            elif self._state == "name":
                deltas += self._take_name()
            elif self._state == "arguments":
                deltas += self._take_arguments()
            else:
                self._take_closing()
            if (self._state, len(self._held)) == before:
                return content, deltas

    def finish(self) -> str:
        """Content that waited for a trigger which never came."""
        rest, self._held = self._held, ""
        is_cut_call = self._state != "text" or self.call_count > 0 or rest.lstrip().startswith(self._dialect.trigger)
        return "" if is_cut_call else rest

    def _take_text(self) -> str:
        opening, trigger = self._dialect.opening, self._dialect.trigger
        start = self._held.find(trigger)
        if start < 0:
            keep = _beginning(self._held, trigger)
            shown = self._held[: len(self._held) - keep]
            kept_space = len(shown) - len(shown.rstrip())
            shown = shown[: len(shown) - kept_space]
            self._held = self._held[len(shown) :]
            return shown
        if len(self._held) < start + len(opening):
            shown, self._held = self._held[:start].rstrip(), self._held[start:]
            return shown
        shown, self._held = self._held[:start].rstrip(), self._held[start + len(opening) :]
        self._state = "name"
        return shown

    def _take_name(self) -> list[CallDelta]:
        end = self._held.find(self._dialect.middle)
        if end < 0:
            return []
        name, self._held = self._held[:end], self._held[end + len(self._dialect.middle) :]
        self._state, self._depth = "arguments", 0
        self.call_count += 1
        return [CallDelta(self.call_count - 1, name, "")]

    def _take_arguments(self) -> list[CallDelta]:
        for place, char in enumerate(self._held):
            if self._ends_with(char):
                self._state = "closing"
                return [self._arguments(place + 1)]
        return [self._arguments(len(self._held))] if self._held else []

    def _arguments(self, count: int) -> CallDelta:
        taken, self._held = self._held[:count], self._held[count:]
        return CallDelta(self.call_count - 1, None, taken)

    def _ends_with(self, char: str) -> bool:
        """Whether `char` closes the arguments' object."""
        if self._is_string:
            if self._is_escaped:
                self._is_escaped = False
            elif char == "\\":
                self._is_escaped = True
            elif char == '"':
                self._is_string = False
            return False
        if char == '"':
            self._is_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            return self._depth == 0
        return False

    def _take_closing(self) -> None:
        if len(self._held) >= len(self._dialect.closing):
            self._held = self._held[len(self._dialect.closing) :].lstrip()
            self._state = "text"


def merged(deltas: list[CallDelta], id_of: Callable[[int], str]) -> list[dict[str, Any]]:
    """OpenAI's `tool_calls` of one chunk: one entry a call, with id and name where it begins."""
    entries: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        entry = entries.setdefault(delta.index, {"index": delta.index, "function": {"arguments": ""}})
        if delta.name is not None:
            entry.update(id=id_of(delta.index), type="function", function={"name": delta.name, "arguments": ""})
        entry["function"]["arguments"] += delta.arguments
    return list(entries.values())


def _beginning(text: str, trigger: str) -> int:
    """Length of the longest ending of `text` that begins `trigger`."""
    lengths = range(min(len(trigger) - 1, len(text)), 0, -1)
    return next((length for length in lengths if trigger.startswith(text[len(text) - length :])), 0)
