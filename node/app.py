"""The composition root: builds the rooms around a starting engine, wires them, opens and closes them in order.

Nothing here decides anything. `node.opening` comes first and needs none of the imports below.
"""

from __future__ import annotations

import asyncio
import gc
import random
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry
from structlog.typing import FilteringBoundLogger

from attribution.fees import Price, SplitPolicy
from node import __version__
from node.adapters.catalog import AdapterCatalog
from node.adapters.disk_cache import open_disk_cache
from node.adapters.fetching import client as fetching
from node.adapters.fetching.client import FetchClient
from node.adapters.merges.derived import Deriver
from node.api.admin import ADMIN_HOST, AdminListener
from node.api.application import build_application
from node.api.doors import Services
from node.api.listener import Listener
from node.api.model_routes import adapter_states
from node.api.settlement_books import SettlementBooks
from node.config import LOOPBACK_HOSTS, Settings, admin_socket
from node.engine.client import EngineClient
from node.engine.messages import Ready
from node.exposure import exposed
from node.operations import adapter_operations, settlement_operations
from node.settlement.treasury import Treasury, open_treasury
from node.start_notes import Note
from node.telemetry.metrics import NodeMetrics
from node.tenancy.given_names import GivenNames
from node.tenancy.key_desk import key_operations
from node.tenancy.meter import TokenPrice
from node.tenancy.tenancy import Tenancy, open_tenancy

BANNER_ENTRIES = 12  # names and problems shown at the start; there may be thousands
_GC_THRESHOLD = (
    4_000  # objects; at Python's 700 its walks take 3 % of a loop that streams 10,000 tokens/s, at 20,000 one may take 20 ms
)


@dataclass(frozen=True, slots=True)
class Node:
    """A node that serves."""

    settings: Settings
    url: str
    admin_url: str | None
    ready: Ready
    treasury: Treasury
    catalog: AdapterCatalog
    engine: EngineClient

    def banner(self) -> str:
        """Where everything is, for whoever started it."""
        entries, problems = self.catalog.entries(), list(self.catalog.problems.items())
        lines = [
            f"openlora-node {__version__} serves at {self.url}",
            f"  model      {self.ready.model_id} ({self.ready.dtype}, {self.ready.device}, {self.ready.kernels})",
            f"  adapters   {_shortened([entry.name for entry in entries])}",
            f"  data       {self.settings.data_dir}",
            f"  chain      {self.treasury.describe()}",
            f"  operator   {self.treasury.keys.operator.address}",
        ]
        if self.admin_url is not None:
            lines.insert(-1, f"  admin      {self.admin_url}")
        lines += [f"  not served {name}: {problem.message}" for name, problem in problems[:BANNER_ENTRIES]]
        if len(problems) > BANNER_ENTRIES:
            lines.append(f"  not served {len(problems) - BANNER_ENTRIES} more; see openlora-node adapters list")
        return "\n".join(lines)


def _shortened(names: Sequence[str]) -> str:
    more = len(names) - BANNER_ENTRIES
    return (", ".join(names[:BANNER_ENTRIES]) or "none") + (f" and {more} more" if more > 0 else "")


@asynccontextmanager
async def open_rooms(
    settings: Settings,
    logger: FilteringBoundLogger,
    key_lines: Sequence[tuple[str, str]],
    engine: EngineClient,
    starting: asyncio.Task[Ready],
    note: Note,
) -> AsyncIterator[Node]:
    """Open every room but the engine's, listen, and on leaving drain and close in the opposite order.

    Args:
        key_lines: Of the file of API keys.
        engine: Whose start is `starting`: it reads weights while keys and ledger are opened.
        note: Called with what is done, one by one.

    Raises:
        NodeError: Whatever room cannot open; what was opened before it is closed again.
    """
    async with AsyncExitStack() as stack:
        fetching_process = await fetching.begin()
        stack.push_async_callback(fetching_process.stop)
        treasury = await stack.enter_async_context(open_treasury(settings, logger))
        tenancy = await open_tenancy(treasury.ledger, settings.tenants, key_lines, settings.adapters.stores)
        _check_keys(settings, tenancy)
        note("keys and ledger opened")
        gc.collect()  # of the imports, while the engine is waited for
        ready = await starting
        note("engine ready")
        names = GivenNames(treasury.ledger.transact)
        fetcher = FetchClient(settings, ready.linears, ready.base_id, started=fetching_process)
        await fetcher.start()
        stack.push_async_callback(fetcher.close)
        catalog = AdapterCatalog(settings, fetcher, time.monotonic, names=names, weight_of=tenancy.weight_of_owner)
        stack.push_async_callback(catalog.close)
        await catalog.start()
        await catalog.restore(tenancy.sees_of_owner)
        deriver = _deriver(settings, ready, fetcher)
        stack.push_async_callback(deriver.close)
        note("adapters listed")
        services = _services(settings, engine, ready, catalog, deriver, treasury, tenancy, logger)
        listener = Listener(build_application(services))
        stack.push_async_callback(listener.close, settings.server.drain_timeout_s)
        port = await listener.open(settings.server.host, settings.server.port)
        operations = {
            **settlement_operations(treasury),
            **adapter_operations(catalog, tenancy.store, lambda: adapter_states(engine.stats)),
            **key_operations(tenancy.store, tenancy.meter),
        }
        admin = AdminListener(operations, logger)
        stack.push_async_callback(admin.close)
        await admin.open(admin_socket(settings))
        admin_url = None
        if settings.server.admin_port is not None:
            admin_url = f"http://{ADMIN_HOST}:{await admin.open_port(settings.server.admin_port, tenancy.door)}"
        # What is here now stays: the collector need not walk ten thousand catalogue entries while answers are streamed.
        gc.collect(1)
        gc.freeze()
        gc.set_threshold(_GC_THRESHOLD)
        note("listening")
        yield Node(settings, f"http://{settings.server.host}:{port}", admin_url, ready, treasury, catalog, engine)


def _services(
    settings: Settings,
    engine: EngineClient,
    ready: Ready,
    catalog: AdapterCatalog,
    deriver: Deriver,
    treasury: Treasury,
    tenancy: Tenancy,
    logger: FilteringBoundLogger,
) -> Services:
    pricing, split = settings.pricing, settings.split
    books = SettlementBooks(
        treasury.ledger,
        None if treasury.settlement is None else treasury.settlement.desk,
        base_id=ready.base_id,
        price=Price(str(pricing.input_token_wei), str(pricing.output_token_wei)),
        policy=SplitPolicy(split.node_ppm, split.trainer_ppm, split.data_ppm),
        payees=treasury.payees,
        requires_payment=pricing.require_payment,
    )
    return Services(
        engine=engine,
        catalog=catalog,
        books=books,
        ready=ready,
        server=settings.server,
        payment_terms=treasury.payment_terms(),
        max_terms=settings.adapters.max_terms,
        tenancy=tenancy,
        price=TokenPrice(pricing.input_token_wei, pricing.output_token_wei),
        metrics=NodeMetrics(CollectorRegistry()),
        logger=logger,
        random_source=random.SystemRandom(),
        new_id=lambda: secrets.token_hex(16),
        clock=time.monotonic,
        now=lambda: datetime.now(UTC),
        version=__version__,
        merger=deriver,
    )


def _deriver(settings: Settings, ready: Ready, fetcher: FetchClient) -> Deriver:
    adapters = settings.adapters
    return Deriver(
        open_disk_cache(settings),
        fetcher.verify,
        ready.linears,
        max_rank=adapters.max_rank,
        max_bytes=adapters.max_adapter_bytes,
        memory_bytes=adapters.merge_memory_bytes,
        timeout_s=adapters.merge_timeout_s,
    )


def _check_keys(settings: Settings, tenancy: Tenancy) -> None:
    server = settings.server
    if server.host not in LOOPBACK_HOSTS and not server.insecure and tenancy.door.is_open:
        raise exposed(server.host)
