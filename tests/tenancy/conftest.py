"""A store on a real ledger database, and clocks that are set by hand."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest

from node.config import TenantSettings
from node.tenancy.door import Door
from node.tenancy.meter import Meter
from node.tenancy.offline import offline_transact
from node.tenancy.store import TenantStore


@dataclass
class Clock:
    """Both clocks of the node; `pass_s` moves them together."""

    at: datetime = datetime(2026, 1, 31, 12, tzinfo=UTC)
    seconds: float = 1000.0

    def pass_s(self, seconds: float) -> None:
        self.seconds += seconds
        self.at += timedelta(seconds=seconds)

    def now(self) -> datetime:
        return self.at

    def monotonic(self) -> float:
        return self.seconds

    def ms(self) -> int:
        return int(self.at.timestamp() * 1000)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'ledger.sqlite'}"


@pytest.fixture
async def open_store(url, clock):
    """Open the same database again and again, as restarts do."""
    counter = itertools.count()

    async def run(work):
        async with offline_transact(url) as transact:
            store = TenantStore(transact, clock.ms, lambda size: bytes([next(counter) % 256]) * size)
            await store.load()
            return await work(store)

    return run


@pytest.fixture
async def store(url, clock):
    async with offline_transact(url) as transact:
        made = TenantStore(transact, clock.ms)
        await made.load()
        yield made


@pytest.fixture
def door(store, clock):
    return Door(store, TenantSettings(max_concurrent=7), clock.monotonic, clock.ms)


@pytest.fixture
def meter(clock):
    return Meter(clock.monotonic, clock.now)
