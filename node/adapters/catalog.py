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
from node.adapters.failures import Failures
from node.adapters.flights import Flights
from node.adapters.hub_shelf import HubShelf
from node.adapters.names import AdapterName, parse_name
from node.adapters.sources.hub import HubSource
from node.adapters.sources.local import LocalSource
from node.adapters.verify import AdapterVerifier, Coverage, Fingerprint, VerifiedAdapter, fingerprint
from node.config import Settings
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

WORKER_COUNT = 4
MAX_FLIGHTS = 64
DEMO_ADAPTERS = "config/demo/adapters"
SOURCES = ("local", "hub")
_CONTENT_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """An adapter under one of its names. `revision` is the hub's commit, None for a local adapter."""

    name: str
    source: str  # "local" or "hub"
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

    Raises:
        ConfigError: A directory of the settings does not exist.
    """

    def __init__(
        self,
        settings: Settings,
        linears: Sequence[LinearShape],
        base_id: str,
        clock: Callable[[], float],
        *,
        hub_endpoint: str | None = None,
    ) -> None:
        chosen = settings.adapters
        self._local = LocalSource(_roots(chosen.directory, chosen.roots))
        self._verifier = AdapterVerifier(
            LinearTable(linears), base_id, max_rank=chosen.max_rank, max_bytes=chosen.max_adapter_bytes
        )
        self._flights = Flights(worker_count=WORKER_COUNT, limit=MAX_FLIGHTS, timeout_s=chosen.fetch_timeout_s)
        self._failures = Failures(chosen.negative_cache_s, clock)
        self._aliases: dict[str, Path] = {}
        self._entries: OrderedDict[str, tuple[Fingerprint, CatalogEntry]] = OrderedDict()
        self._problems: dict[str, AdapterError] = {}
        self._shelf: HubShelf | None = None
        if chosen.allow_hub:
            source = HubSource(
                (chosen.cache_dir or settings.data_dir / "adapters") / "hub",
                max_bytes=chosen.max_adapter_bytes,
                timeout_s=min(chosen.fetch_timeout_s, 10.0),
                endpoint=hub_endpoint,
            )
            self._shelf = HubShelf(source, self._verifier, self._flights, self._failures, clock)

    @property
    def problems(self) -> Mapping[str, AdapterError]:
        """Why directories found at the start cannot be served, by directory name."""
        return self._problems

    async def start(self) -> None:
        """Verify every adapter in the adapters directory. A bad one becomes a problem; the others are served."""
        names = self._local.listed()
        for first in range(0, len(names), WORKER_COUNT):
            await asyncio.gather(*map(self._try, names[first : first + WORKER_COUNT]))

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
        self, name: str, source: str | None = None, token: str | None = None, *, pin: str | None = None
    ) -> CatalogEntry:
        """Find an adapter, fetching and verifying it where needed.

        Args:
            name: See `node.adapters.names`; or the content hash of an adapter that is known.
            source: "local" or "hub"; None: local first, then, for owner/name, the hub.
            token: The client's own hub token.
            pin: The content hash the client insists on.

        Raises:
            AdapterError: Every kind; the message names the adapter.
        """
        parsed = parse_name(name)
        entry = await self._find(parsed, source, token)
        if pin is not None and entry.adapter_id != pin:
            raise AdapterChangedError(f"adapter {name} is now {entry.adapter_id}; the request is pinned to {pin}", param="model")
        return entry

    def entries(self) -> tuple[CatalogEntry, ...]:
        """The adapters known now that anybody may use, by name. Private ones of the hub are not listed."""
        known = {entry.name: entry for _, entry in self._entries.values()}
        if self._shelf is not None:
            for revision, name, verified in self._shelf.public():
                known.setdefault(name, CatalogEntry(name, "hub", revision, verified))
        return tuple(known[name] for name in sorted(known))

    async def close(self) -> None:
        """Stop fetching; adapters already verified stay valid for the requests that have them."""
        await self._flights.close()

    async def _find(self, name: AdapterName, source: str | None, token: str | None) -> CatalogEntry:
        if source not in (None, *SOURCES):
            raise AdapterForbiddenError(
                f"adapter source {source[:40]!r} is not offered; use one of {', '.join(SOURCES)}", param="adapter_source"
            )
        if source != "hub":
            directory = self._find_directory(name)
            if directory is not None:
                return await self._from_directory(str(name), directory)
            self._entries.pop(str(name), None)
        if _CONTENT_ID.fullmatch(name.path):
            return await self._find_by_content(name)
        if source == "local" or not (name.is_hub_id or source == "hub"):
            raise AdapterNotFoundError(f"adapter {name}: this node has no adapter directory of that name", param="model")
        return await self._from_hub(name, token)

    async def _find_by_content(self, name: AdapterName) -> CatalogEntry:
        """An adapter by what it is. The files are looked at again: a moved alias must not answer for its old hash."""
        for entry in self.entries():
            if entry.adapter_id == name.path:
                return await self.resolve(entry.name, entry.source, pin=name.path)
        raise AdapterNotFoundError(f"no adapter with content hash {name.path} is known here; name it by its name", param="model")

    def _find_directory(self, name: AdapterName) -> Path | None:
        if name.revision is not None:
            return None  # a directory has no revisions; one that a client names can only be the hub's
        return self._aliases.get(name.path) or self._local.find(name)

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

    async def _from_hub(self, name: AdapterName, token: str | None) -> CatalogEntry:
        if self._shelf is None:
            raise AdapterForbiddenError(
                f"adapter {name}: this node fetches nothing from the hub (adapters.allow_hub is false)", param="model"
            )
        revision, verified = await self._shelf.resolve(name, token)
        return CatalogEntry(str(name), "hub", revision, verified)


def _roots(directory: Path | None, further: Sequence[Path]) -> tuple[Path, ...]:
    first = directory if directory is not None else data_path(DEMO_ADAPTERS)
    for key, root in [("adapters.directory", first), *(("adapters.roots", root) for root in further)]:
        if not root.is_dir():
            raise ConfigError(f"{key}: {root} is not a directory; create it or name another")
    return (first, *further)
