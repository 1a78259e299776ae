"""Adapters fetched to this disk, within a size: the least recently used leave first.

An entry is one directory `<root>/<source>/<name>/<revision>/`. It appears under that name complete and leaves it at once, so
nobody ever reads half of one. The time of last use is the time of change of the directory's `.used` file: it survives restarts,
and any process, the command line too, may collect. A download is `.part-<revision>` beside it: it takes room like an entry, and
one that broke off leaves like one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from node.config import Settings
from node.errors import AdapterUnavailableError

USED_FILE = ".used"
PROTECTED_S = 600.0  # a request may have resolved the adapter and not loaded it yet
PART_PREFIX = ".part-"
_HIDDEN = "."


@dataclass(frozen=True, slots=True)
class CachedAdapter:
    """One entry, or a download. `used_s`: when it was used or written to last, in seconds since 1970."""

    directory: Path
    size_bytes: int
    used_s: float


class DiskCache:
    """A bounded directory of fetched adapters. Safe to call from several threads and processes.

    Args:
        root: Made when first needed.
        limit_bytes: Bound on all entries together.
        now: Seconds since 1970.
        protected_s: An entry used more recently is never collected.
    """

    def __init__(
        self, root: Path, limit_bytes: int, now: Callable[[], float] = time.time, *, protected_s: float = PROTECTED_S
    ) -> None:
        self.root = root
        self.limit_bytes = limit_bytes
        self._now = now
        self._protected_s = protected_s

    def place(self, source: str, name: str, revision: str) -> Path:
        """Where an entry lies. The arguments are single path components, checked by whoever made them."""
        return self.root / source / name / revision

    def part(self, final: Path) -> Path:
        """Where the download of an entry lies until it is complete."""
        return final.parent / f"{PART_PREFIX}{final.name}"

    def touch(self, directory: Path) -> None:
        """Mark an entry as used now."""
        now = self._now()
        marker = directory / USED_FILE
        try:
            marker.touch()
            os.utime(marker, (now, now))
        except FileNotFoundError:
            return  # collected by another process this moment; whoever asked will fetch it again

    def entries(self) -> list[CachedAdapter]:
        """Everything here, least recently used first."""
        return sorted(self._found(), key=lambda entry: (entry.used_s, str(entry.directory)))

    def make_room(self, needed_bytes: int) -> None:
        """Collect until `needed_bytes` more fit.

        Raises:
            AdapterUnavailableError: cache_full. What is in use now leaves too little.
        """
        left = self._shrink(self.limit_bytes - needed_bytes)[1]
        if left + needed_bytes > self.limit_bytes:
            raise AdapterUnavailableError(
                f"{needed_bytes} bytes do not fit: adapters in use take {left} of the cache's {self.limit_bytes} bytes; raise "
                "adapters.cache_bytes or try again later",
                code="cache_full",
                retry_after_s=60.0,
            )

    def collect(self, limit_bytes: int | None = None) -> list[CachedAdapter]:
        """Remove the least recently used entries until the rest fits; returns what was removed."""
        return self._shrink(self.limit_bytes if limit_bytes is None else limit_bytes)[0]

    def _shrink(self, limit_bytes: int) -> tuple[list[CachedAdapter], int]:
        entries = self.entries()
        total = sum(entry.size_bytes for entry in entries)
        removed: list[CachedAdapter] = []
        for entry in entries:
            if total <= limit_bytes or self._now() - entry.used_s < self._protected_s:
                break  # the others were used even later
            self._remove(entry.directory)
            removed.append(entry)
            total -= entry.size_bytes
        return removed, total

    def _remove(self, directory: Path) -> None:
        with tempfile.TemporaryDirectory(prefix=".leaving-", dir=self.root) as scratch:
            try:
                directory.rename(Path(scratch) / "entry")
            except FileNotFoundError:
                return  # another process collected it first
        parent = directory.parent
        if not any(parent.iterdir()):
            shutil.rmtree(parent, ignore_errors=True)

    def _found(self) -> Iterator[CachedAdapter]:
        for directory in self.root.glob("*/*/*"):
            is_entry = directory.name.startswith(PART_PREFIX) or not directory.name.startswith(_HIDDEN)
            if is_entry and directory.is_dir():
                try:
                    yield _measured(directory)
                except FileNotFoundError:
                    continue


def open_disk_cache(settings: Settings) -> DiskCache:
    """The cache of a node with these settings, whether it runs or not."""
    chosen = settings.adapters
    return DiskCache(chosen.cache_dir or settings.data_dir / "adapters", chosen.cache_bytes)


def _measured(directory: Path) -> CachedAdapter:
    found = [path.stat() for path in directory.rglob("*")]  # Ludwig's output has directories inside
    marker = directory / USED_FILE
    if directory.name.startswith(PART_PREFIX):
        used_s = max(state.st_mtime for state in (directory.stat(), *found))
    else:
        used_s = marker.stat().st_mtime if marker.exists() else directory.stat().st_mtime
    return CachedAdapter(directory, sum(state.st_size for state in found), used_s)
