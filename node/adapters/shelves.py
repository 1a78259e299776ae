"""Every source outside this machine: the hub, the operator's stores, pbase. One disk cache and one table of failures for all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from node.adapters.entry import CatalogEntry, NameFilter
from node.adapters.failures import Failures
from node.adapters.fetching.door import Fetcher
from node.adapters.flights import Flights
from node.adapters.locations import SCHEMES, Location, parse_location, parse_store_root, require_below
from node.adapters.names import AdapterName
from node.adapters.remote import NameT
from node.adapters.shelf import RemoteShelf
from node.adapters.staging import Progress
from node.adapters.turns import WeightOf
from node.config import AdapterSettings
from node.errors import AdapterError, AdapterForbiddenError, AdapterNotFoundError


class Shelves:
    """Finds adapters at the sources of the settings. Belongs to the catalog's event loop.

    Args:
        fetcher: Asks the sources. failures: the negative cache.
        clock: Monotonic seconds.
        weight_of: An owner's weight.

    Raises:
        ConfigError: A store's URL makes no sense.
    """

    def __init__(
        self, settings: AdapterSettings, fetcher: Fetcher, failures: Failures, clock: Callable[[], float], weight_of: WeightOf
    ) -> None:
        # Names that are known here are asked about in flights of their own: a storm of unknown ones refuses none of them.
        # As many workers as the fetching process has threads for each: nothing waits over there, where no tenant's turn counts.
        flights, rechecks = (
            Flights(
                limit=settings.fetch_queue_limit,
                timeout_s=settings.fetch_timeout_s,
                workers=settings.fetch_workers,
                weight_of=weight_of,
            )
            for _ in range(2)
        )

        def shelf(kind: str) -> RemoteShelf[Any]:
            return RemoteShelf(kind, fetcher, flights, rechecks, failures, clock, settings.private_recheck_s)

        self._flights = (flights, rechecks)
        self._fetcher = fetcher
        self._roots = tuple(parse_store_root(store.url) for store in settings.stores)
        self._by_location: RemoteShelf[Location] = shelf("store")
        offered = {"hub": settings.allow_hub, "pbase": settings.pbase_url is not None}
        self._by_name: dict[str, RemoteShelf[AdapterName]] = {
            kind: shelf(kind) for kind, is_offered in offered.items() if is_offered
        }

    async def by_name(self, source: str, name: AdapterName, token: str | None, sees: NameFilter, owner: str) -> CatalogEntry:
        """An adapter of the hub or of pbase. What the operator closed to the caller is absent, whatever its token may read."""
        shelf = self._by_name.get(source)
        if shelf is None:
            key = "adapters.allow_hub is false" if source == "hub" else "adapters.pbase_url is not set"
            raise AdapterForbiddenError(f"adapter {name}: this node fetches nothing from {source} ({key})", param="model")
        if not sees(name.path) and "/" in name.path:
            raise await _missing(shelf, name, _absent_name(source, name), token, owner)
        revision, verified = await shelf.resolve(name, token, owner)
        return CatalogEntry(str(name), source, revision, verified)

    async def at_location(self, text: str, source: str | None, sees: NameFilter, owner: str) -> CatalogEntry:
        """An adapter of one of the operator's stores. A location outside them is refused before anything is asked."""
        location = parse_location(text, source if source in SCHEMES else None)
        if source not in (None, location.source):
            raise AdapterForbiddenError(f"adapter location {location} is not of source {source}", param="adapter_source")
        require_below(location, self._roots)
        if not sees(str(location)):
            raise await _missing(self._by_location, location, _absent_sibling(location), None, owner)
        revision, verified = await self._by_location.resolve(location, None, owner)
        return CatalogEntry(str(location), location.source, revision, verified)

    def entries(self) -> Iterator[CatalogEntry]:
        """Everything fetched that is neither private nor gated at its source."""
        for source, shelf in self._by_name.items():
            for revision, name, verified in shelf.public():
                yield CatalogEntry(name, source, revision, verified)
        for revision, name, verified in self._by_location.public():
            yield CatalogEntry(name, parse_location(name).source, revision, verified)

    def of_content(self, adapter_id: str) -> list[CatalogEntry]:
        """Those of `entries` that are one adapter by content."""
        return [entry for entry in self.entries() if entry.adapter_id == adapter_id]

    def has(self, name: str) -> bool:
        """Whether something was fetched under a name, private or not."""
        return self._by_location.has(name) or any(shelf.has(name) for shelf in self._by_name.values())

    def expire(self, name: str) -> None:
        """Ask a name's source again at its next use, instead of after a while."""
        for shelf in self._by_name.values():
            shelf.expire(name)
        self._by_location.expire(name)

    async def fetching(self) -> Sequence[Progress]:
        """The downloads under way now."""
        return await self._fetcher.progress()

    async def close(self) -> None:
        """Wait for nothing that is under way."""
        for flights in self._flights:
            await flights.close()


async def _missing(shelf: RemoteShelf[NameT], name: NameT, absent: NameT, token: str | None, owner: str) -> AdapterError:
    """The answer for a name that does not exist for the caller, after the work for one that nobody has anything at."""
    try:
        await shelf.resolve(absent, token, owner)
    except AdapterError as error:
        message = error.message.replace(str(absent), str(name))
        return type(error)(message, code=error.error_code, param=error.param, retry_after_s=error.retry_after_s)
    return AdapterNotFoundError(f"there is no adapter at {name}", param="model")


def _absent_name(source: str, name: AdapterName) -> AdapterName:
    """A name like this one that nobody has: of the same owner at the hub, of the same version at pbase."""
    first, _, second = name.path.partition("/")
    digest = hashlib.sha256(name.path.encode()).hexdigest()[:32]
    return AdapterName(f"{digest}/{second}" if source == "pbase" else f"{first}/{digest}", name.revision)


def _absent_sibling(location: Location) -> Location:
    """A location beside this one that nothing is at."""
    digest = hashlib.sha256(str(location).encode()).hexdigest()[:32]
    return replace(location, parts=(*location.parts[:-1], f"{location.parts[-1][:80]}.{digest}"))
