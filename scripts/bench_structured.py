#!/usr/bin/env python3
"""Measure what a JSON schema costs a decode step, in one process, in adjacent steps.

    .venv/bin/python scripts/bench_structured.py --batch 8 16 --rounds 9 --out figures.jsonl

Work: a batch of sequences of one prompt, 64 random tokens and 64 new ones, end-of-sequence off, no prefix cache. Two engines with
the same weights hold the same batch: on the free one nothing is asked of the answers, on the other each row follows a JSON schema
of ten fields whose list is too long to end before the last token. Once all rows of both decode, the engines step in turns, the
other one first in the next turn: the two steps of a pair are milliseconds apart, and what else the machine does slows both. A
round's figure is the median of its pairs' ratios; `ratio` is the median of the rounds, `ratio_95` the range of order statistics
that covers it with >= 95 %. Where steps overlap on a device (the runner works ahead), pairs of whole runs take the place of pairs
of steps, and a run's step time is the median over its steps in which every row decoded. `cpu_ratio` is the same of the processor
time of all threads: it hardly knows what else runs, but counts threads that wait for one another.

`added_ms` is the CPU time of drawing and of advancing grammars beyond the free side's, a step; `compile_ms` the schema's first
compilation. Row structured is greedy with one schema for all, -distinct has a schema for each sequence, -sampled has temperature
1. With --shape the weights are random: hardly a token that the model wants is allowed, so every row of every step needs its mask.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from random_model import random_source

from node.config import AdapterSettings, EngineSettings, ModelSettings
from node.engine.engine import Engine, open_engine
from node.engine.grammar import Vocabulary
from node.engine.messages import Submit
from node.request import Sampling

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "role": {"enum": ["admin", "editor", "reader"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 5},
        "address": {
            "type": "object",
            "properties": {
                "street": {"type": "string", "maxLength": 40},
                "city": {"type": "string", "maxLength": 40},
                "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
            },
            "required": ["street", "city", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "email", "role", "tags", "address"],
    "additionalProperties": False,
}


def grammar(index: int) -> str:
    """A list of people that cannot end soon; `index` makes it another schema of the same work."""
    schema = {"type": "array", "items": PERSON, "minItems": 1000 + index}
    options = {"whitespace_pattern": r"\n[ ]{0,32}|[ ]?"}
    return f"start: %json {json.dumps({**schema, 'x-guidance': options})}"


class CallClock:
    """Counts the CPU time of one method of an object, call by call: drawing happens on one thread."""

    def __init__(self, target: Any, name: str) -> None:
        self.seconds: list[float] = []
        self._call = getattr(target, name)
        setattr(target, name, self._timed)

    def _timed(self, *args: Any) -> Any:
        started_s = time.thread_time()
        result = self._call(*args)
        self.seconds.append(time.thread_time() - started_s)
        return result

    def take_ms(self) -> float:
        """Mean of the calls since the last time without the slowest twentieth, which other processes made slow."""
        kept = sorted(self.seconds)[: max(1, len(self.seconds) * 19 // 20)]
        self.seconds.clear()
        return statistics.mean(kept) * 1000 if kept else 0.0


class Side:
    """One of the two engines. `texts`: what its answers must follow, None for anything."""

    def __init__(self, engine: Engine, texts: list[str | None], args: argparse.Namespace, temperature: float) -> None:
        self.engine = engine
        self.texts = texts
        self.new_tokens: int = args.new_tokens
        self.temperature = temperature
        self.clocks = [CallClock(engine._runner, "draw"), CallClock(engine._grammars, "observe")]

    def add(self, run_id: str) -> None:
        """Hand the batch to the engine."""
        generator = torch.Generator().manual_seed(7)
        prompt = tuple(torch.randint(10, self.engine.ready.vocab_size - 10, (64,), generator=generator).tolist())
        for index, text in enumerate(self.texts):
            sampling = Sampling(max_new_tokens=self.new_tokens, temperature=self.temperature, seed=index)
            name = f"{run_id}-{index}"
            self.engine.add(
                Submit(sequence_id=name, tenant="bench", prompt_ids=prompt, terms=(), sampling=sampling, grammar=text)
            )

    def step(self) -> tuple[tuple[float, float], bool]:
        """Seconds of one step on the clock and of the process, and whether every row drew a token in it."""
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        events, _ = self.engine.step()
        elapsed = time.perf_counter() - started_s, time.process_time() - started_cpu_s
        failed = [event for event in events if event.finish_reason == "error"]
        if failed:
            raise SystemExit(f"the engine failed: {failed[0].error_message}")
        return elapsed, sum(len(event.tokens) for event in events) == len(self.texts)

    def until_all_decode(self) -> None:
        """Compute the prompts."""
        while not self.step()[1]:
            continue

    def run(self, run_id: str) -> float:
        """Decode the batch; returns the median milliseconds of a step."""
        self.add(run_id)
        steps = []
        while self.engine.has_work:
            steps.append(self.step())
        return statistics.median([elapsed_s for (elapsed_s, _), is_full in steps if is_full][1:]) * 1000

    def take_ms(self) -> float:
        return sum(clock.take_ms() for clock in self.clocks)


@dataclass(frozen=True)
class Round:
    """The median ratio of the pairs, of their processor time where it was counted, and each side's median milliseconds."""

    ratio: float
    plain_ms: float
    schema_ms: float
    cpu_ratio: float | None = None


def round_of_steps(free: Side, bound: Side, run_id: str) -> Round:
    """One batch on each engine, step by step in turns."""
    for side in (free, bound):
        side.add(run_id)
        side.until_all_decode()
    times: dict[Side, list[tuple[float, float] | None]] = {free: [], bound: []}
    turn = 0
    while free.engine.has_work and bound.engine.has_work:
        for side in (free, bound) if turn % 2 == 0 else (bound, free):
            elapsed, is_full = side.step()
            times[side].append(elapsed if is_full else None)
        turn += 1
    for side in (free, bound):
        while side.engine.has_work:
            side.step()
    pairs = [(a, b) for a, b in zip(times[free], times[bound], strict=True) if a is not None and b is not None]
    return Round(
        statistics.median(b[0] / a[0] for a, b in pairs),
        statistics.median(a[0] for a, _ in pairs) * 1000,
        statistics.median(b[0] for _, b in pairs) * 1000,
        statistics.median(b[1] / a[1] for a, b in pairs),
    )


def round_of_runs(free: Side, bound: Side, run_id: str, *, is_odd: bool) -> Round:
    """One batch on each engine, one after the other."""
    found = {side: side.run(run_id) for side in ((bound, free) if is_odd else (free, bound))}
    return Round(found[bound] / found[free], found[free], found[bound])


def interval(ratios: list[float]) -> tuple[float, float]:
    """Order statistics around the median that cover it with at least 95 %."""
    ratios, count = sorted(ratios), len(ratios)
    below = 0
    while sum(math.comb(count, k) for k in range(below + 1)) / 2**count <= 0.025:
        below += 1
    return ratios[max(0, below - 1)], ratios[count - max(1, below)]


def figures(name: str, ratios: list[float]) -> dict[str, Any]:
    """The median and its range, where there is one."""
    if not ratios:
        return {}
    low, high = interval(ratios)
    return {name: round(statistics.median(ratios), 4), f"{name}_95": [round(low, 4), round(high, 4)]}


ROWS = {
    "structured": (False, 0.0),
    "structured-distinct": (True, 0.0),
    "structured-sampled": (False, 1.0),
}  # row: whether every sequence has a schema of its own, temperature


def measure(args: argparse.Namespace, engines: tuple[Engine, Engine], batch: int, row: str) -> dict[str, Any]:
    is_distinct, temperature = ROWS[row]
    texts: list[str | None] = [grammar(index if is_distinct else 0) for index in range(batch)]
    free = Side(engines[0], [None] * batch, args, temperature)
    bound = Side(engines[1], texts, args, temperature)
    is_ahead = engines[0]._runner.is_ahead
    rounds: list[Round] = []
    added: list[float] = []
    for index in range(args.rounds + 1):
        name = f"{batch}-{row}-{index}"
        found = round_of_runs(free, bound, name, is_odd=index % 2 == 1) if is_ahead else round_of_steps(free, bound, name)
        extra_ms = bound.take_ms() - free.take_ms()
        if index:  # the first warms caches and automata up
            rounds.append(found)
            added.append(extra_ms)
    plain_ms = [item.plain_ms for item in rounds]
    cpu_ratios = [item.cpu_ratio for item in rounds if item.cpu_ratio is not None]
    return {
        "row": row,
        "batch": batch,
        "rounds": args.rounds,
        "pairs_of": "runs" if is_ahead else "steps",
        "plain_step_ms": round(statistics.median(plain_ms), 3),
        "schema_step_ms": round(statistics.median(item.schema_ms for item in rounds), 3),
        **figures("ratio", [item.ratio for item in rounds]),
        **figures("cpu_ratio", cpu_ratios),
        "added_ms": round(statistics.median(added), 3),
        "added_share": round(statistics.median(added) / min(plain_ms), 4),
        "model": engines[0].ready.model_id,
        "dtype": engines[0].ready.dtype,
        "device": engines[0].ready.device,
        "kernels": engines[0].ready.kernels,
        "threads": args.threads or os.cpu_count(),
    }


def opened(args: argparse.Namespace, directory: Path) -> Engine:
    """An engine; one of a random model keeps half of what it may of the device's memory to the other."""
    settings = EngineSettings(threads=args.threads, prefix_cache=False, kv_cache_bytes=args.kv_bytes or None)
    model, source = ModelSettings(path=args.model, dtype=args.dtype), None
    if args.shape:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        source = random_source(args.shape, device, 2048)
        if args.tokenizer:
            source = replace(source, write_tokenizer=with_tokenizer(source.write_tokenizer, args.tokenizer))
    return open_engine(model, settings, AdapterSettings(memory_bytes=256 << 20), directory, source=source)


def with_tokenizer(write: Callable[[Path], Path], file: Path) -> Callable[[Path], Path]:
    """`write`, with the tokens of a real model in place of invented words."""

    def write_both(directory: Path) -> Path:
        target = write(directory)
        (target / "tokenizer.json").write_bytes(file.read_bytes())
        return target

    return write_both


def compile_ms(engine: Engine) -> float:
    vocabulary = Vocabulary(
        Path(engine.ready.tokenizer_dir) / "tokenizer.json", engine.ready.vocab_size, engine.ready.eos_token_ids
    )
    started_s = time.perf_counter()
    vocabulary.compile(grammar(0))
    return (time.perf_counter() - started_s) * 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--shape", help="random weights of this shape instead, see random_model")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json for the random model")
    parser.add_argument("--kv-bytes", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as state_dir:
        engines = (opened(args, Path(state_dir) / "free"), opened(args, Path(state_dir) / "bound"))
        first_ms = round(compile_ms(engines[1]), 2)
        try:
            for batch in args.batch:
                for row in args.rows:
                    line = json.dumps({**measure(args, engines, batch, row), "compile_ms": first_ms})
                    print(line, flush=True)
                    if args.out:
                        with args.out.open("a", encoding="utf-8") as file:
                            file.write(line + "\n")
        finally:
            for engine in engines:
                engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
