"""Names that callers gave to adapters while the node runs, and names they took back.

Every owner has names of its own: nobody can take, see or probe another's. A name follows what it stands for: a branch that moves
moves it too. A name that was taken back does not exist for its owner until it is given again. Both outlive the node, but for the
tokens: those are nowhere but in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from node.errors import AdapterForbiddenError, OverloadedError, RequestError

MAX_REGISTRATIONS = 100_000
MAX_OF_AN_OWNER = 10_000
EVERYBODY = "*"  # whose names `adapters add` gives; no tenant can be called so

EntryT = TypeVar("EntryT")


@dataclass(frozen=True, slots=True)
class GivenName:
    """A name as it is kept over restarts.

    Attributes:
        owner: A tenant, "" on a node without keys, or EVERYBODY.
        target: A name or location at `source`, a directory for EVERYBODY; None: the owner took the name back.
        needs_token: It was given together with a token, which is not kept.
    """

    owner: str
    name: str
    target: str | None = None
    source: str | None = None
    needs_token: bool = False


class NameStore(Protocol):
    """Where names outlive the node."""

    async def all(self) -> Sequence[GivenName]:
        """Every name; raises LedgerError."""
        ...

    async def keep(self, given: GivenName) -> None:
        """Write a name in place of what it stood for; raises LedgerError."""
        ...

    async def forget(self, owner: str, name: str) -> None:
        """Remove a name; raises LedgerError."""
        ...


@dataclass(frozen=True, slots=True)
class Registration(Generic[EntryT]):
    """What a name stands for: a name or location at a source, asked for with the token of whoever registered it.

    `entry` is what it was found to be last, for lists; None until it is found for the first time after a restart.
    """

    target: str
    source: str | None
    token: str | None = field(repr=False)
    entry: EntryT | None
    needs_token: bool = False

    def token_for(self, name: str, callers: str | None) -> str | None:
        """The token to ask the source with: the one the name was given with, else the caller's.

        Raises:
            AdapterForbiddenError: adapter_gated. There was one and a restart forgot it; asking as the node itself could show
                the caller what only the node may see.
        """
        token = self.token if self.token is not None else callers
        if token is None and self.needs_token:
            raise AdapterForbiddenError(
                f"adapter {name} was loaded with a token, which is not kept over a restart; load it again, or send api_token",
                code="adapter_gated",
                param="api_token",
            )
        return token


class Registrations(Generic[EntryT]):
    """The tables of names. Belongs to the catalog's event loop."""

    def __init__(self) -> None:
        self._given: dict[str, dict[str, Registration[EntryT]]] = {}  # owner -> name
        self._withdrawn: dict[str, set[str]] = {}
        self._count = 0

    def get(self, owner: str, name: str) -> Registration[EntryT] | None:
        """What a name was given to, or None."""
        return self._given.get(owner, {}).get(name)

    def is_withdrawn(self, owner: str, name: str) -> bool:
        """Whether the owner took a name back that others may still use."""
        return name in self._withdrawn.get(owner, ())

    def all(self) -> list[tuple[str, str, Registration[EntryT]]]:
        """(owner, name, what it stands for), of everybody."""
        return [(owner, name, item) for owner, names in self._given.items() for name, item in names.items()]

    def entries(self, owner: str) -> list[EntryT]:
        """What the owner's names stand for, as far as that was found."""
        return [item.entry for item in list(self._given.get(owner, {}).values()) if item.entry is not None]

    def require_free(self, owner: str, name: str) -> None:
        """Raises RequestError (adapter_exists) for a name that was given; OverloadedError when too many were."""
        if self.get(owner, name) is not None:
            raise RequestError(
                f"the adapter {name!r} is loaded already; unload it first, or send load_inplace to replace it",
                code="adapter_exists",
                param="lora_name",
            )
        if not self.is_withdrawn(owner, name):  # its row becomes the given name's
            self.require_room(owner)

    def require_room(self, owner: str) -> None:
        """Raises OverloadedError when the owner, or all together, have too many names."""
        owned = len(self._given.get(owner, ())) + len(self._withdrawn.get(owner, ()))
        if owned >= MAX_OF_AN_OWNER or self._count >= MAX_REGISTRATIONS:
            limit = MAX_OF_AN_OWNER if owned >= MAX_OF_AN_OWNER else MAX_REGISTRATIONS
            raise OverloadedError(f"{limit} names are loaded or unloaded, which is the limit; take some back")

    def give(self, owner: str, name: str, registration: Registration[EntryT]) -> None:
        """Let a name stand for something from now on."""
        self._drop(owner, name)
        self._given.setdefault(owner, {})[name] = registration
        self._count += 1

    def refresh(self, owner: str, name: str, entry: EntryT) -> None:
        """Note what a name was found to be now, unless it was taken back meanwhile."""
        known = self.get(owner, name)
        if known is not None:
            self._given[owner][name] = replace(known, entry=entry)

    def take_back(self, owner: str, name: str) -> None:
        """Let go of an owner's own name that stands for nothing else."""
        self._drop(owner, name)

    def withdraw(self, owner: str, name: str) -> None:
        """Let a name that stands for something without the owner not exist for the owner."""
        self._drop(owner, name)
        self._withdrawn.setdefault(owner, set()).add(name)
        self._count += 1

    def _drop(self, owner: str, name: str) -> None:
        given, withdrawn = self._given.get(owner, {}), self._withdrawn.get(owner, set())
        self._count -= (name in given) + (name in withdrawn)
        given.pop(name, None)
        withdrawn.discard(name)
        for table in (self._given, self._withdrawn):
            if owner in table and not table[owner]:
                del table[owner]
