"""Giving names to adapters and taking them back: durable first, then seen. What names stand for is the catalog's to find."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace

from node.adapters.entry import CatalogEntry, NameFilter
from node.adapters.names import AdapterName, parse_name
from node.adapters.registrations import EVERYBODY, GivenName, NameStore, Registration, Registrations
from node.errors import AdapterError, AdapterIdError, AdapterNotFoundError

RESTORED_AT_ONCE = 4
RESTORED_NAMES = 1000  # found without being asked for after a restart; more would be a storm at their sources

Find = Callable[[str, str | None, str | None, NameFilter, str], Awaitable[CatalogEntry]]  # (target, source, token, sees, owner)
LeadsOn = Callable[[AdapterName, NameFilter], bool]  # whether a name that no owner gave could stand for something


class NameDesk:
    """The names of every owner. Belongs to the catalog's event loop.

    Args:
        find: What a target stands for now; raises AdapterError.
        leads_on: Whether a name would stand for something again if its owner's were merely dropped.
        store: Where names outlive the node; None keeps them in memory alone.
    """

    def __init__(self, find: Find, leads_on: LeadsOn, store: NameStore | None) -> None:
        self._find = find
        self._leads_on = leads_on
        self._store = store
        self._table: Registrations[CatalogEntry] = Registrations()
        self._changing = asyncio.Lock()  # database and memory change in the same order
        self._restoring: asyncio.Task[None] | None = None

    async def give(
        self,
        owner: str,
        name: str,
        target: str,
        source: str | None,
        token: str | None,
        sees: NameFilter,
        *,
        replaces: bool,
        public: Mapping[str, CatalogEntry],
    ) -> tuple[CatalogEntry, CatalogEntry | None]:
        """Let `name` stand for `target` to its owner; returns what it stands for now and what it stood for to nobody else.

        Args:
            public: What names stand for where their owner gave and took back none.

        Raises:
            AdapterError: The name cannot be, or the target cannot be used. RequestError: adapter_exists. OverloadedError.
            LedgerError: Not durable. Nothing changes then.
        """
        alias = _new_name(name)
        self._require_free(owner, alias, replaces=replaces)
        entry = replace(await self._found(target, source, token, sees, owner), name=alias)
        async with self._changing:
            self._require_free(owner, alias, replaces=replaces)  # somebody may have been faster
            before = self.shown(owner, public).get(alias)
            await self._keep(GivenName(owner, alias, target, source, token is not None))
            self._table.give(owner, alias, Registration(target, source, token, entry, token is not None))
        return entry, None if _is_shared(owner, before, public.get(alias)) else before

    async def take_back(
        self, owner: str, name: str, sees: NameFilter, public: Mapping[str, CatalogEntry]
    ) -> tuple[CatalogEntry | None, bool]:
        """Let `name` stand for nothing to its owner, whatever is behind it, until it is given again; requests that run go on.

        Args:
            public: What names stand for where their owner gave and took back none.

        Returns:
            What it stood for, as far as that is known, and whether it stood for that to its owner alone.

        Raises:
            AdapterNotFoundError: The name stands for nothing. LedgerError: Not durable; nothing changes.
        """
        parsed = _name_in_field(name)
        alias = str(parsed)
        async with self._changing:
            known = self._table.get(owner, alias)
            entry = known.entry if known is not None else self.shown(owner, public).get(alias)
            if known is None:
                if entry is None:
                    raise AdapterNotFoundError(f"the adapter {name} is not loaded here", param="lora_name")
                self._table.require_room(owner)
            if known is None or self._leads_on(parsed, sees):
                await self._keep(GivenName(owner, alias))
                self._table.withdraw(owner, alias)
            else:
                await self._forget(owner, alias)
                self._table.take_back(owner, alias)
            return entry, known is not None and not _is_shared(owner, entry, public.get(alias))

    async def resolve(
        self, owner: str, name: str, source: str | None, token: str | None, sees: NameFilter
    ) -> CatalogEntry | None:
        """What an owner's name stands for now; None where it gave no such name, or `source` says that another is meant.

        Raises:
            AdapterError: The name was taken back, or its target cannot be used.
        """
        known = self._table.get(owner, name) if source is None else None
        if known is not None:
            found = await self._find(known.target, known.source, known.token_for(name, token), sees, owner)
            entry = replace(found, name=name)
            self._table.refresh(owner, name, entry)
            return entry
        self.refuse_withdrawn(owner, name)
        return None

    def refuse_withdrawn(self, owner: str, name: str) -> None:
        """Raise AdapterNotFoundError (adapter_unloaded) where an owner took back a name that others may still use."""
        if self._table.is_withdrawn(owner, name):
            raise AdapterNotFoundError(
                f"the adapter {name} was unloaded; load it again first", code="adapter_unloaded", param="model"
            )

    def target(self, owner: str, name: str) -> str | None:
        """The name or location that an owner's name was given to."""
        known = self._table.get(owner, name)
        return None if known is None else known.target

    def shown(self, owner: str, known: Mapping[str, CatalogEntry]) -> dict[str, CatalogEntry]:
        """`known` as the owner sees it: without what it took back, with what it gave."""
        left = {name: entry for name, entry in known.items() if not self._table.is_withdrawn(owner, name)}
        return left | {entry.name: entry for entry in self._table.entries(owner)}

    async def keep_for_everybody(self, name: str, directory: str) -> None:
        """Note a directory that the operator serves under a name; raises LedgerError."""
        async with self._changing:
            await self._keep(GivenName(EVERYBODY, name, directory))

    async def forget_for_everybody(self, name: str) -> None:
        """The opposite; raises LedgerError."""
        async with self._changing:
            await self._forget(EVERYBODY, name)

    async def restore(self, sees_of: Callable[[str], NameFilter]) -> list[GivenName]:
        """Read what outlived the last run, and find in the background what the names stand for, so that lists have them (1,000 of
        them; further ones at their first use). A name that cannot be found now stays given, and says why when it is used.

        Args:
            sees_of: Which of the operator's names exist for an owner.

        Returns:
            The names that the operator gave for everybody.

        Raises:
            LedgerError: The database does not answer.
        """
        rows = () if self._store is None else await self._store.all()
        for row in rows:
            if row.owner == EVERYBODY:
                continue
            if row.target is None:
                self._table.withdraw(row.owner, row.name)
            else:
                self._table.give(row.owner, row.name, Registration(row.target, row.source, None, None, row.needs_token))
        self._restoring = asyncio.create_task(self._find_all(sees_of))
        return [row for row in rows if row.owner == EVERYBODY]

    async def close(self) -> None:
        """Stop finding."""
        if self._restoring is not None:
            self._restoring.cancel()
            await asyncio.gather(self._restoring, return_exceptions=True)

    async def _find_all(self, sees_of: Callable[[str], NameFilter]) -> None:
        turns = asyncio.Semaphore(RESTORED_AT_ONCE)

        async def find(owner: str, name: str) -> None:
            async with turns:
                with suppress(AdapterError):
                    await self.resolve(owner, name, None, None, sees_of(owner))

        await asyncio.gather(*(find(owner, name) for owner, name, _ in self._table.all()[:RESTORED_NAMES]))

    async def _found(self, target: str, source: str | None, token: str | None, sees: NameFilter, owner: str) -> CatalogEntry:
        """What a new name is to stand for; its errors name the field that says so."""
        try:
            return await self._find(target, source, token, sees, owner)
        except AdapterError as error:
            param = "lora_path" if error.param == "model" else error.param
            raise type(error)(error.message, code=error.error_code, param=param, retry_after_s=error.retry_after_s) from error

    def _require_free(self, owner: str, name: str, *, replaces: bool) -> None:
        if self._table.get(owner, name) is None or not replaces:
            self._table.require_free(owner, name)

    async def _keep(self, given: GivenName) -> None:
        if self._store is not None:
            await self._store.keep(given)

    async def _forget(self, owner: str, name: str) -> None:
        if self._store is not None:
            await self._store.forget(owner, name)


def _is_shared(owner: str, entry: CatalogEntry | None, behind: CatalogEntry | None) -> bool:
    """Whether others go on using, under the same name, what it stood for to one of several owners."""
    return bool(owner) and entry is not None and behind is not None and entry.adapter_id == behind.adapter_id


def _name_in_field(text: str) -> AdapterName:
    try:
        return parse_name(text)
    except AdapterIdError as error:
        raise AdapterIdError(error.message, param="lora_name") from error


def _new_name(text: str) -> str:
    name = _name_in_field(text)
    if name.revision is not None:
        raise AdapterIdError(f"adapter name {text}: a name that is given has no revision", param="lora_name")
    return name.path
