from __future__ import annotations

import asyncio

import pytest

from node.api.application import build_application
from node.api.listener import Listener
from node.api.turnstile import LONGEST_PACE_S, TICK_S, Turnstile

HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"


class Loop:
    """A loop whose clocks and timers move when told."""

    def __init__(self):
        self.now_s = self.busy_s = 0.0
        self.timers = []
        self.log = []
        self.turnstile = Turnstile(lambda: self.now_s, lambda: self.busy_s, lambda delay_s, call: self.timers.append(call))

    def come(self, word, begins=True):
        self.turnstile.come(lambda: self.log.append(word) or begins)

    def tick(self, busy_share, passed_s=TICK_S):
        self.now_s += passed_s
        self.busy_s += busy_share * passed_s
        due, self.timers = self.timers, []
        for call in due:
            call()
        return list(self.log)


def test_first_comes_in_at_once_and_the_others_when_the_loop_has_rested():
    loop = Loop()
    for word in "abc":
        loop.come(word)

    assert loop.log == ["a"]
    assert loop.tick(busy_share=0.5) == ["a", "b"]
    assert loop.tick(busy_share=1.0) == ["a", "b"]
    assert loop.tick(busy_share=0.4) == ["a", "b", "c"]


def test_a_loop_that_never_rests_still_lets_newcomers_in():
    loop = Loop()
    for number in range(10):
        loop.come(number)

    while len(loop.log) < 10:
        loop.tick(busy_share=1.0)

    assert loop.now_s == pytest.approx(9 * LONGEST_PACE_S, rel=0.5)


def test_who_hung_up_takes_no_turn():
    loop = Loop()
    loop.come("a")
    loop.come("gone", begins=False)
    loop.come("b")

    assert loop.tick(busy_share=0.0) == ["a", "gone", "b"]


def test_after_the_crowd_the_next_comes_in_at_once_again():
    loop = Loop()
    loop.come("a")
    loop.tick(busy_share=0.0)
    assert loop.timers == []

    loop.come("b")

    assert loop.log == ["a", "b"]


async def test_known_connections_pass_one_in_a_turn_of_the_loop_and_wait_for_no_newcomer():
    loop, passed = Loop(), []
    for number in range(200):
        loop.come(number)

    async def ask(word):
        await loop.turnstile.again()
        passed.append(word)

    tasks = [asyncio.create_task(ask(word)) for word in "abcd"]
    await asyncio.sleep(0)
    tasks[2].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

    assert passed == ["a", "b", "d"]
    assert loop.log == [0]


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
