"""Names that callers gave to adapters while the node runs, and names they took back.

Every owner has names of its own: nobody can take, see or probe another's. A name follows what it stands for: a branch that moves
moves it too. A name that was taken back does not exist for its owner until it is given again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from node.errors import OverloadedError, RequestError

MAX_REGISTRATIONS = 100_000

EntryT = TypeVar("EntryT")
Key = tuple[str, str]  # (owner, name)


@dataclass(frozen=True, slots=True)
class Registration(Generic[EntryT]):
    """What a name stands for: a name or location at a source, asked for with the token of whoever registered it.

    `entry` is what it was found to be last, for lists.
    """

    target: str
    source: str | None
    token: str | None = field(repr=False)
    entry: EntryT


class Registrations(Generic[EntryT]):
    """The tables of names. Belongs to the catalog's event loop."""

    def __init__(self) -> None:
        self._given: dict[Key, Registration[EntryT]] = {}
        self._withdrawn: set[Key] = set()

    def get(self, owner: str, name: str) -> Registration[EntryT] | None:
        """What a name was given to, or None."""
        return self._given.get((owner, name))

    def is_withdrawn(self, owner: str, name: str) -> bool:
        """Whether the owner took a name back that others may still use."""
        return (owner, name) in self._withdrawn

    def entries(self, owner: str) -> list[EntryT]:
        """What the owner's names stand for."""
        return [registration.entry for (whose, _), registration in list(self._given.items()) if whose == owner]

    def require_free(self, owner: str, name: str) -> None:
        """Raises RequestError (adapter_exists) for a name that was given; OverloadedError when too many were."""
        if (owner, name) in self._given:
            raise RequestError(
                f"the adapter {name!r} is loaded already; unload it first, or send load_inplace to replace it",
                code="adapter_exists",
                param="lora_name",
            )
        if len(self._given) + len(self._withdrawn) >= MAX_REGISTRATIONS:
            raise OverloadedError(f"{MAX_REGISTRATIONS} names are registered, which is the limit; unload some")

    def give(self, owner: str, name: str, registration: Registration[EntryT]) -> None:
        """Let a name stand for something from now on."""
        self._given[owner, name] = registration
        self._withdrawn.discard((owner, name))

    def refresh(self, owner: str, name: str, entry: EntryT) -> None:
        """Note what a name was found to be now."""
        self._given[owner, name] = replace(self._given[owner, name], entry=entry)

    def take_back(self, owner: str, name: str) -> None:
        """Let a name stand for nothing from now on."""
        if self._given.pop((owner, name), None) is None and len(self._withdrawn) < MAX_REGISTRATIONS:
            self._withdrawn.add((owner, name))
