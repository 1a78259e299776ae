"""The programs around a node under load, each a process of its own, so that none delays another's clock.

hot    eight clients, one adapter each, stream one completion after another and note when events arrive;
cold   asks for many adapters that the node does not know, all at once;
tenant clients with one API key, each of which streams a completion, thinks, and streams another;
hub    speaks enough of the hub's protocol, slowly and with faults, until it is told to be calm;
sleeper sleeps, and notes when the machine woke it late.

Each reads one JSON object a line on standard input and answers with one a line on standard output. `Helper` is the other end.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import IO, Any, cast

import uvloop
from aiohttp import web

PROMPT_TOKENS = 16
SLEEP_S, LATE_S = 0.01, 0.001
_EVENT, _TOKEN = b"data: {", b'"finish_reason":null'  # what ends an answer is an event, and no token
_END = b"0\r\n\r\n"
Answer = Callable[[dict[str, Any]], Coroutine[Any, Any, Any]]


class Helper:
    """One of the programs, started on some cores. `ask` sends a line and waits for the answer."""

    def __init__(self, cores: str, *arguments: str) -> None:
        command = [sys.executable, __file__, *arguments]
        self._process = subprocess.Popen(
            ["taskset", "-c", cores, *command] if cores else command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._input, self._output = cast(IO[bytes], self._process.stdin), cast(IO[bytes], self._process.stdout)

    def tell(self, **values: Any) -> None:
        """Send a line; `hear` reads its answer."""
        self._input.write(json.dumps(values).encode() + b"\n")
        self._input.flush()

    def hear(self) -> Any:
        """Wait for the answer to the oldest line that has none."""
        line = self._output.readline()
        if not line:
            raise SystemExit("a helper process died; its own lines say why")
        return json.loads(line)

    def ask(self, **values: Any) -> Any:
        """Send a line and wait for its answer."""
        self.tell(**values)
        return self.hear()

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.communicate()


def serve(answer: Answer) -> None:
    """Answer lines until the input ends; several may be under way, so answers to a slow line come later."""

    async def run() -> None:
        loop, lines = asyncio.get_running_loop(), asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
        gc.freeze()
        gc.disable()
        while line := await lines.readline():
            found = await answer(json.loads(line))
            gc.collect()
            print(json.dumps(found), flush=True)

    uvloop.run(run())


# ---- hot


class HotClient(asyncio.Protocol):
    """One connection that streams one answer after another. Events are timed where their bytes arrive."""

    def __init__(self, host: str, model: str, key: str = "") -> None:
        self._host = host
        self._model = model
        self._key = key
        self._rest = b""
        self._event_s: list[float] = []
        self._end_s = 0.0
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail("the node closed the connection")

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        data = self._rest + data
        end = data.rfind(b"\n") + 1
        data, self._rest = data[:end], data[end:]
        tokens = data.count(_TOKEN)
        self._event_s += [now_s] * tokens
        if data.count(_EVENT) > tokens:
            self._end_s = now_s
        if b'data: {"error"' in data or (data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 200")):
            self._fail(data.decode()[:300])
        if (data.endswith(b"\r\n" + _END) or data == _END) and self._done is not None and not self._done.done():
            self._done.set_result(None)

    async def ask(self, tokens: int, seed: int, prompt_tokens: int = PROMPT_TOKENS) -> tuple[float, list[float], float]:
        """When the request was sent, when its tokens arrived, and when the event that ended the answer did: seconds of one clock.

        A last token that shows no text has no event: it came with the end."""
        body = {
            "model": self._model,
            "prompt": [3 + (seed + number) % 500 for number in range(prompt_tokens)],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
        }
        self._done = asyncio.get_running_loop().create_future()
        self._event_s = []
        started_s = time.perf_counter()
        self._transport.write(http_post(self._host, body, self._key))
        await self._done
        return started_s, self._event_s or [self._end_s], self._end_s

    def hang_up(self) -> None:
        """Leave without a word."""
        self._transport.abort()

    def _fail(self, what: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(RuntimeError(f"a hot request failed: {what}"))


async def connected(host: str, model: str, key: str = "") -> HotClient:
    """A client with its connection."""
    address, _, port = host.rpartition(":")
    _, client = await asyncio.get_running_loop().create_connection(lambda: HotClient(host, model, key), address, int(port))
    return client


def http_post(host: str, body: dict[str, Any], key: str = "") -> bytes:
    content = json.dumps(body).encode()
    lines = (
        "POST /v1/completions HTTP/1.1",
        f"Host: {host}",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
    )
    keys = (f"Authorization: Bearer {key}",) if key else ()
    return "\r\n".join((*lines, *keys, "", "")).encode() + content


def hot(host: str, count: int) -> None:
    """{"seconds", "tokens", "seed"} -> {"answers"}: `count` clients stream until the time is over, answers of half to one and a
    half times as many tokens; of each when it was asked for, when its tokens came and when its end."""
    clients: list[HotClient] = []

    async def answer(line: dict[str, Any]) -> dict[str, Any]:
        for number in range(len(clients), count):
            clients.append(await connected(host, f"hot-{number}"))
        end_s = time.perf_counter() + line["seconds"]
        found: list[tuple[float, list[float], float]] = []

        async def run(client: HotClient, seed: int) -> None:
            draw = random.Random(seed)  # noqa: S311 - answers of unequal length, or the clients would ask in lock-step
            while time.perf_counter() < end_s:
                tokens = draw.randint(line["tokens"] // 2, line["tokens"] * 3 // 2)
                found.append(await client.ask(tokens, seed))
                seed += 1

        await asyncio.gather(*(run(client, line["seed"] + 1000 * number) for number, client in enumerate(clients)))
        return {"answers": found}

    serve(answer)


# ---- tenant


def tenant(host: str, key: str, model: str, count: int) -> None:
    """{"seconds", "warm_up_s", "tokens", "prompt", "think_s", "seed"} -> {"ttft_s"} of requests sent after the warm-up. With
    "hangs_up" whoever still waits at the end is gone at once."""
    clients: list[HotClient] = []

    async def run(client: HotClient, line: dict[str, Any], draw: random.Random) -> list[tuple[float, float]]:
        found: list[tuple[float, float]] = []
        begun_s = time.perf_counter()
        await asyncio.sleep(draw.uniform(0, 2 * line["think_s"]))
        while time.perf_counter() < begun_s + line["seconds"]:
            length = draw.randint(*line["prompt"])
            started_s, event_s, _ = await client.ask(line["tokens"], draw.randrange(1 << 30), length)
            if started_s > begun_s + line["warm_up_s"]:
                found.append((started_s, event_s[0] - started_s))
            await asyncio.sleep(draw.uniform(0, 2 * line["think_s"]))
        return found

    async def answer(line: dict[str, Any]) -> dict[str, Any]:
        while len(clients) < count:
            clients.append(await connected(host, model, key))
        draws = [random.Random(line["seed"] + number) for number in range(count)]  # noqa: S311 - a workload
        runs = [asyncio.create_task(run(client, line, draw)) for client, draw in zip(clients, draws, strict=True)]
        done, late = await asyncio.wait(runs, timeout=line["seconds"] if line.get("hangs_up") else None)
        if late:
            for client in clients:
                client.hang_up()
            clients.clear()
            await asyncio.gather(*late, return_exceptions=True)
        return {"ttft_s": [seconds for own in done for _, seconds in own.result()]}

    serve(answer)


# ---- cold


def cold(host: str) -> None:
    """{"names", "after_s"} -> when the burst began; {"wait_s"} -> the statuses, "under way" for those that hang up after
    `wait_s`, and when each answer ended."""
    flood: list[asyncio.Task[tuple[int, float, float]]] = []
    begun: list[float] = []

    async def one(name: str) -> tuple[int, float, float]:
        address, _, port = host.rpartition(":")
        begun_s = time.perf_counter()
        reader, writer = await asyncio.open_connection(address, int(port))
        try:
            writer.write(http_post(host, {"model": name, "prompt": [5, 6, 7], "max_tokens": 1}))
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            await reader.readexactly(int(length[1]) if length else 0)
            return int(head[9:12]), begun_s, time.perf_counter()
        finally:
            writer.close()

    async def answer(line: dict[str, Any]) -> dict[str, Any]:
        if "names" in line:
            await asyncio.sleep(line["after_s"])
            begun[:] = [time.perf_counter()]
            flood.extend(asyncio.create_task(one(name)) for name in line["names"])
            await asyncio.sleep(0)
            return {"begun_s": begun[0]}
        done, pending = await asyncio.wait(flood, timeout=line["wait_s"])
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        flood.clear()
        statuses: dict[str, int] = {"under way": len(pending)} if pending else {}
        answers = [task.result() for task in done]
        for status, _, _ in answers:
            statuses[str(status)] = statuses.get(str(status), 0) + 1
        refused_s = max((ended_s - asked_s for status, asked_s, ended_s in answers if status == 429), default=None)
        return {
            "statuses": statuses,
            "refused_ms": None if refused_s is None else round(1000 * refused_s, 1),
            "begun_s": begun[0],
            "ended": [(status, ended_s) for status, _, ended_s in answers],
        }

    serve(answer)


# ---- hub


def hub(latency_s: float, failure: float, source: Path, slow: str) -> None:
    """{"start"} -> its URL. {"calm": true} answers 404 to whoever waits, and at once from then on; {"calm": false} ends that.
    {"quick": true} leaves latency and faults out until the next line. `slow`: whether all "answers" are late and may fail, or
    "lookups" alone.

    Every repository has the weights of `source` and an alpha of its own, so that all are different adapters.
    """
    draw = random.Random(11)  # noqa: S311 - faults to repeat, not secrets
    weights = (source / "adapter_model.safetensors").read_bytes()
    config = json.loads((source / "adapter_config.json").read_text())
    calm, quick = asyncio.Event(), asyncio.Event()
    counts = {"asked": 0, "failed": 0, "weights": 0}

    def files_of(name: str) -> dict[str, bytes]:
        alpha = 1 + zlib.crc32(name.encode()) % 100_000 / 100_000
        return {"adapter_config.json": json.dumps({**config, "lora_alpha": alpha}).encode(), "adapter_model.safetensors": weights}

    async def respond(request: web.Request) -> web.StreamResponse:
        counts["asked"] += 1
        parts = request.path.strip("/").split("/")
        is_slow = not quick.is_set() and (slow == "answers" or parts[0] == "api")
        try:
            await asyncio.wait_for(calm.wait(), latency_s if is_slow else 0)
            return web.Response(status=404)
        except TimeoutError:
            pass
        if is_slow and draw.random() < failure:
            counts["failed"] += 1
            return web.Response(status=503)
        if parts[0] == "api":
            found = files_of("/".join(parts[2:4]))
            siblings = [{"rfilename": name, "size": len(content)} for name, content in found.items()]
            info = {"id": "/".join(parts[2:4]), "sha": "1" * 40, "private": False, "gated": False, "siblings": siblings}
            return web.json_response(info)
        content = files_of("/".join(parts[:2]))[parts[-1]]
        counts["weights"] += request.method == "GET" and content is weights
        return web.Response(body=content, headers={"ETag": f'"{zlib.crc32(content):08x}"', "X-Repo-Commit": "1" * 40})

    async def answer(line: dict[str, Any]) -> dict[str, Any]:
        if "start" in line:
            application = web.Application()
            application.router.add_route("*", "/{path:.*}", respond)
            runner = web.AppRunner(application, access_log=None)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            return {"url": f"http://127.0.0.1:{runner.addresses[0][1]}"}
        for event, name in ((calm, "calm"), (quick, "quick")):
            if line.get(name):
                event.set()
            else:
                event.clear()
        return counts

    serve(answer)


# ---- sleeper


def sleeper() -> None:
    """{} -> {"late"}: from when to when it slept over a millisecond too long, since the last line. It waits for nobody, so what
    delays it is the machine."""
    late: list[tuple[float, float]] = []

    def sleep() -> None:
        while True:
            begun_s = time.perf_counter()
            time.sleep(SLEEP_S)
            ended_s = time.perf_counter()
            if ended_s - begun_s > SLEEP_S + LATE_S:
                late.append((begun_s, ended_s))

    async def answer(_: dict[str, Any]) -> dict[str, Any]:
        found = late.copy()
        del late[: len(found)]
        return {"late": found}

    threading.Thread(target=sleep, daemon=True).start()
    serve(answer)


if __name__ == "__main__":
    os.setpgid(0, 0)
    if sys.argv[1] == "hot":
        hot(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1] == "tenant":
        tenant(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]))
    elif sys.argv[1] == "cold":
        cold(sys.argv[2])
    elif sys.argv[1] == "sleeper":
        sleeper()
    else:
        hub(float(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
