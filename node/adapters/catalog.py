"""Which adapters exist: names to verified files. Lives on the API process's event loop and imports no torch.

Names are aliases that can move; what a request uses, pays for and is billed under is the content hash. A local directory is
looked at (three file stats) on every use, a hub name is asked about again after a minute, with the token of whoever asks.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from node.adapters.entry import CatalogEntry, NameFilter, sees_all
from node.adapters.failures import Failures
from node.adapters.fetching.door import VERIFY_THREADS, Fetcher
from node.adapters.flights import Flights
from node.adapters.locations import SCHEMES, SOURCES, is_location
from node.adapters.name_desk import NameDesk
from node.adapters.names import AdapterName, parse_name
from node.adapters.registrations import NameStore
from node.adapters.shelves import Shelves
from node.adapters.sources.local import LocalSource, sought_name
from node.adapters.staging import Progress
from node.adapters.turns import WeightOf, same_weight
from node.adapters.verify import Fingerprint, fingerprint
from node.config import Settings
from node.errors import (
    AdapterChangedError,
    AdapterError,
    AdapterForbiddenError,
    AdapterInvalidError,
    AdapterNotFoundError,
    ConfigError,
)
from node.resources import data_path

STARTUP_CHECKS = 4  # at once; the engine loads its model meanwhile
DEMO_ADAPTERS = "config/demo/adapters"
_CONTENT_ID = re.compile(r"[0-9a-f]{64}")


class AdapterCatalog:
    """Finds, fetches and verifies adapters for one base model.

    Args:
        settings: The node's settings; `adapters` and `data_dir` are used.
        fetcher: Does what blocks: asks sources, fetches, verifies.
        clock: Monotonic seconds.
        names: Where given names outlive the node; None: they do not.
        weight_of: An owner's weight, by which fetches that wait take turns.

    Raises:
        ConfigError: A directory of the settings does not exist, or a store's settings make no sense.
    """

    def __init__(
        self,
        settings: Settings,
        fetcher: Fetcher,
        clock: Callable[[], float],
        *,
        names: NameStore | None = None,
        weight_of: WeightOf = same_weight,
    ) -> None:
        chosen = settings.adapters
        self._local = LocalSource(_roots(chosen.directory, chosen.roots))
        self._fetcher = fetcher
        # Of directories alone: fetches from elsewhere have flights of their own, so that a storm of them closes nothing here.
        # One worker more than threads: a tenant that is alone leaves one to others, and files of this machine are checked soon.
        self._flights = Flights(
            limit=chosen.fetch_queue_limit,
            timeout_s=chosen.fetch_timeout_s,
            workers=VERIFY_THREADS + 1,
            weight_of=weight_of,
        )
        self._failures = Failures(chosen.negative_cache_s, clock)
        self._aliases: dict[str, Path] = {}
        self._entries: OrderedDict[str, tuple[Fingerprint, CatalogEntry]] = OrderedDict()
        # By content hash, then name: a request by hash costs the same however many adapters there are.
        self._named_by_content: dict[str, dict[str, CatalogEntry]] = {}
        self._names = NameDesk(self._find, self._leads_on, names)
        self._problems: dict[str, AdapterError] = {}
        self._default_source = chosen.default_source
        self._shelves = Shelves(chosen, fetcher, self._failures, clock, weight_of)

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

    async def restore(self, sees_of: Callable[[str], NameFilter]) -> None:
        """Know the names again that were given before the node was last stopped. `sees_of` tells which of the operator's names
        exist for an owner. A directory that cannot be served any more becomes a problem.

        Raises:
            LedgerError: The names cannot be read.
        """
        for given in await self._names.restore(sees_of):
            directory = self._aliases[given.name] = Path(given.target or "")
            try:
                await self._serve(given.name, directory)
            except AdapterError as error:
                self._problems[given.name] = error

    async def add(self, path: Path, name: str | None = None) -> CatalogEntry:
        """Serve the adapter in `path`, chosen by the operator, under `name` (default: the directory's own), until `remove`.

        Raises:
            AdapterError: The name or the files are unusable; nothing is added. LedgerError: It is served until the node stops.
        """
        alias = parse_name(name if name is not None else path.name)
        entry = await self._serve(str(alias), path)
        await self._names.keep_for_everybody(str(alias), str(self._aliases[str(alias)]))
        return entry

    async def remove(self, name: str) -> None:
        """Stop serving what `add` gave a name to; requests that run go on.

        Raises:
            AdapterNotFoundError: Nothing was added under it. LedgerError: Nothing changed.
        """
        alias = str(parse_name(name))
        if alias not in self._aliases:
            raise AdapterNotFoundError(f"no adapter was added as {name}; those of the adapters directory leave with their files")
        await self._names.forget_for_everybody(alias)
        del self._aliases[alias]
        self._problems.pop(alias, None)
        self._drop(alias)

    async def _serve(self, alias: str, path: Path) -> CatalogEntry:
        if not path.is_dir():
            raise AdapterNotFoundError(f"{path} is not a directory; name one that holds adapter_config.json")
        directory = path.resolve()
        entry = await self._from_directory(alias, directory, owner="")
        self._aliases[alias] = directory
        return entry

    async def register(
        self,
        name: str,
        target: str,
        source: str | None = None,
        token: str | None = None,
        *,
        owner: str,
        replaces: bool = False,
        sees: NameFilter = sees_all,
    ) -> tuple[CatalogEntry, CatalogEntry | None]:
        """Serve what `target` stands for under `name` too, to its owner, from now until `unregister`.

        Args:
            name: The new name. target: a name or location, see `resolve`.
            source, token: Of the target; the token asks for it from now on, and is forgotten when the node stops.
            owner: Whose name it is.
            replaces: The name may stand for something already; the target is looked up anew.
            sees: Which of the operator's names exist for the owner.

        Returns:
            What the name stands for now, and what it stood for before, as far as that is known and no others use it as that.

        Raises:
            RequestError: adapter_exists. AdapterError: the target cannot be used. LedgerError: it is not durable. Nothing
                changes then.
        """
        if replaces:
            self._shelves.expire(target)
        public = self._public(sees)
        return await self._names.give(owner, name, target, source, token, sees, replaces=replaces, public=public)

    async def unregister(self, name: str, *, owner: str, sees: NameFilter = sees_all) -> tuple[CatalogEntry | None, bool]:
        """Stop serving `name` to its owner until it is registered again; requests that run go on.

        Returns:
            What it stood for, as far as that is known, and whether that was the owner's own (others may use what is not).

        Raises:
            AdapterNotFoundError: The name stands for nothing. LedgerError: Nothing changed.
        """
        return await self._names.take_back(owner, name, sees, self._public(sees))

    def is_known(self, name: str) -> bool:
        """Whether a name stands for something here, for anybody: a directory, an adapter added, or one fetched before."""
        if self._shelves.has(name):
            return True
        return not is_location(name) and self._find_directory(parse_name(name)) is not None

    def target(self, name: str, owner: str) -> str | None:
        """The name or location that an owner's name was given to, or None."""
        return self._names.target(owner, name)

    async def resolve(
        self,
        name: str,
        source: str | None = None,
        token: str | None = None,
        *,
        pin: str | None = None,
        sees: NameFilter = sees_all,
        owner: str = "",
    ) -> CatalogEntry:
        """Find an adapter, fetching and verifying it where needed.

        Args:
            name: See `node.adapters.names` and `node.adapters.locations`; or the content hash of an adapter that is known.
            source: One of SOURCES; None: local first, then the default source.
            token: The client's own token for hub and pbase.
            pin: The content hash the client insists on.
            sees: Which of the operator's names exist for the caller. One that does not is looked past, so that its answer, and
                the work for it, are those of a name nobody registered.
            owner: Whose registered names count, and whose turn it is when something has to be fetched or verified.

        Raises:
            AdapterError: Every kind; the message names the adapter.
        """
        given = await self._names.resolve(owner, name, source, token, sees)
        entry = given if given is not None else await self._find(name, source, token, sees, owner)
        return entry if pin is None else _pinned(entry, name, pin)

    def entries(self, sees: NameFilter = sees_all, owner: str = "") -> tuple[CatalogEntry, ...]:
        """The adapters known now, by name, of those that exist for the caller. Ones that their source keeps private or gated are
        listed only under the names their owner gave them. Any thread may call: tables are copied before they are walked."""
        shown = self._names.shown(owner, self._public(sees))
        return tuple(shown[name] for name in sorted(shown))

    async def close(self) -> None:
        """Stop fetching; adapters already verified stay valid for the requests that have them."""
        await self._names.close()
        await self._shelves.close()
        await self._flights.close()

    async def fetching(self) -> Sequence[Progress]:
        """The downloads under way now."""
        return await self._shelves.fetching()

    def _public(self, sees: NameFilter) -> dict[str, CatalogEntry]:
        known = {entry.name: entry for _, entry in list(self._entries.values())}
        for entry in self._shelves.entries():
            known.setdefault(entry.name, entry)
        return {name: entry for name, entry in known.items() if sees(name)}

    def _leads_on(self, name: AdapterName, sees: NameFilter) -> bool:
        """Whether `_find` could find something under a name. Nothing is asked; answer and work tell nothing that is closed to
        the caller."""
        sought = sought_name(name, sees)
        if self._find_directory(sought) is not None and sought == name:
            return True
        return name.is_hub_id or self._default_source in SCHEMES or _CONTENT_ID.fullmatch(name.path) is not None

    async def _find(self, text: str, source: str | None, token: str | None, sees: NameFilter, owner: str) -> CatalogEntry:
        if source is not None and source not in SOURCES:
            raise AdapterForbiddenError(
                f"adapter source {source[:40]!r} is not offered; use one of {', '.join(SOURCES)}", param="adapter_source"
            )
        if is_location(text) or source in SCHEMES:
            return await self._shelves.at_location(text, source, sees, owner)
        name = self._local.name_of(text, sees) if source in (None, "local") else None
        name = name or parse_name(text)
        if source in (None, "local"):
            sought = sought_name(name, sees)
            directory = self._find_directory(sought)
            if directory is None:
                self._drop(str(sought))
            elif sought == name:
                return await self._from_directory(str(name), directory, owner)
        if _CONTENT_ID.fullmatch(name.path):
            return await self._find_by_content(name, sees, owner)
        chosen = source or self._default_source
        if chosen in SCHEMES:
            return await self._shelves.at_location(text, chosen, sees, owner)
        if chosen == "local" or not (name.is_hub_id or source is not None):
            raise AdapterNotFoundError(f"adapter {name}: this node has no adapter directory of that name", param="model")
        return await self._shelves.by_name(chosen, name, token, sees, owner)

    async def _find_by_content(self, name: AdapterName, sees: NameFilter, owner: str) -> CatalogEntry:
        """An adapter by what it is, through a name that exists for the caller. The files are looked at again: a moved alias must
        not answer for its old hash."""
        entries = (*self._named_by_content.get(name.path, {}).values(), *self._shelves.of_content(name.path))
        if not entries:
            sees(name.path)  # content that nobody has takes as long as content under one hidden name
        for entry in entries:
            if sees(entry.name):
                self._names.refuse_withdrawn("", entry.name)
                found = await self._find(entry.name, entry.source, None, sees, owner)
                return _pinned(found, entry.name, name.path)
        raise AdapterNotFoundError(f"no adapter with content hash {name.path} is known here; name it by its name", param="model")

    def _find_directory(self, name: AdapterName) -> Path | None:
        if name.revision is not None:
            return None  # a directory has no revisions; one that a client names can only be the hub's
        found = self._local.find(name)  # an alias takes as long as a name nobody registered
        return self._aliases.get(name.path, found)

    async def _from_directory(self, name: str, directory: Path, owner: str) -> CatalogEntry:
        """The entry of a local directory, verified again whenever a stat of its files says they changed."""
        state = fingerprint(directory)
        known = self._entries.get(name)
        if known is not None and known[0] == state and known[1].directory == directory:
            return known[1]
        key = ("local", name, directory)
        self._failures.raise_known(key, state)
        return await self._flights.join((key, state), lambda: self._verify_directory(name, directory, key, state), owner)

    async def _verify_directory(self, name: str, directory: Path, key: tuple[str, str, Path], state: Fingerprint) -> CatalogEntry:
        try:
            verified = await self._fetcher.verify(directory)
        except AdapterInvalidError as error:
            self._drop(name)
            named = AdapterInvalidError(f"adapter {name}: {error.message}", code=error.error_code, param="model")
            self._failures.remember(key, named, state)
            raise named from error
        entry = CatalogEntry(name, "local", None, verified)
        self._keep(name, state, entry)
        self._problems.pop(name, None)
        return entry

    def _keep(self, name: str, state: Fingerprint, entry: CatalogEntry) -> None:
        self._drop(name)
        self._entries[name] = (state, entry)
        self._named_by_content.setdefault(entry.adapter_id, {})[name] = entry

    def _drop(self, name: str) -> None:
        known = self._entries.pop(name, None)
        if known is not None:
            names = self._named_by_content[known[1].adapter_id]
            del names[name]
            if not names:
                del self._named_by_content[known[1].adapter_id]


def _pinned(entry: CatalogEntry, name: str, pin: str) -> CatalogEntry:
    if entry.adapter_id != pin:
        raise AdapterChangedError(f"adapter {name} is now {entry.adapter_id}; the request is pinned to {pin}", param="model")
    return entry


def _roots(directory: Path | None, further: Sequence[Path]) -> tuple[Path, ...]:
    first = directory if directory is not None else data_path(DEMO_ADAPTERS)
    for key, root in [("adapters.directory", first), *(("adapters.roots", root) for root in further)]:
        if not root.is_dir():
            raise ConfigError(f"{key}: {root} is not a directory; create it or name another")
    return (first, *further)
