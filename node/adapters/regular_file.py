"""Files from outside, opened so that only a regular file can ever be read: no link, FIFO or device, no file beyond its limit."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from node.errors import AdapterInvalidError


def open_regular(path: Path, max_bytes: int, code: str | None = None) -> tuple[int, int]:
    """Open a regular file for reading; return (descriptor, size in bytes).

    The type is looked up before opening, so that a FIFO or a device is never touched, and again on the open file, so that
    swapping it in between gains nothing. O_NONBLOCK keeps even that race from hanging on a FIFO.

    Args:
        path: The file. Messages name it without its folder, which is the operator's business.
        max_bytes: Limit on its length.
        code: The error code of every refusal. None: adapter_format_unsupported (missing), adapter_too_large, adapter_corrupt.
    """
    try:
        _refuse_special(os.lstat(path), path.name, code)
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise AdapterInvalidError(f"{path.name} is missing", code=code or "adapter_format_unsupported") from error
    except OSError as error:
        message = f"{path.name} cannot be opened (errno {error.errno}); check its permissions"
        raise AdapterInvalidError(message, code=code) from error
    try:
        status = os.fstat(descriptor)
        _refuse_special(status, path.name, code)
        if status.st_size > max_bytes:
            message = f"{path.name} has {status.st_size} bytes; the limit is {max_bytes}"
            raise AdapterInvalidError(message, code=code or "adapter_too_large")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, status.st_size


def read_whole(path: Path, max_bytes: int, code: str | None = None) -> bytes:
    """The content of a small regular file, with the same refusals as `open_regular`."""
    descriptor, size_bytes = open_regular(path, max_bytes, code)
    try:
        return read_exactly(descriptor, path.name, 0, size_bytes)
    finally:
        os.close(descriptor)


def _refuse_special(status: os.stat_result, name: str, code: str | None) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise AdapterInvalidError(f"{name} is a symbolic link; put the file itself in its place", code=code)
    if not stat.S_ISREG(status.st_mode):
        raise AdapterInvalidError(f"{name} is not a regular file", code=code)


def read_exactly(descriptor: int, name: str, offset: int, size_bytes: int) -> bytes:
    """`size_bytes` from `offset` of an open file called `name`; AdapterInvalidError where the file ends before that."""
    parts = []
    position, end = offset, offset + size_bytes
    while position < end:
        part = os.pread(descriptor, end - position, position)
        if not part:
            raise AdapterInvalidError(f"{name} ended at byte {position} while {end} bytes were announced; fetch it again")
        parts.append(part)
        position += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
