"""LoRA shrink and expand on a GPU against float64: ranks, recipes, tiles, and the bits of a row in any batch."""

from __future__ import annotations

import pytest
import torch

from node.kernels.cuda_ops import Follow, Product

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

RANKS = [1, 8, 16, 24, 64]
LIMIT = {torch.bfloat16: 1e-4, torch.float32: 1e-5}  # sums are float32 in both; inputs are what they are
BF16, F32 = torch.bfloat16, torch.float32
QKV, ONE, TWO = (128, 64, 64), (256,), (192, 192)


def mixed_terms(rows):
    """Rows without adapters, with one, with two and three, some recipes shared."""
    kinds = [(), ((0, 1.0),), ((3, 0.5), (1, -1.25)), ((4, 1.0),), ((2, 2.0), (0, 0.25), (3, 1.0)), ((1, 1.0),)]
    return [kinds[(row * 7 + row // 5) % len(kinds)] for row in range(rows)]


def shrink(work, x, follow=Follow.PLAIN):
    v = work.poisoned_v()
    work.ops.lora_shrink(x, work.tiles, work.span_tuple, v, follow)
    return v


def delta(work, x):
    """The expand alone, in float32: what a product of zeros becomes."""
    v = shrink(work, x)
    out = torch.full((x.shape[0], work.columns), float("nan"), device="cuda")
    y = torch.zeros(1, x.shape[0], work.columns, device="cuda")
    work.ops.materialize(work.product(y, v), out, Follow.PLAIN)
    return out


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "f32"])
@pytest.mark.parametrize("outputs", [ONE, TWO, QKV], ids=["o", "gate_up", "qkv"])
@pytest.mark.parametrize(("rows", "inputs"), [(1, 576), (5, 4096), (33, 1536), (256, 576), (300, 14336)])
def test_shrink_of_mixed_ranks_and_recipes_equals_float64(make_work, error_of, dtype, outputs, rows, inputs):
    work = make_work([((4, 1.0),), *mixed_terms(rows - 1)], RANKS, inputs, outputs, dtype)
    x = torch.randn(rows, inputs, device="cuda").to(dtype)
    v, reference = shrink(work, x)[0], work.shrink_reference(x)
    assert error_of(v[: len(reference)], reference) < LIMIT[dtype]
    assert bool((v[: len(reference)].cpu()[reference == 0] == 0).all())
    assert bool(v[len(reference) :].isnan().all())


@pytest.mark.parametrize("outputs", [ONE, TWO, QKV], ids=["o", "gate_up", "qkv"])
def test_shrink_of_a_long_prefill_equals_float64_whatever_its_neighbours(make_work, error_of, outputs):
    terms = mixed_terms(2400)
    work = make_work(terms, RANKS, 1536, outputs)
    x = torch.randn(2400, 1536, device="cuda").to(BF16)
    v, reference = shrink(work, x)[0], work.shrink_reference(x)
    assert error_of(v[: len(reference)], reference) < LIMIT[BF16]
    wanted = delta(work, x)
    part = make_work(terms[200:2300], RANKS, 1536, outputs, pool=work.pool)
    assert torch.equal(delta(part, x[200:2300]), wanted[200:2300])


def test_shrink_of_a_strided_x_equals_float64(make_work, error_of):
    work = make_work(mixed_terms(40), RANKS, 512, QKV)
    x = torch.randn(40, 1024, device="cuda").to(BF16)[:, 256:768]
    v, reference = shrink(work, x)[0], work.shrink_reference(x)
    assert error_of(v[: len(reference)], reference) < LIMIT[BF16]


def test_shrink_of_modules_that_an_adapter_does_not_touch_gives_zeros(make_work, error_of):
    ranks = [[16, 0, 24], [0, 0, 8], [40, 16, 0]]
    work = make_work([((0, 1.0),), ((1, 1.0), (2, 0.5)), ((2, 1.0),)], ranks, 576, QKV)
    x = torch.randn(3, 576, device="cuda").to(BF16)
    v, reference = shrink(work, x)[0], work.shrink_reference(x)
    assert error_of(v[: len(reference)], reference) < LIMIT[BF16]
    out = delta(work, x)
    assert error_of(out, work.delta_reference(v[None], 3)) < 1e-4


def test_shrink_of_inputs_that_fit_no_tensor_core_equals_float64(make_work, error_of):
    work = make_work(mixed_terms(9), RANKS, 100, (24, 40))
    x = torch.randn(9, 100, device="cuda").to(BF16)
    v, reference = shrink(work, x)[0], work.shrink_reference(x)
    assert error_of(v[: len(reference)], reference) < LIMIT[BF16]
    assert error_of(delta(work, x), work.delta_reference(v[None], 9)) < 1e-4


def test_shrink_without_adapters_writes_nothing(make_work):
    work = make_work([()] * 7, RANKS, 576, ONE)
    assert bool(shrink(work, torch.randn(7, 576, device="cuda").to(BF16)).isnan().all())


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "f32"])
@pytest.mark.parametrize("rows", [1, 17, 100, 256, 700])
def test_expand_equals_float64(make_work, error_of, dtype, rows):
    work = make_work([((4, 1.0),), *mixed_terms(rows - 1)], RANKS, 576, QKV, dtype)
    x = torch.randn(rows, 576, device="cuda").to(dtype)
    assert error_of(delta(work, x), work.delta_reference(shrink(work, x), rows)) < LIMIT[dtype]


@pytest.mark.parametrize("inputs", [576, 4096])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "f32"])
def test_delta_of_a_row_has_the_same_bits_alone_and_in_any_batch(make_work, dtype, inputs):
    terms = mixed_terms(256)
    whole = make_work(terms, RANKS, inputs, QKV, dtype)
    x = torch.randn(256, inputs, device="cuda").to(dtype)
    wanted = delta(whole, x)
    assert bool(wanted.isfinite().all())
    for row in (0, 1, 2, 100, 255):
        alone = make_work([terms[row]], RANKS, inputs, QKV, dtype, pool=whole.pool)
        assert torch.equal(delta(alone, x[row : row + 1])[0], wanted[row])
    some = [3, 77, 4, 200, 18, 19, 20, 21, 22, 23, 24]
    part = make_work([terms[row] for row in some], RANKS, inputs, QKV, dtype, pool=whole.pool)
    assert torch.equal(delta(part, x[some]), wanted[some])


def test_delta_in_a_graph_follows_new_tiles(make_work):
    """One capture serves every set of tiles that fits its block: counts are read on the device."""
    rows, x = 64, torch.randn(64, 576, device="cuda").to(BF16)
    few = make_work([((0, 1.0),)] * rows, RANKS, 576, QKV)
    many = make_work(mixed_terms(rows), RANKS, 576, QKV, pool=few.pool)
    wanted = [delta(few, x), delta(many, x)]
    block = torch.full((max(few.block.data.size, many.block.data.size),), -1, dtype=torch.int32, device="cuda")
    block[: few.block.data.size] = few.tiles.block
    v, out = torch.empty(1, 1024, 3, 16, device="cuda"), torch.empty(rows, few.columns, device="cuda")
    y, tiles = torch.zeros(1, rows, few.columns, device="cuda"), type(few.tiles)(block, 16)
    product = Product(y, None, tiles, v, few.span_tuple)

    def run():
        few.ops.lora_shrink(x, tiles, few.span_tuple, v, Follow.PLAIN)
        few.ops.materialize(product, out, Follow.WAIT_FIRST)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for work, expected in zip((few, many, few), (*wanted, wanted[0]), strict=True):
        block.fill_(-1)
        block[: work.block.data.size] = work.tiles.block
        out.fill_(float("nan"))
        v.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)


def test_operations_pass_opcheck(make_work):
    work = make_work(mixed_terms(8), RANKS, 576, QKV)
    x, v = torch.randn(8, 576, device="cuda").to(BF16), torch.zeros(1, 64, 3, 16, device="cuda")
    pool, spans = work.ops, list(work.span_tuple)
    arguments = (x, pool._pages, work.tiles.block, pool._ranks, pool._scales, spans, 16, 0, v)
    torch.library.opcheck(torch.ops.openlora.lora_shrink.default, arguments)
    y, out = torch.randn(2, 8, 256, device="cuda"), torch.zeros(8, 256, device="cuda").to(BF16)
    rest = (None, pool._pages, work.tiles.block, pool._ranks, v, spans, 16)
    torch.library.opcheck(torch.ops.openlora.materialize.default, (y, *rest, 0, out))
    torch.library.opcheck(torch.ops.openlora.fused_silu_mul.default, (y, *rest, 0, out[:, :128].contiguous()))
    weight = torch.ones(256, device="cuda").to(BF16)
    torch.library.opcheck(torch.ops.openlora.fused_add_rms_norm.default, (y, *rest, out.clone(), weight, 1e-5, 0, out))


def test_wrong_arguments_say_what_is_wrong(make_work):
    work = make_work(mixed_terms(8), RANKS, 576, QKV)
    x = torch.randn(8, 576, device="cuda").to(BF16)
    with pytest.raises(RuntimeError, match="v has size 2 in dimension 2, wanted 3"):
        work.ops.lora_shrink(x, work.tiles, work.span_tuple, torch.zeros(1, 64, 2, 16, device="cuda"))
    with pytest.raises(RuntimeError, match="outside the page"):
        work.ops.lora_shrink(x[:, :512], work.tiles, work.span_tuple, work.poisoned_v())
    with pytest.raises(RuntimeError, match="wrong element type"):
        work.ops.lora_shrink(x.float(), work.tiles, work.span_tuple, work.poisoned_v())


def test_shrink_beside_a_gemm_reads_what_the_gemm_reads(make_work):
    """x is made anew before each product; a shrink that started too early would read the one before."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs the GEMM of compute capability 9.0")
    work, rows, count = make_work(mixed_terms(64), RANKS, 4096, (1024,)), 64, 6
    raw, weight = torch.randn(count, rows, 4096, device="cuda").to(BF16), torch.randn(1024, 4096, device="cuda").to(BF16)
    norm, x = torch.ones(4096, device="cuda").to(BF16), torch.empty(rows, 4096, device="cuda").to(BF16)
    planes = work.ops.skinny_gemm_planes(1024, 4096, rows)
    y, v = torch.empty(planes, rows, 1024, device="cuda"), work.poisoned_v()
    outs = torch.empty(count, rows, 1024, device="cuda")

    def run(follow, beside):
        for i in range(count):
            work.ops.rms_norm(raw[i], norm, 1e-5, x, follow)
            work.ops.skinny_gemm(x, weight, y, follow)
            work.ops.lora_shrink(x, work.tiles, work.span_tuple, v, beside)
            work.ops.materialize(work.product(y, v), outs[i], follow)

    run(Follow.PLAIN, Follow.PLAIN)
    wanted = outs.clone()
    assert bool(wanted.isfinite().all())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(Follow.WAIT_FIRST, Follow.WAIT_LAST)
    for _ in range(30):
        outs.fill_(float("nan"))
        v.fill_(float("nan"))
        graph.replay()
        assert torch.equal(outs, wanted)
