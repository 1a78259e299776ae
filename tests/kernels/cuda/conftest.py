"""Random adapters, tiles and products on a GPU. Whatever a kernel must not read is NaN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from node.kernels.build_cuda import build_cuda
from node.kernels.cuda_ops import CudaOps, DeviceTiles, Product
from node.kernels.layout import PageLayout
from node.kernels.lora import LoraPool
from node.kernels.lora_tiles import TileBlock, build_tiles, same_ranks
from node.kernels.reference_tiles import reference_expand, reference_shrink

PAGE_RANK, TILE_ROWS = 16, 16


@dataclass
class Work:
    """Adapters over the modules of one fused linear, the tiles of some rows, and the operations opened on them."""

    ops: CudaOps
    pool: LoraPool  # on the host
    spans: list[list[int]]
    block: TileBlock
    tiles: DeviceTiles
    columns: int
    dtype: torch.dtype

    @property
    def span_tuple(self) -> tuple[int, ...]:
        return tuple(field for span in self.spans for field in span)

    def poisoned_v(self, planes: int = 1) -> Tensor:
        return torch.full((planes, self.block.pair_count + 3, len(self.spans), PAGE_RANK), float("nan"), device="cuda")

    def shrink_reference(self, x: Tensor) -> Tensor:
        return reference_shrink(x.double().cpu(), self.block.data, self.pool, self.spans)

    def delta_reference(self, v: Tensor, rows: int) -> Tensor:
        found = v.double().sum(0)[: self.block.pair_count].cpu()
        return reference_expand(found, self.block.data, self.pool, self.spans, rows, self.columns)

    def product(self, y: Tensor, v: Tensor, bias: Tensor | None = None) -> Product:
        return Product(y, bias, self.tiles, v, self.span_tuple)

    def product_reference(self, y: Tensor, v: Tensor | None, bias: Tensor | None = None) -> Tensor:
        total = y.double().sum(0).cpu()
        if bias is not None:
            total = total + bias.double().cpu()
        return total if v is None else total + self.delta_reference(v, y.shape[1])


def make_pool(
    ranks: Sequence[Sequence[int]], inputs: int, outputs: Sequence[int], dtype: torch.dtype
) -> tuple[LoraPool, PageLayout]:
    """ranks: [module][slot]. Pages stand in random order; what lies beyond a rank is NaN."""
    layout = PageLayout([(f"m{i}", inputs, size) for i, size in enumerate(outputs)], PAGE_RANK)
    table = torch.tensor(ranks, dtype=torch.int32)
    counts = [max(1, layout.pages_for_rank(int(most))) for most in table.amax(0)]
    pages = torch.full((sum(counts) + 2, layout.page_elements), float("nan")).to(dtype)
    order = torch.randperm(len(pages)).tolist()
    slot_pages = torch.full((len(counts), max(counts)), -1, dtype=torch.int32)
    for slot, page_count in enumerate(counts):
        for ordinal in range(page_count):
            slot_pages[slot, ordinal] = number = order.pop()
            for span in layout.spans.values():
                count = max(0, min(PAGE_RANK, int(table[span.index, slot]) - ordinal * PAGE_RANK))
                a, b = count * span.in_features, count * span.out_features
                pages[number, span.a_offset : span.a_offset + a] = (torch.randn(a) / inputs**0.5).to(dtype)
                pages[number, span.b_offset : span.b_offset + b] = torch.randn(b).to(dtype)
    scales = torch.rand(table.shape) + 0.5
    return LoraPool(pages, slot_pages, table, scales, PAGE_RANK), layout


MakeWork = Callable[..., Work]


@pytest.fixture(scope="session")
def make_work() -> MakeWork:
    build_cuda()

    def make(
        terms: Sequence[Sequence[tuple[int, float]]],
        ranks: Sequence[int] | Sequence[Sequence[int]],
        inputs: int,
        outputs: Sequence[int],
        dtype: torch.dtype = torch.bfloat16,
        *,
        pool: LoraPool | None = None,
    ) -> Work:
        by_module = [list(ranks)] * len(outputs) if isinstance(ranks[0], int) else ranks
        fresh, layout = make_pool(by_module, inputs, outputs, dtype)
        pool = pool or fresh
        spans = [
            [s.index, s.a_offset, s.b_offset, s.in_features, s.out_features, sum(outputs[:i])]
            for i, s in enumerate(layout.spans.values())
        ]
        block = build_tiles(
            terms,
            [1] * len(terms),
            pool.slot_pages.numpy(),
            TILE_ROWS,
            processors=torch.cuda.get_device_properties("cuda").multi_processor_count,
            slot_ranks=same_ranks(pool.ranks.numpy()),
        )
        device = LoraPool(*(t.cuda() for t in (pool.pages, pool.slot_pages, pool.ranks, pool.scales)), pool.page_rank)
        tiles = DeviceTiles(torch.from_numpy(block.data).cuda(), TILE_ROWS)
        return Work(CudaOps(device), pool, spans, block, tiles, sum(outputs), dtype)

    return make


def relative_error(found: Tensor, reference: Tensor) -> float:
    """max|difference| / max|reference|; NaN where anything is NaN, which is under no limit."""
    return float((found.double().cpu() - reference.cpu()).abs().max() / reference.abs().max())


@pytest.fixture(scope="session")
def error_of() -> Callable[[Tensor, Tensor], float]:
    return relative_error
