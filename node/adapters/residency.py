"""What the scheduler needs to know about adapter memory, and no more.

`node.adapters.pool.AdapterPool` is the real one; tests give the scheduler a few lines of Python instead. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from node.request import AdapterTerm


class ResidencyState(Enum):
    READY = "ready"
    LOADING = "loading"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Residency:
    """Answer to "may a sequence with this recipe run now?". `code` and `message` are set when FAILED (see `node.errors`)."""

    state: ResidencyState
    code: str = ""
    message: str = ""


READY = Residency(ResidencyState.READY)
LOADING = Residency(ResidencyState.LOADING)


class AdapterMemory(Protocol):
    """Adapters in the memory the step computes from. Called by the step loop only, and never waits."""

    def begin_step(self) -> None:
        """Take over what the loader finished, and forget what the last step wanted."""

    def holds(self, terms: Seq[AdapterTerm]) -> bool:
        """Whether all adapters of a recipe are here to the last byte. Wants nothing."""
        ...

    def ensure(self, terms: Seq[AdapterTerm]) -> Residency:
        """Want all adapters of a recipe. Starts what is missing; may evict only what no earlier `ensure` of this step wanted."""
        ...

    def pin(self, terms: Seq[AdapterTerm]) -> None:
        """A sequence with this recipe, which is READY, runs from now on: none of its adapters may leave."""

    def unpin(self, terms: Seq[AdapterTerm]) -> None:
        """That sequence runs no more."""
