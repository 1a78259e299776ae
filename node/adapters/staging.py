"""From a source's bytes to a complete directory: counted as they arrive, resumed where they broke off, shown only when whole."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

from node.adapters.disk_cache import DiskCache
from node.adapters.remote import RemoteFile
from node.errors import AdapterUnavailableError

SLOWEST_BYTES_PER_S = 16 << 10
GRACE_S = 10.0  # before a slow source is given up
DISK_FAULTS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE})
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})

# Yields a file's bytes from an offset on.
Opener = Callable[[RemoteFile, int], Iterator[bytes]]


@dataclass(frozen=True, slots=True)
class Progress:
    """A download under way. `total_bytes` is None where the source names no sizes."""

    name: str
    done_bytes: int
    total_bytes: int | None


class _Lock:
    """A lock that weak references can point to."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


class Staging:
    """Fills directories of one disk cache. Safe to call from several threads.

    Args:
        cache: Where complete adapters go.
        clock: Monotonic seconds.
    """

    def __init__(self, cache: DiskCache, clock: Callable[[], float] = time.monotonic) -> None:
        self._cache = cache
        self._clock = clock
        self._locks: WeakValueDictionary[Path, _Lock] = WeakValueDictionary()
        self._lock = threading.Lock()
        self._running: dict[Path, tuple[str, int | None]] = {}

    def progress(self) -> list[Progress]:
        """The downloads under way now."""
        with self._lock:
            running = list(self._running.items())
        return [Progress(name, _size_of(part), total) for part, (name, total) in running]

    @contextmanager
    def filling(self, final: Path, name: str, files: Sequence[RemoteFile]) -> Iterator[Path | None]:
        """The directory to fill; it becomes `final` on leaving without an error. None: `final` is there already.

        A directory left by an error is kept and handed out again, so that a broken download goes on where it stopped.

        Raises:
            AdapterUnavailableError: cache_full.
        """
        with self._alone(final):
            if final.is_dir():
                yield None
                return
            part = self._cache.part(final)
            sizes = [file.size_bytes for file in files]
            total = None if None in sizes else sum(size or 0 for size in sizes)
            with _disk_faults(name, part):
                part.mkdir(parents=True, exist_ok=True)
                os.utime(part)  # wanted again: what it makes room for is not to push it out
                self._cache.make_room(max(0, (total or 0) - _size_of(part)))
                with self._shown(part, name, total):
                    yield part
                    part.rename(final)

    def receive(self, part: Path, file: RemoteFile, open_from: Opener, max_bytes: int) -> None:
        """Write one file into `part`, from where it stopped.

        Raises:
            AdapterUnavailableError: source_limit: more bytes than announced or allowed, or too slow. source_unavailable: it ended
                early; what arrived is kept for the next try.
        """
        target = part / file.name
        limit = max_bytes if file.size_bytes is None else min(file.size_bytes, max_bytes)
        done = target.stat().st_size if target.exists() else 0
        if done > limit:
            target.unlink()
            done = 0
        if file.size_bytes is not None and done == file.size_bytes and done > 0:
            return
        started_s, before = self._clock(), done
        with target.open("ab") as output:
            for chunk in open_from(file, done):
                done += len(chunk)
                elapsed_s = self._clock() - started_s
                is_slow = elapsed_s > GRACE_S and (done - before) / elapsed_s < SLOWEST_BYTES_PER_S
                if done > limit or is_slow:
                    raise AdapterUnavailableError(
                        f"the source sends {file.name} slower than {SLOWEST_BYTES_PER_S} bytes a second"
                        if is_slow
                        else f"the source sends more than {limit} bytes of {file.name}, the size it announced or the limit",
                        code="source_limit",
                        retry_after_s=60.0,
                    )
                output.write(chunk)
        if file.size_bytes is not None and done != file.size_bytes:
            raise AdapterUnavailableError(
                f"{file.name} ended at byte {done} of {file.size_bytes}; try again, it goes on from there", retry_after_s=1.0
            )

    @contextmanager
    def _alone(self, final: Path) -> Iterator[None]:
        """Callers with different tokens may want the same bytes at once; one of them fetches."""
        with self._lock:
            held = self._locks.setdefault(final, _Lock())
        with held.lock:
            yield

    @contextmanager
    def _shown(self, part: Path, name: str, total: int | None) -> Iterator[None]:
        with self._lock:
            self._running[part] = (name, total)
        try:
            yield
        finally:
            with self._lock:
                del self._running[part]


def discard(part: Path) -> None:
    """Forget what arrived: the source's bytes are no longer those of this version."""
    shutil.rmtree(part, ignore_errors=True)


def unstorable(error: OSError, name: object) -> AdapterUnavailableError:
    """The refusal (cache_full) for one of DISK_FAULTS, met while `name` was written."""
    return AdapterUnavailableError(
        f"{name} cannot be stored (errno {error.errno}); free space in, or correct, the cache directory",
        code="cache_full",
        retry_after_s=60.0,
    )


@contextmanager
def _disk_faults(name: str, part: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        if error.errno in _NO_ROOM:
            discard(part)  # half an adapter must not keep smaller ones out
        raise unstorable(error, name) from error


def _size_of(part: Path) -> int:
    total = 0
    for directory, _, files in os.walk(part):
        for file in files:
            try:
                total += os.lstat(os.path.join(directory, file)).st_size
            except FileNotFoundError:
                continue  # renamed between the two calls
    return total
