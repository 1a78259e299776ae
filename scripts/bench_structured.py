#!/usr/bin/env python3
"""Measure what a JSON schema costs a decode step, in one process, in interleaved pairs.

    .venv/bin/python scripts/bench_structured.py --batch 8 16 --pairs 9 --out figures.jsonl

Work: a batch of sequences of one prompt, 64 random tokens and 64 new ones, end-of-sequence off, no prefix cache. One side is
free; every row of the other follows a JSON schema of ten fields whose list is too long to end before the last token. A step's
time is the median over the steps in which every row decodes; a pair runs both sides, and the other way round in the next pair.
The figure is the median of the pairs' ratios, with the range of order statistics that covers it with >= 95 %. On a machine with
other work that range is wide; `added_ms` is then the better figure: the CPU time that drawing and advancing take more than on the
free side, and `added_share` that over the fastest free run's step. `compile_ms`: the first compilation of the schema. Row
structured is greedy with one schema for all, -distinct has a schema for every sequence, -sampled has temperature 1.
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
from pathlib import Path
from typing import Any

import torch

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


def run(engine: Engine, batch: int, texts: list[str | None], new_tokens: int, temperature: float, run_id: str) -> list[float]:
    """Decode one batch; returns the seconds of every step in which all rows decoded."""
    generator = torch.Generator().manual_seed(7)
    prompt = tuple(torch.randint(10, engine.ready.vocab_size - 10, (64,), generator=generator).tolist())
    for index in range(batch):
        sampling = Sampling(max_new_tokens=new_tokens, temperature=temperature, seed=index)
        submit = Submit(
            sequence_id=f"{run_id}-{index}",
            tenant="bench",
            prompt_ids=prompt,
            terms=(),
            sampling=sampling,
            grammar=texts[index],
        )
        engine.add(submit)
    times: list[float] = []
    while engine.has_work:
        started_s = time.perf_counter()
        events, _ = engine.step()
        elapsed_s = time.perf_counter() - started_s
        failed = [event for event in events if event.finish_reason == "error"]
        if failed:
            raise SystemExit(f"the engine failed: {failed[0].error_message}")
        if sum(len(event.tokens) for event in events) == batch:
            times.append(elapsed_s)
    return times[1:]  # the first of them ends the prompts


def interval(ratios: list[float]) -> tuple[float, float]:
    """Order statistics around the median that cover it with at least 95 %."""
    ratios, count = sorted(ratios), len(ratios)
    below = 0
    while sum(math.comb(count, k) for k in range(below + 1)) / 2**count <= 0.025:
        below += 1
    return ratios[max(0, below - 1)], ratios[count - max(1, below)]


ROWS = {
    "structured": (False, 0.0),
    "structured-distinct": (True, 0.0),
    "structured-sampled": (False, 1.0),
}  # row: whether every sequence has a schema of its own, temperature


def measure(args: argparse.Namespace, engine: Engine, clocks: list[CallClock], batch: int, row: str) -> dict[str, Any]:
    is_distinct, temperature = ROWS[row]
    texts: list[str | None] = [grammar(index if is_distinct else 0) for index in range(batch)]
    sides = {"plain": [None] * batch, "schema": texts}
    medians: dict[str, list[float]] = {name: [] for name in sides}
    for name in sides:
        run(engine, batch, sides[name], args.new_tokens, temperature, f"warm-{batch}-{row}-{name}")
    added: dict[str, list[float]] = {name: [] for name in sides}
    for clock in clocks:
        clock.seconds.clear()
    for pair in range(args.pairs):
        for name in list(sides)[:: 1 if pair % 2 == 0 else -1]:
            times = run(engine, batch, sides[name], args.new_tokens, temperature, f"{batch}-{row}-{pair}-{name}")
            medians[name].append(statistics.median(times) * 1000)
            added[name].append(sum(clock.take_ms() for clock in clocks))
    ratios = [ours / plain for ours, plain in zip(medians["schema"], medians["plain"], strict=True)]
    low, high = interval(ratios)
    return {
        "row": row,
        "batch": batch,
        "pairs": args.pairs,
        "plain_step_ms": round(statistics.median(medians["plain"]), 3),
        "schema_step_ms": round(statistics.median(medians["schema"]), 3),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_95": [round(low, 4), round(high, 4)],
        "added_ms": round(extra_ms := statistics.median(added["schema"]) - statistics.median(added["plain"]), 3),
        "added_share": round(extra_ms / min(medians["plain"]), 4),
        "dtype": args.dtype,
        "kernels": engine.ready.kernels,
        "threads": args.threads or os.cpu_count(),
    }


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
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as state_dir:
        settings = EngineSettings(threads=args.threads, prefix_cache=False)
        engine = open_engine(ModelSettings(path=args.model, dtype=args.dtype), settings, AdapterSettings(), Path(state_dir))
        clocks = [CallClock(engine._runner, "draw"), CallClock(engine._grammars, "observe")]
        first_ms = round(compile_ms(engine), 2)
        try:
            for batch in args.batch:
                for row in args.rows:
                    line = json.dumps({**measure(args, engine, clocks, batch, row), "compile_ms": first_ms})
                    print(line, flush=True)
                    if args.out:
                        with args.out.open("a", encoding="utf-8") as file:
                            file.write(line + "\n")
        finally:
            engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
