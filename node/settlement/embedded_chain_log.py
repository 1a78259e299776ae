"""The development chain's only file: an append-only, checksummed log of its genesis and of every block's transaction.

    file   = magic (8 bytes) record*
    record = length u32 | length's CRC-32 u32 | payload's SHA-256 (32 bytes) | payload
    payload of record 0 = genesis JSON; of every other = timestamp u64 | block hash (32 bytes) | raw signed transaction

A record is synced to disk before anyone hears of its block. A crash can therefore tear only the last record, which nobody was
told about: it is cut off. Damage anywhere else is refused, since cutting there would forget blocks that somebody relies on.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from node.errors import ChainError

MAGIC = b"OLCHAIN1"
MAX_RECORD_BYTES = 1 << 20  # geth refuses transactions over 128 KiB; a record is one transaction or the genesis
_HEADER = struct.Struct(">II32s")
_BLOCK = struct.Struct(">Q32s")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoggedBlock:
    """One block: its time, the hash that a replay must reach, and its only transaction."""

    timestamp_s: int
    block_hash: bytes
    raw: bytes

    def to_bytes(self) -> bytes:
        """The record's payload."""
        return _BLOCK.pack(self.timestamp_s, self.block_hash) + self.raw

    @classmethod
    def from_bytes(cls, payload: bytes) -> LoggedBlock:
        """Read what `to_bytes` wrote."""
        timestamp_s, block_hash = _BLOCK.unpack_from(payload)
        return cls(timestamp_s, block_hash, payload[_BLOCK.size :])


class BlockLog:
    """One open log. The directory's lock is held by the caller.

    Args:
        path: The log's file; made on first use.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def read(self) -> list[bytes]:
        """Every whole record's payload, oldest first; a torn last record is cut off the file.

        Raises:
            ChainError: chain_corrupt, the file is not such a log or is damaged before its end.
        """
        data = self._path.read_bytes()
        if len(data) < len(MAGIC) and MAGIC.startswith(data):
            self._truncate(0, len(data))
            self._write(MAGIC)
            _sync_directory(self._path.parent)
            return []
        if not data.startswith(MAGIC):
            raise _corrupt(self._path, 0, "it does not start with the log's mark")
        payloads, end = [], len(MAGIC)
        for payload, record_end in _records(self._path, data):
            payloads.append(payload)
            end = record_end
        self._truncate(end, len(data))
        return payloads

    def append(self, payload: bytes) -> None:
        """Write one record and sync it; returns only when it is on the disk.

        Raises:
            ChainError: chain_full, the disk is full or gone. The process must stop: its memory is ahead of the disk.
        """
        header = _HEADER.pack(len(payload), zlib.crc32(struct.pack(">I", len(payload))), hashlib.sha256(payload).digest())
        self._write(header + payload)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
            os.fsync(self._fd)
        except OSError as error:
            raise ChainError(
                f"the development chain cannot write {self._path}; free disk space or check the disk, then start again",
                code="chain_full",
            ) from error

    def _truncate(self, end: int, size: int) -> None:
        if end == size:
            return
        logger.warning(
            "cut a torn record off the development chain's log: %d bytes after byte %d of %s", size - end, end, self._path
        )
        os.ftruncate(self._fd, end)
        os.fsync(self._fd)


def _records(path: Path, data: bytes) -> Iterator[tuple[bytes, int]]:
    """(payload, end offset) of each whole record; stops at a torn tail."""
    offset = len(MAGIC)
    while offset < len(data):
        rest = memoryview(data)[offset:]
        if len(rest) < _HEADER.size:
            return
        length, length_crc, digest = _HEADER.unpack_from(rest)
        if length == length_crc == 0 and not any(rest):
            return  # a torn append leaves a prefix, or zeros where the size was written before the bytes
        if zlib.crc32(struct.pack(">I", length)) != length_crc or length > MAX_RECORD_BYTES:
            raise _corrupt(path, offset, "a record's header is damaged")
        payload = bytes(rest[_HEADER.size : _HEADER.size + length])
        is_last = _HEADER.size + length >= len(rest)
        if len(payload) < length or (hashlib.sha256(payload).digest() != digest and is_last):
            return
        if hashlib.sha256(payload).digest() != digest:
            raise _corrupt(path, offset, "a record's checksum does not match")
        offset += _HEADER.size + length
        yield payload, offset


def _corrupt(path: Path, offset: int, what: str) -> ChainError:
    return ChainError(
        f"the development chain's log {path} is damaged at byte {offset}: {what}; restore the file from a copy, or remove its "
        "directory to start a new chain (balances and roots on it are lost)",
        code="chain_corrupt",
    )


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
