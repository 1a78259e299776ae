"""What each adapter was used for, for metrics: counted by content, shown by public name, within a bounded number of series."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

COUNTED = 10_000  # adapters counted apart; further ones together
SHOWN = 256  # series of each metric; Prometheus keeps every one it ever saw
OTHERS = "(other)"  # no adapter can be called so


@dataclass(slots=True)
class Usage:
    """Requests, and the tokens of those requests. One with several adapters counts for each of them."""

    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0

    def add(self, other: Usage) -> None:
        """Take over what another counted."""
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.output_tokens += other.output_tokens


class AdapterUsage:
    """The counts. `count` is for the event loop; `shown` may run on another thread."""

    def __init__(self) -> None:
        self._by_adapter: dict[str, Usage] = {}
        self._further = Usage()

    def count(self, adapter_ids: Iterable[str], prompt_tokens: int, output_tokens: int) -> None:
        """One request with these adapters, by content hash."""
        for adapter_id in adapter_ids:
            known = self._by_adapter.get(adapter_id)
            if known is None:
                known = self._further if len(self._by_adapter) >= COUNTED else self._by_adapter.setdefault(adapter_id, Usage())
            known.add(Usage(1, prompt_tokens, output_tokens))

    def shown(self, names: Mapping[str, str]) -> dict[str, Usage]:
        """By name, those used first first; what has no public name, and what is too many, together as OTHERS.

        Args:
            names: Content hash to public name.
        """
        rows: dict[str, Usage] = {}
        others = Usage()
        others.add(self._further)
        for adapter_id, usage in list(self._by_adapter.items()):
            name = names.get(adapter_id)
            is_shown = name is not None and (name in rows or len(rows) < SHOWN)
            (rows.setdefault(name or "", Usage()) if is_shown else others).add(usage)
        return {**rows, OTHERS: others} if others.requests else rows
