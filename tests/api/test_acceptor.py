"""Connections are taken from the kernel a few at a time, and wait as bare sockets for their turn."""

from __future__ import annotations

import asyncio
import errno
import resource
import socket
from pathlib import Path

import pytest
from aiohttp import web

from node.api import acceptor
from node.api.acceptor import ACCEPTS_IN_A_TURN, Acceptor, bound, reserve_descriptors
from node.api.connections import BoundedSite
from node.api.turnstile import Turnstile


@pytest.fixture
def dial():
    """Connect to a port; the kernel answers for whoever listens there."""
    dialled = []

    def connect(port):
        dialled.append(socket.create_connection(("127.0.0.1", port), 10))
        return dialled[-1]

    yield connect
    for connection in dialled:
        connection.close()


def port_of(sockets):
    return sockets[0].getsockname()[1]


async def turns_until(is_done):
    """Turns of the loop until something is true, at most a thousand."""
    for turn in range(1000):
        if is_done():
            return turn
        await asyncio.sleep(0)
    raise AssertionError("it did not happen")


async def test_crowd_is_taken_a_few_in_each_turn_of_the_loop(dial):
    sockets = await bound("127.0.0.1", 0, 64)
    for _ in range(30):
        dial(port_of(sockets))
    taken, batches = [], [0]
    doors = Acceptor(sockets, lambda connection, address: taken.append((connection, address)))
    while len(taken) < 30:
        before = len(taken)
        await asyncio.sleep(0)
        batches.append(len(taken) - before)
    assert max(batches) == ACCEPTS_IN_A_TURN
    assert {address for _, address in taken} == {"127.0.0.1"}
    doors.close()
    for connection, _ in taken:
        assert connection.gettimeout() == 0
        connection.close()


async def test_closed_listens_no_more(dial):
    sockets = await bound("127.0.0.1", 0, 64)
    port = port_of(sockets)
    Acceptor(sockets, lambda connection, address: pytest.fail("accepted")).close()
    with pytest.raises(ConnectionRefusedError):
        dial(port)


class Full(socket.socket):
    """Finds no descriptor the first time."""

    is_full = True

    def accept(self):
        if self.is_full:
            self.is_full = False
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


async def test_process_without_descriptors_says_so_and_tries_again(dial, monkeypatch, caplog):
    monkeypatch.setattr(acceptor, "_PAUSE_S", 0.001)
    (plain,) = await bound("127.0.0.1", 0, 64)
    listening = Full(fileno=plain.detach())
    listening.setblocking(False)
    taken = []
    doors = Acceptor([listening], lambda connection, address: taken.append(connection))
    dial(port_of([listening]))
    async with asyncio.timeout(10):
        while not taken:
            await asyncio.sleep(0.001)
    assert "errno 24" in caplog.text
    doors.close()
    taken[0].close()


async def test_address_in_use_is_an_error_and_leaves_no_socket_open():
    (held,) = await bound("127.0.0.1", 0, 64)
    with pytest.raises(OSError, match=str(errno.EADDRINUSE)):
        await bound("127.0.0.1", port_of([held]), 64)
    held.close()


def table_size():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("FDSize")))


def test_table_of_descriptors_has_its_size_before_a_crowd_comes():
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(table_size() + 1, limit)
    reserve_descriptors(count)
    assert table_size() >= count


def test_table_of_descriptors_stays_within_the_processs_limit():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lower = min(512, before[0])
    resource.setrlimit(resource.RLIMIT_NOFILE, (lower, before[1]))
    try:
        reserve_descriptors(lower + 1)  # the kernel refuses a number beyond it
        assert table_size() >= lower
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
async def open_site():
    """A site whose turnstile lets nobody in but the first, and its port."""
    runners = []

    async def start():
        runners.append(runner := web.AppRunner(web.Application()))
        await runner.setup()
        site = BoundedSite(runner, "127.0.0.1", 0, 4, Turnstile(later=lambda delay_s, call: None))
        await site.start()
        return site, runner.addresses[0][1]

    yield start
    for runner in runners:
        await runner.cleanup()


async def test_connections_that_wait_are_closed_with_the_site(open_site, dial):
    site, port = await open_site()
    dial(port)
    waiting = dial(port)
    await turns_until(lambda: len(site._waiting) == 1)
    await site.stop()
    assert waiting.recv(1) == b""


async def test_connections_that_wait_count_against_their_addresss_limit(open_site, dial):
    site, port = await open_site()
    for _ in range(4):
        dial(port)
    await turns_until(lambda: len(site._waiting) == 3)
    refused = dial(port)
    refused.setblocking(False)
    async with asyncio.timeout(10):
        assert (await asyncio.get_running_loop().sock_recv(refused, 64)).startswith(b"HTTP/1.1 429")
