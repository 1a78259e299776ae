"""Adapters of one source that were fetched and verified, and who was found to be allowed to use them.

Every (name, token) pair is checked with the source at its first use. What is private or gated there is asked for again on every
request: a token that lost its right opens nothing. What is public is asked for after a minute: a branch that moved is followed.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic

from node.adapters.failures import Failures
from node.adapters.fetching.door import Fetcher
from node.adapters.flights import Flights
from node.adapters.remote import NameT
from node.adapters.verify import Fingerprint, VerifiedAdapter, fingerprint
from node.errors import AdapterChangedError, AdapterError, AdapterUnavailableError

RECHECK_S = 60.0
MAX_SHELVED = 4096

Key = tuple[str, str, str]  # (kind, name, digest of the token)


@dataclass(frozen=True, slots=True)
class _Shelved:
    """One name as one caller may use it."""

    revision: str
    is_private: bool
    verified: VerifiedAdapter
    state: Fingerprint
    checked_s: float


class RemoteShelf(Generic[NameT]):
    """Resolves the names of one source. Belongs to the catalog's event loop; what blocks is the fetcher's.

    Args:
        kind: The source, as the fetcher calls it.
        fetcher: Looks up, fetches and checks. flights, rechecks: one run for all who wait, for names that are not known and names
            that are. failures: the negative cache.
        clock: Monotonic seconds.
        private_recheck_s: How long an answer about something private holds; 0: for the requests that waited for it.
    """

    def __init__(
        self,
        kind: str,
        fetcher: Fetcher,
        flights: Flights,
        rechecks: Flights,
        failures: Failures,
        clock: Callable[[], float],
        private_recheck_s: float = 0.0,
    ) -> None:
        self._kind = kind
        self._fetcher = fetcher
        self._flights = flights
        self._rechecks = rechecks
        self._failures = failures
        self._clock = clock
        self._private_recheck_s = private_recheck_s
        self._shelved: OrderedDict[Key, _Shelved] = OrderedDict()
        self._content: OrderedDict[Path, str] = OrderedDict()  # staged directory -> content hash

    async def resolve(self, name: NameT, token: str | None, owner: str) -> tuple[str, VerifiedAdapter]:
        """The revision a name stands for and its verified adapter. What has to be asked for it takes `owner`'s turn.

        Raises:
            AdapterError: The source's refusal, or what is wrong with the files. AdapterChangedError: a revision's files changed.
        """
        key = (self._kind, str(name), _digest(token))
        known = self._shelved.get(key)
        if known is not None and self._is_fresh(known) and self._is_unchanged(known):
            self._shelved.move_to_end(key)
            return known.revision, known.verified
        self._failures.raise_known(key)
        flights = self._flights if known is None else self._rechecks
        shelved = await flights.join(key, lambda: self._refresh(key, name, token), owner)
        return shelved.revision, shelved.verified

    def expire(self, name: str) -> None:
        """Ask the source again at the next use of a name, whoever asks."""
        for key, item in self._shelved.items():
            if key[1] == name:
                self._shelved[key] = replace(item, checked_s=-math.inf)

    def has(self, name: str) -> bool:
        """Whether anybody fetched the name, in any revision."""
        return any(key[1].partition("@")[0] == name for key in self._shelved)

    def public(self) -> list[tuple[str, str, VerifiedAdapter]]:
        """(revision, name, adapter) of everything that is neither private nor gated."""
        return [(item.revision, key[1], item.verified) for key, item in list(self._shelved.items()) if not item.is_private]

    async def _refresh(self, key: Key, name: NameT, token: str | None) -> _Shelved:
        known = self._shelved.get(key)
        try:
            shelved = await self._fetch(name, token, is_known=known is not None)
        except AdapterUnavailableError as error:
            if known is not None and not known.is_private and self._is_unchanged(known):
                # The bytes are verified and public; only whether the branch moved is unknown until the source answers again.
                return self._shelve(key, replace(known, checked_s=self._clock()))
            self._failures.remember(key, error)
            raise
        except AdapterError as error:
            self._shelved.pop(key, None)
            self._failures.remember(key, error)
            raise
        return self._shelve(key, shelved)

    async def _fetch(self, name: NameT, token: str | None, *, is_known: bool) -> _Shelved:
        found = await self._fetcher.resolve(self._kind, str(name), token, is_known=is_known)
        self._check_content(found.verified.directory, found.verified.adapter_id, name)
        return _Shelved(found.revision, found.is_private, found.verified, found.state, self._clock())

    def _check_content(self, directory: Path, adapter_id: str, name: NameT) -> None:
        """A revision's content never changes; if its files do, somebody changed them here."""
        before = self._content.setdefault(directory, adapter_id)
        if before != adapter_id:
            raise AdapterChangedError(
                f"adapter {name}: the cached files of its revision were {before} and are now {adapter_id}; delete "
                f"{directory.name} from the adapter cache and ask again",
                param="model",
            )
        while len(self._content) > MAX_SHELVED:
            self._content.popitem(last=False)

    def _is_fresh(self, known: _Shelved) -> bool:
        return self._clock() - known.checked_s < (self._private_recheck_s if known.is_private else RECHECK_S)

    def _shelve(self, key: Key, shelved: _Shelved) -> _Shelved:
        self._shelved[key] = shelved
        self._shelved.move_to_end(key)
        while len(self._shelved) > MAX_SHELVED:
            self._shelved.popitem(last=False)
        return shelved

    @staticmethod
    def _is_unchanged(known: _Shelved) -> bool:
        return fingerprint(known.verified.directory) == known.state


def _digest(token: str | None) -> str:
    """A stand-in for a token in keys, so that no table holds the token itself."""
    return "" if token is None else hashlib.sha256(token.encode()).hexdigest()
