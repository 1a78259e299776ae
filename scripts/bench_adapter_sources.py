"""What adapters elsewhere cost the requests that do not need them.

catalogue: time to first token of a resident adapter's request on a node that knows 10 adapters, and on one that knows 10,000;
requests alternate between the two nodes, so the machine's moods fall on both.

storm: eight resident adapters are served while 200 unknown ones are asked for from a hub that takes 5 s to answer and fails one
time in five; time to first token and inter-token latency of the hot requests, beside the same load without the storm. Where
client, hub and node share cores the wall-clock ratio says little; `cpu_ratio` compares the engine process's CPU time a token.

    .venv/bin/python scripts/bench_adapter_sources.py catalogue --pairs 200
    .venv/bin/python scripts/bench_adapter_sources.py storm --engine-cores 0-7 --client-cores 8-15
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from aiohttp import web
from bench_engine import median_interval
from safetensors.numpy import save_file

DEMO = Path(__file__).resolve().parents[1] / "config/demo/adapters"
HOT = ("lincoln", "reagan", "roosevelt")
PROMPT = "Fellow citizens, the state of our Union is"
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


@dataclass(slots=True)
class Stream:
    """One streamed answer: seconds since its request was sent, at each event."""

    event_s: list[float] = field(default_factory=list)
    error: str = ""


def write_small_adapters(directory: Path, count: int, hidden: int = 576) -> None:
    """Rank-1 adapters of one module with distinct numbers: the catalogue reads and hashes every byte of them."""
    generator = np.random.default_rng(7)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    config |= {"layers_to_transform": [0], "bias": "none"}
    for index in range(count):
        place = directory / f"small-{index:05d}"
        place.mkdir()
        (place / "adapter_config.json").write_text(json.dumps(config))
        tensors = {
            f"{MODULE}.lora_A.weight": generator.standard_normal((1, hidden), dtype=np.float32) * 0.01,
            f"{MODULE}.lora_B.weight": generator.standard_normal((hidden, 1), dtype=np.float32) * 0.01,
        }
        save_file(tensors, place / "adapter_model.safetensors")


@contextmanager
def node(place: Path, adapters: Path, cores: str, settings: str = "", **environment: str) -> Iterator[tuple[str, int]]:
    """A node of its own; yields its URL and process id."""
    config = place / "node.toml"
    config.write_text(
        f'data_dir = "{place}"\n[server]\nport = 0\nmax_concurrent_requests = 1024\n[adapters]\ndirectory = "{adapters}"\n'
        f'{settings}\n[chain]\nprofile = "none"\n[telemetry]\nlog_level = "error"\n'
    )
    command = [str(Path(sys.executable).parent / "openlora-node"), "start", "--config", str(config)]
    if cores:
        command = ["taskset", "-c", cores, *command]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    try:
        url = next((line.split(" serves at ")[1].split()[0] for line in process.stdout or () if " serves at " in line), "")
        if not url:
            raise SystemExit("the node did not start; its own lines say why")
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(60)


async def ask(session: aiohttp.ClientSession, url: str, model: str, tokens: int, seed: int) -> Stream:
    """One streamed completion with a prompt of its own, so that no prefix is shared."""
    found, started_s = Stream(), time.perf_counter()
    body = {
        "model": model,
        "prompt": f"{seed} {PROMPT}",
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        async for line in answer.content:
            if line.startswith(b"data: {"):
                found.event_s.append(time.perf_counter() - started_s)
                if b'"error"' in line[:12]:
                    found.error = line.decode()[:200]
        if answer.status != 200:
            found.error = f"status {answer.status}"
    return found


async def catalogue(args: argparse.Namespace) -> dict[str, Any]:
    """Alternate requests between a small and a large catalogue."""
    with tempfile.TemporaryDirectory() as scratch:
        small, large = Path(scratch) / "small", Path(scratch) / "large"
        for directory, count in ((small, 10), (large, args.adapters)):
            (directory / "adapters").mkdir(parents=True)
            (directory / "node").mkdir()
            shutil.copytree(DEMO / "lincoln", directory / "adapters" / "lincoln")
            write_small_adapters(directory / "adapters", count - 1)
        begun_s = time.monotonic()
        with node(small / "node", small / "adapters", "") as (few, _):
            begun_s = time.monotonic()
            with node(large / "node", large / "adapters", "") as (many, _):
                start_s = time.monotonic() - begun_s
                async with aiohttp.ClientSession() as session:
                    pairs = await _paired(session, few, many, args.pairs)
    ratios = [many_s / few_s for few_s, many_s in pairs]
    median, low, high = median_interval(ratios)
    return {
        "row": "catalogue",
        "adapters": args.adapters,
        "pairs": len(pairs),
        "few_ttft_ms": round(1000 * statistics.median(few_s for few_s, _ in pairs), 3),
        "many_ttft_ms": round(1000 * statistics.median(many_s for _, many_s in pairs), 3),
        "ratio": round(median, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "start_s": round(start_s, 1),
    }


async def _paired(session: aiohttp.ClientSession, few: str, many: str, count: int) -> list[tuple[float, float]]:
    pairs = []
    for index in range(count + 5):
        order = (few, many) if index % 2 else (many, few)
        found = {url: await ask(session, url, "lincoln", 1, index) for url in order}
        if found[few].error or found[many].error:
            raise SystemExit(found[few].error or found[many].error)
        if index >= 5:
            pairs.append((found[few].event_s[0], found[many].event_s[0]))
    return pairs


# ---- storm


async def slow_hub(latency_s: float, failure: float) -> tuple[web.AppRunner, str]:
    """A server that speaks enough of the hub's protocol, slowly and with faults. Every repository is one demo adapter."""
    draw = random.Random(11)  # noqa: S311 - faults to repeat, not secrets
    files = {path.name: path.read_bytes() for path in (DEMO / "lincoln").iterdir() if path.name != "manifest.json"}

    async def answer(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(latency_s)
        if draw.random() < failure:
            return web.Response(status=503)
        parts = request.path.strip("/").split("/")
        if parts[0] == "api":
            siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
            info = {"id": "/".join(parts[2:4]), "sha": "1" * 40, "private": False, "gated": False, "siblings": siblings}
            return web.json_response(info)
        content = files[parts[-1]]
        return web.Response(body=content, headers={"ETag": f'"{len(content)}"', "X-Repo-Commit": "1" * 40})

    application = web.Application()
    application.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


async def storm(args: argparse.Namespace) -> dict[str, Any]:
    """The hot load alone, then beside the storm, in turns."""
    runner, hub = await slow_hub(args.latency_s, args.failure)
    with tempfile.TemporaryDirectory() as scratch:
        (adapters := Path(scratch) / "adapters").mkdir()
        for index in range(8):
            shutil.copytree(DEMO / HOT[index % 3], adapters / f"hot-{index}")
        (Path(scratch) / "node").mkdir()
        with node(Path(scratch) / "node", adapters, args.engine_cores, "allow_hub = true", HF_ENDPOINT=hub) as (url, pid):
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                await _hot(session, url, 2, args.tokens, 0)
                rounds = [await _round(session, url, pid, args, index) for index in range(args.rounds)]
    await runner.cleanup()
    alone, beside = ([item for found in rounds for item in found[side]["streams"]] for side in ("alone", "beside"))
    cpu = [found["beside"]["cpu_s_per_token"] / found["alone"]["cpu_s_per_token"] for found in rounds]
    statuses: dict[str, int] = {}
    for found in rounds:
        for status in found["statuses"]:
            statuses[str(status)] = statuses.get(str(status), 0) + 1
    return {
        "row": "storm",
        "cold": args.cold,
        "latency_s": args.latency_s,
        "failure": args.failure,
        "shares_cores": not args.engine_cores,
        "hot_requests": len(alone),
        **{f"alone_{key}": value for key, value in latencies(alone).items()},
        **{f"beside_{key}": value for key, value in latencies(beside).items()},
        "ttft_p99_ratio": round(latencies(beside)["ttft_p99_ms"] / latencies(alone)["ttft_p99_ms"], 3),
        "itl_p99_ratio": round(latencies(beside)["itl_p99_ms"] / latencies(alone)["itl_p99_ms"], 3),
        "cpu_ratio": round(statistics.median(cpu), 3),
        "cold_statuses": statuses,
    }


async def _round(session: aiohttp.ClientSession, url: str, pid: int, args: argparse.Namespace, index: int) -> dict[str, Any]:
    sides = {"alone": None, "beside": None} if index % 2 == 0 else {"beside": None, "alone": None}
    result: dict[str, Any] = {}
    for side in sides:
        cold = [] if side == "alone" else [_cold(session, url, index, number) for number in range(args.cold)]
        flood = asyncio.gather(*cold)
        before_s = cpu_seconds(pid)
        streams = await _hot(session, url, args.requests, args.tokens, 1 + index)
        tokens = sum(len(stream.event_s) for stream in streams)
        result[side] = {"streams": streams, "cpu_s_per_token": (cpu_seconds(pid) - before_s) / tokens}
        found = await flood
        if side == "beside":
            result["statuses"] = found
    return result


async def _hot(session: aiohttp.ClientSession, url: str, count: int, tokens: int, seed: int) -> list[Stream]:
    """Eight clients, one adapter each, `count` answers one after another."""

    async def client(number: int) -> list[Stream]:
        return [await ask(session, url, f"hot-{number}", tokens, seed * 1000 + index) for index in range(count)]

    streams = [stream for found in await asyncio.gather(*map(client, range(8))) for stream in found]
    failed = next((stream.error for stream in streams if stream.error), None)
    if failed:
        raise SystemExit(f"a hot request failed: {failed}")
    return streams


async def _cold(session: aiohttp.ClientSession, url: str, index: int, number: int) -> int:
    body = {"model": f"cold{index}/name-{number}", "prompt": PROMPT, "max_tokens": 1}
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        await answer.read()
        return answer.status


def latencies(streams: list[Stream]) -> dict[str, float]:
    """Milliseconds."""
    first = sorted(stream.event_s[0] for stream in streams)
    gaps = sorted(
        later - earlier for stream in streams for earlier, later in zip(stream.event_s, stream.event_s[1:], strict=False)
    )
    return {
        "ttft_p50_ms": round(1000 * first[len(first) // 2], 2),
        "ttft_p99_ms": round(1000 * first[int(len(first) * 0.99)], 2),
        "itl_p50_ms": round(1000 * gaps[len(gaps) // 2], 2),
        "itl_p99_ms": round(1000 * gaps[int(len(gaps) * 0.99)], 2),
    }


def cpu_seconds(pid: int) -> float:
    """CPU time of the engine process, the node's child that holds the model."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    engine = next(child for child in children if b"node.engine" in Path(f"/proc/{child}/cmdline").read_bytes())
    fields = Path(f"/proc/{engine}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=("catalogue", "storm"))
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--cold", type=int, default=200)
    parser.add_argument("--latency-s", type=float, default=5.0)
    parser.add_argument("--failure", type=float, default=0.2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--requests", type=int, default=12, help="hot answers a client and round")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--engine-cores", default="", help="cores of the node, as taskset takes them")
    parser.add_argument("--client-cores", default="", help="cores of this process")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.client_cores:
        first, _, last = args.client_cores.partition("-")
        os.sched_setaffinity(0, range(int(first), int(last or first) + 1))
    row = asyncio.run(catalogue(args) if args.row == "catalogue" else storm(args))
    row |= {"cores": os.cpu_count(), "load_average": os.getloadavg()[0]}
    print(json.dumps(row))
    if args.out is not None:
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
