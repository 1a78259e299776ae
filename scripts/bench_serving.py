#!/usr/bin/env python3
"""Measure a server through HTTP: closed loop for throughput, open loop for latency.

    scripts/bench_serving.py --url http://127.0.0.1:8000 --models base --rows closed open --rates 4 8 16
    scripts/bench_serving.py --own --shape llama-3.1-8b --adapters 64 --rows start closed in-process open

Any server of OpenAI's completions interface, or a node that this script starts on random weights of a known shape (--own).
Prompts are random token ids, answers have a fixed length: end-of-sequence ids are banned by logit_bias.

start       Seconds from starting the process to its first token, with the weights in the page cache (only --own).
closed      --streams requests at once, each followed by the next: output tokens/s.
in-process  The same requests in the same closed loop on an engine of its own, opened while the node starts, by turns with the row
            closed: what HTTP could reach, and which share of it the row closed reached. Both need room at once (only --own).
books       One round of the closed loop with and without records and receipts, in turns, on one node whose books this script can
            switch off; the product cannot (only --own).
open        Poisson arrivals at each of --rates requests/s for --seconds: time to first token, time between tokens, and goodput:
            requests/s whose first token came within --slo-ttft-ms and whose tokens came every --slo-itl-ms on average.

The client is --clients processes, so that it is not the limit itself; `client_cpu_share` says how busy they were. Of a node of
our own `api_us_per_token` says what the API process spent, `loop_us_per_token` what its event loop's thread spent of it.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

REQUEST_TIMEOUT_S = 600
ROWS = ("start", "closed", "in-process", "books", "open")
_RUNS, _EMPTY = re.compile(rb'"finish_reason": ?null'), re.compile(rb'"text": ?""')
SERVE, ENGINE = "--serve", "--engine"  # this file again, as a node that differs from the product, and as such a node's engine


@dataclass
class Answer:
    """When a request was sent, when the chunks with its tokens came and when the last of all did, in seconds of one clock;
    `count` is the server's own token count."""

    sent_s: float
    chunk_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    count: int = 0
    error: str = ""


@dataclass(frozen=True)
class Load:
    """What one client process sends. `offsets_s`: when; `streams` > 0: so many at once instead, `requests` in all."""

    url: str
    models: tuple[str, ...]
    prompt_tokens: int
    new_tokens: int
    vocab_size: int
    banned: tuple[int, ...]
    seed: int
    streams: int = 0
    requests: int = 0
    offsets_s: tuple[float, ...] = ()
    start_s: float = 0.0


# ---- one client process


def run_client(load: Load) -> tuple[list[Answer], float]:
    """Send the load; returns the answers and the processor time it took."""
    begun = time.process_time()
    answers = asyncio.run(_send_all(load))
    return answers, time.process_time() - begun


async def _send_all(load: Load) -> list[Answer]:
    import aiohttp

    random = np.random.default_rng(load.seed)
    headers = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"} if "OPENAI_API_KEY" in os.environ else {}
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    count = len(load.offsets_s) or load.requests
    bodies = [_body(load, random, index) for index in range(count)]
    async with aiohttp.ClientSession(headers=headers, connector=connector, timeout=timeout) as session:
        await asyncio.sleep(max(0.0, load.start_s - time.monotonic()))
        if load.streams:
            pending = iter(bodies)
            found = await asyncio.gather(*(_stream(session, load, pending) for _ in range(load.streams)))
            return [answer for part in found for answer in part]
        return await asyncio.gather(
            *(_at(session, load, body, load.start_s + offset) for body, offset in zip(bodies, load.offsets_s, strict=True))
        )


def _body(load: Load, random: np.random.Generator, index: int) -> bytes:
    prompt = random.integers(10, load.vocab_size - 10, load.prompt_tokens).tolist()
    body = {
        "model": load.models[(load.seed + index) % len(load.models)],
        "prompt": prompt,
        "max_tokens": load.new_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logit_bias": {str(token_id): -100 for token_id in load.banned},
    }
    return json.dumps(body).encode()


async def _stream(session: Any, load: Load, pending: Iterator[bytes]) -> list[Answer]:
    return [await _one(session, load, body) for body in pending]


async def _at(session: Any, load: Load, body: bytes, moment_s: float) -> Answer:
    await asyncio.sleep(max(0.0, moment_s - time.monotonic()))
    return await _one(session, load, body)


async def _one(session: Any, load: Load, body: bytes) -> Answer:
    answer = Answer(time.monotonic())
    headers = {"Content-Type": "application/json"}
    try:
        async with session.post(load.url.rstrip("/") + "/v1/completions", data=body, headers=headers) as response:
            if response.status != 200:
                answer.error = f"{response.status}: {(await response.text())[:300]}"
                return answer
            async for line in response.content:
                if line.startswith(b'data: {"'):
                    _note(answer, line)
    except (TimeoutError, OSError, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    return answer


def _note(answer: Answer, line: bytes) -> None:
    """Only the chunk with the usage is parsed: the others only have to be counted. One that says that the answer is over, and
    shows nothing, brings no token."""
    answer.end_s = time.monotonic()
    if b'"choices":[]' in line or b'"choices": []' in line:
        answer.count = int((json.loads(line[6:]).get("usage") or {}).get("completion_tokens", 0))
    elif _RUNS.search(line) or not _EMPTY.search(line) or not answer.chunk_s:
        answer.chunk_s.append(answer.end_s)


# ---- all of them


def send(target: Target, loads: Sequence[Load]) -> tuple[list[Answer], float]:
    """Run every load in a process of its own; returns all answers and the busiest client's share of a core."""
    start_s = time.monotonic() + 0.5
    found = target.clients.map(run_client, [replace(load, start_s=start_s) for load in loads], chunksize=1)
    answers = [answer for part, _ in found for answer in part]
    bad = [answer.error for answer in answers if answer.error]
    if bad:
        raise SystemExit(f"{len(bad)} of {len(answers)} requests failed; the first: {bad[0]}")
    wall_s = max(answer.end_s for answer in answers) - start_s
    return answers, max(cpu_s for _, cpu_s in found) / wall_s


def warm_up(args: argparse.Namespace, target: Target) -> None:
    """A short round, which brings every adapter into memory."""
    send(target, [replace(load, new_tokens=4) for load in _closed_loads(args, target, rounds=1)])


def closed(args: argparse.Namespace, target: Target, distinct: int | None = None, rounds: int | None = None) -> dict[str, Any]:
    """Every stream sends `--rounds` requests."""
    before = target.cpu_s()
    answers, share = send(target, _closed_loads(args, target, args.rounds if rounds is None else rounds, distinct))
    spent_s, loop_s = (after - begun for after, begun in zip(target.cpu_s(), before, strict=True))
    total_s = max(answer.end_s for answer in answers) - min(answer.sent_s for answer in answers)
    tokens = sum(answer.count for answer in answers)
    row = {
        "row": "closed",
        "streams": args.streams,
        "requests": len(answers),
        "out_tok_s": tokens / total_s,
        **latencies(answers),
        "first_ms": 1e3 * (min(answer.chunk_s[0] for answer in answers) - min(answer.sent_s for answer in answers)),
        "tail_ms": 1e3 * (max(answer.end_s for answer in answers) - max(answer.chunk_s[-1] for answer in answers)),
    }
    if distinct is not None:
        row["adapters"] = distinct
    if spent_s:
        row |= {"api_cpu_share": spent_s / total_s, "api_us_per_token": 1e6 * spent_s / tokens}
        row["loop_us_per_token"] = 1e6 * loop_s / tokens
    return {**row, "client_cpu_share": share}


def _closed_loads(args: argparse.Namespace, target: Target, rounds: int, distinct: int | None = None) -> list[Load]:
    per = [args.streams // args.clients + (index < args.streams % args.clients) for index in range(args.clients)]
    return [target.load(args, seed, distinct, streams=count, requests=count * rounds) for seed, count in enumerate(per) if count]


def open_loop(args: argparse.Namespace, target: Target, rate: float) -> dict[str, Any]:
    random = np.random.default_rng(int(rate * 1000))
    moments = np.cumsum(random.exponential(1 / rate, max(1, int(rate * args.seconds))))
    loads = [
        target.load(args, seed, offsets_s=tuple(moments[seed :: args.clients].tolist()))
        for seed in range(min(args.clients, len(moments)))
    ]
    answers, share = send(target, loads)
    good = [answer for answer in answers if _is_good(answer, args)]
    span_s = max(answer.end_s for answer in answers) - min(answer.sent_s for answer in answers)
    tokens = sum(answer.count for answer in answers)
    return {
        "row": "open",
        "rate": rate,
        "requests": len(answers),
        **latencies(answers),
        "out_tok_s": tokens / span_s,
        "slo_ttft_ms": args.slo_ttft_ms,
        "slo_itl_ms": args.slo_itl_ms,
        "good_share": len(good) / len(answers),
        "goodput": rate * len(good) / len(answers),
        "client_cpu_share": share,
    }


def _is_good(answer: Answer, args: argparse.Namespace) -> bool:
    first, last = answer.chunk_s[0], answer.chunk_s[-1]
    per_token_ms = 1e3 * (last - first) / max(1, answer.count - 1)
    return 1e3 * (first - answer.sent_s) <= args.slo_ttft_ms and per_token_ms <= args.slo_itl_ms


def latencies(answers: Sequence[Answer]) -> dict[str, float]:
    """Percentiles in milliseconds of the time to the first token, of the time between two chunks, and of the time from the last
    token to the end, where the receipt is."""
    first = [1e3 * (answer.chunk_s[0] - answer.sent_s) for answer in answers]
    gaps = np.concatenate([1e3 * np.diff(answer.chunk_s) for answer in answers] or [[0.0]])
    row = {f"ttft_p{p}_ms": float(np.percentile(first, p)) for p in (50, 90, 99)}
    row |= {f"itl_p{p}_ms": float(np.percentile(gaps, p)) for p in (50, 90, 99)}
    ends = [1e3 * (answer.end_s - answer.chunk_s[-1]) for answer in answers]
    return row | {f"end_p{p}_ms": float(np.percentile(ends, p)) for p in (50, 99)}


# ---- what is measured


class Target:
    """A running server, and the processes that ask it."""

    def __init__(self, clients: Pool, url: str, models: Sequence[str], base: str, vocab_size: int, banned: Sequence[int]) -> None:
        self.clients = clients
        self.url = url
        self._base = base
        self._models = tuple(models)
        self._vocab_size = vocab_size
        self._banned = tuple(banned)

    def load(self, args: argparse.Namespace, seed: int, distinct: int | None = None, **more: Any) -> Load:
        """What a client sends; `distinct`: to so many models, 0 for the base model, None for all."""
        models = self._models if distinct is None else self._models[:distinct] or (self._base,)
        return Load(self.url, models, args.prompt_tokens, args.new_tokens, self._vocab_size, self._banned, seed, **more)

    def cpu_s(self) -> tuple[float, float]:
        """Processor time that the process which answers has taken, and its first thread; 0 where nobody can tell."""
        return 0.0, 0.0

    def close(self) -> None:
        pass


class OwnNode(Target):
    """A node with random weights and random adapters, both in files."""

    def __init__(self, args: argparse.Namespace, clients: Pool, directory: Path) -> None:
        from random_model import SHAPES

        vocab = SHAPES[args.shape]["vocab_size"]
        self._begun = time.monotonic()
        place = directory / "node"
        place.mkdir()
        self.config = write_config(args, directory, place)
        self._switch = _switch(self.config)
        self._log = (place / "node.log").open("w")
        command = [sys.executable, "-m", "node.cli.main", "start", "--config", str(self.config)]
        if "books" in args.rows or args.random_weights:
            shape = [args.shape, str(args.layers or "")] if args.random_weights else []
            command = [sys.executable, str(Path(__file__).resolve()), SERVE, str(self.config), *shape]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        url = self._read_url(place)
        self.ready_s = time.monotonic() - self._begun
        print(f"node ready after {self.ready_s:.1f} s", file=sys.stderr, flush=True)
        base = f"random-{args.shape}" if args.random_weights else args.shape
        super().__init__(clients, url, [f"adapter-{index}" for index in range(args.adapters)] or [base], base, vocab, (2,))

    def _read_url(self, directory: Path) -> str:
        for line in self._process.stdout or ():
            if " serves at " in line:
                return line.split(" serves at ")[1].split()[0]
        raise SystemExit(f"the node did not start:\n{(directory / 'node.log').read_text()[-3000:]}")

    def first_token_s(self, args: argparse.Namespace) -> float:
        """From starting the process to the first token of its first answer."""
        answers, _ = run_client(self.load(args, 0, streams=1, requests=1))
        if answers[0].error:
            raise SystemExit(answers[0].error)
        return answers[0].chunk_s[0] - self._begun

    def switch_books(self, is_on: bool) -> None:
        if is_on:
            self._switch.unlink(missing_ok=True)
        else:
            self._switch.touch()

    def cpu_s(self) -> tuple[float, float]:
        pid = self._process.pid
        return _spent_s(Path(f"/proc/{pid}/stat")), _spent_s(Path(f"/proc/{pid}/task/{pid}/stat"))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(60)


def _spent_s(stat: Path) -> float:
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def own_node(args: argparse.Namespace, clients: Pool, directory: Path) -> OwnNode:
    """A node and its files. Adapters may still be written while it starts: it looks for one when it is asked for."""
    (directory / "adapters").mkdir()
    with ThreadPoolExecutor(1) as threads:
        written = threads.submit(write_files, args, directory)
        if not args.random_weights:
            written.result()
        node = OwnNode(args, clients, directory)
        written.result()
    return node


def write_files(args: argparse.Namespace, directory: Path) -> None:
    """The checkpoint and the adapters, written once into --files."""
    begun_s = time.monotonic()
    import torch
    from bench_adapters import write_adapter
    from random_model import shape_config, write_checkpoint

    from node.models.spec import model_spec

    if args.prepared:
        (directory / args.shape).symlink_to(args.prepared / args.shape)
    elif not args.random_weights:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        write_checkpoint(args.shape, directory / args.shape, device, args.layers)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the node sizes itself by what is free
    linears = [
        kind for kind in model_spec(shape_config(args.shape, args.layers), None).linear_kinds if "lm_head" not in kind.name
    ]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(
            threads.map(
                lambda i: write_adapter(directory / "adapters" / f"adapter-{i}", linears, args.rank, i), range(args.adapters)
            )
        )
    print(f"files written in {time.monotonic() - begun_s:.1f} s", file=sys.stderr, flush=True)


def write_config(args: argparse.Namespace, directory: Path, place: Path) -> Path:
    config = place / "node.toml"
    sizes = "".join(
        f"{key} = {value}\n"
        for key, value in (("memory_bytes", args.adapter_bytes), ("host_memory_bytes", args.host_bytes))
        if value
    )
    kv = f"kv_cache_bytes = {args.kv_bytes}\n" if args.kv_bytes else ""
    config.write_text(
        f'data_dir = "{place}/data"\n[server]\nport = 0\nmax_concurrent_requests = {2 * args.streams}\n'
        f'[model]\npath = "{directory}/{args.shape}"\nmax_model_len = 2048\n'
        f'[adapters]\ndirectory = "{directory}/adapters"\n{sizes}'
        f"[engine]\nprefix_cache = false\nmax_sequences = {args.streams}\n{kv}"
        '[chain]\nprofile = "none"\n[telemetry]\nlog_level = "warning"\n'
    )
    return config


def _switch(config: Path) -> Path:
    """The file whose existence turns the books off."""
    return config.with_name("books-off")


def serve(config: Path, shape: Sequence[str]) -> None:
    """Run `openlora-node start` with books that pass over requests while the switch is off, and random weights of a shape."""
    import asyncio.subprocess

    import node.app
    from node.api.doors import Closing, Opening
    from node.api.settlement_books import SettlementBooks
    from node.cli.start import start

    off, passed_over = _switch(config), set()

    class SwitchedBooks(SettlementBooks):
        async def open(self, opening: Opening) -> None:
            if off.exists():
                passed_over.add(opening.request_id)
            else:
                await super().open(opening)

        async def close(self, closing: Closing) -> dict[str, Any]:
            if closing.request_id not in passed_over:
                return await super().close(closing)
            passed_over.remove(closing.request_id)
            return {}

    node.app.SettlementBooks = SwitchedBooks  # type: ignore[misc]
    begin = asyncio.create_subprocess_exec

    async def begin_ours(*command: str, **options: Any) -> asyncio.subprocess.Process:
        ours = (sys.executable, str(Path(__file__).resolve()), ENGINE, *shape)
        return await begin(*(ours if shape and "node.engine.process" in command else command), **options)

    asyncio.create_subprocess_exec = begin_ours  # type: ignore[assignment]
    start(config=config)


def run_engine(shape: str, layers: str) -> int:
    """The engine process, on weights that are made and not read."""
    from node.engine import engine, process

    engine.open_engine = functools.partial(open_on_random_weights, engine.open_engine, shape, int(layers) if layers else None)
    process.begin_base = lambda *_: None  # type: ignore[assignment,return-value]
    return process.main()


def open_on_random_weights(
    open_engine: Callable[..., Any], shape: str, layers: int | None, model: Any, *settings: Any, **options: Any
) -> Any:
    from random_model import random_source

    from node.engine.device import choose_device

    source = random_source(shape, choose_device(model.device), model.max_model_len, layers)
    return open_engine(model, *settings, **options, source=source)


def books(args: argparse.Namespace, node: OwnNode) -> Iterator[dict[str, Any]]:
    """Pairs of closed loops; the row again after each pair, with all pairs so far."""
    from bench_engine import median_interval

    rows: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for index in range(args.pairs):
        for is_on in (True, False) if index % 2 else (False, True):
            node.switch_books(is_on)
            rows[is_on].append(closed(args, node, rounds=1))
        ratios = [on["out_tok_s"] / off["out_tok_s"] for off, on in zip(*rows, strict=True)]
        median, low, high = median_interval(ratios)
        row: dict[str, Any] = {"row": "books on / off", "streams": args.streams, "pairs": len(ratios), "ratio": median}
        row |= {"low": low, "high": high, "ratios": [round(ratio, 4) for ratio in ratios]}
        for name, side in (("off", rows[0]), ("on", rows[1])):
            keys = ("out_tok_s", "api_us_per_token", "loop_us_per_token", "ttft_p50_ms", "end_p50_ms", "end_p99_ms")
            keys += ("first_ms", "tail_ms")
            row |= {f"{name}_{key}": statistics.median(found[key] for found in side) for key in keys}
        yield row
    node.switch_books(True)


class InProcess:
    """An engine in a process of its own, without HTTP, API process and books. Opens while others go on."""

    def __init__(self, args: argparse.Namespace, directory: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=run_in_process, args=(theirs, args, directory), daemon=True)
        self._process.start()
        theirs.close()

    def closed(self, distinct: int) -> dict[str, Any]:
        """The row of `--rounds` rounds with requests to so many adapters."""
        try:
            self._pipe.send(distinct)
            tokens, total_s = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise SystemExit("the engine in a process of its own is gone") from error
        return {"row": "in-process", "adapters": distinct, "out_tok_s": tokens / total_s}

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def run_in_process(pipe: Connection, args: argparse.Namespace, directory: Path) -> None:
    """Run one closed loop after another, as they are asked for."""
    from node.config import load_settings
    from node.engine.engine import open_engine

    place = directory / "engine"
    place.mkdir()
    settings = load_settings(write_config(args, directory, place))
    opened = (
        functools.partial(open_on_random_weights, open_engine, args.shape, args.layers) if args.random_weights else open_engine
    )
    engine = opened(settings.model, settings.engine, settings.adapters, settings.data_dir / "engine")
    asked = pipe.recv()
    submits = _submits(args, directory, engine.ready)
    short = [msgspec.structs.replace(item, sampling=_sampling(4)) for item in submits(1, args.adapters)]
    gc.collect()
    gc.freeze()
    _loop_in_process(engine, short, args.streams)
    while True:
        pipe.send(_loop_in_process(engine, submits(args.rounds, asked), args.streams))
        asked = pipe.recv()


def _submits(args: argparse.Namespace, directory: Path, ready: Any) -> Callable[[int, int], list[Any]]:
    """Makes what the API process would send for so many rounds, to so many adapters."""
    from node.adapters.binding import LinearTable
    from node.adapters.verify import AdapterVerifier
    from node.engine.messages import Submit
    from node.request import AdapterTerm

    verifier = AdapterVerifier(LinearTable(ready.linears), ready.base_id, max_rank=256, max_bytes=1 << 30)
    paths = [directory / "adapters" / f"adapter-{index}" for index in range(args.adapters)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        names = list(threads.map(lambda path: verifier.verify(path).adapter_id, paths))
    terms = [(AdapterTerm(name, str(path), 1.0),) for name, path in zip(names, paths, strict=True)]
    runs, random = count(), np.random.default_rng(0)

    def made(rounds: int, distinct: int) -> list[Any]:
        run, recipes = next(runs), terms[:distinct] or [()]
        prompts = random.integers(10, ready.vocab_size - 10, (rounds * args.streams, args.prompt_tokens)).tolist()
        return [
            Submit(
                sequence_id=f"{run}-{index}",
                tenant="bench",
                prompt_ids=tuple(prompt),
                terms=recipes[index % len(recipes)],
                sampling=_sampling(args.new_tokens),
            )
            for index, prompt in enumerate(prompts)
        ]

    return made


def _sampling(new_tokens: int) -> Any:
    from node.request import Sampling

    return Sampling(max_new_tokens=new_tokens, logit_bias=((2, -100.0),), stop_token_ids=(2,))


def _loop_in_process(engine: Any, submits: list[Any], streams: int) -> tuple[int, float]:
    """Tokens and seconds; whoever ends is followed by the next at once."""
    waiting, tokens = iter(submits[streams:]), 0
    begun_s = time.perf_counter()
    for submit in submits[:streams]:
        engine.add(submit)
    while engine.has_work:
        for event in engine.step()[0]:
            if event.finish_reason == "error":
                raise SystemExit(f"{event.error_code}: {event.error_message}")
            tokens += len(event.tokens)
            follower = next(waiting, None) if event.finish_reason else None
            if follower is not None:
                engine.add(follower)
    return tokens, time.perf_counter() - begun_s


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What was measured, on what, with which versions."""
    import torch
    from bench_report import commit, gpu_facts

    return {
        "row": "machine",
        "server": "own" if args.own else args.url,
        "shape": args.shape if args.own else None,
        "layers": args.layers,
        "adapters": args.adapters if args.own else len(args.models),
        "rank": args.rank if args.own else None,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "clients": args.clients,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit(),
        **gpu_facts(),
    }


def run(args: argparse.Namespace, target: Target, engine: InProcess | None) -> Iterator[dict[str, Any]]:
    yield machine(args)
    if isinstance(target, OwnNode):
        first_s = target.first_token_s(args)
        if "start" in args.rows:
            yield {"row": "start", "ready_s": target.ready_s, "first_token_s": first_s, "shape": args.shape}
    if {"closed", "books", "open"} & set(args.rows):
        warm_up(args, target)
    if "closed" in args.rows:
        for place, distinct in enumerate(args.distinct if args.own else [None]):
            yield from by_turns(args, target, engine, distinct, place)
    if "books" in args.rows and isinstance(target, OwnNode):
        yield from books(args, target)
    if "open" in args.rows:
        for rate in args.rates:
            yield open_loop(args, target, rate)


def by_turns(
    args: argparse.Namespace, target: Target, engine: InProcess | None, distinct: int | None, place: int
) -> Iterator[dict[str, Any]]:
    """The row closed, and with an engine to compare with the row in-process, before it or after it."""
    if engine is None or distinct is None:
        yield closed(args, target, distinct)
        return
    rows: dict[str, dict[str, Any]] = {}
    for ask in (engine.closed, functools.partial(closed, args, target))[:: -1 if place % 2 else 1]:
        row = ask(distinct)
        rows[row["row"]] = row
        if len(rows) == 2:
            row["http_share"] = rows["closed"]["out_tok_s"] / rows["in-process"]["out_tok_s"]
        yield row


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="default: closed open, and start with --own")
    parser.add_argument("--url", help="a running server; default: a node of our own")
    parser.add_argument("--models", nargs="+", default=["base"], help="names that the requests use in turn, with --url")
    parser.add_argument("--vocab-size", type=int, default=32000, help="of the server's model, with --url")
    parser.add_argument("--eos-ids", type=int, nargs="*", default=[2], help="banned by logit_bias, with --url")
    parser.add_argument("--own", action="store_true", help="start a node")
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument(
        "--random-weights", action="store_true", help="weights made where they run, not read: not for the row start"
    )
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--distinct", type=int, nargs="+", help="adapters that the rows closed and in-process name; default: all")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapter-bytes", type=int, default=0, help="0: the node's default")
    parser.add_argument("--host-bytes", type=int, default=0, help="0: the node's default")
    parser.add_argument("--prepared", type=Path, help="a directory with a checkpoint named as the shape, to read")
    parser.add_argument("--files", help="where files go that are read through the page cache")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--kv-bytes", type=int, default=0, help="0: the node's default")
    parser.add_argument("--pairs", type=int, default=5, help="of the row books")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rates", type=float, nargs="+", default=[8.0, 16.0, 32.0])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--slo-ttft-ms", type=float, default=500.0)
    parser.add_argument("--slo-itl-ms", type=float, default=20.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    args.distinct = args.distinct or [args.adapters]
    args.rows = args.rows or (["start"] if args.own else []) + ["closed", "open"]
    if args.url and {"start", "in-process", "books"} & set(args.rows):
        parser.error("the rows start, in-process and books need a node of our own: --own")
    if bool(args.url) == args.own:
        parser.error("name a server with --url, or start a node with --own")
    return args


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    spawned = multiprocessing.get_context("spawn").Pool(args.clients)
    with spawned as clients, tempfile.TemporaryDirectory(prefix="bench", dir=args.files) as directory:
        engine = InProcess(args, Path(directory)) if "in-process" in args.rows else None
        if args.own:
            target: Target = own_node(args, clients, Path(directory))
        else:
            target = Target(clients, args.url, args.models, args.models[0], args.vocab_size, args.eos_ids)
        try:
            for row in run(args, target, engine):
                line = json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
                print(line, flush=True)
                if args.out is not None:
                    with args.out.open("a", encoding="utf-8") as file:
                        file.write(line + "\n")
        finally:
            target.close()
            if engine is not None:
                engine.close()
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == [SERVE]:
        serve(Path(sys.argv[2]), sys.argv[3:])
    elif sys.argv[1:2] == [ENGINE]:
        sys.exit(run_engine(*sys.argv[2:]))
    else:
        sys.exit(main(sys.argv[1:]))
