"""Runs of slow work: shared by all who wait, taking turns over tenants, refused by name where there is no room."""

from __future__ import annotations

import asyncio

import pytest

from node.adapters.flights import Flights
from node.errors import AdapterUnavailableError


class Work:
    """Runs that last until they are let go; `begun` has their keys in order."""

    def __init__(self, **options):
        self.flights = Flights(**({"limit": 8, "timeout_s": 30.0, "workers": 2} | options))
        self.begun = []
        self.gates = {}

    def ask(self, tenant, key):
        """A caller that waits for a key."""
        return asyncio.create_task(self.flights.join(key, lambda: self._run(key), tenant))

    async def ask_many(self, tenant, keys):
        asked = {key: self.ask(tenant, key) for key in keys}
        await settle()
        return asked

    async def end(self, *keys):
        for key in keys:
            self.gates[key].set()
        await settle()

    async def _run(self, key):
        self.begun.append(key)
        await self.gates.setdefault(key, asyncio.Event()).wait()
        return key.upper()


async def settle():
    """Everything that can happen without anybody's doing has happened."""
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture
async def make():
    made = []

    def build(**options):
        made.append(Work(**options))
        return made[-1]

    yield build
    for work in made:
        await work.flights.close()


async def test_fetch_of_a_newcomer_begins_while_another_tenants_are_slow(make):
    work = make(workers=3)
    await work.ask_many("ann", "abcdefgh")
    (asked,) = (await work.ask_many("ben", "z")).values()

    await work.end("z")

    assert work.begun == ["a", "b", "z"]
    assert await asked == "Z"


async def test_full_queue_refuses_the_newest_of_the_crowd_and_takes_the_newcomer_in(make):
    work = make()
    crowd = await work.ask_many("ann", "abcdefgh")
    ben = work.ask("ben", "z")
    await settle()

    with pytest.raises(AdapterUnavailableError) as caught:
        await crowd["h"]
    with pytest.raises(AdapterUnavailableError) as more:
        await work.ask("ann", "i")
    await work.end("z")

    assert {caught.value.error_code, more.value.error_code} == {"adapter_queue_full"}
    assert caught.value.retry_after_s == 1.0
    assert "8 adapters" in caught.value.message
    assert await ben == "Z"
    assert [key for key, task in crowd.items() if task.done()] == ["h"]


async def test_refused_fetch_can_be_asked_for_again_at_once(make):
    work = make(limit=4)
    ann = await work.ask_many("ann", "abcd")
    ben = work.ask("ben", "z")
    await asyncio.sleep(0)
    cat = work.ask("cat", "d")  # before ann's refused run has ended
    await settle()
    await work.end("z")
    await work.end("d")

    assert (await ben, await cat) == ("Z", "D")
    for key in "cd":
        with pytest.raises(AdapterUnavailableError):
            await ann[key]
    assert work.begun == ["a", "z", "d"]


async def test_everything_that_waits_runs_in_the_end(make):
    work = make()
    asked = {**await work.ask_many("ann", "abcde"), **await work.ask_many("ben", "xyz")}
    for _ in range(8):
        await work.end(*work.begun)

    assert await asyncio.gather(*asked.values()) == [key.upper() for key in asked]
    assert work.begun[:4] == ["a", "x", "b", "y"]


async def test_heavier_tenant_runs_more(make):
    work = make(workers=5, limit=20, weight_of={"ann": 1, "ben": 3, "cat": 1}.__getitem__)
    await work.ask_many("cat", "1234")
    await work.ask_many("ann", "abcd")
    await work.ask_many("ben", "wxyz")
    await work.end("1", "2", "3", "4")
    assert "".join(work.begun) == "1234awxy"


async def test_failed_run_frees_its_worker(make):
    work = make(workers=1)

    async def fail():
        raise AdapterUnavailableError("the source is down")

    first = asyncio.create_task(work.flights.join("bad", fail, "ann"))
    (second,) = (await work.ask_many("ann", "a")).values()
    await work.end("a")

    with pytest.raises(AdapterUnavailableError, match="source is down"):
        await first
    assert await second == "A"


async def test_name_that_a_crowd_asked_for_last_comes_early_for_another_tenant(make):
    work = make()
    ann = await work.ask_many("ann", "abcdefgh")
    ben = await work.ask_many("ben", "h")
    await work.end("h")

    assert work.begun == ["a", "h"]
    assert await ben["h"] == await ann["h"] == "H"


async def test_close_ends_runs_that_work_and_runs_that_wait(make):
    work = make()
    asked = await work.ask_many("ann", "abcd")
    await work.flights.close()
    await asyncio.wait(asked.values())
    assert all(task.cancelled() for task in asked.values())
    assert work.begun == ["a"]
