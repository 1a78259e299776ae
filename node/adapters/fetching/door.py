"""What the catalog asks for and never does itself: everything about adapters that blocks. Imports no source's library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from node.adapters.staging import Progress
from node.adapters.verify import Fingerprint, VerifiedAdapter

VERIFY_THREADS = 4  # for directories


@dataclass(frozen=True, slots=True)
class FetchedAdapter:
    """What a name stands for at its source now. `state` is that of the files when they were verified."""

    revision: str
    is_private: bool
    verified: VerifiedAdapter
    state: Fingerprint


class Fetcher(Protocol):
    """Fetches and verifies somewhere else; for one event loop."""

    async def resolve(self, source: str, name: str, token: str | None, *, is_known: bool = False) -> FetchedAdapter:
        """Ask a source ("hub", "pbase" or "store") what a name stands for, with the caller's right to see it; fetch what is not
        here; verify it. What `is_known`, because it was fetched for the same caller before, does not wait for what is not.

        Raises:
            AdapterError: The source's refusal, what is wrong with the files, or source_unavailable: nobody can fetch now.
        """
        ...

    async def verify(self, directory: Path) -> VerifiedAdapter:
        """See `AdapterVerifier.verify`; AdapterUnavailableError where nobody can verify now."""
        ...

    async def progress(self) -> Sequence[Progress]:
        """The downloads under way now."""
        ...
