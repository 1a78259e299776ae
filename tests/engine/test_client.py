"""The client and the real engine process."""

import asyncio
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import pytest_asyncio
import zmq

from node.config import load_settings
from node.engine.client import EngineClient
from node.engine.messages import Submit
from node.errors import EngineError, ModelLoadError, OverloadedError
from node.request import Sampling

TIMEOUT_S = 60
shared_loop = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture
def short_dir():
    """Unix socket paths are short; pytest's own directories are not."""
    with tempfile.TemporaryDirectory(prefix="eng") as directory:
        yield Path(directory)


def settings_for(world, tmp_path, **engine):
    overrides = {
        "data_dir": str(tmp_path),
        "model.path": str(world.model_dir),
        "model.dtype": "float32",
        "engine.threads": 1,
        "engine.kv_cache_bytes": 1 << 20,
        "adapters.memory_bytes": 4 << 20,
    }
    return load_settings(None, {**overrides, **{f"engine.{key}": value for key, value in engine.items()}})


@pytest.fixture(scope="module")
def shared_dir():
    with tempfile.TemporaryDirectory(prefix="eng") as directory:
        yield Path(directory)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(world, tmp_path_factory, shared_dir):
    """One engine process for every test that leaves it in order; starting one takes seconds."""
    client = EngineClient(settings_for(world, tmp_path_factory.mktemp("data")), shared_dir)
    await client.start()
    yield client
    await client.close()


def submit(sequence_id, max_new_tokens=5, prompt=(1, 5, 9)):
    return Submit(
        sequence_id=sequence_id, tenant="t", prompt_ids=prompt, terms=(), sampling=Sampling(max_new_tokens=max_new_tokens)
    )


async def collect(stream):
    return [event async for event in stream]


def test_client_import_brings_no_torch():
    code = "import sys, node.engine.client; sys.exit(int('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@shared_loop
async def test_submit_streams_every_token_and_one_end(client):
    events = await asyncio.wait_for(collect(client.submit(submit("a"))), TIMEOUT_S)
    assert sum(len(event.tokens) for event in events) == 5
    assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + ["length"]
    assert all(event.tokens for event in events)
    assert client.in_flight_count == 0


@shared_loop
async def test_cancel_ends_the_stream(client):
    stream = client.submit(submit("a", max_new_tokens=200))
    first = await anext(stream)
    assert first.finish_reason is None
    client.cancel("a")
    events = await asyncio.wait_for(collect(stream), TIMEOUT_S)
    assert events[-1].finish_reason in ("cancelled", "length")


@shared_loop
async def test_closed_stream_cancels_its_sequence(client):
    stream = client.submit(submit("a", max_new_tokens=200))
    await anext(stream)
    await stream.aclose()
    while client.in_flight_count:
        await asyncio.sleep(0.01)
    assert (await asyncio.wait_for(collect(client.submit(submit("b"))), TIMEOUT_S))[-1].finish_reason == "length"


@shared_loop
async def test_sockets_lie_in_a_private_directory(client, shared_dir):
    (directory,) = shared_dir.iterdir()
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in directory.iterdir()} == {"commands", "events"}


@shared_loop
async def test_killed_engine_ends_sequences_and_is_restarted(client):
    # So many that the last one waits: however late this process is told of the first token, that one is not over.
    streams = [client.submit(submit(f"a{n}", max_new_tokens=200)) for n in range(32)]
    await anext(streams[0])
    old_pid = client.pid
    os.kill(old_pid, signal.SIGSTOP)
    os.kill(old_pid, signal.SIGKILL)
    last = (await asyncio.wait_for(collect(streams[-1]), TIMEOUT_S))[-1]
    assert (last.finish_reason, last.error_code) == ("error", "engine_unavailable")
    with pytest.raises(EngineError) as caught:
        client.submit(submit("early"))
    assert caught.value.retry_after_s is not None
    async with asyncio.timeout(TIMEOUT_S):
        while not client.is_alive:
            await asyncio.sleep(0.02)
    assert client.pid != old_pid
    assert (await asyncio.wait_for(collect(client.submit(submit("b"))), TIMEOUT_S))[-1].finish_reason == "length"


class Socket:
    """The client's command socket, counted; full when told."""

    def __init__(self, inner):
        self.inner = inner
        self.sent = []
        self.is_full = False

    def send(self, message, flags):
        if self.is_full:
            raise zmq.Again
        self.sent.append(message)
        self.inner.send(message, flags)


@shared_loop
async def test_command_that_cannot_be_queued_is_overload_and_leaves_nothing(client, monkeypatch):
    socket = Socket(client._commands)
    monkeypatch.setattr(client, "_commands", socket)
    socket.is_full = True
    with pytest.raises(OverloadedError) as caught:
        client.submit(submit("a"))
    assert caught.value.retry_after_s is not None
    assert client.in_flight_count == 0
    socket.is_full = False
    assert (await asyncio.wait_for(collect(client.submit(submit("a"))), TIMEOUT_S))[-1].finish_reason == "length"


@shared_loop
async def test_cancel_again_and_again_sends_one_command(client, monkeypatch):
    socket = Socket(client._commands)
    monkeypatch.setattr(client, "_commands", socket)
    stream = client.submit(submit("a", max_new_tokens=200))
    for _ in range(5):
        client.cancel("a")
    await stream.aclose()
    assert len(socket.sent) == 2
    async with asyncio.timeout(TIMEOUT_S):
        while client.in_flight_count:
            await asyncio.sleep(0.01)


async def test_silent_engine_is_replaced(world, tmp_path, short_dir):
    client = EngineClient(settings_for(world, tmp_path, stall_timeout_s=1.5), short_dir)
    await client.start()
    try:
        old_pid = client.pid
        os.kill(old_pid, signal.SIGSTOP)
        async with asyncio.timeout(TIMEOUT_S):
            while client.pid in (old_pid, None) or not client.is_alive:
                await asyncio.sleep(0.02)
    finally:
        await client.close()


async def test_model_that_cannot_run_is_named_at_start(world, tmp_path, short_dir):
    settings = settings_for(world, tmp_path).model_copy(
        update={"model": settings_for(world, tmp_path).model.model_copy(update={"path": str(tmp_path / "none")})}
    )
    client = EngineClient(settings, short_dir)
    with pytest.raises(ModelLoadError) as caught:
        await client.start()
    assert caught.value.error_code == "model_not_found_on_disk"
    await client.close()


async def test_start_beyond_its_time_is_an_error(world, tmp_path, short_dir):
    client = EngineClient(settings_for(world, tmp_path, start_timeout_s=0.05), short_dir)
    with pytest.raises(EngineError, match="not ready after"):
        await client.start()
    await client.close()


async def test_more_sequences_than_the_limit_are_refused(world, tmp_path, short_dir):
    client = EngineClient(settings_for(world, tmp_path, queue_limit=1, max_sequences=1), short_dir)
    await client.start()
    try:
        streams = [client.submit(submit(f"s{i}", max_new_tokens=200)) for i in range(2)]
        with pytest.raises(OverloadedError):
            client.submit(submit("s2"))
        for stream in streams:
            await stream.aclose()
    finally:
        await client.close()


async def test_close_drains_what_is_in_flight(world, tmp_path, short_dir):
    client = EngineClient(settings_for(world, tmp_path), short_dir)
    await client.start()
    stream = client.submit(submit("a", max_new_tokens=20))
    await client.close(drain_s=TIMEOUT_S)
    events = await collect(stream)
    assert sum(len(event.tokens) for event in events) == 20


async def test_close_without_drain_cancels(world, tmp_path, short_dir):
    client = EngineClient(settings_for(world, tmp_path), short_dir)
    await client.start()
    stream = client.submit(submit("a", max_new_tokens=240))
    await anext(stream)
    await client.close()
    assert (await collect(stream))[-1].finish_reason in ("cancelled", "length")
    assert list(short_dir.iterdir()) == []


@shared_loop
async def test_stats_arrive_while_idle(client):
    async with asyncio.timeout(TIMEOUT_S):
        while client.stats.kv_blocks_total == 0:
            await asyncio.sleep(0.02)


def test_engine_process_ends_with_its_parent(world, tmp_path, short_dir):
    """A parent that is killed has no chance to clean up; the child must notice by itself."""
    script = (
        "import asyncio, sys, os\n"
        "from pathlib import Path\n"
        "from node.config import load_settings\n"
        "from node.engine.client import EngineClient\n"
        "async def main():\n"
        "    overrides = {'data_dir': sys.argv[1], 'model.path': sys.argv[2], 'model.dtype': 'float32', 'engine.threads': 1}\n"
        "    client = EngineClient(load_settings(None, overrides), Path(sys.argv[3]))\n"
        "    await client.start()\n"
        "    print(client.pid, flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path), str(world.model_dir), str(short_dir)], stdout=subprocess.PIPE, text=True
    )
    child_pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    descriptor = None
    try:
        descriptor = os.pidfd_open(child_pid)
    except ProcessLookupError:
        return
    assert select.select([descriptor], [], [], TIMEOUT_S)[0]
    os.close(descriptor)


async def test_start_removes_what_killed_processes_left_and_nothing_else(world, tmp_path, short_dir):
    stray, living = short_dir / "engine-999999999-1", short_dir / f"engine-{os.getppid()}-1"
    for directory in (stray, living):
        directory.mkdir()
    client = EngineClient(settings_for(world, tmp_path), short_dir)
    await client.start()
    await client.close()
    assert list(short_dir.iterdir()) == [living]
