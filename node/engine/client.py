"""The API process's end of the engine: start it, feed it, restart it. No torch here.

The child is watched from three sides: its exit, its silence (it sends statistics twice a second), and its start. When it is lost,
every sequence in flight ends with an `engine_unavailable` event and a new child is started.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from node import errors
from node.child_process import STOP_TIMEOUT_S, ChildProcess
from node.config import Settings
from node.engine.channel import command_address, event_address
from node.engine.launch import launch_engine
from node.engine.messages import (
    Cancel,
    Command,
    Event,
    Evict,
    Prefetch,
    Ready,
    SequenceEvent,
    Shutdown,
    StartFailed,
    Stats,
    Step,
    Submit,
)
from node.engine.places import Places
from node.engine.sizing import MAX_SEQUENCES_GPU
from node.engine.stream import SequenceStream
from node.errors import EngineError, NodeError, OverloadedError
from node.request import AdapterTerm

RESTART_LIMIT = 5  # starts in a row that fail before the client gives up
RESTART_DELAY_S = 0.5  # doubled after each
RETRY_AFTER_S = 5.0
# Of the event loop. A request takes several turns from its bytes to the engine, and none of them may wait for a step's tokens
# when those come faster than they can be written: whoever is behind finds them as one event, while an empty place costs a row.
TURNS_BETWEEN_STEPS = 8

logger = logging.getLogger(__name__)


class EngineClient:
    """Talks to one engine process. All methods are for one event loop.

    Args:
        settings: The node's settings; model, engine, adapters and data_dir matter here.
        runtime_dir: Private directory for sockets, short enough for a Unix socket path.
        clock: Monotonic seconds.
    """

    def __init__(self, settings: Settings, runtime_dir: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._runtime_dir = runtime_dir
        self._clock = clock
        self._places = Places(settings.engine.queue_limit + (settings.engine.max_sequences or MAX_SEQUENCES_GPU))
        # A sequence sends its Submit and at most one Cancel, so a queue of this size never fills while the engine reads.
        self._high_water_mark = 2 * self._places.limit + 8
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)
        self._context = zmq.asyncio.Context()
        self._commands: zmq.Socket[bytes] | None = None
        self._events: zmq.asyncio.Socket | None = None
        self._process: ChildProcess | None = None
        self._streams: dict[str, SequenceStream] = {}
        self._ready: Ready | None = None
        self._stats = Stats()
        self._heard_s = 0.0
        self._generation = 0
        self._supervisor: asyncio.Task[None] | None = None
        self._is_closing = False

    # ---- state

    @property
    def is_alive(self) -> bool:
        """Whether a child is ready and takes sequences."""
        return self._ready is not None and self._process is not None and self._process.is_running

    @property
    def ready(self) -> Ready | None:
        """What the running child said of itself; None while there is none."""
        return self._ready

    @property
    def stats(self) -> Stats:
        """The latest statistics, at most about a second old while the engine is alive."""
        return self._stats

    @property
    def in_flight_count(self) -> int:
        """Sequences whose last event has not arrived."""
        return len(self._streams)

    @property
    def pid(self) -> int | None:
        """Process id of the child, for the doctor and for tests."""
        return self._process.pid if self._process is not None else None

    # ---- life

    async def start(self) -> Ready:
        """Start the engine and wait until it can serve.

        Raises:
            ModelLoadError, ConfigError: What the settings name cannot be run.
            EngineError: The process died or took longer than `engine.start_timeout_s`; the message ends with its last log lines.
        """
        try:
            ready = await self._launch()
        except NodeError:
            await self._discard()
            raise
        self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")
        return ready

    async def close(self, drain_s: float = 0.0) -> None:
        """Stop: wait up to `drain_s` seconds for sequences in flight, cancel the rest, end the process."""
        deadline_s = self._clock() + drain_s
        while self._streams and self.is_alive and self._clock() < deadline_s:
            await asyncio.sleep(0.02)
        self._is_closing = True
        if self.is_alive:
            with contextlib.suppress(OverloadedError):  # an engine that no longer reads is ended by its signal
                self._send(Shutdown())
        if self._supervisor is not None:
            done, _ = await asyncio.wait({self._supervisor}, timeout=STOP_TIMEOUT_S)
            if not done:
                self._supervisor.cancel()
                await asyncio.gather(self._supervisor, return_exceptions=True)
        await self._discard()
        self._context.term()

    # ---- sequences

    def submit(self, submit: Submit) -> SequenceStream:
        """Run a sequence; iterate over the result for its events. Closing the result early cancels the sequence.

        Raises:
            EngineError: engine_unavailable, no engine is running now.
            OverloadedError: queue_full; nothing was queued.
        """
        if not self.is_alive or self._is_closing:
            raise _unavailable("the engine is not running")
        if not self._places.has_room(submit.tenant):
            raise OverloadedError(
                f"{len(self._streams)} sequences are in flight, as many of {self._places.limit} as this tenant may have now; "
                "retry later",
                retry_after_s=1.0,
            )
        if submit.sequence_id in self._streams:
            raise ValueError(f"sequence id {submit.sequence_id} is in flight already")
        self._send(submit)
        stream = self._streams[submit.sequence_id] = SequenceStream(submit.sequence_id, submit.tenant, self.cancel)
        self._places.enter(submit.tenant)
        return stream

    def cancel(self, sequence_id: str) -> None:
        """Stop a sequence; its last event still arrives. Unknown ids, and a second time, are ignored."""
        stream = self._streams.get(sequence_id)
        if stream is not None and not stream.is_cancelled and self.is_alive:
            self._send(Cancel(sequence_id))
            stream.is_cancelled = True

    def prefetch(self, term: AdapterTerm) -> None:
        """Bring an adapter into the engine's memory ahead of its first request; nothing happens while no engine runs.

        Raises:
            OverloadedError: queue_full; nothing was queued.
        """
        if self.is_alive:
            self._send(Prefetch(term))

    def evict(self, adapter_id: str) -> None:
        """Let an adapter's memory go once no sequence runs with it; nothing happens while no engine runs.

        Raises:
            OverloadedError: queue_full; nothing was queued.
        """
        if self.is_alive:
            self._send(Evict(adapter_id))

    def _send(self, command: Command) -> None:
        if self._commands is None:
            return
        try:
            self._commands.send(self._encoder.encode(command), zmq.NOBLOCK)
        except zmq.Again as error:
            raise OverloadedError(
                f"the engine has {self._high_water_mark} commands waiting, which is the limit; retry later", retry_after_s=1.0
            ) from error

    # ---- the child

    async def _launch(self) -> Ready:
        """Start a child with sockets of its own, so that nothing an earlier one sent can be mistaken for its words."""
        self._generation += 1
        directory = self._directory()
        _remove_strays(self._runtime_dir)
        self._process = await launch_engine(self._settings, directory, self._high_water_mark)
        self._commands = zmq.Context(self._context).socket(zmq.PUSH)
        self._commands.set(zmq.SNDHWM, self._high_water_mark)
        self._commands.set(zmq.LINGER, 0)
        self._commands.connect(command_address(directory))
        self._events = self._context.socket(zmq.PULL)
        self._events.set(zmq.RCVHWM, self._high_water_mark)
        self._events.set(zmq.LINGER, 0)
        self._events.connect(event_address(directory))
        self._ready = await self._first_word(self._process, self._events)
        self._heard_s = self._clock()
        return self._ready

    async def _first_word(self, process: ChildProcess, events: zmq.asyncio.Socket) -> Ready:
        """Wait for Ready, for the reason why not, for the child's death or for the end of patience."""
        timeout_s = self._settings.engine.start_timeout_s
        word = asyncio.ensure_future(events.recv())
        death = asyncio.create_task(process.wait())
        try:
            await asyncio.wait({word, death}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not word.done() and death.done():
                await asyncio.wait({word}, timeout=0.2)  # its last message may still be on the way
            if word.done():
                return _ready_or_raise(self._decoder.decode(word.result()))
            what = f"ended with status {death.result()}" if death.done() else f"was not ready after {timeout_s} s"
            raise EngineError(f"the engine process {what}; its last lines:\n{process.log_tail}")
        finally:
            word.cancel()
            death.cancel()
            await asyncio.gather(word, death, return_exceptions=True)

    async def _supervise(self) -> None:
        """Listen to the child; replace it when it is lost."""
        while True:
            what = await self._listen()
            if self._is_closing:
                return
            logger.error("the engine is lost (%s); restarting it", what)
            self._ready = None
            self._end_all("the engine stopped while this answer was being made; try again")
            await self._discard()
            if not await self._restart():
                return

    async def _listen(self) -> str:
        """Dispatch the child's messages until it dies or falls silent; returns what happened."""
        process, events = self._process, self._events
        if process is None or events is None:
            raise EngineError("the engine was never started")
        death = asyncio.create_task(process.wait())
        receiver = asyncio.create_task(self._receive(events))
        silence_s = self._settings.engine.stall_timeout_s
        try:
            while not death.done() and not receiver.done():
                await asyncio.wait({death, receiver}, timeout=min(1.0, silence_s), return_when=asyncio.FIRST_COMPLETED)
                if self._clock() - self._heard_s > silence_s:
                    return f"no word for {silence_s} s"
            if receiver.done():
                receiver.result()
            await asyncio.wait({receiver}, timeout=0.2)  # what it said before it died
            return f"exit status {death.result()}: {process.log_tail[-500:]}"
        finally:
            death.cancel()
            receiver.cancel()
            await asyncio.gather(death, receiver, return_exceptions=True)

    async def _receive(self, events: zmq.asyncio.Socket) -> None:
        waiting: zmq.Socket[bytes] = zmq.Socket.shadow(events.underlying)
        while True:
            messages = [await events.recv(), *_rest(waiting)]
            self._heard_s = self._clock()
            said = [self._decoder.decode(message) for message in messages]
            self._deliver([item for event in said if isinstance(event, Step) for item in event.events])
            self._stats = next((event for event in reversed(said) if isinstance(event, Stats)), self._stats)
            for _ in range(TURNS_BETWEEN_STEPS):
                await asyncio.sleep(0)  # a message that is here already would be taken at once

    def _deliver(self, events: Iterable[SequenceEvent]) -> None:
        """Steps that waited together reach each reader together."""
        reached: dict[SequenceStream, None] = {}
        for event in events:
            stream = self._streams.get(event.sequence_id)
            if stream is None:
                continue
            stream.add(event)
            reached[stream] = None
            if event.finish_reason is not None:
                del self._streams[event.sequence_id]
                self._places.leave(stream.tenant)
        for stream in reached:
            stream.hand_over()

    def _end_all(self, message: str) -> None:
        self._deliver(
            [
                SequenceEvent(
                    sequence_id=sequence_id, finish_reason="error", error_code="engine_unavailable", error_message=message
                )
                for sequence_id in self._streams
            ]
        )

    async def _restart(self) -> bool:
        """Start another child; gives up after `RESTART_LIMIT` failures in a row."""
        delay_s = RESTART_DELAY_S
        for _ in range(RESTART_LIMIT):
            await asyncio.sleep(delay_s)
            try:
                await self._launch()
            except NodeError as error:
                logger.error("the engine did not start again: %s", error.message)
                await self._discard()
                delay_s *= 2
            else:
                return True
        logger.critical("the engine failed %d starts in a row; this node serves nothing until it is restarted", RESTART_LIMIT)
        return False

    async def _discard(self) -> None:
        """Let go of the child, its sockets and their directory."""
        self._ready = None
        if self._process is not None:
            await self._process.stop()
        for socket in (self._commands, self._events):
            if socket is not None:
                socket.close(0)
        self._process = self._commands = self._events = None
        self._end_all("the engine stopped; try again")
        shutil.rmtree(self._directory(), ignore_errors=True)

    def _directory(self) -> Path:
        """Of the child's sockets. No other process has one of this name: a second node on the same data starts its engine before
        the ledger refuses it."""
        return self._runtime_dir / f"engine-{os.getpid()}-{self._generation}"


def _remove_strays(runtime_dir: Path) -> None:
    """Directories of processes that were killed."""
    for stray in runtime_dir.glob("engine-*-*"):
        if not Path("/proc", stray.name.split("-")[1]).exists():
            shutil.rmtree(stray, ignore_errors=True)


def _rest(socket: zmq.Socket[bytes]) -> Iterator[bytes]:
    """Messages that have arrived already."""
    with contextlib.suppress(zmq.Again):
        while True:
            yield socket.recv(zmq.NOBLOCK)


def _unavailable(message: str) -> EngineError:
    return EngineError(f"{message}; retry in a few seconds", retry_after_s=RETRY_AFTER_S)


def _ready_or_raise(event: Event) -> Ready:
    """The child's first message, as a value or as the error it names."""
    if isinstance(event, Ready):
        return event
    if isinstance(event, StartFailed):
        kind = {"ModelLoadError": errors.ModelLoadError, "ConfigError": errors.ConfigError}.get(event.kind, EngineError)
        raise kind(event.message, code=event.code)
    raise EngineError(f"the engine's first message is {type(event).__name__}; Ready was expected")
