"""The fetching process for real: started, asked, killed, started again, stopped."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from attribution import canonical
from attribution.manifest import Manifest
from node.adapters.fetching import client
from node.adapters.fetching.client import FetchClient
from node.config import AdapterSettings, Settings, StoreSettings
from node.errors import AdapterForbiddenError, AdapterInvalidError, AdapterUnavailableError, ConfigError
from tests.adapters.replies import reply

WEIGHTS = "adapter_model.safetensors"


class Source:
    """A web server of one adapter. While `held`, weights are begun and not ended; `asked` counts what came for them."""

    def __init__(self, directory):
        self.directory = directory
        self.files = {}
        self.publish("adapter")
        self.held = threading.Event()
        self.asked = threading.Semaphore(0)
        source = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                source.answer(self)

            def log_message(self, *_):
                """Nothing on the terminal."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.root = f"http://localhost:{self.server.server_port}/team"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def publish(self, name):
        self.files |= {f"/team/{name}/{path.name}": path.read_bytes() for path in self.directory.iterdir()}

    def answer(self, handler):
        body, wanted = self.files.get(handler.path), handler.headers.get("Range")
        if body is None:
            return reply(handler, 404, b"")
        first, _, last = (wanted or "bytes=0-").removeprefix("bytes=").partition("-")
        part = body[int(first) : int(last) + 1 if last else len(body)]
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
        if wanted:
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(body)}"
        if handler.path.endswith(WEIGHTS) and not last:
            self.asked.release()
            if self.held.is_set():
                handler.send_response(200)
                for name, value in {**headers, "Content-Length": str(len(part))}.items():
                    handler.send_header(name, value)
                handler.end_headers()
                handler.wfile.write(part[: len(part) // 2])
                handler.wfile.flush()
                while self.held.is_set():
                    threading.Event().wait(0.02)
                handler.close_connection = True
                return None
        return reply(handler, 206 if wanted else 200, part, headers)


@pytest.fixture
def source(writer, tmp_path):
    served = Source(type(writer)(tmp_path / "far").write("adapter"))
    yield served
    served.held.clear()
    served.server.shutdown()
    served.server.server_close()


@pytest.fixture
async def start(tmp_path, writer, linears, base_id):
    made = []

    async def begin(**adapters):
        chosen = AdapterSettings(directory=writer.root, **({"allow_hub": False, "max_rank": 64} | adapters))
        made.append(FetchClient(Settings(data_dir=tmp_path / "data", adapters=chosen), linears, base_id))
        await made[-1].start()
        return made[-1]

    yield begin
    for fetcher in made:
        await fetcher.close()


def store(source):
    return {"stores": (StoreSettings(url=source.root, allow_private=True),)}


async def asked(source):
    assert await asyncio.to_thread(source.asked.acquire, timeout=30)


async def test_resolve_and_verify_in_the_process_say_the_same_of_the_same_files(start, source, writer):
    fetcher = await start(**store(source))

    fetched = await fetcher.resolve("store", f"{source.root}/adapter", None)
    verified = await fetcher.verify(writer.write("adapter"))

    assert fetched.verified.adapter_id == verified.adapter_id
    assert fetched.verified.coverage == verified.coverage
    assert (fetched.is_private, len(fetched.revision), fetched.verified.directory.name) == (False, 40, fetched.revision)


async def test_manifest_comes_through_whole(start, tmp_path, base_id, writer):
    fetcher = await start()
    directory = writer.write("adapter")
    adapter_id = (await fetcher.verify(directory)).adapter_id
    address = "0x" + "00" * 19 + "01"
    trainer = {"address": address, "name": "T"}
    fields = {"schema": "openlora.manifest/1", "adapter_id": adapter_id, "name": "n", "trainer": trainer, "base_id": base_id}
    fields |= {"datanets": [{"id": "d", "name": "D", "corpus_root": "c" * 64, "license": "CC0-1.0"}]}
    fields |= {"contributors": [{"address": address, "name": "C", "datanet": "d", "share_ppm": 1_000_000}]}
    (directory / "manifest.json").write_bytes(
        canonical.dumps({**fields, "training": {"steps": 3, "of": "x"}, "license": "CC0-1.0"})
    )

    found = await fetcher.verify(directory)

    assert found.manifest == Manifest.parse((directory / "manifest.json").read_bytes())
    assert found.manifest_hash == found.manifest.manifest_hash()


async def test_errors_of_the_process_keep_their_kind_code_and_words(start, source, writer):
    fetcher = await start(**store(source))

    with pytest.raises(AdapterInvalidError) as invalid:
        await fetcher.verify(writer.write("bad", r=0))
    with pytest.raises(AdapterForbiddenError, match=r"adapters\.stores"):
        await fetcher.resolve("store", "s3://other/adapter", None)

    assert invalid.value.error_code == "adapter_rank_unsupported"


async def test_settings_that_make_no_sense_refuse_the_start(start):
    with pytest.raises(ConfigError, match=r"adapters\.stores"):
        await start(stores=(StoreSettings(url="s3://bucket", options={"regoin": "x"}),))


async def test_killed_process_ends_its_jobs_and_the_next_one_works(start, source):
    fetcher = await start(**store(source))
    source.held.set()
    job = asyncio.create_task(fetcher.resolve("store", f"{source.root}/adapter", None))
    await asked(source)
    before = fetcher.pid
    assert [item.name for item in await fetcher.progress()] == [f"{source.root}/adapter"]

    os.kill(before, signal.SIGKILL)
    with pytest.raises(AdapterUnavailableError) as caught:
        await job
    source.held.clear()
    with pytest.raises(AdapterUnavailableError):
        await fetcher.resolve("store", f"{source.root}/adapter", None)

    async with asyncio.timeout(60):
        while fetcher.pid in (before, None) or not fetcher.is_alive:
            await asyncio.sleep(0.02)
    found = await fetcher.resolve("store", f"{source.root}/adapter", None)

    assert (caught.value.error_code, caught.value.is_retryable) == ("source_unavailable", True)
    assert found.verified.rank == 2
    assert await fetcher.progress() == ()


async def test_local_adapters_are_verified_while_every_fetch_thread_waits(start, source, writer):
    fetcher = await start(fetch_workers=1, **store(source))
    source.held.set()
    job = asyncio.create_task(fetcher.resolve("store", f"{source.root}/adapter", None))
    await asked(source)

    assert (await fetcher.verify(writer.write("here"))).rank == 2

    assert not job.done()
    source.held.clear()
    await asyncio.gather(job, return_exceptions=True)


async def test_close_ends_the_process_while_a_source_is_silent(start, source):
    fetcher = await start(**store(source))
    source.held.set()
    job = asyncio.create_task(fetcher.resolve("store", f"{source.root}/adapter", None))
    await asked(source)
    pid = fetcher.pid

    await fetcher.close()

    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(AdapterUnavailableError):
        await job
    with pytest.raises(AdapterUnavailableError):
        await fetcher.verify(Path("x"))


async def test_jobs_beyond_the_limit_are_refused(start, source, writer, monkeypatch):
    monkeypatch.setattr(client, "MAX_JOBS", 0)
    fetcher = await start()
    with pytest.raises(AdapterUnavailableError) as caught:
        await fetcher.verify(writer.write("a"))
    assert caught.value.error_code == "adapter_queue_full"


async def test_process_that_dies_at_its_start_is_a_clear_error(start, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ConfigError, match="did not start"):
        await start()


async def test_token_is_in_no_command_line_and_no_log(start, source, caplog):
    caplog.set_level(logging.DEBUG)
    fetcher = await start(**store(source))
    token = "hf_" + "s" * 30

    await fetcher.resolve("store", f"{source.root}/adapter", token)
    command = Path(f"/proc/{fetcher.pid}/cmdline").read_text() + Path(f"/proc/{fetcher.pid}/environ").read_text()
    await fetcher.close()

    assert token not in command
    assert token not in caplog.text


async def test_process_ends_with_its_parent(tmp_path, writer):
    script = (
        "import asyncio, os, sys\n"
        "from pathlib import Path\n"
        "from node.adapters.fetching.client import FetchClient\n"
        "from node.config import AdapterSettings, Settings\n"
        "async def main():\n"
        "    settings = Settings(data_dir=Path(sys.argv[1]), adapters=AdapterSettings(directory=Path(sys.argv[2])))\n"
        "    fetcher = FetchClient(settings, (), 'ab' * 32)\n"
        "    await fetcher.start()\n"
        "    print(fetcher.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", script, str(tmp_path), str(writer.root)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    async with asyncio.timeout(20):
        while (
            Path(f"/proc/{done.stdout.strip()}").exists()
            and b"fetching" in Path(f"/proc/{done.stdout.strip()}/cmdline").read_bytes()
        ):
            await asyncio.sleep(0.05)


def test_importing_the_client_brings_no_source_library():
    script = "import sys, node.app; print([name for name in ('huggingface_hub', 'obstore', 'torch') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


async def test_known_names_are_asked_about_while_every_fetch_thread_waits(start, source):
    fetcher = await start(fetch_workers=1, **store(source))
    name = f"{source.root}/adapter"
    before = await fetcher.resolve("store", name, None)
    source.publish("other")
    source.held.set()
    job = asyncio.create_task(fetcher.resolve("store", f"{source.root}/other", None))
    await asked(source)
    await asked(source)

    assert await fetcher.resolve("store", name, None, is_known=True) == before

    assert not job.done()
    source.held.clear()
    await asyncio.gather(job, return_exceptions=True)
