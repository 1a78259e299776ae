"""Tree hash v1: SHA-256 over 1 MiB leaves, so that a file of gigabytes hashes on all cores.

Semantics:
    leaf  = SHA-256(0x00 | chunk)              chunks of 1 MiB, the last one shorter; empty data is one empty chunk
    node  = SHA-256(0x01 | left | right)       an odd last node moves up unchanged
    root  = SHA-256(0x02 | length as 8 bytes, big-endian | top)
The prefixes keep leaves, nodes and roots apart (RFC 6962, section 2.1); the length settles what an odd node leaves open.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from attribution.errors import IdentityError

LEAF_BYTES = 1 << 20
MAX_THREADS = 8

Buffer = bytes | bytearray | memoryview
_Item = TypeVar("_Item")


def hash_leaf(chunk: Buffer) -> bytes:
    """Hash one chunk. hashlib releases the interpreter lock on chunks above 2 KiB, which is what makes threads pay."""
    state = hashlib.sha256(b"\x00")
    state.update(chunk)
    return state.digest()


def tree_root(leaves: Sequence[bytes], length_bytes: int) -> str:
    """Fold leaf hashes into the root, 64 hex digits.

    Raises:
        IdentityError: No leaf was given; empty data has one empty leaf.
    """
    if not leaves:
        raise IdentityError("a tree hash needs at least one leaf; empty data is one empty leaf")
    level = list(leaves)
    while len(level) > 1:
        paired = [hashlib.sha256(b"\x01" + level[i] + level[i + 1]).digest() for i in range(0, len(level) - 1, 2)]
        level = paired + level[len(level) - len(level) % 2 :]
    return hashlib.sha256(b"\x02" + length_bytes.to_bytes(8, "big") + level[0]).hexdigest()


def tree_hash(data: Buffer) -> str:
    """Tree hash v1 of bytes in memory, on the calling thread."""
    view = memoryview(data).cast("B")
    leaves = [hash_leaf(view[start : start + LEAF_BYTES]) for start in leaf_starts(len(view))]
    return tree_root(leaves, len(view))


def tree_hash_file(path: str | os.PathLike[str], *, threads: int | None = None) -> str:
    """Tree hash v1 of a file, its leaves read and hashed on `threads` threads (None: one for each core, at most 8).

    Raises:
        IdentityError: The file became shorter while it was read.
        OSError: The file cannot be opened or read.
    """
    with Path(path).open("rb") as file:
        handle = file.fileno()
        size = os.fstat(handle).st_size

        own = threading.local()  # memory of each thread, once: a megabyte anew for each leaf would cost as many page faults

        def leaf(start: int) -> bytes:
            room = own.room = getattr(own, "room", None) or memoryview(bytearray(LEAF_BYTES))
            count = os.preadv(handle, [room], start)
            if count != min(LEAF_BYTES, size - start):
                raise IdentityError(f"{path} changed while it was read: {count} bytes at offset {start}; read it again")
            return hash_leaf(room[:count])

        return tree_root(map_threads(leaf, leaf_starts(size), threads), size)


def leaf_starts(length_bytes: int) -> range:
    """Offsets of the leaves; empty data has one at 0."""
    return range(0, max(length_bytes, 1), LEAF_BYTES)


def map_threads(work: Callable[[_Item], bytes], items: Iterable[_Item], threads: int | None) -> list[bytes]:
    """Apply `work` to every item, in order, on at most `threads` threads."""
    todo = list(items)
    count = min(len(todo), threads or min(os.cpu_count() or 1, MAX_THREADS))
    if count <= 1:
        return [work(item) for item in todo]
    with ThreadPoolExecutor(max_workers=count, thread_name_prefix="treehash") as pool:
        return list(pool.map(work, todo))
