"""Adapters from the Hugging Face hub: the files of one commit, nothing else, in the node's own cache under its hash.

`HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE` and the rest mean what the library's documentation says. Files go straight into the
node's cache, so that one size limit holds for everything fetched, and a download goes on where it broke off.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled

from node.adapters.disk_cache import DiskCache
from node.adapters.formats.layout import is_adapter, wanted_files
from node.adapters.names import AdapterName
from node.adapters.remote import RemoteFile, RemoteVersion, file_limit, refuse_oversized
from node.adapters.sources.hub_errors import HUB_ERRORS, from_hub, is_broken_connection, translated
from node.adapters.sources.hub_files import HubFiles
from node.adapters.staging import Opener, Staging, discard
from node.errors import AdapterForbiddenError, AdapterNotFoundError, AdapterUnavailableError

_COMMIT = re.compile(r"[0-9a-f]{40}")


class _Reference(msgspec.Struct, frozen=True):
    """The last answer of the hub about one name, kept for offline starts."""

    commit: str
    is_private: bool


class HubSource:
    """Fetches adapters. Every method blocks: call them on a worker thread.

    Args:
        cache: Where fetched adapters are kept: hub/<owner>--<name>/<commit>. staging: fills it.
        max_bytes: Limit on the weights file.
        timeout_s: Limit on one answer about a repository; every read of a download has the library's HF_HUB_DOWNLOAD_TIMEOUT.
        endpoint: The hub's address; None: HF_ENDPOINT, else the public hub.
    """

    def __init__(
        self, cache: DiskCache, staging: Staging, *, max_bytes: int, timeout_s: float, endpoint: str | None = None
    ) -> None:
        self._cache = cache
        self._staging = staging
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._files = HubFiles(endpoint)
        self._api = HfApi(endpoint=endpoint)

    def look_up(self, name: AdapterName, token: str | None) -> RemoteVersion:
        """Ask the hub what `name` stands for, with the caller's right to see it.

        Args:
            name: With an owner; its revision is a branch, tag or commit, or None for the default branch.
            token: The client's own; None: the node's (HF_TOKEN), where it has one.

        Raises:
            AdapterForbiddenError: adapter_gated. AdapterNotFoundError. AdapterUnavailableError: 429, 5xx, no connection.
            AdapterInvalidError: The repository holds code or no safetensors weights, or files beyond their limits.
        """
        if not name.is_hub_id:
            raise AdapterNotFoundError(f"{name} is no hub adapter: those are named owner/name", param="model")
        with translated(name):
            try:
                info = self._api.model_info(
                    name.path, revision=name.revision, timeout=self._timeout_s, files_metadata=True, token=token
                )
            except OfflineModeIsEnabled as error:
                return self._look_up_offline(name, error)
        found = _commit_of(info, name)
        refuse_oversized(_wanted(found), self._max_bytes, "on the hub")
        return found

    def fetch(self, name: AdapterName, found: RemoteVersion, token: str | None) -> Path:
        """Download and stage what `look_up` found; returns the staged directory.

        Raises:
            The errors of `look_up`, and AdapterUnavailableError (cache_full) where nothing can be written.
        """
        staged = self._staged(name, found.revision)
        wanted = _wanted(found) if found.files else []  # offline nobody lists them, and they are here
        with translated(name):
            with self._staging.filling(staged, str(name), wanted) as part:
                if part is not None:
                    self._download(name, found.revision, wanted, token, part)
                    _require_whole(part, wanted)
            self._remember(name, found)
        return staged

    def _download(self, name: AdapterName, commit: str, files: Sequence[RemoteFile], token: str | None, part: Path) -> None:
        def open_from(file: RemoteFile, offset: int) -> Iterator[bytes]:
            return self._files.read(name, commit, file, token, offset)

        for file in files:
            (part / file.name).parent.mkdir(parents=True, exist_ok=True)
            self._receive(part, file, open_from)

    def _receive(self, part: Path, file: RemoteFile, open_from: Opener) -> None:
        """One file; a connection that breaks is taken up again at once, where it stopped."""
        for is_last in (False, False, True):
            try:
                self._staging.receive(part, file, open_from, file_limit(file, self._max_bytes))
                break
            except HUB_ERRORS as error:
                if is_last or not is_broken_connection(error):
                    raise

    def _staged(self, name: AdapterName, commit: str) -> Path:
        return self._cache.place("hub", name.path.replace("/", "--"), commit)

    def _reference_file(self, name: AdapterName) -> Path:
        return self._cache.place("hub", name.path.replace("/", "--"), f".ref-{quote(name.revision or 'main', safe='')}.json")

    def _remember(self, name: AdapterName, found: RemoteVersion) -> None:
        content = msgspec.json.encode(_Reference(found.revision, found.is_private))
        file = self._reference_file(name)
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".ref-", delete=False) as scratch:
            scratch.write(content)
        os.replace(scratch.name, file)

    def _look_up_offline(self, name: AdapterName, error: OfflineModeIsEnabled) -> RemoteVersion:
        """The last commit seen under this name. A private one stays closed: nobody can say who may read it."""
        try:
            known = msgspec.json.decode(self._reference_file(name).read_bytes(), type=_Reference)
        except (OSError, msgspec.MsgspecError):
            raise from_hub(error, name) from error
        staged = self._staged(name, known.commit)
        if not _COMMIT.fullmatch(known.commit) or not is_adapter(staged):
            raise from_hub(error, name) from error
        if known.is_private:
            raise AdapterForbiddenError(
                f"{name} is private or gated, and offline nobody can check who may use it; go online", code="adapter_gated"
            ) from error
        return RemoteVersion(known.commit, known.is_private)


def _commit_of(info: Any, name: AdapterName) -> RemoteVersion:
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise AdapterUnavailableError(f"the hub names no commit for {name}", retry_after_s=60.0)
    files = tuple(_remote_file(file) for file in info.siblings or ())
    return RemoteVersion(info.sha, bool(info.private or info.gated), files)


def _wanted(found: RemoteVersion) -> list[RemoteFile]:
    """Of a repository's files those that make the adapter. Raises AdapterInvalidError as `wanted_files` does."""
    names = wanted_files(found.file_names)
    return [file for file in found.files if file.name in names]


def _remote_file(file: Any) -> RemoteFile:
    """Large files have the digest that the hub keeps them under."""
    return RemoteFile(str(file.rfilename), file.size, sha256=None if file.lfs is None else str(file.lfs.sha256))


def _require_whole(part: Path, files: Sequence[RemoteFile]) -> None:
    """Refuse bytes that are not those the hub keeps, whichever connections they came through."""
    for file in files:
        if file.sha256 is None:
            continue
        with (part / file.name).open("rb") as content:
            arrived = hashlib.file_digest(content, "sha256").hexdigest()
        if arrived != file.sha256:
            discard(part)
            raise AdapterUnavailableError(
                f"{file.name} arrived damaged: its SHA-256 is {arrived}, the hub says {file.sha256}; try again", retry_after_s=1.0
            )
