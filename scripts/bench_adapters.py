#!/usr/bin/env python3
"""Measure adapter memory: churn (W2), cold adapters (W3), loads beside running requests, a large pool.

    scripts/bench_adapters.py --rows churn cold beside zipf --out figures.jsonl

Every adapter is a file of its own with its own random bytes, written to --files once and read through the page cache. The engine
runs in this process; times are taken at its door: from `add` to the event that carries a token.

churn   256 adapters through 32 slots, one request each (prompt 128, 64 new tokens), all submitted together. First pass: files in
        the page cache. Later passes: adapters in host memory.
cold    Time to first token (prompt 16) on an idle engine of an adapter never seen, of one in host memory, of a resident one.
beside  Inter-token latency of 63 running requests beside which a short request comes every --beside-every steps, in turns for a
        resident adapter that nobody else names and for one that has to be loaded from its files (`beside_turns`).
zipf    Requests whose adapters are drawn by Zipf's law (s = 1) from 1,000, against the same from 64, in turns. All 1,000 are
        asked for once before, the rarest first: slots and host memory, which are fewer, are full, as after long service, and a
        draw from the tail is read from files and pushes another out. `drawn_so_far`: distinct adapters of all turns.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_report import commit, gpu_facts, ratio_of, report, stolen_s
from bench_runs import Bell, Bench, Request, Trace
from beside_turns import beside
from random_model import random_source

from node.adapters.binding import LinearTable
from node.adapters.file_plan import FilePlans
from node.adapters.page_reader import PageReader
from node.config import AdapterSettings, EngineSettings, ModelSettings
from node.engine.engine import open_engine
from node.kernels.build import library_path
from node.kernels.layout import PageLayout
from node.request import AdapterTerm, LinearShape

MAX_BYTES = 1 << 30
IDLE_S = 0.001
PAGE_RANK = 16  # of a GPU
COLD_ADAPTERS, BESIDE_ADAPTERS = 9, 100  # of those rows, never seen before


# ---- files


def write_adapter(directory: Path, linears: Sequence[LinearShape], rank: int, seed: int) -> None:
    """A PEFT adapter of all linear modules: bfloat16, magnitudes between 2^-7 and 2^-5, signs and mantissas random."""
    header: dict[str, Any] = {}
    size = 0
    for shape in linears:
        for layer in range(shape.layer_count):
            for side, sizes in (("A", (rank, shape.in_features)), ("B", (shape.out_features, rank))):
                name = f"base_model.model.{shape.name.replace('{layer}', str(layer))}.lora_{side}.weight"
                end = size + 2 * sizes[0] * sizes[1]
                header[name] = {"dtype": "BF16", "shape": sizes, "data_offsets": [size, end]}
                size = end
    raw = json.dumps(header).encode()
    bits = np.random.Generator(np.random.SFC64(seed)).integers(0, 1 << 16, size // 2, dtype=np.uint16)
    np.bitwise_and(bits, 0x80FF, out=bits)
    np.bitwise_or(bits, 0x3C00, out=bits)
    directory.mkdir(parents=True)
    with (directory / "adapter_model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.write(bits.data)
    targets = sorted({shape.name.rpartition(".")[2] for shape in linears})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (directory / "adapter_config.json").write_text(json.dumps({**config, "bias": "none"}))


class AdapterFiles:
    """Adapters with distinct bytes below a directory, made once and named by their content hashes.

    Args:
        linears: Modules to adapt. layout: the engine's pages, through which the hashes are computed.
        seeds: One adapter each, which decides its bytes.
    """

    def __init__(self, root: Path, linears: Sequence[LinearShape], layout: PageLayout, rank: int, seeds: Sequence[int]) -> None:
        self._root, self._linears, self._rank = root, linears, rank
        library = library_path()
        if library is None:
            raise SystemExit("the C++ kernels are not built; run python -m node.kernels.build")
        self._layout = layout
        self._plans = FilePlans(layout, LinearTable(linears), max_rank=256, max_bytes=MAX_BYTES)
        self._library = library
        self._scratch = threading.local()  # a reader and its pages: reads on one reader follow each other
        started = time.perf_counter()
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            self.terms = list(threads.map(self._make, seeds))
        if len({term.adapter_id for term in self.terms}) != len(seeds):
            raise SystemExit("two adapters have the same bytes")
        self.seconds = time.perf_counter() - started

    def _make(self, seed: int) -> AdapterTerm:
        directory = self._root / f"adapter-{seed}"
        write_adapter(directory, self._linears, self._rank, seed)
        if not hasattr(self._scratch, "pages"):
            count = self._layout.pages_for_rank(self._rank)
            self._scratch.pages = [np.zeros(self._layout.page_elements, np.uint16) for _ in range(count)]
            self._scratch.reader = PageReader(self._library, self._layout, thread_count=1, max_bytes=MAX_BYTES)
        plan = self._plans.read(directory)
        return AdapterTerm(plan.adapter_id(self._scratch.reader.read(directory, plan, self._scratch.pages)), str(directory), 1.0)


# ---- rows


def churn(bench: Bench, terms: Sequence[AdapterTerm], passes: int = 3) -> dict[str, Any]:
    requests = [Request((term,), 128, 64) for term in terms]
    figures = []
    for _ in range(passes):
        before, before_stolen_s = bench.engine.stats(), stolen_s()
        trace: Trace = bench.run(requests)
        after = bench.engine.stats()
        figures.append(
            {
                "out_tok_s": trace.token_count / trace.total_s,
                "total_s": trace.total_s,
                "file_loads": after.adapter_file_loads_total - before.adapter_file_loads_total,
                "loads": after.adapter_loads_total - before.adapter_loads_total,
                "steps": after.steps_total - before.steps_total,
                "sent_gb": (after.adapter_sent_bytes_total - before.adapter_sent_bytes_total) / 1e9,
                "load_s": after.adapter_load_seconds_total - before.adapter_load_seconds_total,
                "stolen_s": round(stolen_s() - before_stolen_s, 2),
            }
        )
    later = [figure["out_tok_s"] for figure in figures[1:]]
    return {"first_tok_s": figures[0]["out_tok_s"], "later_tok_s": max(later), "passes": figures}


def cold(bench: Bench, fresh: Sequence[AdapterTerm], fillers: Sequence[AdapterTerm]) -> dict[str, Any]:
    """`fresh`: adapters never seen. `fillers`: enough others to push them out of the slots, but not out of host memory."""

    def first_ms(term: AdapterTerm) -> float:
        return bench.run([Request((term,), 16, 2)]).first_s[0] * 1e3

    cold_ms = [first_ms(term) for term in fresh]
    resident_ms = [first_ms(fresh[-1]) for _ in range(len(fresh))]
    bench.run([Request((term,), 16, 2) for term in fillers])
    resident = set(bench.engine.stats().resident_adapters)
    staged = [term for term in fresh if term.adapter_id not in resident]
    before = bench.engine.stats().adapter_file_loads_total
    host_ms = [first_ms(term) for term in staged]
    return {
        "cold_ms": cold_ms,
        "cold_median_ms": statistics.median(cold_ms),
        "resident_median_ms": statistics.median(resident_ms),
        "host_median_ms": statistics.median(host_ms) if host_ms else None,
        "host_ms": host_ms,
        "host_read_files": bench.engine.stats().adapter_file_loads_total - before,
        "first_ever_ms": cold_ms[0],
    }


def draw_zipf(count: int, request_count: int, seed: int) -> list[int]:
    """Which of `count` adapters each request names."""
    weights = 1 / np.arange(1, count + 1)
    drawn: list[int] = np.random.default_rng(seed).choice(count, request_count, p=weights / weights.sum()).tolist()
    return drawn


def zipf(bench: Bench, terms: Sequence[AdapterTerm]) -> dict[str, Any]:
    """One request for each term."""
    requests = [Request((term,), 128, 64) for term in terms]
    before = bench.engine.stats()
    trace = bench.run(requests)
    after = bench.engine.stats()
    return {
        "distinct": len({term.adapter_id for term in terms}),
        "out_tok_s": trace.token_count / trace.total_s,
        "loads": after.adapter_loads_total - before.adapter_loads_total,
        "file_loads": after.adapter_file_loads_total - before.adapter_file_loads_total,
        "host_evictions": after.adapter_host_evictions_total - before.adapter_host_evictions_total,
    }


# ---- the command


def page_bytes(linears: Sequence[LinearShape], page_rank: int) -> int:
    """Of one page, bfloat16."""
    return 2 * page_rank * sum((shape.in_features + shape.out_features) * shape.layer_count for shape in linears)


class Stage:
    """One engine and the files its rows need.

    Args:
        slots: Adapters that fit on the GPU. staged: adapters that fit into host memory before it.
    """

    def __init__(self, args: argparse.Namespace, slots: int, staged: int) -> None:
        self._bell = Bell()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        source = random_source(args.shape, device, args.max_model_len)
        rank = PAGE_RANK if device.type == "cuda" else 8
        page = page_bytes(source.spec.linear_kinds, rank) * -(-args.rank // rank)
        self._state = tempfile.TemporaryDirectory(prefix="bench-adapters")
        started = time.perf_counter()
        self.engine = open_engine(
            ModelSettings(path="random"),
            EngineSettings(
                prefix_cache=False,
                max_sequences=args.max_sequences,
                max_batch_tokens=args.max_batch_tokens,
                kv_cache_bytes=args.kv_bytes,
            ),
            AdapterSettings(memory_bytes=slots * page, host_memory_bytes=staged * page),
            Path(self._state.name),
            wake=self._bell.ring,
            source=source,
        )
        self.start_s = time.perf_counter() - started
        self.bench = Bench(self.engine, self._bell)
        self.layout = PageLayout(source.spec.linears, rank)
        self.linears = [shape for shape in self.engine.ready.linears if shape.name != "lm_head"]
        gc.collect()
        gc.freeze()

    def close(self) -> None:
        self.engine.close()
        self._state.cleanup()


def rows(args: argparse.Namespace, root: Path) -> Iterator[dict[str, Any]]:
    """The rows that were asked for: those of a few slots on one engine, the large pool on another."""
    if set(args.rows) - {"zipf"}:
        yield from few_slots(args, root / "few")
    if "zipf" in args.rows:
        gc.collect()
        yield from large_pool(args, root / "large")


def few_slots(args: argparse.Namespace, root: Path) -> Iterator[dict[str, Any]]:
    count = args.adapters + (BESIDE_ADAPTERS if "beside" in args.rows else COLD_ADAPTERS)
    stage = Stage(args, args.slots, min(count, args.staged))
    yield machine(stage, args)
    files = AdapterFiles(root, stage.linears, stage.layout, args.rank, range(count))
    yield {"row": "files", "count": count, "seconds": files.seconds, "rank": args.rank}
    spare, terms = files.terms[args.adapters :], files.terms[: args.adapters]
    stage.bench.run([Request((), 16, 8)])
    if "cold" in args.rows:
        yield {"row": "cold", **cold(stage.bench, spare[:COLD_ADAPTERS], terms[: args.slots])}
    if "churn" in args.rows:
        yield {"row": "churn", "adapters": len(terms), "slots": args.slots, **churn(stage.bench, terms, args.passes)}
    if "beside" in args.rows:
        names = [terms[index % 8] for index in range(min(63, args.max_sequences - 1))]
        yield beside(stage.bench, names, terms[8], spare, args.pairs, args.beside_tokens, args.beside_every)
    stage.close()


def large_pool(args: argparse.Namespace, root: Path) -> Iterator[dict[str, Any]]:
    """A pool of all adapters against one of 64, on one engine, in turns; the first turn does not count."""
    stage = Stage(args, args.large_slots, args.large_staged)
    yield machine(stage, args)
    files = AdapterFiles(root, stage.linears, stage.layout, args.rank, range(args.large))
    yield {"row": "files", "count": args.large, "seconds": files.seconds, "rank": args.rank}
    stage.bench.run([Request((term,), 16, 1) for term in reversed(files.terms)])
    pools, drawn = (args.large, 64), set()
    found: list[dict[int, float]] = []
    for turn in range(args.turns):
        found.append({})
        for count in pools[:: 1 if turn % 2 else -1]:
            places = draw_zipf(count, args.requests, turn)
            drawn.update(places)
            row = zipf(stage.bench, [files.terms[place] for place in places])
            found[-1][count] = row["out_tok_s"]
            facts = {"slots": stage.engine.stats().adapter_slots, "staged": args.large_staged, "drawn_so_far": len(drawn)}
            yield {"row": "zipf", "turn": turn, **facts, "adapters": count, "requests": args.requests, **row}
        if turn > 0:
            yield zipf_ratio(args.large, found[1:])
    stage.close()


def zipf_ratio(large: int, found: Sequence[dict[int, float]]) -> dict[str, Any]:
    """Throughput of the large pool over that of the small one, over the turns so far."""
    pairs = [(turn[large], turn[64]) for turn in found]
    return {"row": "zipf ratio", "adapters": large, "pairs": len(pairs), **ratio_of(pairs, "out_tok_s")}


def machine(stage: Stage, args: argparse.Namespace) -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "row": "machine",
        "model": stage.engine.ready.model_id,
        "kernels": stage.engine.ready.kernels,
        "adapter_slots": stage.engine.stats().adapter_slots,
        "engine_start_s": stage.start_s,
        "max_sequences": args.max_sequences,
        "max_batch_tokens": args.max_batch_tokens,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "commit": commit(),
        **gpu_facts(),
    }


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=("cold", "churn", "beside", "zipf"), default=["cold", "churn", "beside"])
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=256, help="of the row churn")
    parser.add_argument("--slots", type=int, default=32, help="adapters on the GPU")
    parser.add_argument("--staged", type=int, default=300, help="adapters in host memory at most")
    parser.add_argument("--passes", type=int, default=3, help="of the row churn")
    parser.add_argument("--beside-tokens", type=int, default=160, help="of each running request of the row beside")
    parser.add_argument("--beside-every", type=int, default=6, help="steps from one short request of the row beside to the next")
    parser.add_argument("--pairs", type=int, default=7, help="of the row beside")
    parser.add_argument("--large", type=int, default=1000, help="adapters of the row zipf")
    parser.add_argument("--large-slots", type=int, default=300, help="adapters of the row zipf on the GPU")
    parser.add_argument("--large-staged", type=int, default=300, help="adapters of the row zipf in host memory at most")
    parser.add_argument("--turns", type=int, default=6, help="of the row zipf")
    parser.add_argument("--requests", type=int, default=256, help="of one pool in one turn of the row zipf")
    parser.add_argument("--max-sequences", type=int, default=64)
    parser.add_argument("--max-batch-tokens", type=int, default=8192)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--kv-bytes", type=int, default=4 << 30)
    parser.add_argument("--files", type=Path, default=Path("/dev/shm"), help="where adapter files go")  # noqa: S108
    parser.add_argument("--brief", action="store_true", help="print short lines; the file has everything")
    parser.add_argument("--out", type=Path, help="append the rows as JSON lines")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    with tempfile.TemporaryDirectory(prefix="bench-adapters", dir=args.files) as root:
        report(rows(args, Path(root)), args.out, is_brief=args.brief)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
