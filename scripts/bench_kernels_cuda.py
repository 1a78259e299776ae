"""Time the CUDA kernels of one layer of a Llama-3.1-8B shape. `bench_kernels.py --device cuda` runs this.

Every row is a graph of one operation over 32 layers and several sets of adapters, replayed: the adapters' pages come from
memory, as in a step, where the base weights have pushed them out of the cache; products and hidden states stay in the cache.
"bytes" must come from memory (A, B; the base weights too in a "layer"), "floor_us" is those over 3.11 TB/s.

Shape letters: B rows (sequences), D adapters, K inputs, N outputs.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from node.kernels.cuda_ops import CudaOps, DeviceTiles, Follow, Product
from node.kernels.device_rows import SHORT_ROWS, has_many_pages
from node.kernels.layout import PageLayout
from node.kernels.linear import lora_spans
from node.kernels.lora import LoraPool
from node.kernels.lora_tiles import build_tiles

HIDDEN, INTERMEDIATE, LAYERS, HEADS, GROUPS, SIZE = 4096, 14336, 32, 32, 8, 128
Q, KV, EPS, BLOCK = HEADS * SIZE, GROUPS * SIZE, 1e-5, 64
READ_TB_S = 3.11  # of an H100 SXM, measured: read-only stream
PAGES = 256
LINEARS = {
    "qkv": (HIDDEN, (("q", Q), ("k", KV), ("v", KV))),
    "o": (Q, (("o", HIDDEN),)),
    "gate_up": (HIDDEN, (("gate", INTERMEDIATE), ("up", INTERMEDIATE))),
    "down": (INTERMEDIATE, (("down", HIDDEN),)),
}
CONSUMERS = {"qkv": "rope_kv_write", "o": "add_rms_norm", "gate_up": "silu_mul", "down": "add_rms_norm"}


@dataclass(frozen=True)
class Draw:
    """Which adapter each row of a batch has. ranks: of the adapters, in turn."""

    name: str
    adapters: int
    ranks: tuple[int, ...] = (16,)


@dataclass(frozen=True)
class Adapters:
    """A pool of random pages over all layers, and tables for adapters of the given ranks."""

    layout: PageLayout
    pages: Tensor

    @classmethod
    def make(cls) -> Adapters:
        modules = [
            (f"{layer}.{name}", inputs, outputs)
            for layer in range(LAYERS)
            for inputs, parts in LINEARS.values()
            for name, outputs in parts
        ]
        layout = PageLayout(modules, 16)
        pages = torch.empty((PAGES, layout.page_elements), dtype=torch.bfloat16, device="cuda")
        for page in pages:
            page.normal_(std=0.02)
        return cls(layout, pages)

    def pool(self, ranks: Sequence[int]) -> tuple[LoraPool, np.ndarray]:
        """Slots of the given ranks, pages dealt in turn; the page table on the host."""
        counts = [self.layout.pages_for_rank(rank) for rank in ranks]
        table = np.full((len(ranks), max(counts)), -1, np.int32)
        firsts = np.cumsum([0, *counts])
        if firsts[-1] > PAGES:
            raise ValueError(f"{firsts[-1]} pages wanted, {PAGES} made")
        for slot, count in enumerate(counts):
            table[slot, :count] = np.arange(firsts[slot], firsts[slot] + count)
        by_module = torch.tensor(ranks, dtype=torch.int32, device="cuda").repeat(self.layout.module_count, 1)
        scales = torch.full(by_module.shape, 2.0, device="cuda")
        return LoraPool(self.pages, torch.from_numpy(table).cuda(), by_module, scales, 16), table

    def spans(self, layer: int, linear: str) -> tuple[int, ...]:
        column, found = 0, []
        for name, outputs in LINEARS[linear][1]:
            found.append((self.layout.spans[f"{layer}.{name}"], column))
            column += outputs
        return tuple(int(field) for field in lora_spans(found).table.flatten().tolist())


def slots_of(draw: Draw, rows: int, generator: np.random.Generator) -> list[int]:
    """One slot a row."""
    if draw.name == "zipf1.5":
        weights = 1.0 / np.arange(1, draw.adapters + 1) ** 1.5
        return generator.choice(draw.adapters, rows, p=weights / weights.sum()).tolist()  # type: ignore[no-any-return]
    if draw.name == "uniform":
        return generator.integers(0, draw.adapters, rows).tolist()  # type: ignore[no-any-return]
    return [row % draw.adapters for row in range(rows)]  # distinct, identical: dealt in turn


def time_us(calls: Sequence[Callable[[], None]], repetitions: int = 7) -> float:
    """Median time of one call when all of them run one after another in a graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repetitions):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[1:])


def _in_turn(groups: Sequence[Sequence[Callable[[], None]]]) -> list[Callable[[], None]]:
    """One call for each group, which runs the group's calls one after another."""

    def together(group: Sequence[Callable[[], None]]) -> Callable[[], None]:
        def run() -> None:
            for call in group:
                call()

        return run

    return [together(group) for group in groups]


class Layer:
    """The operations of a decode step on `rows` rows, with the adapters of a draw (None: no LoRA)."""

    def __init__(
        self, adapters: Adapters, draw: Draw | None, rows: int, *, tile_rows: int, y_type: torch.dtype = torch.float32
    ) -> None:
        self.adapters, self.draw, self.rows, self.tile_rows = adapters, draw, rows, tile_rows
        ranks = [16] if draw is None else [draw.ranks[i % len(draw.ranks)] for i in range(max(draw.adapters, 64))]
        if sum(adapters.layout.pages_for_rank(rank) for rank in ranks) > PAGES:
            ranks = ranks[: draw.adapters]  # type: ignore[union-attr]
        pool, table = adapters.pool(ranks)
        self.ops = CudaOps(pool)
        self.tiles: list[DeviceTiles] = []
        self.used_ranks = 0
        self._is_behind = rows <= SHORT_ROWS
        generator = np.random.default_rng(rows)
        pairs = 1
        if draw is not None:
            slots = slots_of(draw, rows, generator)
            sets = max(1, min(8, len(ranks) // max(len(set(slots)), 1)))
            for turn in range(sets):
                moved = [(slot + turn * draw.adapters) % len(ranks) for slot in slots]
                block = build_tiles(
                    [((slot, 1.0),) for slot in moved],
                    [1] * rows,
                    table,
                    tile_rows,
                    processors=torch.cuda.get_device_properties("cuda").multi_processor_count,
                    slot_ranks=np.array(ranks, np.int32),
                )
                self.tiles.append(DeviceTiles(torch.from_numpy(block.data).cuda(), tile_rows))
                pairs = max(pairs, block.pair_count)
                self._is_behind = self._is_behind and not has_many_pages(rows, block.item_count)
            self.used_ranks = sum(ranks[slot] for slot in set(slots))
        self.v = {name: self._ranks(name, pairs) for name in LINEARS}
        bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
        self.x = {name: torch.randn(rows, inputs, **bf16) for name, (inputs, _) in LINEARS.items()}
        self.y = {name: self._planes(name, y_type) for name in LINEARS}
        self.residual, self.normed = torch.randn(rows, HIDDEN, **bf16), torch.empty(rows, HIDDEN, **bf16)
        self.act, self.q = torch.empty(rows, INTERMEDIATE, **bf16), torch.empty(rows, Q, **bf16)
        self.weight = torch.randn(HIDDEN, **bf16)
        self.cache = torch.empty(2, max(rows, 256) // 16 + 1, BLOCK, GROUPS, SIZE, **bf16)
        angles = torch.randn(4096, SIZE // 2, device="cuda")
        self.cos, self.sin = angles.cos(), angles.sin()
        self.positions = torch.arange(rows, dtype=torch.int32, device="cuda") % 4096
        self.slots = torch.arange(rows, dtype=torch.int32, device="cuda")

    def _planes(self, name: str, y_type: torch.dtype) -> Tensor:
        inputs, parts = LINEARS[name]
        outputs = sum(size for _, size in parts)
        planes = max(1, self.ops.skinny_gemm_planes(outputs, inputs, self.rows)) if y_type == torch.float32 else 1
        return torch.randn(planes, self.rows, outputs, device="cuda").to(y_type)

    def _ranks(self, name: str, pairs: int) -> Tensor:
        inputs, parts = LINEARS[name]
        can_stream = torch.cuda.get_device_capability() == (9, 0)
        return torch.randn(self.ops.shrink_planes(inputs) if can_stream else 1, pairs, len(parts), 16, device="cuda")

    def shrink(self, name: str, follow: Follow) -> list[Callable[[], None]]:
        def call(layer: int, tiles: DeviceTiles) -> Callable[[], None]:
            spans = self.adapters.spans(layer, name)
            return lambda: self.ops.lora_shrink(self.x[name], tiles, spans, self.v[name], follow)

        return [call(layer, tiles) for tiles in self.tiles for layer in range(LAYERS)]

    def consumer(self, name: str, follow: Follow) -> list[Callable[[], None]]:
        def call(layer: int, tiles: DeviceTiles | None) -> Callable[[], None]:
            spans = self.adapters.spans(layer, name) if tiles is not None else ()
            product = Product(self.y[name], None, tiles, self.v[name] if tiles is not None else None, spans)
            if name == "qkv":
                keys, values = self.cache
                return lambda: self.ops.rope_kv_write(
                    product, self.cos, self.sin, self.positions, self.slots, keys, values, self.q, follow=follow
                )
            if name == "gate_up":
                return lambda: self.ops.silu_mul(product, self.act, follow)
            return lambda: self.ops.add_rms_norm(product, self.residual, self.weight, EPS, self.normed, follow)

        return [call(layer, tiles) for tiles in (self.tiles or [None]) for layer in range(LAYERS)]

    def measure(self, follow: Follow = Follow.WAIT_FIRST) -> Iterator[dict[str, object]]:
        """Every operation by itself."""
        for name, (inputs, parts) in LINEARS.items():
            if self.draw is not None:
                read = self.used_ranks * inputs * len(parts) * 2
                yield self._row("shrink_" + name, name, time_us(self.shrink(name, follow)), read)
            read = self.used_ranks * sum(size for _, size in parts) * 2
            yield self._row(f"{CONSUMERS[name]}_{name}", name, time_us(self.consumer(name, follow)), read)

    def linear(self, name: str, weights: dict[str, list[Tensor]]) -> list[Callable[[], None]]:
        """The skinny GEMM of each layer; where there are adapters with their shrink, behind or before it."""
        x, y, v = self.x[name], self.y[name], self.v[name]

        def call(layer: int, tiles: DeviceTiles | None) -> Callable[[], None]:
            weight = weights[name][layer]
            if tiles is None:
                return lambda: self.ops.skinny_gemm(x, weight, y)
            spans = self.adapters.spans(layer, name)

            def behind() -> None:
                self.ops.skinny_gemm(x, weight, y)
                self.ops.lora_shrink(x, tiles, spans, v, Follow.WAIT_LAST)

            def before() -> None:
                self.ops.lora_shrink(x, tiles, spans, v)
                self.ops.skinny_gemm(x, weight, y)

            return behind if self._is_behind else before

        return [call(layer, tiles) for tiles in (self.tiles or [None]) for layer in range(LAYERS)]

    def measure_layer(self, weights: dict[str, list[Tensor]]) -> Iterator[dict[str, object]]:
        """Each linear by itself, all four, and all with what finishes them, in the order of a step. Attention is left out."""
        linears = {name: self.linear(name, weights) for name in LINEARS}
        for name, (inputs, parts) in LINEARS.items():
            base, read = weights[name][0].numel() * 2, self.used_ranks * inputs * len(parts) * 2
            yield self._row(f"gemm_{name}", name, time_us(linears[name]), read, base)
        base = sum(weight[0].numel() * 2 for weight in weights.values())
        a = sum(inputs * len(parts) for inputs, parts in LINEARS.values())
        b = sum(size for _, parts in LINEARS.values() for _, size in parts)
        consumers = {name: self.consumer(name, Follow.WAIT_FIRST) for name in LINEARS}
        whole = [*zip(*[operation[name] for name in LINEARS for operation in (linears, consumers)], strict=True)]
        yield self._row("gemms", None, time_us(_in_turn([*zip(*linears.values(), strict=True)])), self.used_ranks * a * 2, base)
        yield self._row("layer", None, time_us(_in_turn(whole)), self.used_ranks * (a + b) * 2, base)

    def _row(self, op: str, linear: str | None, us: float, adapters: int, base: int = 0) -> dict[str, object]:
        draw = self.draw
        return {
            "op": op,
            "B": self.rows,
            "D": 0 if draw is None else draw.adapters,
            "draw": None if draw is None else draw.name,
            "rank": None if draw is None else list(draw.ranks),
            "planes": None if linear is None else int(self.y[linear].shape[0]),
            "us": round(us, 2),
            "bytes": adapters + base,
            "tb_s": round((adapters + base) / us / 1e6, 2),
            "floor_us": round((adapters + base) / READ_TB_S / 1e6, 2),
        }


def make_weights() -> dict[str, list[Tensor]]:
    """Random weights of all layers: 14 GB, so that none is in the cache when its turn comes."""

    def weight(outputs: int, inputs: int) -> Tensor:
        return torch.empty((outputs, inputs), dtype=torch.bfloat16, device="cuda").normal_(std=0.02)

    return {
        name: [weight(sum(size for _, size in parts), inputs) for _ in range(LAYERS)] for name, (inputs, parts) in LINEARS.items()
    }


def facts(commit: str) -> dict[str, object]:
    """What a figure means nothing without. commit: of the sources."""
    query = ["nvidia-smi", "--query-gpu=name,clocks.max.sm,clocks.max.mem,driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    return {
        "gpu": found[0],
        "clock_sm": found[1],
        "clock_memory": found[2],
        "driver": found[3],
        "torch": torch.__version__,
        "commit": commit,
    }


def bench(out: Path | None, *, is_short: bool = False, commit: str) -> None:
    """Print a JSON line a measurement, and append it to `out`."""
    label = facts(commit)
    adapters = Adapters.make()
    weights = make_weights() if torch.cuda.get_device_capability() == (9, 0) else None
    for rows, draw in _cases([None, Draw("identical", 1), Draw("distinct", 8), Draw("distinct", 64)]):
        _emit(_decode_rows(adapters, draw, rows, weights), label, out)
    for draw in (None, Draw("distinct", 64)):
        _emit(Layer(adapters, draw, 16384, tile_rows=16, y_type=torch.bfloat16).measure(), label, out)
    if is_short:
        return
    ranks = [Draw("distinct", 64, ranks) for ranks in ((64,), (8,), (8, 16, 64))]
    for rows, draw in _cases([*ranks, Draw("zipf1.5", 64), Draw("uniform", 64)]):
        _emit(_decode_rows(adapters, draw, rows, weights), label, out)


def _cases(draws: Sequence[Draw | None]) -> Iterator[tuple[int, Draw | None]]:
    """Rows and draws; a batch has no more distinct adapters than rows."""
    for rows in (64, 256, 1, 16):
        yield from ((rows, draw) for draw in draws if draw is None or draw.name != "distinct" or draw.adapters <= rows)


def _decode_rows(
    adapters: Adapters, draw: Draw | None, rows: int, weights: dict[str, list[Tensor]] | None
) -> Iterator[dict[str, object]]:
    layer = Layer(adapters, draw, rows, tile_rows=16)
    yield from layer.measure()
    if weights is not None and layer.ops.skinny_gemm_planes(HIDDEN, HIDDEN, rows):
        yield from layer.measure_layer(weights)


def _emit(rows: Iterator[dict[str, object]], label: dict[str, object], out: Path | None) -> None:
    for row in rows:
        line = json.dumps({"work": "lora", **row, **label})
        print(line, flush=True)
        if out is not None:
            with out.open("a") as file:
                file.write(line + "\n")
