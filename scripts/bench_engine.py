#!/usr/bin/env python3
"""Measure the engine against transformers + PEFT, in one process, in interleaved pairs.

    .venv/bin/python scripts/bench_engine.py --pairs 15 --out figures.jsonl
    .venv/bin/python scripts/bench_engine.py --rows http books      (starts the nodes it needs)
    .venv/bin/python scripts/bench_engine.py --rows peer --peer-url http://127.0.0.1:9000 --url-models model
    .venv/bin/python scripts/bench_engine.py --workload W1 --out figures.jsonl      (on a GPU; W2, W3: see bench_adapters.py)

Work: 64 random prompt tokens (other ones for every request), 64 new tokens, greedy, end-of-sequence off, no prefix cache,
8 distinct adapters of rank 8 on all linear modules of the layers; request i uses adapter i mod 8.
decode tok/s = C x 63 / (last finish - earliest first token); stream tok/s = the sum of 63 / (own last - own first token) over the
requests, which is the same when all begin together and is not, over HTTP, slowed by prompts that arrive after the first; total
tok/s = C x 64 / (last finish - submission). A pair runs both sides one after the other, and the other way round
in the next pair; the figure is the median of the pairs' ratios with the interval of order statistics that covers it with >= 95 %.

Exit status: 0; 2 when the torch reference ran although nobody asked for it (`--kernels reference` asks).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bench_report import commit, median_interval

from node.adapters.binding import LinearTable
from node.adapters.verify import AdapterVerifier
from node.config import AdapterSettings, EngineSettings, ModelSettings, load_settings
from node.engine.client import EngineClient
from node.engine.engine import Engine, open_engine
from node.engine.messages import Ready, Submit
from node.models.source import resolve
from node.request import AdapterTerm, Sampling

ADAPTER_COUNT = 8
RANK = 8
ROWS = ("mixed", "base", "share", "deterministic", "memory", "http", "books", "peer")
SERVE_WITHOUT_BOOKS = "--serve-without-books"  # this file again, as the node of the row books
CHOICE_PAIRS = 3  # to find PEFT's faster adapter dtype before the pairs that count


@dataclass(frozen=True)
class Timing:
    """One run of C requests. Speeds in tokens/s, times in seconds."""

    decode_tok_s: float
    stream_tok_s: float
    total_tok_s: float
    first_token_s: float


def timing(started_s: float, first_s: list[float], last_s: list[float], token_count: int) -> Timing:
    """Turn the moments of each request's first and last token, and the number of all tokens, into the speeds of a run."""
    decode_count = token_count - len(first_s)
    per_request = decode_count / len(first_s)
    return Timing(
        decode_count / max(max(last_s) - min(first_s), 1e-9),
        sum(per_request / max(last - first, 1e-9) for first, last in zip(first_s, last_s, strict=True)),
        token_count / (max(last_s) - started_s),
        statistics.mean(moment - started_s for moment in first_s),
    )


def make_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Random token ids, the same for both sides of a pair."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, vocab_size - 10, (count, length), generator=generator).tolist()


# ---- ours, in process


def engine_settings(args: argparse.Namespace, **changes: Any) -> EngineSettings:
    values = {
        "threads": args.threads,
        "kernels": args.kernels,
        "prefix_cache": False,
        "max_batch_tokens": args.max_batch_tokens,
        "kv_cache_bytes": args.kv_cache_bytes,
    }
    return EngineSettings(**{**values, **changes})


class Ours:
    """The engine on this thread."""

    def __init__(self, args: argparse.Namespace, adapters: list[Path], state_dir: Path, **changes: Any) -> None:
        settings = engine_settings(args, **changes)
        self.engine: Engine = open_engine(ModelSettings(path=args.model), settings, AdapterSettings(), state_dir)
        self.ready = self.engine.ready
        self.terms = adapter_terms(self.ready, adapters)
        self._new_tokens = args.new_tokens
        self._run_count = 0

    def run(self, prompts: list[list[int]], is_mixed: bool) -> Timing:
        torch.set_num_threads(1)  # as `open_engine` leaves it: the kernels have threads of their own
        self._run_count += 1
        started_s = time.perf_counter()
        for index, prompt in enumerate(prompts):
            terms = (self.terms[index % ADAPTER_COUNT],) if is_mixed else ()
            self.engine.add(make_submit(f"{self._run_count}-{index}", prompt, terms, self._new_tokens))
        first_s: dict[str, float] = {}
        last_s: dict[str, float] = {}
        token_count = 0
        while self.engine.has_work:
            events, _ = self.engine.step()
            now_s = time.perf_counter()
            for event in events:
                if event.finish_reason == "error":
                    raise SystemExit(f"the engine failed: {event.error_code}: {event.error_message}")
                token_count += len(event.tokens)
                first_s.setdefault(event.sequence_id, now_s)
                last_s[event.sequence_id] = now_s
        return timing(started_s, list(first_s.values()), [last_s[name] for name in first_s], token_count)


def adapter_terms(ready: Ready, adapters: list[Path]) -> list[AdapterTerm]:
    """Verify the adapters as the API process does."""
    verifier = AdapterVerifier(LinearTable(ready.linears), ready.base_id, max_rank=256, max_bytes=1 << 30)
    return [AdapterTerm(verifier.verify(path).adapter_id, str(path), 1.0) for path in adapters]


def make_submit(sequence_id: str, prompt: list[int], terms: tuple[AdapterTerm, ...], new_tokens: int) -> Submit:
    sampling = Sampling(max_new_tokens=new_tokens)
    return Submit(sequence_id=sequence_id, tenant="bench", prompt_ids=tuple(prompt), terms=terms, sampling=sampling)


# ---- theirs, in process


def save_plain(model: str, directory: Path) -> Path:
    """The same weights as an ordinary bfloat16 checkpoint. transformers would keep a GGUF's blocks packed, which is slower."""
    from transformers import AutoModelForCausalLM, GgufConfig

    files = resolve(model)
    if files.kind == "safetensors":
        return files.directory
    options = {"gguf_file": files.weights[0].name, "quantization_config": GgufConfig(dequantize=True)}
    dense = AutoModelForCausalLM.from_pretrained(files.directory, dtype=torch.bfloat16, **options)
    state = {name: value for name, value in dense.state_dict().items() if not (name == "lm_head.weight" and is_tied(dense))}
    plain = type(dense)(plain_config(dense.config)).to(torch.bfloat16)
    plain.load_state_dict(state, strict=False)
    plain.save_pretrained(directory / "plain")
    return directory / "plain"


def is_tied(model: Any) -> bool:
    return bool(model.config.tie_word_embeddings)


def plain_config(config: Any) -> Any:
    """The configuration without the note that its weights came packed."""
    values = {key: value for key, value in config.to_dict().items() if key != "quantization_config"}
    return type(config)(**values)


def load_transformers(checkpoint: Path) -> Any:
    """A checkpoint in transformers, bfloat16, as it loads it; end-of-sequence off."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    loaded.generation_config.eos_token_id = None
    loaded.generation_config.pad_token_id = 0
    return loaded


def make_adapters(directory: Path, model: Path) -> list[Path]:
    """Random adapters written by PEFT, A and B both non-zero."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    peft = get_peft_model(load_transformers(model), config)
    paths = []
    for index in range(ADAPTER_COUNT):
        generator = torch.Generator().manual_seed(index)
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
        paths.append(directory / "adapters" / f"adapter-{index}")
        peft.save_pretrained(paths[-1])
    return paths


class Theirs:
    """transformers `generate`, with PEFT's `adapter_names` for mixed batches. `adapter_dtype`: "float32" or "bfloat16"."""

    def __init__(self, args: argparse.Namespace, checkpoint: Path, adapters: list[Path], adapter_dtype: str | None) -> None:
        self._new_tokens, self._threads = args.new_tokens, args.threads
        self._model = load_transformers(checkpoint)
        if adapter_dtype is not None:
            self._add_adapters(adapters, is_wide=adapter_dtype == "float32")

    def _add_adapters(self, adapters: list[Path], is_wide: bool) -> None:
        from peft import PeftModel

        first, *others = adapters
        # autocast_adapter_dtype is PEFT's default: adapters stay float32 over a bfloat16 base.
        self._model = PeftModel.from_pretrained(self._model, first, adapter_name="a0", autocast_adapter_dtype=is_wide)
        for index, path in enumerate(others, start=1):
            self._model.load_adapter(path, adapter_name=f"a{index}", autocast_adapter_dtype=is_wide)
        found = {parameter.dtype for name, parameter in self._model.named_parameters() if "lora_" in name}
        if found != {torch.float32 if is_wide else torch.bfloat16}:
            raise SystemExit(f"PEFT loaded the adapters as {found}; this benchmark does not know that version")
        self._model.eval()

    def run(self, prompts: list[list[int]], is_mixed: bool) -> Timing:
        from transformers import StoppingCriteria, StoppingCriteriaList

        torch.set_num_threads(self._threads)
        moments: list[float] = []

        class Watch(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
                moments.append(time.perf_counter())
                return torch.zeros(input_ids.shape[0], dtype=torch.bool)

        options: dict[str, Any] = {}
        if is_mixed:
            options["adapter_names"] = [f"a{index % ADAPTER_COUNT}" for index in range(len(prompts))]
        ids = torch.tensor(prompts)
        started_s = time.perf_counter()
        with torch.inference_mode():
            self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self._new_tokens,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([Watch()]),
                **options,
            )
        count = len(prompts)
        return timing(started_s, [moments[0]] * count, [moments[-1]] * count, count * len(moments))


# ---- over HTTP, any OpenAI-shaped server


class Http:
    """`POST /v1/completions` with streaming; `models` are used in turn when mixed, the first one alone otherwise."""

    def __init__(self, args: argparse.Namespace, url: str, models: list[str]) -> None:
        self._url = url.rstrip("/") + "/v1/completions"
        self._models = models
        self._new_tokens = args.new_tokens
        self._headers = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"} if "OPENAI_API_KEY" in os.environ else {}
        # The one way of OpenAI's API to keep an answer from ending early.
        self._ban = {str(token_id): -100 for token_id in args.eos_ids}

    def run(self, prompts: list[list[int]], is_mixed: bool) -> Timing:
        return asyncio.run(self._run(prompts, is_mixed))

    async def _run(self, prompts: list[list[int]], is_mixed: bool) -> Timing:
        import aiohttp

        async with aiohttp.ClientSession(headers=self._headers) as session:
            started_s = time.perf_counter()
            choose = self._models[1:] if is_mixed and len(self._models) > 1 else self._models[:1]
            runs = [self._one(session, prompt, choose[index % len(choose)]) for index, prompt in enumerate(prompts)]
            found = await asyncio.gather(*runs)
        first_s, last_s, counts = zip(*found, strict=True)
        return timing(started_s, list(first_s), list(last_s), sum(counts))

    async def _one(self, session: Any, prompt: list[int], model: str) -> tuple[float, float, int]:
        """Returns when the first token came, when the last, and how many there were by the server's own count."""
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": self._new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logit_bias": self._ban,
        }
        first_s, last_s, count = 0.0, 0.0, 0
        async with session.post(self._url, json=body) as response:
            if response.status != 200:
                raise SystemExit(f"{self._url} answered {response.status}: {(await response.text())[:500]}")
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                last_s = time.perf_counter() if chunk.get("choices") else last_s
                first_s = first_s or last_s
                count = (chunk.get("usage") or {}).get("completion_tokens", count)
        return first_s, last_s, count


# ---- nodes of our own


class NoBooks:
    """Stands where ledger and voucher desk stand, and does nothing: the other side of the row books."""

    is_healthy = True

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    async def open(self, opening: Any) -> None:
        pass

    async def close(self, closing: Any) -> dict[str, Any]:
        return {}

    async def receipt(self, *_: Any) -> None:
        return None


def serve_without_books(config: str) -> None:
    """Run `openlora-node start` with `NoBooks`."""
    import node.app
    from node.cli.start import start

    node.app.SettlementBooks = NoBooks  # type: ignore[assignment,misc]
    start(config=Path(config))


class OwnNode:
    """A node in processes of its own, with the settings of the in-process engine."""

    def __init__(self, args: argparse.Namespace, directory: Path, adapters: list[Path], has_books: bool) -> None:
        place = directory / ("node" if has_books else "node-without-books")
        place.mkdir()
        config = place / "node.toml"
        engine = engine_settings(args)
        config.write_text(
            f'data_dir = "{place}"\n[server]\nport = 0\n[model]\npath = "{args.model}"\n'
            f'[adapters]\ndirectory = "{adapters[0].parent}"\n'
            f'[engine]\nthreads = {engine.threads}\nkernels = "{engine.kernels}"\nprefix_cache = false\n'
            f"max_batch_tokens = {engine.max_batch_tokens}\nkv_cache_bytes = {engine.kv_cache_bytes}\n"
            '[chain]\nprofile = "none"\n[telemetry]\nlog_level = "error"\n'
        )
        if has_books:
            command = [str(Path(sys.executable).parent / "openlora-node"), "start", "--config", str(config)]
        else:
            command = [sys.executable, __file__, SERVE_WITHOUT_BOOKS, str(config)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = self._read_url()
        self.models = ["", *(path.name for path in adapters)]

    def _read_url(self) -> str:
        if self._process.stdout is None:
            raise SystemExit("the node was started without an output pipe")
        for line in self._process.stdout:
            if " serves at " in line:
                return line.split(" serves at ")[1].strip()
        raise SystemExit("the node did not start; its own lines say why")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(60)


# ---- pairs


Side = Callable[[int], Timing]


def pairs(args: argparse.Namespace, first: Side, second: Side) -> Iterator[tuple[Timing, Timing]]:
    """Run both sides alternately; one warm-up of each is not counted."""
    first(-1), second(-1)
    for index in range(args.pairs):
        if index % 2:
            theirs, ours = second(index), first(index)
        else:
            ours, theirs = first(index), second(index)
        yield ours, theirs


def compare(args: argparse.Namespace, name: str, concurrency: int, first: Side, second: Side, **facts: Any) -> dict[str, Any]:
    """Measure one row: the ratios of the two sides' speeds, first over second."""
    found = list(pairs(args, first, second))
    ratios: dict[str, float] = {}
    for measure in ("decode", "stream", "total"):
        speeds = [(getattr(a, f"{measure}_tok_s"), getattr(b, f"{measure}_tok_s")) for a, b in found]
        median, low, high = median_interval([a / b for a, b in speeds])
        ratios |= {f"{measure}_ratio": round(median, 3), f"{measure}_low": round(low, 3), f"{measure}_high": round(high, 3)}
    return {
        "row": name,
        "concurrency": concurrency,
        "pairs": len(found),
        **ratios,
        **{f"first_{key}": value for key, value in medians([a for a, _ in found]).items()},
        **{f"second_{key}": value for key, value in medians([b for _, b in found]).items()},
        **facts,
    }


def medians(timings: list[Timing]) -> dict[str, float]:
    return {
        key: round(statistics.median(getattr(item, key) for item in timings), 4)
        for key in ("decode_tok_s", "stream_tok_s", "total_tok_s", "first_token_s")
    }


# ---- rows


class Bench:
    """The rows. Every model is loaded once, when a row first needs it."""

    def __init__(self, args: argparse.Namespace, directory: Path) -> None:
        self._args = args
        self._directory = directory
        self._made: dict[str, Any] = {}

    def _once(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            print(f"loading {key}", file=sys.stderr)
            self._made[key] = make()
        return self._made[key]

    @property
    def adapters(self) -> list[Path]:
        return self._once("adapters", lambda: make_adapters(self._directory, self.checkpoint))

    @property
    def checkpoint(self) -> Path:
        return self._once("checkpoint", lambda: save_plain(self._args.model, self._directory))

    @property
    def ours(self) -> Ours:
        return self._once("ours", lambda: Ours(self._args, self.adapters, self._directory))

    def theirs(self, dtype: str | None) -> Theirs:
        return self._once(f"transformers, adapters {dtype}", lambda: Theirs(self._args, self.checkpoint, self.adapters, dtype))

    def side(self, runner: Ours | Theirs | Http, concurrency: int, is_mixed: bool) -> Side:
        def run(index: int) -> Timing:
            prompts = make_prompts(concurrency, self._args.prompt_tokens, self.ours.ready.vocab_size, seed=1000 + index)
            return runner.run(prompts, is_mixed)

        return run

    def rows(self) -> Iterator[dict[str, Any]]:
        for name in self._args.rows:
            yield from getattr(self, f"row_{name}")()

    def row_mixed(self) -> Iterator[dict[str, Any]]:
        """Mixed adapters against `adapter_names`. The adapter dtype that is faster for PEFT in a few pairs is quoted."""
        few = argparse.Namespace(**{**vars(self._args), "pairs": min(CHOICE_PAIRS, self._args.pairs)})
        for concurrency in self._args.concurrency:
            ours = self.side(self.ours, concurrency, True)
            peers = {dtype: self.side(self.theirs(dtype), concurrency, True) for dtype in ("float32", "bfloat16")}
            name, found = "mixed / peft adapter_names", {}
            for dtype, theirs in peers.items():
                found[dtype] = compare(few, name, concurrency, ours, theirs, peer_adapters=dtype, quote=False)
                yield found[dtype]
            dtype = max(found, key=lambda key: found[key]["second_decode_tok_s"])
            yield compare(self._args, name, concurrency, ours, peers[dtype], peer_adapters=dtype, quote=True)

    def row_base(self) -> Iterator[dict[str, Any]]:
        c = max(self._args.concurrency)
        yield compare(
            self._args, "base / transformers", c, self.side(self.ours, c, False), self.side(self.theirs(None), c, False)
        )

    def row_share(self) -> Iterator[dict[str, Any]]:
        c = max(self._args.concurrency)
        yield compare(self._args, "mixed / own base", c, self.side(self.ours, c, True), self.side(self.ours, c, False))

    def row_deterministic(self) -> Iterator[dict[str, Any]]:
        c = max(self._args.concurrency)
        exact = self._once("ours, deterministic", lambda: Ours(self._args, self.adapters, self._directory, deterministic=True))
        yield compare(self._args, "deterministic / not", c, self.side(exact, c, True), self.side(self.ours, c, True))

    def row_memory(self) -> Iterator[dict[str, Any]]:
        """Peak resident memory of an engine process that loads the model and serves every concurrency, mixed."""
        terms = self.ours.terms
        yield {"row": "engine process", "peak_rss_bytes": asyncio.run(peak_rss_bytes(self._args, terms, self._directory))}

    def node(self, has_books: bool) -> OwnNode:
        name = "node" if has_books else "node without books"
        return self._once(name, lambda: OwnNode(self._args, self._directory, self.adapters, has_books))

    def row_http(self) -> Iterator[dict[str, Any]]:
        """The same work through a node's HTTP interface, books and all."""
        own = self.node(True)
        for concurrency in self._args.concurrency:
            http = self.side(Http(self._args, own.url, own.models), concurrency, True)
            yield compare(self._args, "http / in process", concurrency, http, self.side(self.ours, concurrency, True))

    def row_books(self) -> Iterator[dict[str, Any]]:
        """What records, receipts and two durable commits a request cost."""
        c = max(self._args.concurrency)
        with_books, without = (Http(self._args, own.url, own.models) for own in (self.node(True), self.node(False)))
        yield compare(self._args, "books / none", c, self.side(with_books, c, True), self.side(without, c, True))

    def close(self) -> None:
        """End the nodes this benchmark started."""
        for made in self._made.values():
            if isinstance(made, OwnNode):
                made.close()

    def row_peer(self) -> Iterator[dict[str, Any]]:
        for concurrency in self._args.concurrency:
            peer = Http(self._args, self._args.peer_url, self._args.url_models.split(","))
            ours, theirs = self.side(self.ours, concurrency, True), self.side(peer, concurrency, True)
            yield compare(self._args, "mixed / peer server", concurrency, ours, theirs, url=self._args.peer_url)


async def peak_rss_bytes(args: argparse.Namespace, terms: list[AdapterTerm], directory: Path) -> int:
    """Serve the mixed work in a fresh engine process and read the kernel's own high-water mark."""
    overrides = {"data_dir": str(directory), "model.path": args.model}
    settings = load_settings(None, overrides).model_copy(update={"engine": engine_settings(args)})
    with tempfile.TemporaryDirectory(prefix="bench") as runtime:
        client = EngineClient(settings, Path(runtime))
        ready = await client.start()
        for concurrency in args.concurrency:
            prompts = make_prompts(concurrency, args.prompt_tokens, ready.vocab_size, seed=concurrency)
            streams = [
                client.submit(make_submit(f"{concurrency}-{i}", prompt, (terms[i % ADAPTER_COUNT],), args.new_tokens))
                for i, prompt in enumerate(prompts)
            ]
            for stream in streams:
                async for event in stream:
                    if event.finish_reason == "error":
                        raise SystemExit(f"the engine failed: {event.error_code}: {event.error_message}")
        status = Path(f"/proc/{client.pid}/status").read_text()
        await client.close()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def machine(args: argparse.Namespace, ready: Ready) -> dict[str, Any]:
    """What was measured, on what, with which versions."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    return {
        "row": "machine",
        "cpu": cpu or platform.processor(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "load_average": os.getloadavg()[0],
        "kernels": ready.kernels,
        "model": ready.model_id,
        "dtype": ready.dtype,
        "max_batch_tokens": args.max_batch_tokens,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "commit": commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["mixed", "base", "share", "deterministic", "memory"])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--kernels", choices=["auto", "cpp", "reference"], default="auto")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--max-batch-tokens", type=int, default=1024, help="rows in one step; 1024 prefills 16 prompts at once")
    parser.add_argument("--kv-cache-bytes", type=int, default=256 << 20)
    parser.add_argument("--peer-url", help="another OpenAI-shaped server, for the row peer")
    parser.add_argument("--url-models", default="base", help="model names over HTTP: the base first, then the adapters")
    parser.add_argument("--eos-ids", type=int, nargs="*", default=[2], help="banned over HTTP by logit_bias")
    parser.add_argument("--out", type=Path, help="append the rows as JSON lines")
    args = parser.parse_args(argv)
    if "peer" in args.rows and not args.peer_url:
        parser.error("the row peer needs --peer-url")
    if args.pairs < 1:
        parser.error("--pairs must be at least 1")
    return args


def main(argv: list[str]) -> int:
    if argv[:1] == [SERVE_WITHOUT_BOOKS]:
        serve_without_books(argv[1])
        return 0
    if "--workload" in argv:
        return run_workload(argv)
    args = parse(argv)
    with tempfile.TemporaryDirectory(prefix="bench") as directory:
        bench = Bench(args, Path(directory))
        report(args, machine(args, bench.ours.ready))
        try:
            for row in bench.rows():
                report(args, row)
        finally:
            bench.close()
        kernels = bench.ours.ready.kernels
        bench.ours.engine.close()
    if kernels == "reference" and args.kernels != "reference":
        print("the torch reference ran: build the C++ kernels, or ask for it with --kernels reference", file=sys.stderr)
        return 2
    return 0


def run_workload(argv: list[str]) -> int:
    """The workloads of a GPU are scripts of their own, which share this door: W1 decode, W2 churn, W3 cold adapters."""
    import bench_adapters
    import bench_workloads

    at = argv.index("--workload")
    name = argv[at + 1 : at + 2]
    rest = argv[:at] + argv[at + 2 :]
    if name == ["W1"]:
        return bench_workloads.main(rest)
    if name in (["W2"], ["W3"]):
        return bench_adapters.main(["--rows", "churn" if name == ["W2"] else "cold", *rest])
    raise SystemExit("--workload takes W1, W2 or W3")


def report(args: argparse.Namespace, row: dict[str, Any]) -> None:
    line = json.dumps(row)
    print(line, flush=True)
    if args.out is not None:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
