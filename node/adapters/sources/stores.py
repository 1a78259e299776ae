"""The stores an operator opened to clients, and how to read each: object stores through obstore, web servers through one door.

A client names a location; it is served only when it lies under a store of the settings, and only with that store's own endpoint
and credentials. Nothing a client sends chooses a host, an account or a header.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import obstore
from obstore.exceptions import BaseError, NotFoundError, PermissionDeniedError, PreconditionError, UnauthenticatedError
from obstore.store import AzureStore, GCSStore, S3Store

from node.adapters.disk_cache import DiskCache
from node.adapters.formats.layout import CONFIG_FILE, MANIFEST_FILE, MAX_DIRECTORY_ENTRIES, WEIGHTS_FILE, wanted_files
from node.adapters.locations import Location, parse_store_root, require_below
from node.adapters.remote import RemoteFile, RemoteVersion, file_limit, refuse_oversized
from node.adapters.sources.web import Resolve, WebAnswer, WebDoor, resolve_host
from node.adapters.staging import Staging, discard
from node.errors import (
    AdapterForbiddenError,
    AdapterInvalidError,
    AdapterNotFoundError,
    AdapterUnavailableError,
    ConfigError,
)

if TYPE_CHECKING:
    from obstore import GetOptions

CHUNK_BYTES = 1 << 20
RETRY_S = 10.0


class StoreSettings(Protocol):
    """See `node.config.StoreSettings`."""

    @property
    def url(self) -> str: ...

    @property
    def options(self) -> Mapping[str, str]: ...

    @property
    def allow_private(self) -> bool: ...


class _Reader(Protocol):
    """One store's files."""

    def files(self, location: Location) -> list[RemoteFile]:
        """What lies directly under a location."""
        ...

    def read(self, location: Location, file: RemoteFile, offset: int) -> Iterator[bytes]:
        """A file's bytes from an offset on, of exactly the version that `files` named."""
        ...


class StoreSource:
    """Fetches adapters from the operator's stores. Every method blocks: call them on a worker thread.

    Args:
        stores: From the settings.
        cache: Where fetched adapters go. staging: fills it.
        max_bytes: Limit on a weights file.
        timeout_s: Limit on connecting and on every single read.
        resolve: Addresses of a host.

    Raises:
        ConfigError: A store's URL or options make no sense.
    """

    def __init__(
        self,
        stores: Sequence[StoreSettings],
        cache: DiskCache,
        staging: Staging,
        *,
        max_bytes: int,
        timeout_s: float,
        resolve: Resolve = resolve_host,
    ) -> None:
        self._cache = cache
        self._staging = staging
        self._max_bytes = max_bytes
        self._readers = dict(_open_store(store, timeout_s, resolve) for store in reversed(stores))  # the first of equals counts
        self._roots = tuple(dict.fromkeys(parse_store_root(store.url) for store in stores))

    def require_allowed(self, location: Location) -> None:
        """Raises AdapterForbiddenError (source_forbidden) for a location outside every store."""
        require_below(location, self._roots)

    def look_up(self, name: Location, token: str | None) -> RemoteVersion:
        """List the files at a location. The token is not used: a store has its operator's credentials."""
        listed = self._reader(name).files(name)
        wanted = wanted_files([file.name for file in listed])
        files = [file for file in listed if file.name in wanted]
        refuse_oversized(files, self._max_bytes, "at its source")
        return RemoteVersion(_revision(files, name), is_private=False, files=tuple(files))

    def fetch(self, name: Location, found: RemoteVersion, token: str | None) -> Path:
        """Download the adapter's files; a broken download goes on where it stopped."""
        reader = self._reader(name)
        final = self._cache.place(name.source, _entry_name(name), found.revision)
        with self._staging.filling(final, str(name), found.files) as part:
            for file in found.files if part is not None else ():
                assert part is not None  # noqa: S101 - for the type checker: the loop is empty otherwise
                limit = file_limit(file, self._max_bytes)
                try:
                    self._staging.receive(part, file, lambda f, offset: reader.read(name, f, offset), limit)
                except AdapterUnavailableError as error:
                    if error.error_code == "source_limit":
                        discard(part)  # what a source sends beyond its word is not worth going on with
                    raise
                except _VersionMovedError as error:
                    discard(part)
                    raise AdapterUnavailableError(f"{name} changed while it was fetched; try again", retry_after_s=1.0) from error
        return final

    def _reader(self, location: Location) -> _Reader:
        return self._readers[require_below(location, self._roots)]


class _VersionMovedError(Exception):
    """The file is no longer the one that was listed."""


def _open_store(settings: StoreSettings, timeout_s: float, resolve: Resolve) -> tuple[Location, _Reader]:
    root = parse_store_root(settings.url)
    if root.source == "http":
        if root.scheme == "http" and not settings.allow_private:
            raise ConfigError(
                f"adapters.stores: {settings.url} is not encrypted; use https, or allow_private = true for a server of your own"
            )
        return root, _WebReader(WebDoor(timeout_s, allows_private=settings.allow_private, resolve=resolve))
    return root, _ObjectReader(_object_store(root, settings.options, timeout_s))


def _object_store(root: Location, options: Mapping[str, str], timeout_s: float) -> Any:
    limit = timedelta(seconds=timeout_s)
    client = {"connect_timeout": limit, "read_timeout": limit, "timeout": timedelta(days=1)}
    chosen = dict(options)
    if chosen.pop("allow_http", "false").lower() == "true":
        client["allow_http"] = True  # type: ignore[assignment]
    kinds: dict[str, Any] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
    retry = {"max_retries": 3, "retry_timeout": limit}
    try:
        return kinds[root.scheme](root.authority, config=chosen, client_options=client, retry_config=retry)
    except (BaseError, TypeError, ValueError) as error:
        raise ConfigError(
            f"adapters.stores: the options of {root} are not understood ({', '.join(sorted(chosen)) or 'none'}); see obstore's "
            "names for this kind of store"
        ) from error


class _ObjectReader:
    """S3, Google Cloud Storage, Azure Blob Storage."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def files(self, location: Location) -> list[RemoteFile]:
        found: list[RemoteFile] = []
        prefix = location.path + "/"
        try:
            for page in obstore.list(self._store, prefix=prefix):
                for meta in page:
                    name = str(meta["path"]).removeprefix(prefix)
                    if "/" not in name:
                        found.append(RemoteFile(name, int(meta["size"]), meta.get("e_tag")))
                if len(found) > MAX_DIRECTORY_ENTRIES:
                    raise AdapterInvalidError(f"{location} holds more than {MAX_DIRECTORY_ENTRIES} files")
        except BaseError as error:
            raise _from_store(error, location) from error
        if not found:
            raise AdapterNotFoundError(f"there is no adapter at {location}", param="model")
        return found

    def read(self, location: Location, file: RemoteFile, offset: int) -> Iterator[bytes]:
        options: GetOptions = {"if_match": file.tag} if file.tag else {}
        if offset:
            options["range"] = {"offset": offset}
        try:
            answer = obstore.get(self._store, f"{location.path}/{file.name}", options=options)
            for chunk in answer.stream(min_chunk_size=CHUNK_BYTES):
                yield bytes(chunk)
        except PreconditionError as error:
            raise _VersionMovedError from error
        except BaseError as error:
            raise _from_store(error, location) from error


class _WebReader:
    """A directory of a web server. It cannot be listed, so the files an adapter may have are asked for one by one."""

    def __init__(self, door: WebDoor) -> None:
        self._door = door

    def files(self, location: Location) -> list[RemoteFile]:
        found: list[RemoteFile] = []
        for name in (CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE):
            with self._door.get(_below(location, name), {"Range": "bytes=0-0"}) as answer:
                if answer.status in (404, 410):
                    continue
                _require(answer, location, (200, 206))
                found.append(RemoteFile(name, _total_bytes(answer), answer.headers.get("etag") or _modified(answer)))
        if not found:
            raise AdapterNotFoundError(f"there is no adapter at {location}", param="model")
        return found

    def read(self, location: Location, file: RemoteFile, offset: int) -> Iterator[bytes]:
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        with self._door.get(_below(location, file.name), headers) as answer:
            _require(answer, location, (206,) if offset else (200,))
            if (answer.headers.get("etag") or _modified(answer)) != file.tag:
                raise _VersionMovedError
            yield from answer.chunks()


def _below(location: Location, name: str) -> Location:
    return Location(location.scheme, location.authority, (*location.parts, name))


def _modified(answer: WebAnswer) -> str | None:
    return answer.headers.get("last-modified")


def _total_bytes(answer: WebAnswer) -> int | None:
    """The whole file's size, from the answer to a request for its first byte."""
    stated = answer.headers.get("content-range", "").rpartition("/")[2] if answer.status == 206 else None
    stated = answer.headers.get("content-length", "") if stated is None else stated
    return int(stated) if stated.isdecimal() else None


def _require(answer: WebAnswer, location: Location, statuses: tuple[int, ...]) -> None:
    if answer.status in (401, 403):
        raise AdapterForbiddenError(f"the server refuses {location} ({answer.status})", code="adapter_gated", param="model")
    if answer.status in (404, 410):
        raise AdapterNotFoundError(f"there is no adapter at {location}", param="model")
    if answer.status not in statuses:
        raise AdapterUnavailableError(
            f"the server answers {answer.status} for {location}; try again later", retry_after_s=RETRY_S
        )
    if answer.headers.get("content-encoding", "identity") != "identity":
        raise AdapterUnavailableError(
            f"the server compresses {location}, so its size cannot be bounded; serve it as it is", code="source_limit"
        )


def _from_store(error: BaseError, location: Location) -> Exception:
    if isinstance(error, NotFoundError):
        return AdapterNotFoundError(f"there is no adapter at {location}", param="model")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return AdapterForbiddenError(
            f"the store refuses {location}; check the credentials of adapters.stores", code="adapter_gated", param="model"
        )
    return AdapterUnavailableError(f"the store does not answer for {location}; try again later", retry_after_s=RETRY_S)


def _revision(files: Sequence[RemoteFile], location: Location) -> str:
    """A digest of the version marks of the adapter's files: 40 hex digits, as a commit has."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        if file.tag is None:
            raise AdapterUnavailableError(
                f"the source gives {file.name} of {location} neither an ETag nor a time of change, so a new version could not be "
                "noticed; serve it with one"
            )
        digest.update(f"{file.name}\0{file.size_bytes}\0{file.tag}\0".encode())
    return digest.hexdigest()[:40]


def _entry_name(location: Location) -> str:
    """One path component for a location: readable, and unambiguous through its digest."""
    tail = "-".join((location.authority.replace(":", "-"), *location.parts))[-60:]
    return f"{hashlib.sha256(str(location).encode()).hexdigest()[:16]}-{tail}"
