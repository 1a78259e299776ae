"""What the API room needs from the other rooms, as small protocols, so that each can be replaced by a fake in a test."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import msgspec
from structlog.typing import FilteringBoundLogger

from attribution.record import Merge, RecipeTerm, recipe_hash
from node.adapters.entry import NameFilter
from node.adapters.merges.recipe import MergeRecipe
from node.config import ServerSettings
from node.engine.messages import Ready, SequenceEvent, Stats, Submit
from node.request import AdapterTerm
from node.settlement.admission import SignedVoucher
from node.telemetry.metrics import NodeMetrics
from node.tenancy.meter import TokenPrice
from node.tenancy.tenancy import Tenancy


class SequenceEvents(Protocol):
    """The events of one sequence, in order; ends after the one with a `finish_reason`."""

    def __aiter__(self) -> AsyncIterator[SequenceEvent]: ...

    def hand_to(self, take: Callable[[SequenceEvent], bool]) -> None:
        """Offer events to `take` while the reader waits; what it does not take is iterated over, and the last one always."""

    async def aclose(self) -> None:
        """Stop following; a sequence that still runs is cancelled."""


class Engine(Protocol):
    """The engine process, seen from here."""

    @property
    def is_alive(self) -> bool:
        """Whether the process runs and answers."""

    @property
    def stats(self) -> Stats:
        """The newest counters; at most about a second old."""

    def submit(self, submit: Submit) -> SequenceEvents:
        """Run one sequence and follow it to its last event; raises EngineError, OverloadedError."""

    def cancel(self, sequence_id: str) -> None:
        """Stop a sequence within one step; never blocks, unknown ids are ignored."""

    def prefetch(self, term: AdapterTerm) -> None:
        """Bring an adapter into memory ahead of its first request; raises OverloadedError."""

    def evict(self, adapter_id: str) -> None:
        """Let an adapter's memory go once no sequence runs with it; raises OverloadedError."""


class CatalogEntry(Protocol):
    """One adapter that can be served."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def adapter_id(self) -> str: ...
    @property
    def directory(self) -> Path: ...
    @property
    def rank(self) -> int: ...
    @property
    def manifest(self) -> Any: ...
    @property
    def manifest_hash(self) -> str | None: ...


class Catalog(Protocol):
    """Which adapters exist."""

    async def resolve(
        self, name: str, source: str | None = None, token: str | None = None, *, sees: NameFilter, owner: str
    ) -> CatalogEntry:
        """Find, fetch and verify an adapter by name, of the names that exist for the caller; raises AdapterError."""

    def entries(self, sees: NameFilter, owner: str) -> Sequence[CatalogEntry]:
        """The adapters that are known now and exist for the caller, in the order of their names."""

    async def register(
        self,
        name: str,
        target: str,
        source: str | None = None,
        token: str | None = None,
        *,
        owner: str,
        replaces: bool,
        sees: NameFilter,
    ) -> tuple[CatalogEntry, CatalogEntry | None]:
        """Give an adapter one more name; returns it and what the name stood for before; raises RequestError, AdapterError,
        LedgerError."""

    async def unregister(self, name: str, *, owner: str, sees: NameFilter) -> tuple[CatalogEntry | None, bool]:
        """Take a name back; returns what it stood for, as far as that is known, and whether it was the owner's own; raises
        AdapterNotFoundError, LedgerError."""

    def target(self, name: str, owner: str) -> str | None:
        """The name or location that an owner's name was given to, or None."""


class DerivedAdapter(Protocol):
    """An adapter made of others."""

    @property
    def adapter_id(self) -> str: ...
    @property
    def directory(self) -> Path: ...


class Merger(Protocol):
    """Makes several adapters one."""

    async def derive(self, recipe: MergeRecipe) -> DerivedAdapter:
        """The adapter of a recipe, made where it is not there yet; raises AdapterError."""


@dataclass(frozen=True, slots=True)
class RecipeEntry:
    """One adapter of a request as the books need it: who it is, and with what weight it was used, a plain decimal."""

    entry: CatalogEntry
    weight: str


@dataclass(frozen=True, slots=True)
class Opening:
    """A request at admission.

    Attributes:
        prompts: Token ids of every distinct prompt.
        max_output_tokens: The most that all choices together can produce; bounds the price.
        voucher: Who signed to pay, or None.
        merge: How the adapters of `recipe` became one, or None where the answer is computed with all of them.
    """

    request_id: str
    tenant: str
    recipe: tuple[RecipeEntry, ...]
    prompts: tuple[tuple[int, ...], ...]
    max_output_tokens: int
    voucher: SignedVoucher | None
    merge: Merge | None = None

    @property
    def recipe_hash(self) -> str:
        """Content hash of recipe and merge, the one the record will carry."""
        return recipe_hash(tuple(RecipeTerm(item.entry.adapter_id, None, item.weight) for item in self.recipe), self.merge)


@dataclass(frozen=True, slots=True)
class Closing:
    """A request at its end: `status` is ok, cancelled or failed; `outputs` are the token ids delivered, choice by choice."""

    request_id: str
    status: str
    finish_reason: str
    outputs: tuple[tuple[int, ...], ...]
    cached_tokens: int


Receipt = dict[str, Any] | msgspec.Raw  # a bundle that goes into an answer's JSON, or is JSON already


class Books(Protocol):
    """Ledger and voucher desk together: what is admitted is closed exactly once."""

    @property
    def is_healthy(self) -> bool:
        """Whether the last commit succeeded."""

    async def open(self, opening: Opening) -> None:
        """Reserve the price and make the admission durable; raises PaymentError, LedgerError. Interrupted, it may have done so or
        not: then `close` ends what is there, or raises LedgerError."""

    async def close(self, closing: Closing) -> Receipt:
        """Make the record durable and return the signed receipt bundle; raises LedgerError."""

    async def receipt(self, request_id: str, tenant: str) -> dict[str, Any] | None:
        """The bundle of a closed request of this tenant, or None."""


@dataclass(frozen=True, slots=True)
class Services:
    """Everything the API is built from.

    Attributes:
        tenancy: Who may call, and how much; without any key it serves everybody (loopback, or `--insecure`).
        random_source: Draws seeds for requests without one.
        new_id: A fresh request id, unguessable and unique for the life of the node.
        clock: Monotonic seconds, for durations.
        now: UTC time, for what clients and templates see.
        payment_terms: What a payer must know to sign a voucher (`GET /info`), or None on a node that takes no payment.
        merger: Makes derived adapters; None refuses every merge that is more than a sum.
    """

    engine: Engine
    catalog: Catalog
    books: Books
    ready: Ready
    server: ServerSettings
    price: TokenPrice
    max_terms: int
    tenancy: Tenancy
    metrics: NodeMetrics
    logger: FilteringBoundLogger
    random_source: random.Random
    new_id: Callable[[], str]
    clock: Callable[[], float]
    now: Callable[[], datetime]
    version: str
    payment_terms: Mapping[str, Any] | None = None
    merger: Merger | None = None
