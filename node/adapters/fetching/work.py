"""The blocking half of just-in-time adapters: ask the source, fetch, verify. Imports the sources' client libraries.

Lives in the fetching process; `node.adapters.fetching.process` gives each job a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic

from node.adapters.disk_cache import DiskCache, open_disk_cache
from node.adapters.fetching.door import FetchedAdapter
from node.adapters.linear_table import LinearTable
from node.adapters.locations import parse_location
from node.adapters.names import parse_name
from node.adapters.remote import NameT, RemoteSource, RemoteVersion
from node.adapters.sources.hub import HubSource
from node.adapters.sources.pbase import PbaseSource
from node.adapters.sources.stores import StoreSource
from node.adapters.sources.web import Resolve, WebDoor, resolve_host
from node.adapters.staging import Progress, Staging
from node.adapters.verify import AdapterVerifier, VerifiedAdapter, fingerprint
from node.config import AdapterSettings, Settings
from node.errors import AdapterInvalidError, ConfigError
from node.request import LinearShape

STORE_TIMEOUT_S = 10.0  # on connecting and on every single read
HUB_TIMEOUT_S = 10.0  # on one answer about a repository


class FetchWork:
    """Does jobs. Every method blocks; safe to call from several threads.

    Args:
        settings: The node's settings; `adapters` and `data_dir` are used.
        linears, base_id: The base model, from the engine's `Ready`.
        hub_endpoint: The hub's address; None: HF_ENDPOINT, else the public hub.
        resolve_host: Addresses of a web server's host.

    Raises:
        ConfigError: A store's settings make no sense.
    """

    def __init__(
        self,
        settings: Settings,
        linears: Sequence[LinearShape],
        base_id: str,
        *,
        hub_endpoint: str | None = None,
        resolve_host: Resolve = resolve_host,
    ) -> None:
        chosen, cache = settings.adapters, open_disk_cache(settings)
        limits = {"max_bytes": chosen.max_adapter_bytes}
        self._verifier = AdapterVerifier(LinearTable(linears), base_id, max_rank=chosen.max_rank, **limits)
        self._staging = Staging(cache)
        stores = StoreSource(chosen.stores, cache, self._staging, **limits, timeout_s=STORE_TIMEOUT_S, resolve=resolve_host)
        self._sources: dict[str, _Source[Any]] = {"store": _Source(parse_location, stores, cache, self._verifier)}
        if chosen.allow_hub:
            timeout_s = min(chosen.fetch_timeout_s, HUB_TIMEOUT_S)
            hub = HubSource(cache, self._staging, **limits, timeout_s=timeout_s, endpoint=hub_endpoint)
            self._sources["hub"] = _Source(parse_name, hub, cache, self._verifier)
        pbase = _pbase(chosen, stores, resolve_host)
        if pbase is not None:
            self._sources["pbase"] = _Source(parse_name, pbase, cache, self._verifier)

    def resolve(self, source: str, name: str, token: str | None) -> FetchedAdapter:
        """Ask a source what a name stands for, with the caller's right to see it; fetch that where it is not here; verify it.

        Raises:
            AdapterError: The source's refusal, or what is wrong with the files; the message names the adapter.
        """
        return self._sources[source].fetch(name, token)

    def verify(self, directory: Path) -> VerifiedAdapter:
        """See `AdapterVerifier.verify`."""
        return self._verifier.verify(directory)

    def progress(self) -> tuple[Progress, ...]:
        """The downloads under way now."""
        return tuple(self._staging.progress())


class _Source(Generic[NameT]):
    """One source whose names are read here and whose files are verified here."""

    def __init__(
        self, parse: Callable[[str], NameT], source: RemoteSource[NameT], cache: DiskCache, verifier: AdapterVerifier
    ) -> None:
        self._parse = parse
        self._source = source
        self._cache = cache
        self._verifier = verifier

    def fetch(self, name: str, token: str | None) -> FetchedAdapter:
        """See `FetchWork.resolve`."""
        parsed = self._parse(name)
        try:
            found, directory = self._staged(parsed, token)
            self._cache.touch(directory)
            state = fingerprint(directory)
            return FetchedAdapter(found.revision, found.is_private, self._verifier.verify(directory), state)
        except AdapterInvalidError as error:
            raise AdapterInvalidError(f"adapter {name}: {error.message}", code=error.error_code, param="model") from error

    def _staged(self, name: NameT, token: str | None) -> tuple[RemoteVersion, Path]:
        found = self._source.look_up(name, token)
        return found, self._source.fetch(name, found, token)


def _pbase(settings: AdapterSettings, stores: StoreSource, resolve: Resolve) -> PbaseSource | None:
    if settings.pbase_url is None:
        return None
    if settings.pbase_store is None:
        raise ConfigError("adapters.pbase_url needs adapters.pbase_store, the store that its adapter paths lie in")
    # The endpoint is the operator's own choice, so it may be on a private network.
    door = WebDoor(STORE_TIMEOUT_S, allows_private=True, resolve=resolve)
    return PbaseSource(settings.pbase_url, settings.pbase_store, stores, door)
