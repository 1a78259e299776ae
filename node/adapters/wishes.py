"""Adapters that an operator wants to come or to go, though no sequence asks for it."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

WISH_LIMIT = 1024


class Wishes:
    """Of too many that are to come the oldest is forgotten."""

    def __init__(self) -> None:
        self._coming: OrderedDict[str, Path] = OrderedDict()
        self._going: set[str] = set()

    @property
    def coming(self) -> list[tuple[str, Path]]:
        """What is to come, and from where, the oldest wish first."""
        return list(self._coming.items())

    @property
    def going(self) -> list[str]:
        """What is to go once nobody holds it."""
        return list(self._going)

    def come(self, adapter_id: str, directory: Path) -> None:
        """Load it ahead of its first request."""
        self._going.discard(adapter_id)
        self._coming[adapter_id] = directory
        while len(self._coming) > WISH_LIMIT:
            self._coming.popitem(last=False)

    def go(self, adapter_id: str, *, is_here: bool) -> None:
        """Let it go from every tier."""
        self._coming.pop(adapter_id, None)
        if is_here:
            self._going.add(adapter_id)

    def has_come(self, adapter_id: str) -> None:
        """It is there, or cannot come."""
        del self._coming[adapter_id]

    def is_gone(self, adapter_id: str) -> None:
        """It need not be looked after any more."""
        self._going.discard(adapter_id)
