"""Which adapters exist: names to verified files. Lives on the API process's event loop and imports no torch.

Names are aliases that can move; what a request uses, pays for and is billed under is the content hash. A local directory is
looked at (three file stats) on every use, a hub name is asked about again after a minute, with the token of whoever asks.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from attribution.manifest import Manifest
from node.adapters.binding import LinearTable
from node.adapters.disk_cache import open_disk_cache
from node.adapters.failures import Failures
from node.adapters.flights import Flights
from node.adapters.locations import SCHEMES, SOURCES, Location, is_location, parse_location
from node.adapters.names import AdapterName, parse_name
from node.adapters.remote import NameT, RemoteSource
from node.adapters.shelf import RemoteShelf
from node.adapters.sources.hub import HubSource
from node.adapters.sources.local import LocalSource
from node.adapters.sources.pbase import PbaseSource
from node.adapters.sources.stores import StoreSource
from node.adapters.sources.web import Resolve, WebDoor, resolve_host
from node.adapters.staging import Progress, Staging
from node.adapters.verify import AdapterVerifier, Coverage, Fingerprint, VerifiedAdapter, fingerprint
from node.config import AdapterSettings, Settings
from node.errors import (
    AdapterChangedError,
    AdapterError,
    AdapterForbiddenError,
    AdapterInvalidError,
    AdapterNotFoundError,
    ConfigError,
)
from node.request import LinearShape
from node.resources import data_path

STARTUP_CHECKS = 4  # at once; the engine loads its model meanwhile
STORE_TIMEOUT_S = 10.0  # on connecting and on every single read
DEMO_ADAPTERS = "config/demo/adapters"
_CONTENT_ID = re.compile(r"[0-9a-f]{64}")

NameFilter = Callable[[str], bool]


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


class AdapterCatalog:
    """Finds, fetches and verifies adapters for one base model.

    Args:
        settings: The node's settings; `adapters` and `data_dir` are used.
        linears: The base's linear modules, from the engine's `Ready`.
        base_id: The base's content hash.
        clock: Monotonic seconds.
        hub_endpoint: The hub's address; None: HF_ENDPOINT, else the public hub.
        resolve_host: Addresses of a web server's host.

    Raises:
        ConfigError: A directory of the settings does not exist, or a store's settings make no sense.
    """

    def __init__(
        self,
        settings: Settings,
        linears: Sequence[LinearShape],
        base_id: str,
        clock: Callable[[], float],
        *,
        hub_endpoint: str | None = None,
        resolve_host: Resolve = resolve_host,
    ) -> None:
        chosen = settings.adapters
        self._local = LocalSource(_roots(chosen.directory, chosen.roots))
        self._verifier = AdapterVerifier(
            LinearTable(linears), base_id, max_rank=chosen.max_rank, max_bytes=chosen.max_adapter_bytes
        )
        self._flights = Flights(
            worker_count=chosen.fetch_workers, limit=chosen.fetch_queue_limit, timeout_s=chosen.fetch_timeout_s
        )
        self._failures = Failures(chosen.negative_cache_s, clock)
        self._aliases: dict[str, Path] = {}
        self._entries: OrderedDict[str, tuple[Fingerprint, CatalogEntry]] = OrderedDict()
        self._problems: dict[str, AdapterError] = {}
        self._cache = open_disk_cache(settings)
        self._staging = Staging(self._cache)
        self._default_source = chosen.default_source
        self._stores = StoreSource(
            chosen.stores,
            self._cache,
            self._staging,
            max_bytes=chosen.max_adapter_bytes,
            timeout_s=STORE_TIMEOUT_S,
            resolve=resolve_host,
        )
        self._by_location: RemoteShelf[Location] = self._shelf("store", self._stores, clock)
        self._by_name: dict[str, RemoteShelf[AdapterName]] = {}
        if chosen.allow_hub:
            hub = HubSource(
                self._cache,
                self._staging,
                max_bytes=chosen.max_adapter_bytes,
                timeout_s=min(chosen.fetch_timeout_s, 10.0),
                endpoint=hub_endpoint,
            )
            self._by_name["hub"] = self._shelf("hub", hub, clock)
        pbase = _pbase(chosen, self._stores, resolve_host)
        if pbase is not None:
            self._by_name["pbase"] = self._shelf("pbase", pbase, clock)

    def _shelf(self, kind: str, source: RemoteSource[NameT], clock: Callable[[], float]) -> RemoteShelf[NameT]:
        return RemoteShelf(kind, source, self._cache, self._verifier, self._flights, self._failures, clock)

    @property
    def problems(self) -> Mapping[str, AdapterError]:
        """Why directories found at the start cannot be served, by directory name."""
        return self._problems

    async def start(self) -> None:
        """Verify every adapter in the adapters directory. A bad one becomes a problem; the others are served."""
        names = self._local.listed()
        for first in range(0, len(names), STARTUP_CHECKS):
            await asyncio.gather(*map(self._try, names[first : first + STARTUP_CHECKS]))

    async def _try(self, name: str) -> None:
        try:
            await self.resolve(name, "local")
        except AdapterError as error:
            self._problems[name] = error

    async def add(self, path: Path, name: str | None = None) -> CatalogEntry:
        """Serve the adapter in `path`, chosen by the operator, under `name` (default: the directory's own).

        Raises:
            AdapterError: The name or the files are unusable; nothing is added.
        """
        alias = parse_name(name if name is not None else path.name)
        if not path.is_dir():
            raise AdapterNotFoundError(f"{path} is not a directory; name one that holds adapter_config.json")
        directory = path.resolve()
        entry = await self._from_directory(str(alias), directory)
        self._aliases[str(alias)] = directory
        return entry

    async def resolve(
        self,
        name: str,
        source: str | None = None,
        token: str | None = None,
        *,
        pin: str | None = None,
        sees: NameFilter = sees_all,
    ) -> CatalogEntry:
        """Find an adapter, fetching and verifying it where needed.

        Args:
            name: See `node.adapters.names` and `node.adapters.locations`; or the content hash of an adapter that is known.
            source: One of SOURCES; None: local first, then the default source.
            token: The client's own token for hub and pbase.
            pin: The content hash the client insists on.
            sees: Which of the operator's names exist for the caller. One that does not is looked past, so that its answer, and
                the work for it, are those of a name nobody registered.

        Raises:
            AdapterError: Every kind; the message names the adapter.
        """
        entry = await self._find(name, source, token, sees)
        if pin is not None and entry.adapter_id != pin:
            raise AdapterChangedError(f"adapter {name} is now {entry.adapter_id}; the request is pinned to {pin}", param="model")
        return entry

    def entries(self, sees: NameFilter = sees_all) -> tuple[CatalogEntry, ...]:
        """The adapters known now, by name, of those that exist for the caller. Ones that their source keeps private or gated are
        not listed."""
        known = {entry.name: entry for _, entry in self._entries.values()}
        for source, shelf in self._by_name.items():
            for revision, name, verified in shelf.public():
                known.setdefault(name, CatalogEntry(name, source, revision, verified))
        for revision, name, verified in self._by_location.public():
            known.setdefault(name, CatalogEntry(name, parse_location(name).source, revision, verified))
        return tuple(known[name] for name in sorted(known) if sees(name))

    async def close(self) -> None:
        """Stop fetching; adapters already verified stay valid for the requests that have them."""
        await self._flights.close()

    def fetching(self) -> list[Progress]:
        """The downloads under way now."""
        return self._staging.progress()

    async def _find(self, text: str, source: str | None, token: str | None, sees: NameFilter) -> CatalogEntry:
        if source not in (None, *SOURCES):
            raise AdapterForbiddenError(
                f"adapter source {source[:40]!r} is not offered; use one of {', '.join(SOURCES)}", param="adapter_source"
            )
        if is_location(text) or source in SCHEMES:
            return await self._from_store(text, source, sees)
        name = parse_name(text)
        if source in (None, "local"):
            directory = self._find_directory(name)
            if directory is None:
                self._entries.pop(str(name), None)
            elif sees(name.path):
                return await self._from_directory(str(name), directory)
        if _CONTENT_ID.fullmatch(name.path):
            return await self._find_by_content(name, sees)
        chosen = source or self._default_source
        if chosen in SCHEMES:
            return await self._from_store(text, chosen, sees)
        if chosen == "local" or not (name.is_hub_id or source is not None):
            raise AdapterNotFoundError(f"adapter {name}: this node has no adapter directory of that name", param="model")
        return await self._from_named(chosen, name, token)

    async def _find_by_content(self, name: AdapterName, sees: NameFilter) -> CatalogEntry:
        """An adapter by what it is, through a name that exists for the caller. The files are looked at again: a moved alias must
        not answer for its old hash."""
        for entry in self.entries(sees):
            if entry.adapter_id == name.path:
                return await self.resolve(entry.name, entry.source, pin=name.path, sees=sees)
        raise AdapterNotFoundError(f"no adapter with content hash {name.path} is known here; name it by its name", param="model")

    def _find_directory(self, name: AdapterName) -> Path | None:
        if name.revision is not None:
            return None  # a directory has no revisions; one that a client names can only be the hub's
        found = self._local.find(name)  # an alias takes as long as a name nobody registered
        return self._aliases.get(name.path, found)

    async def _from_directory(self, name: str, directory: Path) -> CatalogEntry:
        """The entry of a local directory, verified again whenever a stat of its files says they changed."""
        state = fingerprint(directory)
        known = self._entries.get(name)
        if known is not None and known[0] == state and known[1].directory == directory:
            return known[1]
        key = ("local", name, directory)
        self._failures.raise_known(key, state)
        return await self._flights.join((key, state), lambda: self._verify_directory(name, directory, key, state))

    async def _verify_directory(self, name: str, directory: Path, key: tuple[str, str, Path], state: Fingerprint) -> CatalogEntry:
        try:
            verified = await self._flights.call(self._verifier.verify, directory)
        except AdapterInvalidError as error:
            self._entries.pop(name, None)
            named = AdapterInvalidError(f"adapter {name}: {error.message}", code=error.error_code, param="model")
            self._failures.remember(key, named, state)
            raise named from error
        entry = CatalogEntry(name, "local", None, verified)
        self._entries[name] = (state, entry)
        self._problems.pop(name, None)
        return entry

    async def _from_named(self, source: str, name: AdapterName, token: str | None) -> CatalogEntry:
        shelf = self._by_name.get(source)
        if shelf is None:
            key = "adapters.allow_hub is false" if source == "hub" else "adapters.pbase_url is not set"
            raise AdapterForbiddenError(f"adapter {name}: this node fetches nothing from {source} ({key})", param="model")
        revision, verified = await shelf.resolve(name, token)
        return CatalogEntry(str(name), source, revision, verified)

    async def _from_store(self, text: str, source: str | None, sees: NameFilter) -> CatalogEntry:
        """An adapter of one of the operator's stores. A location outside them is refused before anything is asked."""
        location = parse_location(text, source if source in SCHEMES else None)
        if source not in (None, location.source):
            raise AdapterForbiddenError(f"adapter location {location} is not of source {source}", param="adapter_source")
        self._stores.require_allowed(location)
        if not sees(str(location)):
            raise AdapterNotFoundError(f"there is no adapter at {location}", param="model")
        revision, verified = await self._by_location.resolve(location, None)
        return CatalogEntry(str(location), location.source, revision, verified)


def _pbase(settings: AdapterSettings, stores: StoreSource, resolve: Resolve) -> PbaseSource | None:
    if settings.pbase_url is None:
        return None
    if settings.pbase_store is None:
        raise ConfigError("adapters.pbase_url needs adapters.pbase_store, the store that its adapter paths lie in")
    # The endpoint is the operator's own choice, so it may be on a private network.
    door = WebDoor(STORE_TIMEOUT_S, allows_private=True, resolve=resolve)
    return PbaseSource(settings.pbase_url, settings.pbase_store, stores, door)


def _roots(directory: Path | None, further: Sequence[Path]) -> tuple[Path, ...]:
    first = directory if directory is not None else data_path(DEMO_ADAPTERS)
    for key, root in [("adapters.directory", first), *(("adapters.roots", root) for root in further)]:
        if not root.is_dir():
            raise ConfigError(f"{key}: {root} is not a directory; create it or name another")
    return (first, *further)
