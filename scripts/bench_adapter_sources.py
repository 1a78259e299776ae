"""What adapters elsewhere cost the requests that do not need them.

catalogue: time to first token of a resident adapter's request on a node that knows 10 adapters, and on one that knows 10,000;
requests alternate between the two nodes, so the machine's moods fall on both.

storm: eight clients stream from resident adapters, for some seconds alone and for as many beside 200 requests for unknown
adapters, which all come at once, from a hub that takes 5 s and fails one time in five: for each answer, or with --slow-lookups
for each adapter, so that the others' files arrive together and are served while the hot load is measured; --rounds such pairs on
one node, after a few adapters from a quick hub (its library asks more when it is first used). Every hot request counts, those of
the storm's first instant too. Times between tokens are those between the events that bring them; the event that ends an answer
waits for its record and is no token: `last_event` says how far it is behind the last one. Ratios of quantiles over all rounds
have bootstrap intervals. Clients and hub are processes of their own (`storm_load`); where they and the node share cores,
wall-clock ratios say little: the row also has the engine process's CPU time and steps a token on both sides, and the API
process's, and which moments of the storm the slowest hot requests fell into, how many steps each waited for, and how long those
were (`storm_moments`). `on_time` has the p99 again without the moments in which a process that only sleeps woke late: whole
machines can be late, storm or not.

    python scripts/bench_adapter_sources.py catalogue --pairs 200
    python scripts/bench_adapter_sources.py storm --shape llama-3.1-8b --random-weights --engine-cores 0-9 --client-cores 10-15
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from bench_engine import median_interval
from bench_report import stolen_s
from bench_serving import SERVE
from safetensors.numpy import save_file
from storm_figures import Phase, Round, compared, cpu_seconds, on_time, read_rounds, write_round
from storm_load import Helper
from storm_moments import Streamed, slowest_requests

SERVING = Path(__file__).with_name("bench_serving.py")
DEMO = Path(__file__).resolve().parents[1] / "config/demo/adapters"
BASE = "smollm2-135m-instruct"
HOT = ("lincoln", "reagan", "roosevelt")
PROMPT_TOKENS = 16
HOT_CLIENTS = 8
WARM_UP_ADAPTERS = 8
STORM_RANK = 8  # with the modules below what PEFT makes where nothing is said
QUICK_DRAWS = 50  # for the intervals of a round, which are only looked at while a run is under way
MOST_CALM_S, GLANCE_S, IDLE_SHARE = 5.0, 0.2, 0.15
LEAD_S = 0.3  # from the first hot requests of a phase to the cold ones
STATS_S = 0.7  # the engine sends its counters twice a second
RESIDENT = "resident"
TWO_ON_ONE = 'memory_bytes = "1GiB"\n[engine]\nkv_cache_bytes = "512MiB"\nprefix_cache = false'  # two nodes share the device
STORM_SETTINGS = "allow_hub = true\nfetch_workers = {workers}\n{memory}[engine]\nprefix_cache = false"
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


@dataclass(slots=True)
class Stream:
    """One streamed answer: seconds since its request was sent, at each event."""

    event_s: list[float] = field(default_factory=list)
    error: str = ""


def write_small_adapters(directory: Path, count: int, hidden: int) -> None:
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
    """The base model's path and the adapters to copy from, the last for the storm: the packaged ones, or random ones of a known
    shape in `place`, where they are not there yet: of all linear modules, the storm's of queries and values, as most are."""
    if not args.shape:
        return BASE, [DEMO / name for name in (*HOT, HOT[0])]
    sources = [place / f"source-{index}" for index in range(4)]
    if (place / "made").exists():
        return str(place / "model"), sources
    (place / "model").mkdir(parents=True, exist_ok=True)  # empty with --random-weights
    import torch
    from bench_adapters import write_adapter
    from random_model import shape_config, write_checkpoint

    from node.models.spec import model_spec

    if not args.random_weights:
        write_checkpoint(args.shape, place / "model", torch.device("cuda" if torch.cuda.is_available() else "cpu"), args.layers)
    kinds = [kind for kind in model_spec(shape_config(args.shape, args.layers), None).linear_kinds if kind.name != "lm_head"]
    for index, source in enumerate(sources):
        is_of_storm = index == len(sources) - 1
        adapted = [kind for kind in kinds if not is_of_storm or kind.name.endswith(("q_proj", "v_proj"))]
        write_adapter(source, adapted, STORM_RANK if is_of_storm else 16, index)
    (place / "made").touch()
    return str(place / "model"), sources


@contextmanager
def node(
    place: Path, model: str, adapters: Path, args: argparse.Namespace, settings: str, server: str = "", **environment: str
) -> Iterator[tuple[str, int]]:
    """A node of its own; yields its URL and process id. With --random-weights they are made where they run, and not read."""
    config = place / "node.toml"
    config.write_text(
        f'data_dir = "{place}"\n[server]\nport = 0\nmax_concurrent_requests = 1024\n{server}\n[model]\npath = "{model}"\n'
        f'[adapters]\ndirectory = "{adapters}"\n{settings}\n'
        '[chain]\nprofile = "none"\n[telemetry]\nlog_level = "error"\n'
    )
    command = [sys.executable, "-m", "node.cli.main", "start", "--config", str(config)]
    if args.random_weights:
        command = [sys.executable, str(SERVING), SERVE, str(config), args.shape, str(args.layers or "")]
    if args.engine_cores:
        command = ["taskset", "-c", args.engine_cores, *command]
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


def prepare_catalogues(args: argparse.Namespace, place: Path) -> tuple[str, Path, Path]:
    """The base model's path, and directories of few and of many adapters with the same resident one, where they are not yet."""
    from random_model import SHAPES

    model, sources = prepare(args, place)
    hidden = 576 if model == BASE else SHAPES[args.shape]["hidden_size"]
    small, large = place / "small", place / f"large-{args.adapters}"
    for directory, count in ((small, 10), (large, args.adapters)):
        if not directory.exists():
            shutil.copytree(sources[0], directory / RESIDENT)
            write_small_adapters(directory, count - 1, hidden)
    return model, small, large


async def catalogue(args: argparse.Namespace) -> dict[str, Any]:
    """Alternate requests between a small and a large catalogue, on nodes that are started --starts times, each first in turn.

    Two equal nodes differ by a percent for as long as they live, so a start is one observation, however many requests it answers.
    """
    with tempfile.TemporaryDirectory(dir=args.files) as scratch:
        model, *directories = prepare_catalogues(args, args.prepared or Path(scratch))
        places = [Path(scratch) / "few", Path(scratch) / "many"]
        for place in places:
            place.mkdir()
        medians: list[tuple[float, float]] = []
        for start in range(args.starts):
            order = (0, 1) if start % 2 else (1, 0)
            with ExitStack() as stack:
                urls = {i: stack.enter_context(node(places[i], model, directories[i], args, TWO_ON_ONE))[0] for i in order}
                async with aiohttp.ClientSession() as session:
                    pairs = await _paired(session, urls[0], urls[1], args.pairs)
            few_s, many_s = (statistics.median(side) for side in zip(*pairs, strict=True))
            medians.append((few_s, many_s))
            print(f"start {start + 1}: {1000 * few_s:.2f} and {1000 * many_s:.2f} ms", file=sys.stderr, flush=True)
    median, low, high = median_interval([many / few for few, many in medians])
    return {
        "row": "catalogue",
        "model": args.shape or BASE,
        "layers": args.layers,
        "adapters": args.adapters,
        "starts": args.starts,
        "pairs": args.pairs,
        "few_ttft_ms": [round(1000 * few, 3) for few, _ in medians],
        "many_ttft_ms": [round(1000 * many, 3) for _, many in medians],
        "ratio": round(median, 4),
        "low": round(low, 4),
        "high": round(high, 4),
    }


async def _paired(session: aiohttp.ClientSession, few: str, many: str, count: int) -> list[tuple[float, float]]:
    pairs = []
    for index in range(count + 5):
        order = (few, many) if index % 2 else (many, few)
        found = {url: await ask(session, url, RESIDENT, 1, index) for url in order}
        if found[few].error or found[many].error:
            raise SystemExit(found[few].error or found[many].error)
        if index >= 5:
            pairs.append((found[few].event_s[0], found[many].event_s[0]))
    return pairs


# ---- storm


def storm(args: argparse.Namespace) -> None:
    """The hot load alone and beside the storm, in turns on one node; the hub is calm before each turn. What was measured is said
    before the node is stopped."""
    begun_s = time.monotonic()
    with tempfile.TemporaryDirectory(dir=args.files) as scratch, ExitStack() as stack:
        (adapters := Path(scratch) / "adapters").mkdir()
        (Path(scratch) / "node").mkdir()
        model, sources = prepare(args, args.prepared or Path(scratch))
        for index in range(HOT_CLIENTS):
            shutil.copytree(sources[index % 3], adapters / f"hot-{index}")
        cores = client_cores(args.client_cores)
        slow = "lookups" if args.slow_lookups else "answers"
        hub = stack.enter_context(
            closing(Helper(cores[2], "hub", str(args.latency_s), str(args.failure), str(sources[-1]), slow))
        )
        endpoint = hub.ask(start=True)["url"]
        sizes = (("memory_bytes", args.adapter_bytes), ("host_memory_bytes", args.host_bytes))
        memory = "".join(f"{key} = {size}\n" for key, size in sizes if size)
        place, settings = Path(scratch) / "node", STORM_SETTINGS.format(workers=args.fetch_workers, memory=memory)
        url, pid = stack.enter_context(node(place, model, adapters, args, settings, HF_ENDPOINT=endpoint))
        host = url.removeprefix("http://")
        hot = stack.enter_context(closing(Helper(cores[0], "hot", host, str(HOT_CLIENTS))))
        cold = stack.enter_context(closing(Helper(cores[1], "cold", host)))
        sleeper = stack.enter_context(closing(Helper(cores[2], "sleeper")))
        _warm_up(hot, cold, hub, args)
        start_s, rounds, round_s = time.monotonic() - begun_s, [], 0.0
        while len(rounds) < args.rounds and (not args.within_s or time.monotonic() + 1.1 * round_s < begun_s + args.within_s):
            round_s = -time.monotonic()
            sleeper.ask()
            found = _round(hot, cold, hub, url, pid, args, len(rounds))
            rounds.append(replace(found, late=sleeper.ask()["late"]))
            round_s += time.monotonic()
            if args.rounds_file is not None:
                write_round(args.rounds_file, rounds[-1])
            row = {"round": len(rounds), "start_s": round(start_s, 1)} | compared(rounds[-1:], QUICK_DRAWS)
            print(json.dumps(row | slowest_requests(rounds[-1:], args.latency_s)), flush=True)
        keep(args, storm_row(args, rounds, start_s))


def storm_row(args: argparse.Namespace, rounds: list[Round], start_s: float | None) -> dict[str, Any]:
    """The figures of all rounds together."""
    return {
        "row": "storm",
        "model": args.shape or BASE,
        "layers": args.layers,
        "cold": args.cold,
        "fetch_workers": args.fetch_workers,
        "latency_s": args.latency_s,
        "slow": "lookups" if args.slow_lookups else "answers",
        "failure": args.failure,
        "shares_cores": not (args.engine_cores and args.client_cores),
        "rounds": len(rounds),
        "start_s": None if start_s is None else round(start_s, 1),
        "phase_s": [args.alone_s or args.phase_s, args.phase_s],
        "lead_s": LEAD_S,
        **compared(rounds),
        **(on_time(rounds) if args.engine_cores and args.client_cores and all(one.late is not None for one in rounds) else {}),
        **slowest_requests(rounds, args.latency_s),
    }


def _warm_up(hot: Helper, cold: Helper, hub: Helper, args: argparse.Namespace) -> None:
    """Hot clients, beside a few adapters from a hub that is quick: its library asks more the first time it is used."""
    hub.ask(calm=False, quick=True)
    hot.tell(seconds=args.warm_up_s, tokens=args.tokens, seed=0)
    cold.ask(names=[f"warm/name-{number}" for number in range(WARM_UP_ADAPTERS)], after_s=0.0)
    hot.hear()
    statuses = cold.ask(wait_s=MOST_CALM_S)["statuses"]
    print(json.dumps({"warm_up": statuses}), file=sys.stderr, flush=True)
    hub.ask(calm=True)


def client_cores(text: str) -> tuple[str, str, str]:
    """Cores of the hot clients, of the cold ones and of the hub: a third of `text` ("10-15") each."""
    if not text:
        return "", "", ""
    first, _, last = text.partition("-")
    cores = list(range(int(first), int(last or first) + 1))
    third = max(1, len(cores) // 3)
    parts = [cores[index * third : (index + 1) * third] or cores[-1:] for index in range(3)]
    return tuple(",".join(map(str, part)) for part in parts)  # type: ignore[return-value]


def _round(hot: Helper, cold: Helper, hub: Helper, url: str, pid: int, args: argparse.Namespace, index: int) -> Round:
    phases: dict[str, Phase] = {}
    outcome: dict[str, Any] = {}
    for side in ("alone", "beside") if index % 2 == 0 else ("beside", "alone"):
        before_cpu, before_steps, before_stolen_s = cpu_seconds(pid), engine_steps(url), stolen_s()
        hot.tell(seconds=args.phase_s if side == "beside" else args.alone_s or args.phase_s, tokens=args.tokens, seed=1 + index)
        if side == "beside":
            before_hub = hub.ask(calm=False)
            cold.ask(names=[f"cold{index}/name-{number}" for number in range(args.cold)], after_s=LEAD_S)
        found = hot.hear()
        spent = {name: seconds - before_cpu.get(name, 0.0) for name, seconds in cpu_seconds(pid).items()}
        time.sleep(STATS_S)
        steps = engine_steps(url) - before_steps
        streamed = [Streamed(*answer) for answer in found["answers"]]
        phases[side] = Phase(streamed, steps, spent, stolen_s() - before_stolen_s)
        if side == "beside":
            outcome = cold.ask(wait_s=args.cold_wait_s)
            after_hub = hub.ask(calm=True)
            _wait_for_fetches(pid, args.calm_s)
    return Round(phases["alone"], phases["beside"], outcome, {key: after_hub[key] - before_hub[key] for key in after_hub})


def _wait_for_fetches(pid: int, least_s: float) -> None:
    """Until the fetching process rests, or for so long that the next phase says what it costs."""
    time.sleep(least_s)
    for _ in range(int(MOST_CALM_S / GLANCE_S)):
        before_s = cpu_seconds(pid).get("fetcher", 0.0)
        time.sleep(GLANCE_S)
        if cpu_seconds(pid).get("fetcher", 0.0) - before_s < IDLE_SHARE * GLANCE_S:
            return


def engine_steps(url: str) -> float:
    """Steps of the engine so far."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:  # noqa: S310 - this node's own
        lines = answer.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("openlora_engine_steps_total"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "row",
        choices=("prepare", "prepare-catalogue", "catalogue", "storm", "storm-figures"),
        help="the first two make the files of --prepared alone; the last computes a storm's row from --rounds-file",
    )
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--pairs", type=int, default=200, help="requests to each node of a start")
    parser.add_argument("--starts", type=int, default=8, help="of both nodes of the catalogue")
    parser.add_argument("--cold", type=int, default=200)
    parser.add_argument("--latency-s", type=float, default=5.0)
    parser.add_argument("--failure", type=float, default=0.2)
    parser.add_argument("--slow-lookups", action="store_true", help="latency and failures once an adapter, not for each answer")
    parser.add_argument("--fetch-workers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--within-s", type=float, help="begin no round that would end later than this after the start")
    parser.add_argument("--phase-s", type=float, default=5.0, help="hot load of each side of a round")
    parser.add_argument("--alone-s", type=float, help="the side alone, where it is to be shorter")
    parser.add_argument("--warm-up-s", type=float, default=3.0)
    parser.add_argument("--cold-wait-s", type=float, default=0.0, help="for cold requests under way after the hot ones are done")
    parser.add_argument("--calm-s", type=float, default=1.0, help="after a storm, for the fetches that the calm hub ends")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--engine-cores", default="", help="cores of the node, as taskset takes them")
    parser.add_argument("--client-cores", default="", help="cores of this process")
    parser.add_argument("--shape", default="", help="random weights of a shape (scripts/random_model.py) instead of the package")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--random-weights", action="store_true", help="weights of --shape made where they run, not read")
    parser.add_argument("--adapter-bytes", type=int, help="adapters.memory_bytes of the storm's node")
    parser.add_argument("--host-bytes", type=int, help="adapters.host_memory_bytes of the storm's node")
    parser.add_argument("--prepared", type=Path, help="a directory for the shape's files, which are made once")
    parser.add_argument("--rounds-file", type=Path, help="gets every latency of a storm's rounds, a line each as they end")
    parser.add_argument("--files", type=Path, help="where files are made; default: the temporary directory")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.client_cores and args.row != "storm-figures":
        os.sched_setaffinity(0, {int(core) for cores in client_cores(args.client_cores) for core in cores.split(",")})
    if args.row == "prepare":
        prepare(args, args.prepared)
        return 0
    if args.row == "prepare-catalogue":
        prepare_catalogues(args, args.prepared)
        return 0
    if args.row == "storm":
        storm(args)
    elif args.row == "storm-figures":
        keep(args, storm_row(args, read_rounds(args.rounds_file), None))
    else:
        keep(args, asyncio.run(catalogue(args)))
    return 0


def keep(args: argparse.Namespace, row: dict[str, Any]) -> None:
    """Print a row, and add it to the file of --out."""
    row |= {"cores": os.cpu_count(), "load_average": os.getloadavg()[0]}
    print(json.dumps(row), flush=True)
    if args.out is not None:
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
