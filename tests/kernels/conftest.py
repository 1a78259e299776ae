"""Kernels of every instruction set this CPU has, and random adapters and caches to run them on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from node.kernels.build import build, compiler, library_path
from node.kernels.compiled import ISAS, CompiledKernels
from node.kernels.layout import PageLayout
from node.kernels.linear import LoraSpans, lora_spans
from node.kernels.lora import LoraPool, LoraRows, lora_rows
from node.kernels.ops import Kernels


def _available() -> list[str]:
    """A compiler that fails is an error; a machine without one, where the node runs the reference, skips and says so."""
    if library_path() is None and compiler() is None:
        pytest.skip("the compiled kernels are neither built nor can be: no C++ compiler (Debian: apt install g++)")
    build()
    best = CompiledKernels.open(None, 1, is_required=True)
    assert best is not None
    return list(ISAS[: ISAS.index(best.name.removeprefix("cpp-")) + 1])


@pytest.fixture(params=ISAS)
def kernels(request: pytest.FixtureRequest, available_isas: list[str]) -> Kernels:
    if request.param not in available_isas:
        pytest.skip(f"this CPU has no {request.param}")
    return Kernels.load("cpp", isa=request.param, threads=2)


@pytest.fixture(scope="session")
def available_isas() -> list[str]:
    return _available()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def best(available_isas: list[str]) -> Kernels:
    return Kernels.load("cpp", threads=2)


@dataclass
class Adapters:
    """A pool with adapters of the given ranks over two modules that share an input, and spans for a fused output."""

    pool: LoraPool
    spans: LoraSpans
    outputs: int

    def rows(self, terms: list[tuple[tuple[int, float], ...]]) -> LoraRows:
        rows = lora_rows(terms, [1] * len(terms))
        assert rows is not None
        return rows


@pytest.fixture
def make_adapters() -> Callable[..., Adapters]:
    def make(
        ranks: list[int], inputs: int, outputs: tuple[int, ...], page_dtype: torch.dtype, page_rank: int = 8, gap: int = 0
    ) -> Adapters:
        layout = PageLayout([(f"m{i}", inputs, size) for i, size in enumerate(outputs)], page_rank)
        counts = [layout.pages_for_rank(rank) for rank in ranks]
        pages = torch.full((sum(counts) + 2, layout.page_elements), float("nan")).to(page_dtype)
        order = torch.randperm(sum(counts) + 2).tolist()
        slot_pages = torch.full((len(ranks), max(counts)), -1, dtype=torch.int32)
        table = torch.tensor(ranks, dtype=torch.int32).repeat(len(outputs), 1)
        for slot, rank in enumerate(ranks):
            for page in range(counts[slot]):
                slot_pages[slot, page] = number = order.pop()
                count = min(page_rank, rank - page * page_rank)
                for span in layout.spans.values():
                    a, b = count * span.in_features, count * span.out_features
                    pages[number, span.a_offset : span.a_offset + a] = (torch.randn(a) / inputs**0.5).to(page_dtype)
                    pages[number, span.b_offset : span.b_offset + b] = torch.randn(b).to(page_dtype)
        pool = LoraPool(pages, slot_pages, table, torch.rand(len(outputs), len(ranks)) + 0.5, page_rank)
        columns = [sum(outputs[:i]) + i * gap for i in range(len(outputs))]
        spans = lora_spans([(layout.spans[f"m{i}"], column) for i, column in enumerate(columns)])
        return Adapters(pool, spans, columns[-1] + outputs[-1])

    return make
