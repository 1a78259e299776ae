"""Time every kernel on SmolLM2-135M shapes and add them up to one decode step.

    python scripts/bench_kernels.py [--threads 2] [--dtype bfloat16] [--isa avx512] [--rows 1 8 16] [--seconds 0.3] [--out FILE]
    python scripts/bench_kernels.py --device cuda [--out FILE] [--short]    # LoRA and fused operations of a Llama-3.1-8B layer

Prints one JSON line per measurement, and appends it to --out. Each layer's call is timed on its own, the least of many rounds is
kept and the layers are summed: the machine's other work only ever adds. All 30 layers have weights of their own and take turns,
so that they come from main memory as they do in a real step. "sum" adds up the operations, "step" is the least whole step, calls
from Python included.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from bench_report import commit
from torch import Tensor

from node.kernels.layout import PageLayout
from node.kernels.linear import LoraSpans, PackedLinear, lora_spans
from node.kernels.lora import LoraPool, LoraRows, lora_rows
from node.kernels.memory import empty_huge
from node.kernels.ops import Kernels

HIDDEN, INTERMEDIATE, LAYERS, HEADS, GROUPS, SIZE, VOCABULARY = 576, 1536, 30, 9, 3, 64, 49152
BLOCK, CONTEXT, EPS, RANK, ADAPTERS = 16, 100, 1e-5, 8, 8


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def least_ms(calls: Sequence[Callable[[], object]], seconds: float) -> float:
    """Sum over `calls` of each one's least time, taking turns for `seconds`, at least five rounds."""
    best, stop, rounds = [float("inf")] * len(calls), time.perf_counter() + seconds, 0
    while rounds < 5 or time.perf_counter() < stop:
        for index, call in enumerate(calls):
            begin = time.perf_counter()
            call()
            best[index] = min(best[index], time.perf_counter() - begin)
        rounds += 1
    return sum(best) * 1e3


@dataclass
class Layer:
    qkv: PackedLinear
    o: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear
    spans: list[LoraSpans]
    keys: Tensor
    values: Tensor


@dataclass
class Step:
    """A decode step of `rows` sequences at one context length, with random weights."""

    kernels: Kernels
    layers: list[Layer]
    head: PackedLinear
    norm: Tensor
    pool: LoraPool
    rows: int
    has_adapters: bool
    hidden: Tensor = field(init=False)
    lora: LoraRows | None = field(init=False)

    def __post_init__(self) -> None:
        dtype = self.norm.dtype
        self.hidden = torch.randn(self.rows, HIDDEN).to(dtype)
        terms = [((i % ADAPTERS, 1.0),) if self.has_adapters else () for i in range(self.rows)]
        self.lora = lora_rows(terms, [1] * self.rows)
        per_sequence = -(-CONTEXT // BLOCK)
        self.tables = torch.arange(self.rows * per_sequence, dtype=torch.int32).view(self.rows, per_sequence)
        self.starts = torch.arange(self.rows + 1, dtype=torch.int32)
        self.lengths = torch.full((self.rows,), CONTEXT, dtype=torch.int32)
        self.positions = torch.full((self.rows,), CONTEXT - 1)
        self.slots = self.tables[:, -1].long() * BLOCK + (CONTEXT - 1) % BLOCK
        angles = torch.randn(2048, SIZE // 2)
        self.cos, self.sin = angles.cos(), angles.sin()

    def linear(self, x: Tensor, packed: PackedLinear, spans: LoraSpans) -> Tensor:
        return self.kernels.linear(x, packed, pool=self.pool, rows=self.lora, spans=spans)

    def attend(self, layer: Layer, qkv: Tensor) -> Tensor:
        q = self.kernels.rope_kv_write(qkv, self.cos, self.sin, self.positions, self.slots, layer.keys, layer.values)
        return self.kernels.paged_attention(q, layer.keys, layer.values, self.tables, self.starts, self.lengths, SIZE**-0.5)

    def run(self) -> Tensor:
        kernels, residual = self.kernels, self.hidden.clone()
        x = kernels.rms_norm(residual, self.norm, EPS)
        for layer in self.layers:
            attended = self.attend(layer, self.linear(x, layer.qkv, layer.spans[0]))
            x = kernels.add_rms_norm(self.linear(attended, layer.o, layer.spans[1]), residual, self.norm, EPS)
            active = kernels.silu_mul(self.linear(x, layer.gate_up, layer.spans[2]))
            x = kernels.add_rms_norm(self.linear(active, layer.down, layer.spans[3]), residual, self.norm, EPS)
        return kernels.linear(x, self.head, out_dtype=torch.float32)


MODULES = [
    ("q", HIDDEN, HEADS * SIZE),
    ("k", HIDDEN, GROUPS * SIZE),
    ("v", HIDDEN, GROUPS * SIZE),
    ("o", HEADS * SIZE, HIDDEN),
    ("gate", HIDDEN, INTERMEDIATE),
    ("up", HIDDEN, INTERMEDIATE),
    ("down", INTERMEDIATE, HIDDEN),
]


def make_pool(dtype: torch.dtype) -> tuple[PageLayout, LoraPool]:
    layout = PageLayout([(f"{i}.{name}", a, b) for i in range(LAYERS) for name, a, b in MODULES], RANK)
    pages = empty_huge((ADAPTERS, layout.page_elements), dtype).normal_(std=0.01)
    tables = torch.arange(ADAPTERS, dtype=torch.int32).view(ADAPTERS, 1)
    ranks = torch.full((layout.module_count, ADAPTERS), RANK, dtype=torch.int32)
    return layout, LoraPool(pages, tables, ranks, torch.full((layout.module_count, ADAPTERS), 2.0), RANK)


def layer_spans(layout: PageLayout, index: int) -> list[LoraSpans]:
    span = {name: layout.spans[f"{index}.{name}"] for name, _, _ in MODULES}
    q, k = HEADS * SIZE, GROUPS * SIZE
    return [
        lora_spans([(span["q"], 0), (span["k"], q), (span["v"], q + k)]),
        lora_spans([(span["o"], 0)]),
        lora_spans([(span["gate"], 0), (span["up"], INTERMEDIATE)]),
        lora_spans([(span["down"], 0)]),
    ]


def make_layers(kernels: Kernels, dtype: torch.dtype, layout: PageLayout, sequences: int) -> list[Layer]:
    def packed(outputs: int, inputs: int) -> PackedLinear:
        return kernels.pack_linear((torch.randn(outputs, inputs) * 0.02).to(dtype))

    blocks = sequences * -(-CONTEXT // BLOCK)
    return [
        Layer(
            packed((HEADS + 2 * GROUPS) * SIZE, HIDDEN),
            packed(HIDDEN, HEADS * SIZE),
            packed(2 * INTERMEDIATE, HIDDEN),
            packed(HIDDEN, INTERMEDIATE),
            layer_spans(layout, index),
            empty_huge((blocks, GROUPS, BLOCK, SIZE), dtype).normal_(),
            empty_huge((blocks, GROUPS, BLOCK, SIZE), dtype).normal_(),
        )
        for index in range(LAYERS)
    ]


def step_operations(step: Step) -> dict[str, list[Callable[[], object]]]:
    """Every layer's call of each operation."""
    kernels, layers, dtype = step.kernels, step.layers, step.norm.dtype
    inner, wide = torch.randn(step.rows, INTERMEDIATE).to(dtype), torch.randn(step.rows, 2 * INTERMEDIATE).to(dtype)
    qkv = torch.randn(step.rows, (HEADS + 2 * GROUPS) * SIZE).to(dtype)
    x, residual = step.hidden, step.hidden.clone()
    return {
        "qkv": [partial(step.linear, x, layer.qkv, layer.spans[0]) for layer in layers],
        "rope_kv_write + paged_attention": [partial(step.attend, layer, qkv) for layer in layers],
        "o": [partial(step.linear, x, layer.o, layer.spans[1]) for layer in layers],
        "gate_up": [partial(step.linear, x, layer.gate_up, layer.spans[2]) for layer in layers],
        "down": [partial(step.linear, inner, layer.down, layer.spans[3]) for layer in layers],
        "silu_mul": [partial(kernels.silu_mul, wide) for _ in layers],
        "add_rms_norm": [partial(kernels.add_rms_norm, x, residual, step.norm, EPS) for _ in range(2 * LAYERS)],
        "lm_head": [partial(kernels.linear, x, step.head, out_dtype=torch.float32)],
    }


def bench_decode(kernels: Kernels, dtype: torch.dtype, row_counts: list[int], seconds: float) -> Iterator[dict[str, object]]:
    layout, pool = make_pool(dtype)
    layers = make_layers(kernels, dtype, layout, max(row_counts))
    head = kernels.pack_linear((torch.randn(VOCABULARY, HIDDEN) * 0.02).to(dtype))
    for rows in row_counts:
        for has_adapters in (False, True):
            step = Step(kernels, layers, head, torch.ones(HIDDEN).to(dtype), pool, rows, has_adapters)
            times = {name: least_ms(calls, seconds) for name, calls in step_operations(step).items()}
            times["sum"] = sum(times.values())
            times["step"] = least_ms([step.run], 4 * seconds)
            for name, ms in times.items():
                line = {"work": "decode", "op": name, "rows": rows, "adapters": has_adapters, "ms": round(ms, 3)}
                speed = {"tokens_per_s": round(rows / ms * 1e3)} if name in ("sum", "step") else {}
                yield {**line, **speed}


def bench_prefill(kernels: Kernels, dtype: torch.dtype, seconds: float) -> Iterator[dict[str, object]]:
    """One gate_up of one sequence: ours, ours with an adapter, and torch's own matrix product."""
    layout, pool = make_pool(dtype)
    weight = (torch.randn(2 * INTERMEDIATE, HIDDEN) * 0.02).to(dtype)
    packed, spans = kernels.pack_linear(weight), layer_spans(layout, 0)[2]
    for rows in (16, 64, 128, 256, 512):
        x = torch.randn(rows, HIDDEN).to(dtype)
        lora = lora_rows([((0, 1.0),)], [rows])
        calls: dict[str, Callable[[], object]] = {
            "gate_up": lambda x=x: kernels.linear(x, packed),
            "gate_up + adapter": lambda x=x, lora=lora: kernels.linear(x, packed, pool=pool, rows=lora, spans=spans),
            "torch mm": lambda x=x: torch.nn.functional.linear(x, weight),
        }
        for name, call in calls.items():
            ms = least_ms([call], seconds)
            gflops = 2 * rows * HIDDEN * 2 * INTERMEDIATE / ms / 1e6
            yield {"work": "prefill", "op": name, "rows": rows, "ms": round(ms, 4), "gflops": round(gflops)}


def report(rows: Iterator[dict[str, object]], label: dict[str, object], out: Path | None) -> None:
    """Print rows as they come, and append them to a file."""
    for row in rows:
        line = json.dumps({**row, **label})
        print(line, flush=True)
        if out is not None:
            with out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--isa", choices=("avx2", "avx512", "avx512bf16"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--seconds", type=float, default=0.3, help="time per measurement")
    parser.add_argument("--skip-prefill", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file as well")
    parser.add_argument("--commit", default=commit(), help="of these sources, where they are no repository")
    parser.add_argument("--short", action="store_true", help="GPU: rank 16, dealt in turn, only")
    options = parser.parse_args()
    if options.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("torch sees no NVIDIA GPU here")
        import bench_kernels_cuda  # beside this file; needs a GPU

        with torch.inference_mode():
            bench_kernels_cuda.bench(options.out, is_short=options.short, commit=options.commit)
        return
    kernels, dtype = Kernels.load("cpp", threads=options.threads, isa=options.isa), getattr(torch, options.dtype)
    label = {
        "kernels": kernels.name,
        "threads": options.threads,
        "dtype": options.dtype,
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "commit": options.commit,
    }
    with torch.inference_mode():
        torch.set_num_threads(1)  # as the engine does: see Kernels.load
        report(bench_decode(kernels, dtype, options.rows, options.seconds), label, options.out)
        if not options.skip_prefill:
            torch.set_num_threads(options.threads)  # torch's own product stands beside ours
            report(bench_prefill(kernels, dtype, options.seconds), label, options.out)


if __name__ == "__main__":
    main()
