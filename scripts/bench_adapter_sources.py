"""What adapters elsewhere cost the requests that do not need them.

catalogue: time to first token of a resident adapter's request on a node that knows 10 adapters, and on one that knows 10,000;
requests alternate between the two nodes, so the machine's moods fall on both.

storm: eight resident adapters are served while 200 unknown ones are asked for from a hub that takes 5 s to answer and fails one
time in five; time to first token and inter-token latency of the hot requests, beside the same load without the storm. Where
client, hub and node share cores the wall-clock ratio says little; `cpu_ratio` compares the engine process's CPU time a token.

    .venv/bin/python scripts/bench_adapter_sources.py catalogue --pairs 200
    .venv/bin/python scripts/bench_adapter_sources.py storm --engine-cores 0-7 --client-cores 8-15 --shape llama-3.1-8b --layers 8
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
import zlib
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
BASE = "smollm2-135m-instruct"
HOT = ("lincoln", "reagan", "roosevelt")
PROMPT_TOKENS = 16
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


def prepare(args: argparse.Namespace, place: Path) -> tuple[str, list[Path]]:
    """The base model's path and the adapters to copy from: the packaged ones, or random ones of a known shape."""
    if not args.shape:
        return BASE, [DEMO / name for name in HOT]
    import torch
    from bench_adapters import write_adapter
    from random_model import shape_config, write_checkpoint

    from node.models.spec import model_spec

    write_checkpoint(args.shape, place, torch.device("cuda" if torch.cuda.is_available() else "cpu"), args.layers)
    kinds = [kind for kind in model_spec(shape_config(args.shape, args.layers), None).linear_kinds if kind.name != "lm_head"]
    sources = [place.parent / f"source-{index}" for index in range(3)]
    for index, source in enumerate(sources):
        write_adapter(source, kinds, 16, index)
    return str(place), sources


@contextmanager
def node(
    place: Path, model: str, adapters: Path, cores: str, settings: str = "", **environment: str
) -> Iterator[tuple[str, int]]:
    """A node of its own; yields its URL and process id."""
    config = place / "node.toml"
    config.write_text(
        f'data_dir = "{place}"\n[server]\nport = 0\nmax_concurrent_requests = 1024\n[model]\npath = "{model}"\n'
        f'[engine]\nprefix_cache = false\n[adapters]\ndirectory = "{adapters}"\n{settings}\n'
        '[chain]\nprofile = "none"\n[telemetry]\nlog_level = "error"\n'
    )
    command = [sys.executable, "-m", "node.cli.main", "start", "--config", str(config)]
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
    """One streamed completion."""
    found, started_s = Stream(), time.perf_counter()
    body = {
        "model": model,
        "prompt": [3 + (seed + number) % 500 for number in range(PROMPT_TOKENS)],
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
        with node(small / "node", BASE, small / "adapters", "") as (few, _):
            begun_s = time.monotonic()
            with node(large / "node", BASE, large / "adapters", "") as (many, _):
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


async def slow_hub(latency_s: float, failure: float, source: Path) -> tuple[web.AppRunner, str]:
    """A server that speaks enough of the hub's protocol, slowly and with faults.

    Every repository has the weights of `source` and an alpha of its own, so that all are different adapters.
    """
    draw = random.Random(11)  # noqa: S311 - faults to repeat, not secrets
    weights = (source / "adapter_model.safetensors").read_bytes()
    config = json.loads((source / "adapter_config.json").read_text())

    def files_of(name: str) -> dict[str, bytes]:
        alpha = 1 + zlib.crc32(name.encode()) % 100_000 / 100_000
        return {"adapter_config.json": json.dumps({**config, "lora_alpha": alpha}).encode(), "adapter_model.safetensors": weights}

    async def answer(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(latency_s)
        if draw.random() < failure:
            return web.Response(status=503)
        parts = request.path.strip("/").split("/")
        if parts[0] == "api":
            found = files_of("/".join(parts[2:4]))
            siblings = [{"rfilename": name, "size": len(content)} for name, content in found.items()]
            info = {"id": "/".join(parts[2:4]), "sha": "1" * 40, "private": False, "gated": False, "siblings": siblings}
            return web.json_response(info)
        content = files_of("/".join(parts[:2]))[parts[-1]]
        return web.Response(body=content, headers={"ETag": f'"{zlib.crc32(content):08x}"', "X-Repo-Commit": "1" * 40})

    application = web.Application()
    application.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


async def storm(args: argparse.Namespace) -> dict[str, Any]:
    """The hot load alone, then beside the storm, in turns."""
    with tempfile.TemporaryDirectory(dir=args.files) as scratch:
        (adapters := Path(scratch) / "adapters").mkdir()
        (Path(scratch) / "node").mkdir()
        (Path(scratch) / "model").mkdir()
        model, sources = prepare(args, Path(scratch) / "model")
        for index in range(8):
            shutil.copytree(sources[index % 3], adapters / f"hot-{index}")
        runner, hub = await slow_hub(args.latency_s, args.failure, sources[0])
        with node(Path(scratch) / "node", model, adapters, args.engine_cores, "allow_hub = true", HF_ENDPOINT=hub) as (url, pid):
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
        "model": args.shape or BASE,
        "layers": args.layers,
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
    result: dict[str, Any] = {}
    for side in ("alone", "beside"):
        count = args.cold if side == "beside" else 0
        flood = [asyncio.create_task(_cold(session, url, index, number)) for number in range(count)]
        before_s = cpu_seconds(pid)
        streams = await _hot(session, url, args.requests, args.tokens, 1 + index)
        tokens = sum(len(stream.event_s) for stream in streams)
        result[side] = {"streams": streams, "cpu_s_per_token": (cpu_seconds(pid) - before_s) / tokens}
        if flood:
            result["statuses"] = await _outcomes(flood, args.cold_wait_s)
    return result


async def _outcomes(flood: list[asyncio.Task[int]], wait_s: float) -> list[int | str]:
    """How the cold requests ended; those still under way after `wait_s` hang up."""
    done, pending = await asyncio.wait(flood, timeout=wait_s)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    return [*(task.result() for task in done), *("under way" for _ in pending)]


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
    body = {"model": f"cold{index}/name-{number}", "prompt": [5, 6, 7], "max_tokens": 1}
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
    parser.add_argument("--cold-wait-s", type=float, default=600.0, help="for the cold requests, after the hot ones are done")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--requests", type=int, default=12, help="hot answers a client and round")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--engine-cores", default="", help="cores of the node, as taskset takes them")
    parser.add_argument("--client-cores", default="", help="cores of this process")
    parser.add_argument("--shape", default="", help="random weights of a shape (scripts/random_model.py) instead of the package")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--files", type=Path, help="where files are made; default: the temporary directory")
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
