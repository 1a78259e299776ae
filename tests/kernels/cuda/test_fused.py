"""The operations that finish a product, on a GPU against float64: planes, bias, adapters, and what becomes of the sum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from node.kernels import reference
from node.kernels.cuda_ops import Follow, Product

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

RANKS = [1, 8, 16, 24, 64]
BF16, F32 = torch.bfloat16, torch.float32
LIMIT = {BF16: 1e-2, F32: 1e-5}
KINDS = [(BF16, 4, F32), (BF16, 1, F32), (BF16, 1, BF16), (BF16, 4, BF16), (F32, 3, F32)]  # model, planes, type of the product
KIND_IDS = ["planes", "plane", "bf16", "bf16-planes", "f32"]
ROWS = [1, 9, 64, 130, 300]


def terms_of(rows):
    kinds = [(), ((0, 1.0),), ((3, 0.5), (1, -1.25)), ((4, 1.0),), ((1, 1.0),)]
    return [kinds[(row * 7 + row // 5) % len(kinds)] for row in range(rows)]


class Case:
    """A product of random planes, with or without adapters."""

    def __init__(self, make_work, kind, rows, outputs, *, has_adapters, has_bias=True):
        self.model, planes, y_type = kind
        self.rows, self.work = rows, make_work(terms_of(rows), RANKS, 64, outputs, self.model)
        self.y = torch.randn(planes, rows, sum(outputs), device="cuda").to(y_type)
        self.bias = torch.randn(sum(outputs), device="cuda").to(self.model) if has_bias else None
        self.v = None
        if has_adapters:
            self.v = self.work.poisoned_v()
            x = torch.randn(rows, 64, device="cuda").to(self.model)
            self.work.ops.lora_shrink(x, self.work.tiles, self.work.span_tuple, self.v, Follow.PLAIN)
        self.ops = self.work.ops
        self.sum = self.work.product_reference(self.y, self.v, self.bias).cuda()

    @property
    def product(self) -> Product:
        return Product(self.y, self.bias) if self.v is None else self.work.product(self.y, self.v, self.bias)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda").to(self.model)

    def poison(self, *shape: int) -> Tensor:
        return torch.full(shape, float("nan"), device="cuda").to(self.model)


adapters = pytest.mark.parametrize("has_adapters", [False, True], ids=["base", "lora"])
kinds = pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
row_counts = pytest.mark.parametrize("rows", ROWS)


@adapters
@kinds
@row_counts
@pytest.mark.parametrize("outputs", [(96, 96), (1536, 1536), (20, 20)])
def test_silu_mul_equals_float64(make_work, error_of, has_adapters, kind, rows, outputs):
    case = Case(make_work, kind, rows, outputs, has_adapters=has_adapters)
    out = case.poison(rows, outputs[0])
    case.ops.silu_mul(case.product, out, Follow.PLAIN)
    assert error_of(out, reference.silu_mul(case.sum)) < LIMIT[case.model]


@adapters
@kinds
@row_counts
@pytest.mark.parametrize("size", [576, 4096, 200])
def test_add_rms_norm_equals_float64(make_work, error_of, has_adapters, kind, rows, size):
    case = Case(make_work, kind, rows, (size,), has_adapters=has_adapters)
    residual, weight, out = case.random(rows, size), case.random(size), case.poison(rows, size)
    wanted = residual.double() + case.sum
    case.ops.add_rms_norm(case.product, residual, weight, 1e-5, out, Follow.PLAIN)
    assert error_of(residual, wanted) < LIMIT[case.model]
    assert error_of(out, reference.rms_norm(residual.double(), weight.double(), 1e-5)) < LIMIT[case.model]


@pytest.mark.parametrize("size", [64, 1024, 2048, 8192, 16384])
def test_add_rms_norm_of_every_width_equals_float64(make_work, error_of, size):
    case = Case(make_work, KINDS[0], 19, (size,), has_adapters=True, has_bias=False)
    residual, weight, out = case.random(19, size), case.random(size), case.poison(19, size)
    case.ops.add_rms_norm(case.product, residual, weight, 1e-5, out, Follow.PLAIN)
    assert error_of(out, reference.rms_norm(residual.double(), weight.double(), 1e-5)) < 1e-2


@pytest.mark.parametrize("size", [576, 4096])
@pytest.mark.parametrize("rows", [2, 66, 67])  # of a pair of blocks, of one
def test_add_rms_norm_of_long_recipes_equals_float64(make_work, error_of, rows, size):
    """More pages than the ring has stages, and more entries than shared memory holds v of at once, twice."""
    terms = [((4, 0.25),) * 18 if row % 33 == 1 else ((3, 1.0), (4, -0.5), (2, 0.75)) for row in range(rows)]
    work = make_work(terms, RANKS, 64, (size,))
    v, y = work.poisoned_v(), torch.randn(4, rows, size, device="cuda").to(BF16)
    work.ops.lora_shrink(torch.randn(rows, 64, device="cuda").to(BF16), work.tiles, work.span_tuple, v, Follow.PLAIN)
    residual, weight = torch.randn(rows, size, device="cuda").to(BF16), torch.randn(size, device="cuda").to(BF16)
    wanted, out = residual.double() + work.product_reference(y, v).cuda(), torch.full_like(residual, float("nan"))
    work.ops.add_rms_norm(work.product(y, v), residual, weight, 1e-5, out, Follow.PLAIN)
    assert error_of(residual, wanted) < LIMIT[BF16]
    assert error_of(out, reference.rms_norm(residual.double(), weight.double(), 1e-5)) < LIMIT[BF16]


@pytest.mark.parametrize("size", [576, 4096, 8192])
@pytest.mark.parametrize("prompt", [1, 35, 36, 97, 225, 900])  # 66 rows are the last that two blocks share, 67 the first
def test_add_rms_norm_of_a_row_has_the_same_bits_alone_and_beside_a_prompt(make_work, size, prompt):
    terms = [*terms_of(31), *([((4, 0.75),)] * prompt)]
    work = make_work(terms, RANKS, 64, (size,))
    x, y = torch.randn(len(terms), 64, device="cuda").to(BF16), torch.randn(4, len(terms), size, device="cuda").to(BF16)
    start, weight = torch.randn(len(terms), size, device="cuda").to(BF16), torch.randn(size, device="cuda").to(BF16)

    def run(work, chosen):
        v = work.poisoned_v()
        work.ops.lora_shrink(x[chosen].contiguous(), work.tiles, work.span_tuple, v, Follow.PLAIN)
        residual, out = start[chosen].clone(), torch.full_like(start[chosen], float("nan"))
        work.ops.add_rms_norm(work.product(y[:, chosen].contiguous(), v), residual, weight, 1e-5, out, Follow.PLAIN)
        return residual, out

    residual, out = run(work, list(range(len(terms))))
    for row in (0, 2, 3, 30, 31, len(terms) - 1):
        alone = run(make_work([terms[row]], RANKS, 64, (size,), pool=work.pool), [row])
        assert torch.equal(residual[row], alone[0][0])
        assert torch.equal(out[row], alone[1][0])


@adapters
@kinds
@pytest.mark.parametrize("rows", [1, 64, 300])
@pytest.mark.parametrize(("heads", "groups", "size"), [(9, 3, 64), (8, 2, 128), (4, 2, 24), (4, 1, 256)])
@pytest.mark.parametrize("has_norm", [False, True], ids=["", "norm"])
def test_rope_kv_write_equals_float64(make_work, error_of, has_adapters, kind, rows, heads, groups, size, has_norm):
    outputs = (heads * size, groups * size, groups * size)
    case = Case(make_work, kind, rows, outputs, has_adapters=has_adapters)
    block_size, blocks = 16, rows // 16 + 2
    angles = torch.randn(500, size // 2, device="cuda")
    cos, sin = angles.cos(), angles.sin()
    positions = torch.randint(0, 500, (rows,), device="cuda", dtype=torch.int32)
    slots = torch.randperm(blocks * block_size, device="cuda")[:rows].to(torch.int32)
    norms = (case.random(size), case.random(size)) if has_norm else (None, None)
    storage = case.poison(blocks, block_size, 2, groups, size)  # keys and values side by side: strides, not sizes
    keys, values, q = storage[:, :, 0], storage[:, :, 1], case.poison(rows, heads * size)
    case.ops.rope_kv_write(
        case.product, cos, sin, positions, slots, keys, values, q, q_norm=norms[0], k_norm=norms[1], follow=Follow.PLAIN
    )
    wanted = [torch.full((blocks, groups, block_size, size), float("nan"), dtype=torch.float64, device="cuda") for _ in range(2)]
    wide = [None if norm is None else norm.double() for norm in norms]
    tables = (cos.double(), sin.double(), positions.long(), slots.long())
    wanted_q = reference.rope_kv_write(case.sum, *tables, *wanted, *wide, 1e-6)
    assert error_of(q, wanted_q) < LIMIT[case.model]
    for found, expected in zip((keys, values), wanted, strict=True):
        expected = expected.transpose(1, 2)
        assert torch.equal(found.isnan(), expected.isnan())
        assert error_of(found.nan_to_num(), expected.nan_to_num()) < LIMIT[case.model]


def test_rope_kv_write_of_a_padding_row_touches_no_cache(make_work):
    case = Case(make_work, KINDS[0], 3, (128, 64, 64), has_adapters=False)
    keys, values, q = case.poison(1, 16, 1, 64), case.poison(1, 16, 1, 64), case.poison(3, 128)
    tables = torch.ones(4, 32, device="cuda"), torch.zeros(4, 32, device="cuda")
    slots = torch.tensor([5, -1, 7], dtype=torch.int32, device="cuda")
    positions = torch.zeros(3, dtype=torch.int32, device="cuda")
    case.ops.rope_kv_write(case.product, *tables, positions, slots, keys, values, q, follow=Follow.PLAIN)
    assert keys[0, :, 0, 0].isfinite().nonzero().flatten().tolist() == [5, 7]
    assert values[0, :, 0, 0].isfinite().nonzero().flatten().tolist() == [5, 7]


@adapters
@kinds
@row_counts
def test_materialize_equals_float64(make_work, error_of, has_adapters, kind, rows):
    case = Case(make_work, kind, rows, (1024,), has_adapters=has_adapters)
    logits, out = torch.full((rows, 1024), float("nan"), device="cuda"), case.poison(rows, 1024)
    case.ops.materialize(case.product, logits, Follow.PLAIN)
    case.ops.materialize(case.product, out, Follow.PLAIN)
    assert error_of(logits, case.sum) < 1e-4
    assert error_of(out, case.sum) < LIMIT[case.model]


@pytest.mark.parametrize("rows", [1024, 4096])
def test_prefill_of_long_prompts_equals_float64(make_work, error_of, rows):
    case = Case(make_work, KINDS[2], rows, (256, 256), has_adapters=True)
    out = case.poison(rows, 256)
    case.ops.silu_mul(case.product, out, Follow.PLAIN)
    assert error_of(out, reference.silu_mul(case.sum)) < 1e-2
    residual, weight, normed = case.random(rows, 512), case.random(512), case.poison(rows, 512)
    wanted = residual.double() + case.sum
    case.ops.add_rms_norm(case.product, residual, weight, 1e-5, normed, Follow.PLAIN)
    assert error_of(residual, wanted) < 1e-2
    assert error_of(normed, reference.rms_norm(residual.double(), weight.double(), 1e-5)) < 1e-2


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "f32"])
@pytest.mark.parametrize("ids_type", [torch.int32, torch.int64])
def test_embed_rms_norm_equals_float64(make_work, error_of, dtype, ids_type):
    ops = make_work([()], RANKS, 64, (64,)).ops
    ids = torch.tensor([3, 0, 99, -1, 100], dtype=ids_type, device="cuda")
    embedding, weight = torch.randn(100, 576, device="cuda").to(dtype), torch.randn(576, device="cuda").to(dtype)
    residual, out, again = (torch.full((5, 576), float("nan"), device="cuda").to(dtype) for _ in range(3))
    ops.embed_rms_norm(ids, embedding, weight, 1e-5, residual, out)
    assert torch.equal(residual[:3], embedding[ids[:3].long()])
    assert error_of(out[:3], reference.rms_norm(embedding[ids[:3].long()].double(), weight.double(), 1e-5)) < LIMIT[dtype]
    assert bool(residual[3:].isnan().all())
    ops.rms_norm(residual[:3], weight, 1e-5, again[:3], Follow.PLAIN)
    assert torch.equal(again[:3], out[:3])


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "f32"])
@pytest.mark.parametrize("size", [64, 4096, 5000, 12288])
def test_embed_rms_norm_of_named_tokens_equals_that_of_tokens_in_order(make_work, error_of, dtype, size):
    ops = make_work([()], RANKS, 64, (64,)).ops
    memory = torch.randint(100, (5000,), dtype=torch.int32, device="cuda")
    sources = torch.randint(5000, (1500,), dtype=torch.int32, device="cuda")
    sources[7], sources[8] = -1, 5000
    embedding, weight = torch.randn(100, size, device="cuda").to(dtype), torch.randn(size, device="cuda").to(dtype)
    ids = memory[sources.long().clamp(0, 4999)]
    ids[7:9] = -1
    wanted, found = (torch.full((2, 1500, size), float("nan"), device="cuda", dtype=dtype) for _ in range(2))
    ops.embed_rms_norm(ids, embedding, weight, 1e-5, *wanted)
    ops.embed_rms_norm(memory, embedding, weight, 1e-5, *found, sources)
    assert bool(found[:, 7:9].isnan().all())
    seen = [row for row in range(1500) if row not in (7, 8)]
    assert torch.equal(found[:, seen], wanted[:, seen])
    rows = embedding[ids[seen].long()]
    assert torch.equal(found[0, seen], rows)
    assert error_of(found[1, seen], reference.rms_norm(rows.double(), weight.double(), 1e-5)) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "f32"])
@pytest.mark.parametrize("follow", [Follow.PLAIN, Follow.WAIT_FIRST])
@pytest.mark.parametrize("size", [64, 4096, 4104])
def test_take_rows_copies_them(make_work, dtype, follow, size):
    ops = make_work([()], RANKS, 64, (64,)).ops
    x, weight = torch.randn(300, size, device="cuda").to(dtype), torch.ones(size, device="cuda").to(dtype)
    rows = torch.randint(300, (1200,), dtype=torch.int32, device="cuda")
    rows[3], rows[4] = -1, 300
    normed, out = torch.full_like(x, float("nan")), torch.full((1200, size), float("nan"), device="cuda", dtype=dtype)
    ops.rms_norm(x, weight, 1e-5, normed, follow)
    ops.take_rows(normed, rows, out, follow)
    assert bool(out[3:5].isnan().all())
    assert torch.equal(out[5:], normed[rows[5:].long()])


def test_operations_in_a_chain_of_dependent_launches_keep_their_bits(make_work):
    """The same kernels, plain and overlapped, in a graph replayed many times."""
    case = Case(make_work, KINDS[0], 64, (1536, 1536), has_adapters=True, has_bias=False)
    x = case.random(64, 64)
    weight = case.random(1536)
    residual, act, out = case.random(64, 1536), case.poison(64, 1536), case.poison(64, 1536)
    start = residual.clone()

    def run(follow: Follow) -> None:
        residual.copy_(start)
        for _ in range(4):
            case.ops.lora_shrink(x, case.work.tiles, case.work.span_tuple, case.v, follow)
            case.ops.silu_mul(case.product, act, follow)
            case.ops.add_rms_norm(Product(act.unsqueeze(0)), residual, weight, 1e-5, out, follow)

    run(Follow.PLAIN)
    wanted = out.clone(), residual.clone()
    run(Follow.WAIT_FIRST)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(Follow.WAIT_FIRST)
    for _ in range(20):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, wanted[0])
        assert torch.equal(residual, wanted[1])
