from __future__ import annotations

import asyncio

from node.api.application import build_application
from node.api.listener import Listener
from node.api.turnstile import KNOWN, NEW, Turnstile

HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"


def noting(log, word, begins=True):
    return lambda: log.append(word) or begins


async def turns(log, turnstile, count):
    """What begins in each of the loop's next turns."""
    found = []
    for _ in range(count):
        before = len(log)
        await asyncio.sleep(0)
        found.append(log[before:])
    return found


async def test_first_begins_at_once_and_the_others_one_in_a_turn():
    log, turnstile = [], Turnstile()
    for word in "abc":
        turnstile.enter(NEW, noting(log, word))

    assert log == ["a"]
    assert await turns(log, turnstile, 4) == [["b"], ["c"], [], []]
    turnstile.enter(NEW, noting(log, "d"))
    assert log[-1] == "d"


async def test_a_crowd_in_one_lane_is_one_place_before_the_other():
    log, turnstile = [], Turnstile()
    for number in range(200):
        turnstile.enter(NEW, noting(log, number))
    await asyncio.sleep(0)

    turnstile.enter(KNOWN, noting(log, "known"))
    await turns(log, turnstile, 2)

    assert "known" in log
    assert len(log) <= 4


async def test_who_hung_up_takes_no_turn():
    log, turnstile = [], Turnstile()
    turnstile.enter(NEW, noting(log, "a"))
    turnstile.enter(NEW, noting(log, "gone", begins=False))
    turnstile.enter(NEW, noting(log, "b"))

    assert await turns(log, turnstile, 1) == [["gone", "b"]]


async def test_passed_lets_those_who_wait_through_in_order_without_the_cancelled():
    log, turnstile = [], Turnstile()

    async def come(word):
        await turnstile.passed(KNOWN)
        log.append(word)

    tasks = [asyncio.create_task(come(word)) for word in "abcd"]
    await asyncio.sleep(0)
    tasks[2].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

    assert log == ["a", "b", "d"]


async def test_a_crowd_of_connections_is_answered_whole_and_gives_its_places_back(bench):
    listener = Listener(build_application(bench.services))
    port = await listener.open("127.0.0.1", 0)
    limit = bench.services.server.max_connections_per_address

    async def ask(times):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        statuses = []
        for _ in range(times):
            writer.write(HEALTH)
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(line.split()[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
            await reader.readexactly(length)
            statuses.append(head.split()[1])
        writer.close()
        await writer.wait_closed()
        return statuses

    async def hang_up():
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.transport.abort()

    for _ in range(3):
        asked = [ask(3) for _ in range(limit // 2)]
        found = await asyncio.gather(*asked, *(hang_up() for _ in range(limit // 4)))
        assert {status for statuses in found[: limit // 2] for status in statuses} == {b"200"}
    await listener.close(1.0)
