"""W1: decode speed by batch size and number of adapters, in one process, on random weights of a known shape.

Every row: B requests submitted together, each a random prompt of 256 tokens and exactly 128 new ones, greedy, end-of-sequence
off, no prefix cache; D adapters with distinct bytes, all resident. `prefill_s`: the same requests with one new token each.
step_ms = (total - prefill) / 127, the best of --repeat runs after a warm-up. floor_ms: the fewest bytes a step must read
(weights but the embedding, B x 320 tokens of keys and values, every adapter that the batch names) over the GPU's read bandwidth.
turn_ms: the median time between the tokens of two steps, once all requests decode. graph_ms: such a step's graph alone, replayed
without a host in between.

Several tables share one engine, and a row that two of them have is measured once. The table long has few sequences of long
prompts, computed in chunks of --max-batch-tokens: --table long --prompt-tokens 32640 --max-model-len 32768. The machine's row
says how many tokens the planned memory holds, peak_bytes of a row what was allocated.

Two tables compare engines that do the same work in turns. lora-engine: requests that name no adapter, on an engine that holds 64
adapters and on one that has room for a single page: what it costs to be able to serve adapters. deterministic: an engine whose
answers do not depend on the batch, against one without that promise.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_adapters import AdapterFiles
from bench_report import commit, gpu_facts, ratio_of, report
from bench_runs import Bell, Bench, Request, Trace
from random_model import random_source

from node.config import AdapterSettings, EngineSettings, ModelSettings
from node.engine.engine import Engine, open_engine
from node.kernels.layout import PageLayout
from node.models.spec import ModelSpec
from node.request import AdapterTerm

READ_BYTES_S = 3.11e12  # an H100's read-only stream, measured
ZIPF_EXPONENT = 1.5
RANKS = {"8": (8,), "16": (16,), "64": (64,), "mixed": (8, 16, 64)}


@dataclass(frozen=True)
class Row:
    """One row of the table. `draw`: how requests choose among the D adapters; `rank`: a key of `RANKS`."""

    batch: int
    adapters: int
    draw: str = "round robin"
    rank: str = "16"


def _anchors() -> list[Row]:
    """The most telling ones first."""
    pairs = [(256, 64), (256, 0), (64, 64), (1, 1), (64, 0), (64, 1), (64, 8), (1, 0), (128, 64), (128, 0), (16, 1), (16, 8)]
    return [Row(batch, adapters) for batch, adapters in [*pairs, (16, 0), (128, 1), (128, 8), (256, 1), (256, 8)]]


TABLES = {
    "anchors": _anchors(),
    "all": [*_anchors()[:7], Row(64, 64, "round robin", "64"), *_anchors()[7:]],  # what has a goal first
    "draws": [Row(64, 64, draw) for draw in ("distinct", "uniform", "zipf", "identical")],
    "ranks": [Row(64, 64, "round robin", rank) for rank in ("64", "16", "8", "mixed")],
    "rest": _anchors()[:9:-1],  # the anchors from their end, down to what short runs reach
    "long": [Row(1, 0), Row(1, 1), Row(4, 4)],
}


class Pools:
    """Adapter files by rank, written once."""

    def __init__(self, root: Path, engine: Engine, spec: ModelSpec, page_rank: int) -> None:
        self._root = root
        self._linears = [shape for shape in engine.ready.linears if "lm_head" not in shape.name]
        self._layout = PageLayout(spec.linears, page_rank)
        self._made: dict[int, list[AdapterTerm]] = {}

    def terms(self, rank: str, count: int) -> list[tuple[AdapterTerm, int]]:
        """`count` adapters and their ranks; of mixed ranks in turn."""
        ranks = RANKS[rank]
        per_rank = -(-count // len(ranks)) if count else 0
        pools = [self._of_rank(number, per_rank) for number in ranks]
        return [(pools[i % len(ranks)][i // len(ranks)], ranks[i % len(ranks)]) for i in range(count)]

    def _of_rank(self, rank: int, count: int) -> list[AdapterTerm]:
        made = self._made.get(rank, [])
        if len(made) < count:
            root = self._root / f"rank-{rank}-{count}"
            made = self._made[rank] = AdapterFiles(root, self._linears, self._layout, rank, range(count)).terms
        return made


def choose(row: Row, terms: Sequence[tuple[AdapterTerm, int]], seed: int) -> list[tuple[AdapterTerm, int] | None]:
    """The adapter of every request."""
    count = len(terms)
    if not count:
        return [None] * row.batch
    random = np.random.default_rng(seed)
    if row.draw == "identical":
        places = [0] * row.batch
    elif row.draw == "uniform":
        places = random.integers(0, count, row.batch).tolist()
    elif row.draw == "zipf":
        weights = np.arange(1, count + 1) ** -ZIPF_EXPONENT
        places = random.choice(count, row.batch, p=weights / weights.sum()).tolist()
    else:  # round robin, distinct
        places = [index % count for index in range(row.batch)]
    return [terms[place] for place in places]


def floor_ms(spec: ModelSpec, row: Row, chosen: Sequence[tuple[AdapterTerm, int] | None], tokens: int) -> float:
    """The bytes that a decode step must read, over the read bandwidth. bfloat16."""
    linears = sum(inputs * outputs for _, inputs, outputs in spec.linears)
    layered = [(inputs, outputs) for name, inputs, outputs in spec.linears if name != "lm_head"]
    per_rank = sum(inputs + outputs for inputs, outputs in layered)
    ranks = {found[0].adapter_id: found[1] for found in chosen if found is not None}
    kv = row.batch * tokens * 2 * spec.layer_count * spec.kv_size
    return 2e3 * (linears + kv + per_rank * sum(ranks.values())) / READ_BYTES_S


def measure(bench: Bench, row: Row, chosen: Sequence[tuple[AdapterTerm, int] | None], args: argparse.Namespace) -> dict[str, Any]:
    """Best of `repeat` runs after a warm-up, which also makes the adapters resident."""
    terms = [() if found is None else (found[0],) for found in chosen]
    short = [Request(item, args.prompt_tokens, 1) for item in terms]
    whole = [Request(item, args.prompt_tokens, args.new_tokens) for item in terms]
    bench.run([Request(item, args.prompt_tokens, min(8, args.new_tokens)) for item in terms])
    prefill_s = min(bench.run(short).total_s for _ in range(args.repeat))
    before = bench.engine.stats()
    traces = [bench.run(whole) for _ in range(args.repeat)]
    total_s = min(trace.total_s for trace in traces)
    after = bench.engine.stats()
    return {
        "step_ms": 1e3 * (total_s - prefill_s) / (args.new_tokens - 1),
        "prefill_s": prefill_s,
        "total_s": total_s,
        "turn_ms": min(turn_ms(trace) for trace in traces),
        "out_tok_s": row.batch * args.new_tokens / total_s,
        "steps": (after.steps_total - before.steps_total) // args.repeat,
        "adapter_loads": after.adapter_loads_total - before.adapter_loads_total,
    }


def turn_ms(trace: Trace) -> float:
    """Median time between two tokens of the request that came last, when nobody is being prefilled any more."""
    latest = max(trace.token_s.values(), key=lambda moments: moments[0])
    return 1e3 * float(np.median(np.diff(latest)))


def graph_ms(bench: Bench, row: Row, requests: Sequence[Request], replays: int = 30) -> float | None:
    """Time of the row's decode graph alone, in the middle of a run, when its static memory holds one of the run's steps."""
    graphs = getattr(bench.engine._runner, "graphs", None)
    if not getattr(graphs, "_graphs", {}):
        return None
    trace, found = Trace({}), None
    for request in requests:
        bench.submit(request)
    while bench.engine.has_work:
        bench.step(trace, time.perf_counter())
        if found is None and len(trace.token_s) == row.batch and min(map(len, trace.token_s.values())) >= 3:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(replays):
                graphs.step(graphs.last)
            end.record()
            end.synchronize()
            found = begin.elapsed_time(end) / replays
    return found


def facts(engine: Engine, args: argparse.Namespace, start_s: float) -> dict[str, Any]:
    return {
        "row": "machine",
        "workload": "W1",
        "model": engine.ready.model_id,
        "dtype": engine.ready.dtype,
        "kernels": engine.ready.kernels,
        "engine_start_s": round(start_s, 3),
        "max_batch_tokens": args.max_batch_tokens,
        "kv_blocks": engine.ready.kv_block_count,
        "kv_tokens": engine.ready.kv_block_count * engine.ready.kv_block_size,
        "max_model_len": args.max_model_len,
        "gpu_bytes": torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 0,
        "adapter_slots": engine.stats().adapter_slots,
        "deterministic": args.deterministic,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "commit": commit(),
        **gpu_facts(),
    }


class OpenedEngine:
    """An engine on random weights, and the bench that drives it."""

    def __init__(self, args: argparse.Namespace, directory: Path, adapter_bytes: int) -> None:
        started = time.perf_counter()
        bell = Bell()
        device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        self.source = random_source(args.shape, device, args.max_model_len, args.layers)
        self.page_rank = 16 if device.type == "cuda" else 8
        self.engine = open_engine(
            ModelSettings(path="random", device=args.device, dtype=args.dtype),
            EngineSettings(
                prefix_cache=False,
                max_sequences=args.max_sequences,
                max_batch_tokens=args.max_batch_tokens,
                kv_cache_bytes=args.kv_bytes or None,
                kernels=args.kernels,
                deterministic=args.deterministic,
            ),
            AdapterSettings(memory_bytes=adapter_bytes, host_memory_bytes=args.host_bytes),
            directory,
            wake=bell.ring,
            source=self.source,
        )
        self.bench = Bench(self.engine, bell)
        self.start_s = time.perf_counter() - started


@dataclass
class Paired:
    """Two engines that do the same work in turns. `terms`: adapters that the requests of a row name, none where it is empty."""

    name: str
    first: Bench
    second: Bench
    terms: Sequence[AdapterTerm] = ()

    def row(self, row: Row, args: argparse.Namespace) -> dict[str, Any]:
        """Ratios of the whole run and of the time between tokens once all decode; the first turn of each does not count."""
        terms = [(self.terms[index % row.adapters],) if row.adapters else () for index in range(row.batch)]
        requests = [Request(item, args.prompt_tokens, args.pair_tokens) for item in terms]
        traces: list[tuple[Trace, Trace]] = []
        for index in range(args.pairs + 1):
            benches = {0: self.first, 1: self.second}
            found = {side: benches[side].run(requests) for side in ((0, 1) if index % 2 else (1, 0))}
            traces += [(found[0], found[1])] if index else []
        turns = [(turn_ms(a), turn_ms(b)) for a, b in traces]
        totals = [(a.total_s, b.total_s) for a, b in traces]
        figures = {"pairs": args.pairs, "first_turn_ms": min(a for a, _ in turns), "second_turn_ms": min(b for _, b in turns)}
        figures |= ratio_of(turns, "turn") | ratio_of(totals, "total")
        return {"row": self.name, "batch": row.batch, "adapters": row.adapters, **figures}


def lora_engine_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Requests that name no adapter, on an engine that holds 64 and on one that has room for a single page."""
    with tempfile.TemporaryDirectory(prefix="bench", dir=args.files) as directory:
        able = OpenedEngine(args, Path(directory) / "able", args.adapter_bytes)
        page_bytes = 2 * PageLayout(able.source.spec.linears, able.page_rank).page_elements
        bare = OpenedEngine(args, Path(directory) / "bare", page_bytes)
        yield facts(able.engine, args, able.start_s)
        pools = Pools(Path(directory), able.engine, able.source.spec, able.page_rank)
        able.bench.run([Request((term,), 16, 2) for term, _ in pools.terms("16", 64)])
        yield from _paired_rows(Paired("lora engine on / off", able.bench, bare.bench), (Row(b, 0) for b in (64, 1, 256)), args)
        able.engine.close()
        bare.engine.close()


def deterministic_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The same requests on an engine whose answers do not depend on the batch, and on one that does as it likes."""
    with tempfile.TemporaryDirectory(prefix="bench", dir=args.files) as directory:
        free = OpenedEngine(args, Path(directory) / "free", args.adapter_bytes)
        exact_args = argparse.Namespace(**{**vars(args), "deterministic": True})
        exact = OpenedEngine(exact_args, Path(directory) / "exact", args.adapter_bytes)
        yield facts(exact.engine, exact_args, exact.start_s)
        pools = Pools(Path(directory), free.engine, free.source.spec, free.page_rank)
        terms = [term for term, _ in pools.terms("16", 64)]
        for opened in (free, exact):
            opened.bench.run([Request((term,), 16, 2) for term in terms])
        paired = Paired("deterministic / not", exact.bench, free.bench, terms)
        yield from _paired_rows(paired, (Row(64, 64), Row(64, 0), Row(1, 1), Row(256, 64)), args)
        free.engine.close()
        exact.engine.close()


def _paired_rows(paired: Paired, table: Iterable[Row], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    started = time.perf_counter()
    gc.collect()
    gc.freeze()
    for row in table:
        if time.perf_counter() - started < args.budget_s:
            yield paired.row(row, args)


def measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The tables that were asked for: those of one engine together, then those of two."""
    table = list(dict.fromkeys(row for name in args.table if name in TABLES for row in TABLES[name]))
    if table:
        yield from rows(table, args)
    for name in args.table:
        if name in PAIRED:
            yield from PAIRED[name](args)


def rows(table: Sequence[Row], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Open an engine and measure the rows until --budget-s is spent."""
    started = time.perf_counter()
    # The pool decides what fits: every adapter of the largest row must be resident while it runs.
    with tempfile.TemporaryDirectory(prefix="bench", dir=args.files) as directory:
        opened = OpenedEngine(args, Path(directory), args.adapter_bytes)
        engine, bench, source = opened.engine, opened.bench, opened.source
        yield facts(engine, args, opened.start_s)
        pools = Pools(Path(directory), engine, source.spec, opened.page_rank)
        gc.collect()
        gc.freeze()
        try:
            for row in table:
                if time.perf_counter() - started > args.budget_s:
                    return
                yield _guarded(bench, row, pools, source.spec, args)
        finally:
            engine.close()


def _guarded(bench: Bench, row: Row, pools: Pools, spec: ModelSpec, args: argparse.Namespace) -> dict[str, Any]:
    chosen = choose(row, pools.terms(row.rank, row.adapters), seed=row.batch)
    distinct = len({found[0].adapter_id for found in chosen if found is not None})
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    found = measure(bench, row, chosen, args)
    floor = floor_ms(spec, row, chosen, args.prompt_tokens + args.new_tokens // 2)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    values = {**asdict(row), "distinct_adapters": distinct, **found, "floor_ms": floor}
    if not args.skip_graphs:
        short = [Request(() if item is None else (item[0],), args.prompt_tokens, 12) for item in chosen]
        values["graph_ms"] = graph_ms(bench, row, short)
    values["step_over_floor"] = found["step_ms"] / floor
    return {"row": "W1", **values, "peak_bytes": peak}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", nargs="+", choices=(*TABLES, *PAIRED), default=["anchors"])
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="another number of layers")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--kernels", choices=("auto", "cpp", "reference"), default="auto")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--max-sequences", type=int, default=256)
    parser.add_argument("--max-batch-tokens", type=int, help="default: the engine's")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--adapter-bytes", type=int, default=8 << 30)
    parser.add_argument("--host-bytes", type=int, default=2 << 30)
    parser.add_argument("--kv-bytes", type=int, default=0, help="0: what is left")
    parser.add_argument("--pairs", type=int, default=6, help="of the tables lora-engine and deterministic")
    parser.add_argument("--pair-tokens", type=int, default=48, help="new tokens of a request of those tables")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--skip-graphs", action="store_true", help="do not time the steps' graphs alone")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--budget-s", type=float, default=600.0, help="begin no row after this")
    parser.add_argument("--files", help="where adapter files go")
    parser.add_argument("--brief", action="store_true", help="print short lines; the file has everything")
    parser.add_argument("--out", type=Path, help="append the rows as JSON lines")
    return parser.parse_args(argv)


PAIRED = {"lora-engine": lora_engine_rows, "deterministic": deterministic_rows}


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    report(measured(args), args.out, is_brief=args.brief)
    return 0
