"""Who needs adapters while a step is planned: the recipes that are wanted, and how many sequences run."""

from __future__ import annotations

from collections.abc import Collection, Iterable


class Demand:
    """Of one engine's step loop.

    Attributes:
        running_count: Sequences that run, those without adapters too.
    """

    def __init__(self) -> None:
        self._wanted: set[str] = set()
        self.running_count = 0

    @property
    def wanted(self) -> Collection[str]:
        """Adapters that a sequence wanted since this step began to be planned: none of them leaves for another one."""
        return self._wanted

    def begin_step(self) -> None:
        """Forget what the last step wanted."""
        self._wanted.clear()

    def want(self, adapter_ids: Iterable[str]) -> None:
        """A sequence wants these."""
        self._wanted.update(adapter_ids)

    def is_waited_for(self, adapter_id: str) -> bool:
        """Whether a sequence wants it and nobody runs."""
        return adapter_id in self._wanted and not self.running_count
