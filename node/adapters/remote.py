"""What every source outside this machine has in common: it says which version a name stands for, and fetches that version."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from node.adapters.formats.layout import is_weights
from node.errors import AdapterInvalidError

SMALL_FILE_BYTES = 1 << 20  # configuration and manifest

NameT = TypeVar("NameT")
NameT_contra = TypeVar("NameT_contra", contravariant=True)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of an adapter at its source. `tag` is the source's own version mark (an ETag), `sha256` what it says the file's
    digest is in hexadecimal, where it has one."""

    name: str
    size_bytes: int | None
    tag: str | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class RemoteVersion:
    """What a name stands for now.

    Attributes:
        revision: A commit, or a digest of the files' version marks; other files always have another one.
        is_private: Whether only some callers may see it; it is then never listed.
        files: Everything the source shows for the name.
    """

    revision: str
    is_private: bool
    files: tuple[RemoteFile, ...] = ()

    @property
    def file_names(self) -> list[str]:
        return [file.name for file in self.files]


def file_limit(file: RemoteFile, max_weight_bytes: int) -> int:
    """The bytes that one file of an adapter may have."""
    return max_weight_bytes if is_weights(file.name) else SMALL_FILE_BYTES


def refuse_oversized(files: Iterable[RemoteFile], max_weight_bytes: int, where: str) -> None:
    """Refuse an adapter by the sizes that its source names, before a byte is fetched.

    Raises:
        AdapterInvalidError: adapter_too_large.
    """
    for file in files:
        limit = file_limit(file, max_weight_bytes)
        if file.size_bytes is not None and file.size_bytes > limit:
            raise AdapterInvalidError(
                f"{file.name} has {file.size_bytes} bytes {where}; the limit is {limit}", code="adapter_too_large"
            )


class RemoteSource(Protocol[NameT_contra]):
    """A source. Every method blocks: call them on a worker thread."""

    def look_up(self, name: NameT_contra, token: str | None) -> RemoteVersion:
        """Ask what `name` stands for, with the caller's right to see it.

        Raises:
            AdapterError: The source's refusal, or files that are no adapter.
        """
        ...

    def fetch(self, name: NameT_contra, found: RemoteVersion, token: str | None) -> Path:
        """Download and stage what `look_up` found; returns the staged directory.

        Raises:
            The errors of `look_up`, and AdapterUnavailableError (cache_full, source_limit).
        """
        ...
