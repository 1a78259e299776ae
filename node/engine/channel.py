"""The engine's end of the two ZeroMQ queues.

Neither direction ever makes the step loop wait: commands are drained, events are queued up to the high-water mark and held back
beyond it (the loop then stops stepping, so at most one step's events and the refusals of commands in flight are held).
"""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

import msgspec
import zmq

from node.engine.messages import Command, Event

HELD_LIMIT = 64  # messages held back before commands are left in their queue, too
LINGER_MS = 2000  # for the last events of a shutdown


def command_address(directory: Path) -> str:
    """Where the engine process receives."""
    return f"ipc://{directory}/commands"


def event_address(directory: Path) -> str:
    """Where the engine process sends."""
    return f"ipc://{directory}/events"


class EngineChannel:
    """Commands in, events out, and a bell that other threads may ring.

    Args:
        directory: Private (0700) directory for the sockets.
        high_water_mark: Messages queued in each direction.
    """

    def __init__(self, directory: Path, high_water_mark: int) -> None:
        self._context = zmq.Context()
        self._commands = self._context.socket(zmq.PULL)
        self._commands.set(zmq.RCVHWM, high_water_mark)
        self._commands.bind(command_address(directory))
        self._events = self._context.socket(zmq.PUSH)
        self._events.set(zmq.SNDHWM, high_water_mark)
        self._events.set(zmq.LINGER, LINGER_MS)
        self._events.bind(event_address(directory))
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._held: deque[bytes] = deque()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)

    @property
    def is_blocked(self) -> bool:
        """Whether events are held back because the other side does not read."""
        return bool(self._held)

    def ring(self) -> None:
        """End a wait in `receive`. The only method that another thread may call."""
        os.eventfd_write(self._bell, 1)

    def receive(self, timeout_s: float) -> list[Command]:
        """Take every command that has arrived; wait up to `timeout_s` when there is none and nothing else to do."""
        self._flush()
        if timeout_s > 0:
            self._wait(timeout_s)
            self._flush()
        commands: list[Command] = []
        while len(self._held) < HELD_LIMIT:
            try:
                commands.append(self._decoder.decode(self._commands.recv(zmq.NOBLOCK)))
            except zmq.Again:
                break
        return commands

    def send(self, event: Event) -> None:
        """Queue an event, or hold it back when the queue is full. Order is kept."""
        self._held.append(self._encoder.encode(event))
        self._flush()

    def close(self) -> None:
        """Send what can still be sent within `LINGER_MS`, then let go of the sockets. What is said at once, such as that a start
        failed, may have to wait for who reads it."""
        if self._held and self._events.poll(LINGER_MS, zmq.POLLOUT):
            self._flush()
        self._commands.close(0)
        self._events.close()
        self._context.term()
        os.close(self._bell)

    def _flush(self) -> None:
        while self._held:
            try:
                self._events.send(self._held[0], zmq.NOBLOCK)
            except zmq.Again:
                return
            self._held.popleft()

    def _wait(self, timeout_s: float) -> None:
        """Sleep until a command, the bell, room for held events, or the time."""
        poller = zmq.Poller()
        poller.register(self._bell, zmq.POLLIN)
        if len(self._held) < HELD_LIMIT:
            poller.register(self._commands, zmq.POLLIN)
        if self._held:
            poller.register(self._events, zmq.POLLOUT)
        ready = dict(poller.poll(max(1, round(timeout_s * 1000))))
        if self._bell in ready:
            os.eventfd_read(self._bell)
