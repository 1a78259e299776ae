"""The LoRA shrink that streams pages through shared memory, on a Hopper GPU: float64, bits, what it follows and what follows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from node.kernels.cuda_ops import Follow


def _has_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not _has_hopper(), reason="needs a GPU of compute capability 9.0")]

RANKS = [1, 8, 16, 24, 64]
BF16 = torch.bfloat16
ONE, TWO, THREE = (256,), (192, 192), (128, 64, 64)
KINDS = [(), ((0, 1.0),), ((3, 0.5), (1, -1.25)), ((4, 1.0),), ((2, 2.0), (0, 0.25), (3, 1.0)), ((1, 1.0),)]


def _terms(rows):
    """Rows without adapters, with one, with two and three, some recipes shared; the first one has rank 64."""
    return [((4, 1.0),), *[KINDS[(row * 7 + row // 5) % len(KINDS)] for row in range(rows - 1)]]


def _streamed(work, x, follow=Follow.PLAIN) -> Tensor:
    v = work.poisoned_v(work.ops.shrink_planes(x.shape[1]))
    work.ops.lora_shrink(x, work.tiles, work.span_tuple, v, follow)
    return v


@pytest.mark.parametrize("outputs", [ONE, TWO, THREE], ids=["o", "gate_up", "qkv"])
@pytest.mark.parametrize(
    ("rows", "inputs"), [(1, 32), (1, 14336), (5, 576), (16, 4096), (33, 1536), (64, 4160), (100, 608), (256, 14336), (700, 4096)]
)
def test_stream_of_mixed_ranks_and_recipes_equals_float64(make_work, error_of, outputs, rows, inputs):
    work = make_work(_terms(rows), RANKS, inputs, outputs)
    x = torch.randn(rows, inputs, device="cuda").to(BF16)
    v, reference = _streamed(work, x), work.shrink_reference(x)
    found = v.double().sum(0)
    assert error_of(found[: len(reference)], reference) < 1e-4
    assert bool((v[:, : len(reference)].cpu()[:, reference == 0] == 0).all())
    assert bool(v[:, len(reference) :].isnan().all())


def test_stream_takes_as_many_planes_as_rows_of_x_are_long(make_work):
    ops = make_work([((0, 1.0),)], RANKS, 64, ONE).ops
    assert [ops.shrink_planes(inputs) for inputs in (32, 100, 4096, 4128, 14336, 32768, 32800)] == [1, 1, 1, 2, 4, 8, 1]


@pytest.mark.parametrize(("distinct", "rank"), [(1, 16), (8, 64), (64, 16), (64, 40)])
@pytest.mark.parametrize(("inputs", "outputs"), [(4096, THREE), (14336, ONE)], ids=["qkv", "down"])
def test_stream_of_more_tasks_than_blocks_equals_float64(make_work, error_of, inputs, outputs, distinct, rank):
    work = make_work([((row % distinct, 1.0),) for row in range(96)], [rank] * distinct, inputs, outputs)
    x, pairs = torch.randn(96, inputs, device="cuda").to(BF16), work.block.pair_count
    for _ in range(2):
        assert error_of(_streamed(work, x).double().sum(0)[:pairs], work.shrink_reference(x)) < 1e-4


@pytest.mark.parametrize("inputs", [576, 4096, 14336])
def test_stream_of_a_row_has_the_same_bits_alone_and_in_any_batch(make_work, inputs):
    terms, x = _terms(600), torch.randn(600, inputs, device="cuda").to(BF16)
    whole = make_work(terms, RANKS, inputs, THREE)
    wanted = _delta(whole, x)
    assert bool(wanted.isfinite().all())
    for rows in ([0], [1], [100], [599], [3, 77, 4, 200, 18, 19, 20, 21, 22, 23, 24], list(range(256))):
        part = make_work([terms[row] for row in rows], RANKS, inputs, THREE, pool=whole.pool)
        assert torch.equal(_delta(part, x[rows].contiguous()), wanted[rows])


def _delta(work, x) -> Tensor:
    out = torch.full((len(x), work.columns), float("nan"), device="cuda")
    work.ops.materialize(work.product(torch.zeros(1, len(x), work.columns, device="cuda"), _streamed(work, x)), out, Follow.PLAIN)
    return out


def test_stream_without_adapters_writes_nothing_and_still_waits(make_work):
    work, x = make_work([()] * 7, RANKS, 576, ONE), torch.randn(7, 576, device="cuda").to(BF16)
    assert bool(_streamed(work, x).isnan().all())
    assert bool(_streamed(work, x, Follow.WAIT_FIRST).isnan().all())


@pytest.mark.parametrize("inputs", [4096, 14336])
@pytest.mark.parametrize("rows", [1, 64, 256])
@pytest.mark.parametrize("follow", [Follow.WAIT_FIRST, Follow.WAIT_LAST])
def test_stream_before_or_behind_a_product_reads_what_was_just_written(make_work, inputs, rows, follow):
    """x is made anew before each product, and the product may begin while its shrink still waits for x."""
    terms = _terms(rows)
    work, count = make_work(terms, RANKS, inputs, (1024,)), 6
    raw, weight = torch.randn(count, rows, inputs, device="cuda").to(BF16), torch.randn(1024, inputs, device="cuda").to(BF16)
    norm, x = torch.ones(inputs, device="cuda").to(BF16), torch.empty(rows, inputs, device="cuda").to(BF16)
    y = torch.empty(work.ops.skinny_gemm_planes(1024, inputs, rows), rows, 1024, device="cuda")
    v, outs = work.poisoned_v(work.ops.shrink_planes(inputs)), torch.empty(count, rows, 1024, device="cuda")

    def shrink(follow):
        work.ops.lora_shrink(x, work.tiles, work.span_tuple, v, follow)

    def run(others, own):
        for i in range(count):
            work.ops.rms_norm(raw[i], norm, 1e-5, x, others)
            if own <= Follow.WAIT_FIRST:
                shrink(own)
            work.ops.skinny_gemm(x, weight, y, others)
            if own > Follow.WAIT_FIRST:
                shrink(own)
            work.ops.materialize(work.product(y, v), outs[i], others)

    run(Follow.PLAIN, Follow.PLAIN)
    wanted = outs.clone()
    assert bool(wanted.isfinite().all())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(Follow.WAIT_FIRST, follow)
    for _ in range(20):
        outs.fill_(float("nan"))
        v.fill_(float("nan"))
        graph.replay()
        assert torch.equal(outs, wanted)


def test_planes_that_no_kernel_makes_are_refused(make_work):
    work, x = make_work(_terms(4), RANKS, 4096, ONE), torch.randn(4, 4096, device="cuda").to(BF16)
    with pytest.raises(RuntimeError, match="v has 2 planes, wanted 1 or 1"):
        work.ops.lora_shrink(x, work.tiles, work.span_tuple, work.poisoned_v(2))


# ---- long steps: wide items, then narrow ones


def _prompts(rows):
    """Runs of rows of one recipe, of 1 to 300, some recipes twice; single rows of many recipes between them."""
    found, size = [], 300
    while len(found) < rows:
        kind = KINDS[len(found) % len(KINDS)]
        found += [kind] * size + [((slot, 0.5 + len(found) % 7),) for slot in range(5)]
        size = 17 if size == 300 else 64 if size == 17 else 33 if size == 64 else 300
    return found[:rows]


@pytest.mark.parametrize("terms_of", [_terms, _prompts])
@pytest.mark.parametrize("outputs", [ONE, TWO, THREE], ids=["o", "gate_up", "qkv"])
@pytest.mark.parametrize(("rows", "inputs"), [(2049, 4160), (2100, 32), (2200, 14336), (2300, 608), (5000, 4096)])
def test_long_step_equals_float64(make_work, error_of, outputs, rows, inputs, terms_of):
    work = make_work(terms_of(rows), RANKS, inputs, outputs)
    assert work.block.data[12] > 0
    x = torch.randn(rows, inputs, device="cuda").to(BF16)
    v, reference = _streamed(work, x), work.shrink_reference(x)
    assert error_of(v.double().sum(0)[: len(reference)], reference) < 1e-4
    assert bool((v[:, : len(reference)].cpu()[:, reference == 0] == 0).all())
    assert bool(v[:, len(reference) :].isnan().all())


@pytest.mark.parametrize("inputs", [608, 4096, 14336])
def test_long_step_gives_a_row_the_bits_that_it_has_alone_and_in_any_batch(make_work, inputs):
    terms, x = _prompts(3500), torch.randn(3500, inputs, device="cuda").to(BF16)
    whole = make_work(terms, RANKS, inputs, THREE)
    wanted = _delta(whole, x)
    assert bool(wanted.isfinite().all())
    for rows in ([0], [301], [3499], [3, 77, 4, 1200, 18, 19], list(range(100, 356)), list(range(1000)), list(range(1100, 3300))):
        part = make_work([terms[row] for row in rows], RANKS, inputs, THREE, pool=whole.pool)
        assert torch.equal(_delta(part, x[rows].contiguous()), wanted[rows])


def test_long_step_of_modules_that_an_adapter_does_not_touch_gives_zeros(make_work, error_of):
    ranks = [[16, 0, 24], [0, 0, 8], [40, 16, 0]]
    terms = [((0, 1.0),)] * 800 + [((1, 1.0), (2, 0.5))] * 1000 + [((2, 1.0),)] * 300 + [((0, 2.0),)]
    work, x = make_work(terms, ranks, 576, THREE), torch.randn(2101, 576, device="cuda").to(BF16)
    v, reference = _streamed(work, x), work.shrink_reference(x)
    assert error_of(v[0, : len(reference)], reference) < 1e-4


@pytest.mark.parametrize("inputs", [4096, 14336])
def test_long_step_behind_a_norm_reads_what_was_just_written(make_work, inputs):
    rows, count = 2100, 4
    work = make_work(_prompts(rows), RANKS, inputs, THREE)
    raw = torch.randn(count, rows, inputs, device="cuda").to(BF16)
    norm, x = torch.ones(inputs, device="cuda").to(BF16), torch.empty(rows, inputs, device="cuda").to(BF16)
    v, y = work.poisoned_v(work.ops.shrink_planes(inputs)), torch.zeros(1, rows, work.columns, device="cuda")
    outs = torch.empty(count, rows, work.columns, device="cuda")

    def run(follow):
        for i in range(count):
            work.ops.rms_norm(raw[i], norm, 1e-5, x, follow)
            work.ops.lora_shrink(x, work.tiles, work.span_tuple, v, follow)
            work.ops.materialize(work.product(y, v), outs[i], follow)

    run(Follow.PLAIN)
    wanted = outs.clone()
    assert bool(wanted.isfinite().all())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(Follow.WAIT_FIRST)
    for _ in range(10):
        outs.fill_(float("nan"))
        v.fill_(float("nan"))
        graph.replay()
        assert torch.equal(outs, wanted)
