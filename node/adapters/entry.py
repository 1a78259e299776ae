"""One adapter under one of its names, as the API knows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from attribution.manifest import Manifest
from node.adapters.verify import Coverage, VerifiedAdapter

NameFilter = Callable[[str], bool]  # which of the operator's names exist for a caller


def sees_all(name: str) -> bool:
    """The operator's view: every name exists."""
    return True


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """An adapter under one of its names. `revision` is the source's, None for a local adapter."""

    name: str
    source: str  # one of SOURCES
    revision: str | None
    verified: VerifiedAdapter

    @property
    def adapter_id(self) -> str:
        """Content hash, 64 hex digits."""
        return self.verified.adapter_id

    @property
    def directory(self) -> Path:
        """Where the verified files are."""
        return self.verified.directory

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return self.verified.rank

    @property
    def coverage(self) -> tuple[Coverage, ...]:
        """How many layers of each kind of module it changes."""
        return self.verified.coverage

    @property
    def size_bytes(self) -> int:
        """Length of the weights file."""
        return self.verified.size_bytes

    @property
    def manifest(self) -> Manifest | None:
        """Who made it, where it says so."""
        return self.verified.manifest

    @property
    def manifest_hash(self) -> str | None:
        """Content hash of the manifest, 64 hex digits."""
        return self.verified.manifest_hash
