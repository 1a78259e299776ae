"""The loop against a fake engine and a fake channel; the channel against real sockets."""

import tempfile
import threading
from pathlib import Path

import msgspec
import pytest
import zmq

from node.engine import channel as subject
from node.engine.channel import HELD_LIMIT, EngineChannel, command_address, event_address
from node.engine.loop import COPY_POLL_S, STATS_INTERVAL_S, EngineLoop
from node.engine.messages import Cancel, Event, SequenceEvent, Shutdown, Stats, Step, Submit
from node.request import Sampling


def submit(name="a"):
    return Submit(sequence_id=name, tenant="t", prompt_ids=(1,), terms=(), sampling=Sampling(max_new_tokens=1))


class FakeEngine:
    def __init__(self):
        self.log = []
        self.has_work = False
        self.computes = True
        self.is_copying = False

    def add(self, submit):
        self.log.append(("add", submit.sequence_id))
        self.has_work = True
        return []

    def cancel(self, sequence_id):
        self.log.append(("cancel", sequence_id))
        self.has_work = False
        return [SequenceEvent(sequence_id=sequence_id, finish_reason="cancelled")]

    def cancel_all(self):
        return [SequenceEvent(sequence_id="all", finish_reason="cancelled")]

    def step(self):
        self.log.append("step")
        return [SequenceEvent(sequence_id="a")], self.computes

    def stats(self):
        return Stats()


class FakeChannel:
    def __init__(self):
        self.commands = []
        self.sent = []
        self.waits = []
        self.is_blocked = False

    def receive(self, timeout_s):
        self.waits.append(timeout_s)
        found, self.commands = self.commands, []
        return found

    def send(self, event):
        self.sent.append(event)


class Room:
    def __init__(self):
        self.now_s = 100.0
        self.engine, self.channel = FakeEngine(), FakeChannel()
        self.loop = EngineLoop(self.engine, self.channel, lambda: self.now_s)

    def turn(self, *commands):
        self.channel.commands = list(commands)
        self.loop.run_once()


def test_commands_are_taken_before_the_step():
    room = Room()
    room.turn(submit(), submit("b"))
    assert room.engine.log == [("add", "a"), ("add", "b"), "step"]


def test_cancel_is_not_behind_a_step():
    room = Room()
    room.turn(submit())
    room.turn(Cancel("a"))
    assert room.engine.log[-1] == ("cancel", "a")
    assert room.channel.sent[-1].events[0].finish_reason == "cancelled"


def test_idle_loop_sleeps_until_statistics_are_due():
    room = Room()
    room.turn()
    room.turn()
    assert room.channel.waits[-1] == pytest.approx(STATS_INTERVAL_S)
    assert room.engine.log == []


def test_busy_loop_does_not_sleep():
    room = Room()
    room.turn(submit())
    room.turn()
    assert room.channel.waits[-1] == 0.0


def test_loop_that_waits_for_adapters_sleeps():
    room = Room()
    room.engine.computes = False
    room.turn(submit())
    room.turn()
    assert room.channel.waits[-1] == pytest.approx(STATS_INTERVAL_S)


def test_loop_looks_for_copies_that_wake_nobody():
    room = Room()
    room.engine.computes, room.engine.is_copying = False, True
    room.turn()
    room.turn(submit())
    room.turn()
    assert room.channel.waits[1:] == [pytest.approx(STATS_INTERVAL_S), COPY_POLL_S]


def test_blocked_channel_stops_stepping_but_not_listening():
    room = Room()
    room.turn(submit())
    room.channel.is_blocked = True
    before = room.engine.log.count("step")
    room.turn(Cancel("a"))
    assert room.engine.log.count("step") == before
    assert ("cancel", "a") in room.engine.log


def test_statistics_are_sent_when_due():
    room = Room()
    room.turn()
    room.turn()
    assert sum(isinstance(item, Stats) for item in room.channel.sent) == 1
    room.now_s += STATS_INTERVAL_S
    room.turn()
    assert sum(isinstance(item, Stats) for item in room.channel.sent) == 2


def test_shutdown_ends_the_loop_with_last_events():
    room = Room()
    room.channel.commands = [submit(), Shutdown()]
    room.loop.run()
    assert room.channel.sent[-1] == Step((SequenceEvent(sequence_id="all", finish_reason="cancelled"),))
    assert "step" not in room.engine.log


@pytest.fixture
def sockets(monkeypatch):
    monkeypatch.setattr(subject, "LINGER_MS", 0)  # some tests leave words that nobody reads
    with tempfile.TemporaryDirectory(prefix="ch") as name:
        channel = EngineChannel(Path(name), 4)
        context = zmq.Context()
        commands, events = context.socket(zmq.PUSH), context.socket(zmq.PULL)
        commands.connect(command_address(Path(name)))
        events.set(zmq.RCVHWM, 1)
        yield channel, commands, events, lambda: events.connect(event_address(Path(name)))
        commands.close(0)
        events.close(0)
        channel.close()
        context.term()


def test_channel_without_a_reader_blocks_and_loses_nothing(sockets):
    channel, _, events, connect = sockets
    for index in range(50):
        channel.send(Stats(running=index))
    assert channel.is_blocked
    connect()
    found = []
    while len(found) < 50:
        channel.receive(0.01)
        while events.poll(10):
            found.append(msgspec.msgpack.decode(events.recv(), type=Event).running)
    assert found == list(range(50))
    assert not channel.is_blocked


def test_channel_takes_cancels_while_events_are_held_back(sockets):
    channel, commands, _, _ = sockets
    channel.send(Stats())
    assert channel.is_blocked
    commands.send(msgspec.msgpack.encode(Cancel("a")))
    assert channel.receive(30) == [Cancel("a")]


def test_channel_that_holds_too_much_leaves_commands_queued(sockets):
    channel, commands, _, _ = sockets
    for _ in range(HELD_LIMIT):
        channel.send(Stats())
    commands.send(msgspec.msgpack.encode(Cancel("a")))
    assert channel.receive(0.05) == []


def test_bell_ends_a_wait(sockets):
    channel, _, _, _ = sockets
    thread = threading.Thread(target=channel.ring)
    thread.start()
    assert channel.receive(30) == []
    thread.join()


def test_channel_that_closes_at_once_is_heard_by_who_connects_later():
    with tempfile.TemporaryDirectory(prefix="ch") as name:
        channel = EngineChannel(Path(name), 4)
        channel.send(Stats(running=3))
        closing = threading.Thread(target=channel.close)
        closing.start()
        with zmq.Context() as context, context.socket(zmq.PULL) as events:
            events.connect(event_address(Path(name)))
            assert events.poll(10_000)
            assert msgspec.msgpack.decode(events.recv(), type=Event).running == 3
        closing.join(10)
        assert not closing.is_alive()
